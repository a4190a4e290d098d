"""Every method and option that TRL has too, trained by both libraries: one table, measured for tests and document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.models.tiny import save_tiny_model, train_tokenizer

#: What loss, rewards, gradients and weights may differ by, relative to their size.
TOLERANCE = 5e-4
#: Rewards are beta times differences of log-probs of this size in relation to them; TRL adds these up in fp32.
REWARD_FLOOR = 4e-3


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: What is compared, in words.
        verb: Trainer: ``dpo``, ``kto``, ``orpo`` or ``cpo``.
        options: Settings that both libraries get.
        reference: Give an explicit reference model, smaller than the policy.
        lora: Train an adapter.
        leave_out: Logged figures that TRL does not mean in the same way.
    """

    name: str
    verb: str
    options: dict[str, Any] = field(default_factory=dict)
    reference: bool = False
    lora: bool = False
    leave_out: tuple[str, ...] = ()


def _losses() -> list[Case]:
    settings: dict[str, dict[str, Any]] = {
        "sigmoid": {},
        "hinge": {"beta": 0.05},
        "ipo": {"beta": 0.01},
        "exo_pair": {"label_smoothing": 1e-3},
        "nca_pair": {"beta": 0.01},
        "robust": {"label_smoothing": 0.1},
        "bco_pair": {"beta": 0.01},
        "sppo_hard": {"beta": 0.001},
        "aot": {"beta": 0.01},
        "aot_unpaired": {"beta": 0.01},
        "apo_zero": {},
        # At the default beta its rewards move too little in three steps to be a test.
        "apo_down": {"beta": 0.5},
        "discopop": {"beta": 0.05},
        "sft": {},
        "sigmoid_norm": {"beta": 5.0},
    }
    cases = [Case(name, "dpo", {"loss_type": [name], **options}) for name, options in settings.items()]
    for name in ("exo_pair", "aot", "aot_unpaired"):
        options = {"loss_type": [name], "label_smoothing": 0.2, "beta": 0.3}
        cases.append(Case(f"{name}, label_smoothing 0.2", "dpo", options))
    return cases


def _divergences() -> list[Case]:
    kinds: dict[str, dict[str, Any]] = {
        "forward_kl": {},
        "js_divergence": {},
        "alpha_divergence": {"f_alpha_divergence_coef": 0.5},
        "alpha_divergence, alpha 1": {"f_alpha_divergence_coef": 1.0},
        "alpha_divergence, alpha 2": {"f_alpha_divergence_coef": 2.0},
    }
    cases = [
        Case(f"sigmoid, {name}", "dpo", {"f_divergence_type": name.partition(",")[0], **options})
        for name, options in kinds.items()
    ]
    for loss, options in {
        "sigmoid_norm": {"beta": 5.0},
        "hinge": {},
        "ipo": {"beta": 0.01},
        "exo_pair": {"label_smoothing": 1e-3},
        "robust": {"label_smoothing": 0.1},
        # At the published beta of .05 its rewards move too little in three steps to be a test.
        "discopop": {"beta": 0.2},
    }.items():
        given = {"loss_type": [loss], "f_divergence_type": "js_divergence", **options}
        cases.append(Case(f"{loss}, js_divergence", "dpo", given))
    return cases


def _modifiers() -> list[Case]:
    mpo = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 2}
    return [
        Case("LD-DPO, alpha 0.5", "dpo", {"ld_alpha": 0.5}),
        Case("LD-DPO, alpha 0", "dpo", {"ld_alpha": 0.0, "loss_type": ["apo_zero"]}),
        Case("WPO", "dpo", {"use_weighting": True}),
        Case("WPO, ipo", "dpo", {"use_weighting": True, "loss_type": ["ipo"], "beta": 0.01}),
        Case("MPO: 0.8 sigmoid + 0.2 bco_pair + 1.0 sft", "dpo", mpo),
        Case("RPO: sigmoid + 0.2 sft", "dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}),
        Case("TR-DPO, soft", "dpo", {**sync, "ref_model_mixup_alpha": 0.6}),
        Case("TR-DPO, hard", "dpo", {**sync, "ref_model_mixup_alpha": 1.0}),
        Case("precomputed reference", "dpo", {"precompute_ref_log_probs": True}),
        Case("explicit reference", "dpo", {}, reference=True),
        Case("explicit reference, precomputed", "dpo", {"precompute_ref_log_probs": True}, reference=True),
        Case("LoRA", "dpo", {}, lora=True),
        Case("LoRA, explicit reference", "dpo", {}, reference=True, lora=True),
        Case("keep_end, max_length 48", "dpo", {"truncation_mode": "keep_end", "max_length": 48}),
    ]


def _others() -> list[Case]:
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.7}
    unused = ("nll_loss",)
    return [
        Case("KTO", "kto", {}),
        Case("KTO, weights 1.2 and 0.7", "kto", {**weights, "beta": 0.3}),
        Case("KTO, precomputed reference", "kto", {"precompute_ref_log_probs": True}),
        Case("KTO, reference that follows", "kto", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
        Case("KTO, LoRA", "kto", {}, lora=True),
        Case("apo_zero_unpaired", "kto", {"loss_type": "apo_zero_unpaired"}, leave_out=("kl",)),
        Case("ORPO", "orpo", {}),
        Case("ORPO, beta 0.25", "orpo", {"beta": 0.25}),
        Case("CPO", "cpo", {}),
        Case("CPO, label_smoothing 0.1", "cpo", {"label_smoothing": 0.1}),
        Case("CPO, hinge", "cpo", {"loss_type": "hinge", "beta": 0.05}),
        Case("CPO, ipo", "cpo", {"loss_type": "ipo"}),
        Case("SimPO", "cpo", {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.0}, leave_out=unused),
        Case("CPO-SimPO", "cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.5}),
        Case("AlphaPO", "cpo", {"loss_type": "alphapo", "beta": 2.0, "alpha": 0.25}, leave_out=unused),
    ]


CASES = [*_losses(), *_divergences(), *_modifiers(), *_others()]


class Ground:
    """A tiny policy, a tinier reference with the same vocabulary, and rows of real preference data."""

    def __init__(self, folder: Path, rows: list[dict[str, str]]) -> None:
        # Short rows: TRL pads them and scores every position.
        rows = [row for row in rows if sum(map(len, row.values())) < 420][:60]
        self.pairs = Dataset.from_list(rows)
        answers = [
            {"prompt": row["prompt"], "completion": row["chosen" if n % 2 else "rejected"], "label": bool(n % 2)}
            for n, row in enumerate(rows)
        ]
        self.answers = Dataset.from_list(answers)
        self.tokenizer = train_tokenizer([text for row in rows for text in row.values()], 500)
        # Larger weights than usual, so that completions are not all alike to an untrained model.
        self.policy = save_tiny_model(folder / "policy", self.tokenizer, initializer_range=0.3)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        self.reference = save_tiny_model(folder / "reference", self.tokenizer, initializer_range=0.3, **sizes)


class _Gradients(TrainerCallback):
    """Keeps the gradient of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = kwargs["model"].named_parameters()
        self.steps.append({name: p.grad.detach().clone() for name, p in parameters if p.grad is not None})


@dataclass
class Run:
    """What a run of three steps left: log lines, gradients, weights."""

    lines: list[dict[str, float]]
    gradients: list[dict[str, torch.Tensor]]
    weights: dict[str, torch.Tensor]


def classes(verb: str, library: str) -> tuple[Any, Any]:
    """Trainer and settings class."""
    import importlib

    name = verb.upper()
    home = "preftune" if library == "preftune" else f"trl.experimental.{verb}" if verb in ("orpo", "cpo") else "trl"
    module = importlib.import_module(home)
    return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")


def train(case: Case, library: str, ground: Ground, out: Path, **more: Any) -> Run:
    """Train three steps of four examples with one of the libraries, in fp32."""
    trainer_class, config_class = classes(case.verb, library)
    defaults: dict[str, Any] = {
        "output_dir": str(out / library),
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_length": 256,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 7,
    }
    gradients = _Gradients()
    keywords: dict[str, Any] = {"peft_config": _lora()} if case.lora else {}
    if case.reference:
        keywords["ref_model"] = AutoModelForCausalLM.from_pretrained(ground.reference)
    trainer = trainer_class(
        model=ground.policy,
        args=config_class(**{**defaults, **case.options, **more}),
        train_dataset=ground.answers if case.verb == "kto" else ground.pairs,
        processing_class=ground.tokenizer,
        callbacks=[gradients],
        **keywords,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return Run(lines, gradients.steps, weights)


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"])


@dataclass(frozen=True)
class Differences:
    """Largest relative differences of one case over all of its steps.

    Attributes:
        loss: Of the loss.
        rewards: Of chosen and rejected rewards and their margin.
        logps: Of the log-probs, and of whatever else is logged about them.
        gradient: Of the gradient as a vector.
        weights: Of the trained weights, tensor by tensor, after the last step.
        moved: How far rewards came, so that a comparison of zeros is noticed; for methods without a reference, how far
            they lie from zero.
    """

    loss: float
    rewards: float
    logps: float
    gradient: float
    weights: float
    moved: float

    @property
    def worst(self) -> float:
        """The largest of them."""
        return max(self.loss, self.rewards, self.logps, self.gradient, self.weights)


_LOGPS = ("logps/chosen", "logps/rejected", "kl", "nll_loss", "log_odds_ratio", "log_odds_chosen", "grad_norm")
_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")


def differences(case: Case, ours: Run, theirs: Run) -> Differences:
    """Compare two runs of a case, figure by figure."""
    beta = case.options.get("beta", 0.1)
    assert len(ours.lines) == len(theirs.lines) == len(ours.gradients) == len(theirs.gradients) == 3

    def over_steps(names: tuple[str, ...], floor: Callable[[dict[str, float]], float]) -> float:
        found = [0.0]
        for mine, other in zip(ours.lines, theirs.lines, strict=True):
            for name in set(names) - set(case.leave_out):
                # TRL leaves a figure out where no example of a kind is in the batch.
                assert (name in mine) == (name in other), (case.name, name)
                if name in other:
                    found.append(abs(mine[name] - other[name]) / max(abs(other[name]), floor(other)))
        return max(found)

    def size(line: dict[str, float]) -> float:
        return abs(line.get("logps/chosen", 0.0)) + abs(line.get("logps/rejected", 0.0))

    return Differences(
        loss=over_steps(("loss",), lambda line: 1e-6),
        rewards=over_steps(_REWARDS, lambda line: REWARD_FLOOR * beta * size(line)),
        logps=over_steps(_LOGPS, lambda line: REWARD_FLOOR * size(line)),
        gradient=max(_distance(a, b) for a, b in zip(ours.gradients, theirs.gradients, strict=True)),
        weights=max(_distance({name: ours.weights[name]}, {name: value}) for name, value in theirs.weights.items()),
        moved=max(abs(line.get("rewards/margins", 0.0)) for line in theirs.lines) / beta,
    )


def _distance(mine: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    assert set(mine) == set(others)
    apart = sum(float((mine[name].double() - other.double()).square().sum()) for name, other in others.items())
    size = sum(float(other.double().square().sum()) for other in others.values())
    return float((apart / max(size, 1e-24)) ** 0.5)


def measure(case: Case, ground: Ground, out: Path) -> Differences:
    """Train with both libraries and compare."""
    theirs = train(case, "trl", ground, out)
    return differences(case, train(case, "preftune", ground, out), theirs)
