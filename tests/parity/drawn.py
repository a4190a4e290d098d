"""Runs drawn at random, by TRL and by preftune: architectures, trainers, data forms and settings in any combination.

What the two mean differently on purpose (docs/migration.md) is not drawn, or not compared; every such place says so.
"""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.models.tiny import SIZES, train_tokenizer
from tests.parity.worlds import DEFAULTS, pair_rows

#: Relative difference of a figure.
TOLERANCE = 5e-4
#: Rewards and margins are beta times differences of log-probs of the whole run's rounding.
REWARD_FLOOR = 2e-5
#: Beside them there are figures per token, which the two average differently.
FIGURES: tuple[str, ...] = ("loss", "grad_norm", "learning_rate", "epoch", "step", "num_tokens", "train_loss")
FIGURES += ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
MODELS: dict[str, dict[str, Any]] = {
    **{f"{name}Config": {} for name in ("Llama", "Qwen2", "GPT2", "Mistral", "Phi3", "Olmo2", "StableLm", "GPTNeoX")},
    **{f"{name}Config": {} for name in ("Granite", "Cohere", "SmolLM3", "Phi", "Olmo", "Starcoder2", "Exaone4")},
    **{f"{name}Config": {} for name in ("Nemotron", "Bloom", "Mamba", "Falcon")},
    **{f"{name}Config": {"head_dim": 8} for name in ("Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Helium", "Glm4")},
    "Ernie4_5Config": {"head_dim": 8},
    "OPTConfig": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "MixtralConfig": {"num_local_experts": 4},
    "Qwen3MoeConfig": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
#: Those that know no sizes by the usual names take these alone.
_FEW = ("hidden_size", "num_hidden_layers", "num_attention_heads", "pad_token_id", "bos_token_id", "eos_token_id")
_OLD = ("BloomConfig", "FalconConfig", "MambaConfig")
_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}the {{ m['content'] }} : {% elif m['role'] == 'system' %}"
    "plot {{ m['content'] }} {% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
_LOSSES: tuple[str, ...] = (
    "sigmoid",
    "hinge",
    "ipo",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
)
_LOSSES += ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "exo_pair")
#: Divisible by every number of examples of a step that is drawn: TRL weighs the examples of a smaller one differently.
NUM_ROWS = 12


@dataclass(frozen=True)
class Drawn:
    """One run.

    Attributes:
        seed: It was drawn with.
        model: Configuration class.
        verb: Trainer, without the word.
        form: How rows are written.
        lora: Train an adapter.
        reference: Give the reference model explicitly.
        options: Settings that both libraries get.
    """

    seed: int
    model: str
    verb: str
    form: str
    lora: bool = False
    reference: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def draw(seed: int) -> Drawn:
    """The run of a seed."""
    d = random.Random(seed)
    verb = d.choice(("DPO", "DPO", "DPO", "SFT", "KTO", "ORPO", "CPO"))
    form = d.choice(("explicit", "implicit", "chat", "implicit chat", "turns"))
    lora = d.random() < 0.25
    options = _common(d)
    {"DPO": _dpo, "KTO": _kto, "SFT": _sft, "ORPO": _orpo, "CPO": _cpo}[verb](d, options)
    if form == "turns" and options["max_length"] == 24:
        # The prompt alone would fill it: rows that only TRL trains on.
        options["max_length"] = 40
    if lora:
        # The trainers' own settings of it differ: ours mixes the adapter, TRL refuses.
        options.pop("sync_ref_model", None)
    reference = verb == "DPO" and not lora and "sync_ref_model" not in options and d.random() < 0.2
    architecture = d.choice(sorted(MODELS))
    # PEFT refuses an adapter on all linear layers of Mamba.
    return Drawn(seed, architecture, verb, form, lora and architecture != "MambaConfig", reference, options)


def _common(d: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "per_device_train_batch_size": d.choice((1, 2, 3, 4)),
        # One batch: a figure weighs every example alike, where TRL takes the mean of batch means.
        "per_device_eval_batch_size": 32,
        "max_length": d.choice((128, 128, 24, None)),
        "learning_rate": d.choice((1e-4, 3e-4)),
        "lr_scheduler_type": d.choice(("linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt")),
        "warmup_steps": d.choice((0, 2)),
        "weight_decay": d.choice((0, 0.1)),
        "max_grad_norm": d.choice((1.0, 0.1, 0.0)),
        "optim": d.choice(("adamw_torch", "sgd", "adafactor", "rmsprop")),
        "gradient_checkpointing": d.random() < 0.3,
        "seed": d.randrange(100),
        "eval_strategy": d.choice(("no", "epoch")),
    }
    options |= d.choice(({"max_steps": 3}, {"max_steps": 5}, {"max_steps": -1, "num_train_epochs": 1.5}))
    if options["eval_strategy"] == "epoch" and d.random() < 0.3:
        options["eval_on_start"] = True
    return options


def _accumulate(d: random.Random, options: dict[str, Any]) -> None:
    fitting = [n for n in (1, 2, 3) if NUM_ROWS % (n * options["per_device_train_batch_size"]) == 0]
    options["gradient_accumulation_steps"] = d.choice(fitting)
    # The mean over log lines is that of steps; TRL's is that of micro-batches.
    options["logging_steps"] = d.choice((1, 1, 2))


def _dpo(d: random.Random, options: dict[str, Any]) -> None:
    names = d.sample(_LOSSES, 1 if d.random() < 0.7 else 2)
    # TRL smooths labels with exo_pair and not with its neighbour; ours with both.
    names = ["exo_pair"] if "exo_pair" in names else names
    options |= {"loss_type": names, "beta": d.choice((0.05, 0.1, 0.5))}
    options["truncation_mode"] = d.choice(("keep_start", "keep_start", "keep_end"))
    if len(names) > 1 and d.random() < 0.5:
        options["loss_weights"] = [d.choice((0.3, 1.0)), d.choice((0.5, 2.0))]
    if set(names) <= {"exo_pair", "robust"}:
        options["label_smoothing"] = d.choice((0.1, 0.2))
    if set(names) <= {"sigmoid", "hinge"} and d.random() < 0.4:
        options["f_divergence_type"] = d.choice(("forward_kl", "js_divergence", "alpha_divergence"))
    if "sft" not in names and d.random() < 0.2:
        options["ld_alpha"] = d.choice((0.2, 0.7))
    if d.random() < 0.2:
        options["use_weighting"] = True
    if d.random() < 0.3:
        options["precompute_ref_log_probs"] = True
    elif d.random() < 0.3:
        options |= {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    if "sft" in names or any(name.startswith("aot") for name in names):
        # They join what TRL takes batch by batch, and so does the load-balancing loss.
        options["router_aux_loss_coef"] = 0.0
    else:
        _accumulate(d, options)


def _kto(d: random.Random, options: dict[str, Any]) -> None:
    # Its baseline is that of a step, TRL's that of a micro-batch.
    options["per_device_train_batch_size"] = max(2, options["per_device_train_batch_size"])
    options |= {"loss_type": d.choice(("kto", "apo_zero_unpaired")), "beta": d.choice((0.05, 0.1, 0.5))}


def _sft(d: random.Random, options: dict[str, Any]) -> None:
    options["loss_type"] = d.choice(("nll", "nll", "dft"))
    _accumulate(d, options)


def _orpo(d: random.Random, options: dict[str, Any]) -> None:
    options["beta"] = d.choice((0.05, 0.1, 0.5))


def _cpo(d: random.Random, options: dict[str, Any]) -> None:
    options |= {"beta": d.choice((0.05, 0.1, 0.5)), "loss_type": d.choice(("sigmoid", "hinge", "ipo", "simpo"))}
    options["cpo_alpha"] = d.choice((0.0, 0.5, 1.0))
    if options["loss_type"] == "sigmoid" and d.random() < 0.4:
        options["label_smoothing"] = 0.1


# ---- data and model -------------------------------------------------------------------------------------------------


def rows_of(run: Drawn, number: int, seed: int) -> list[dict[str, Any]]:
    """Rows in the run's form."""
    return [_written(run, n, row) for n, row in enumerate(pair_rows(number, seed))]


def _written(run: Drawn, number: int, row: dict[str, str]) -> dict[str, Any]:
    prompt: Any = row["prompt"]
    answers: dict[str, Any] = {name: row[name] for name in ("chosen", "rejected")}
    if run.form not in ("explicit", "implicit"):
        prompt = [{"role": "user", "content": row["prompt"]}]
        if run.form == "turns":
            before = [("system", "was nice"), ("user", "end or"), ("assistant", "good")]
            prompt = [*({"role": role, "content": text} for role, text in before), *prompt]
        answers = {name: [{"role": "assistant", "content": text.strip()}] for name, text in answers.items()}
    if run.verb == "KTO" and not run.form.startswith("implicit"):
        wanted = number % 3 != 0
        return {"prompt": prompt, "completion": answers["chosen" if wanted else "rejected"], "label": wanted}
    if run.form.startswith("implicit"):
        whole = {name: prompt + answer for name, answer in answers.items()}
        return {"messages" if "chat" in run.form else "text": whole["chosen"]} if run.verb == "SFT" else whole
    return {"prompt": prompt, "completion": answers["chosen"]} if run.verb == "SFT" else {"prompt": prompt, **answers}


def tokenizer_of(run: Drawn) -> Any:
    """A tokenizer for the rows, with a template where they are conversations."""
    tokenizer = train_tokenizer([text for row in pair_rows(60) for text in row.values()], 400)
    if run.form not in ("explicit", "implicit"):
        tokenizer.chat_template = _TEMPLATE
    return tokenizer


def save_model(run: Drawn, folder: Path, tokenizer: Any) -> None:
    """A random model without dropout: the two draw it differently."""
    kind = getattr(transformers, run.model)
    known = vars(kind())
    sizes = {name: SIZES[name] for name in _FEW} if run.model in _OLD else SIZES
    dropouts = {name: 0.0 for name, value in known.items() if "drop" in name and isinstance(value, float)}
    torch.manual_seed(0)
    config = kind(vocab_size=len(tokenizer), initializer_range=0.2, **{**sizes, **dropouts, **MODELS[run.model]})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- running and comparing ------------------------------------------------------------------------------------------


def train(library: str, run: Drawn, folder: Path) -> list[dict[str, float]]:
    """The log of a run by ``trl`` or ``preftune``; the model lies in ``folder / "model"``."""
    experimental = library == "trl" and run.verb in ("ORPO", "CPO")
    module = importlib.import_module(f"trl.experimental.{run.verb.lower()}" if experimental else library)
    path = str(folder / "model")
    more: dict[str, Any] = {}
    if run.lora:
        more["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if run.reference:
        more["ref_model"] = AutoModelForCausalLM.from_pretrained(path)
    # An adapter is drawn.
    torch.manual_seed(5)
    trainer = getattr(module, f"{run.verb}Trainer")(
        model=path,
        args=getattr(module, f"{run.verb}Config")(output_dir=str(folder / library), **{**DEFAULTS, **run.options}),
        train_dataset=Dataset.from_list(rows_of(run, NUM_ROWS, run.seed)),
        eval_dataset=Dataset.from_list(rows_of(run, 5, run.seed + 1)),
        processing_class=tokenizer_of(run),
        **more,
    )
    trainer.train()
    log: list[dict[str, float]] = trainer.state.log_history
    return log


def differences(run: Drawn, ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> Iterator[str]:
    """What differs, in words."""
    if len(ours) != len(theirs):
        yield f"{len(ours)} lines instead of {len(theirs)}"
    for mine, other in zip(ours, theirs, strict=False):
        size = sum(abs(value) for name, value in other.items() if "logps/" in name)
        for name, value in other.items():
            plain = name.removeprefix("eval_")
            if plain not in FIGURES or (plain == "num_tokens" and run.verb in ("ORPO", "CPO")):
                continue
            floor = REWARD_FLOOR * size * run.options.get("beta", 1.0) if "rewards" in name else 1e-6
            found = mine.get(name, math.nan)
            both_nan = name in mine and math.isnan(found) and math.isnan(value)
            if not both_nan and not math.isclose(found, value, rel_tol=TOLERANCE, abs_tol=floor):
                yield f"{name} of step {other.get('step')}: {found:.6g} instead of {value:.6g}"
