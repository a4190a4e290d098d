"""Training cells: models of real shapes and vocabularies with random weights, rows of published lengths, side by side.

A step's time is the median over the steps behind the first two, with the device finished at each step's end.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from benchmarks.gpu_checks import Result, device_of, peak_memory, wait

#: Median tokens of prompt and completion: HH-RLHF and UltraFeedback under a tokenizer of 128k entries.
LENGTHS = {"ultrafeedback": (121, 288), "hh": (127, 59)}
MAX_LENGTH = 2048
TINY = {"vocab": 2000, "hidden": 64, "intermediate": 128, "layers": 2, "heads": 4, "kv_heads": 2, "tied": True}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **{"vocab": 128_256, "hidden": 2048, "intermediate": 8192, "layers": 16, "heads": 32, "kv_heads": 8},
        "tied": True,
    },
    "qwen2.5-1.5b": {
        **{"vocab": 151_936, "hidden": 1536, "intermediate": 8960, "layers": 28, "heads": 12, "kv_heads": 2},
        "tied": True,
    },
    "llama-3.1-8b": {
        **{"vocab": 128_256, "hidden": 4096, "intermediate": 14_336, "layers": 32, "heads": 32, "kv_heads": 8},
        "tied": False,
    },
}
#: Library and settings. TRL at its best: nothing recomputed, reference known. Unshared: our rows, prompts twice.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "preftune": ("preftune", {}),
    "preftune, prompts not shared": ("preftune", {}),
    "TRL at its best": ("trl", {"gradient_checkpointing": False, "precompute_ref_log_probs": True}),
    "TRL as shipped": ("trl", {}),
}


def make_model(shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama of this shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=8192,
        tie_word_embeddings=shape["tied"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def make_tokenizer(vocab: int) -> Any:
    """A tokenizer whose words are numbers: no text has to be at hand, and lengths are exact."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(vocab)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


def make_rows(number: int, vocab: int, lengths: tuple[int, int], seed: int = 7) -> Any:
    """Pairs with log-normal lengths around these medians."""
    from datasets import Dataset

    draw = np.random.default_rng(seed)

    def text(median: int, sigma: float) -> str:
        length = int(np.clip(draw.lognormal(np.log(median), sigma), 4, 900))
        return " ".join(f"w{n}" for n in draw.integers(4, vocab, length))

    prompt, completion = lengths
    rows = [
        {"prompt": text(prompt, 0.6), "chosen": " " + text(completion, 0.5), "rejected": " " + text(completion, 0.5)}
        for _ in range(number)
    ]
    return Dataset.from_list(rows)


def step_operations(rows: Any, shape: dict[str, Any], lora: bool) -> float:
    """Operations that training these pairs cannot do without, the reference known: prompts once, completions scored."""
    hidden, layers = shape["hidden"], shape["layers"]
    kv_size = hidden // shape["heads"] * shape["kv_heads"]
    body = 2 * layers * (2 * hidden * hidden + 2 * hidden * kv_size + 3 * hidden * shape["intermediate"])
    products = attention = 0.0
    for row in rows:
        prompt, *completions = (len(row[name].split()) for name in ("prompt", "chosen", "rejected"))
        products += body * (prompt + sum(completions)) + 2 * hidden * shape["vocab"] * sum(completions)
        contexts = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in completions)
        attention += 4 * hidden * layers * contexts
    # Backward: twice the forward, or once where weights are frozen.
    return (2 if lora else 3) * products + 3 * attention


def train(
    name: str, shape: dict[str, Any], lora: bool, lengths: tuple[int, int], batch: int, steps: int, dry: bool
) -> Result:
    """One contender on one kind of rows."""
    from peft import LoraConfig
    from transformers import TrainerCallback

    library_name, options = CONTENDERS[name]
    try:
        library: Any = importlib.import_module(library_name)
        config_class, trainer_class = library.DPOConfig, library.DPOTrainer
    except (ImportError, RuntimeError) as missing:
        return {"error": f"not installed ({' '.join(str(missing).split())[:120]})"}
    device = device_of(dry)
    result: dict[str, Any] = {}
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(device)
            ends.append(time.perf_counter())

    rows = make_rows(batch * steps, shape["vocab"], lengths)
    with tempfile.TemporaryDirectory() as folder, peak_memory(device, result):
        model = make_model(shape, device, torch.bfloat16 if lora and not dry else torch.float32)
        start = time.perf_counter()
        arguments = config_class(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=steps,
            max_length=MAX_LENGTH,
            bf16=True,
            use_cpu=dry,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=2,
            learning_rate=1e-6,
            **options,
        )
        # TRL would load the reference by name, and these weights have none.
        known = lora or options.get("precompute_ref_log_probs")
        more = {"ref_model": deepcopy(model)} if library_name == "trl" and not known else {}
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=rows,
            processing_class=make_tokenizer(shape["vocab"]),
            peft_config=adapter if lora else None,
            callbacks=[Clock()],
            **more,
        )
        if "not shared" in name:
            trainer.task.trees = _unshared
        built = time.perf_counter()
        trainer.train()
        wait(device)
    result |= {
        "build_s": round(built - start, 1),
        "until_first_step_s": round(ends[0] - built, 1),
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line][:4],
    }
    took = [after - before for before, after in itertools.pairwise(ends[1:])]
    if took:
        result["step_s"] = round(statistics.median(took), 4)
        result["pairs_per_second"] = round(batch / result["step_s"], 2)
        result["operations_per_second"] = step_operations(rows, shape, lora) / steps / result["step_s"]
    if library_name == "preftune":
        result |= {"path": trainer.verdict.reason, "packed": trainer.verdict.ok}
        result |= {"backends": sorted(trainer.step.forward.backends_used), "row_tokens": trainer.max_tokens_per_row}
    trainer.model = None
    del trainer, model, more
    gc.collect()
    if not dry:
        torch.cuda.empty_cache()
    return result


def _unshared(example: Any, number: int) -> Any:
    from preftune.packing import Branch, Tree

    prompt = example["prompt_ids"]
    slots = (2 * number, 2 * number + 1)
    return tuple(
        Tree(prompt, (Branch(example[name], slot),))
        for name, slot in zip(("chosen_ids", "rejected_ids"), slots, strict=True)
    )


def check_training(
    result: Result, shape_name: str, lora: bool, dry: bool, left: Callable[[], float], flush: Callable[[], None]
) -> None:
    """All contenders, the rows where this project is expected to be slowest first; the result is kept cell by cell."""
    shape = TINY if dry else SHAPES[shape_name]
    batch, steps = (4, 3) if dry else (16, 5) if lora else (32, 6)
    kinds = {"hh": LENGTHS["hh"]} if dry else LENGTHS
    for kind, lengths in kinds.items():
        for name in CONTENDERS:
            if left() < (0 if dry else 35):
                result[f"{kind}: {name}"] = {"error": "left out for want of time"}
                continue
            try:
                cell = train(name, shape, lora, lengths, batch, steps, dry)
            except Exception as failure:
                cell = {"error": f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"}
                gc.collect()
            result[f"{kind}: {name}"] = cell
            flush()


def check_start(result: Result, dry: bool, left: Callable[[], float]) -> None:
    """What the start-up probe decides about a small model, with and without autocast and TF32."""
    for half in (False, True):
        for fast in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = fast
            name = f"{'bf16' if half else 'fp32'}{', TF32' if fast else ''}"
            start = time.perf_counter()
            try:
                verdict = _small_trainer(half, dry)[0].verdict
                result[name] = {"packed": verdict.ok, "reason": verdict.reason}
                result[name]["build_s"] = round(time.perf_counter() - start, 1)
            except Exception as failure:
                result[name] = {"error": f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"}
    torch.backends.cuda.matmul.allow_tf32 = False


def check_waits(result: Result, dry: bool, left: Callable[[], float]) -> None:
    """Places in training that wait for the device, as torch reports them, without building and the reference pass."""
    if dry:
        result["sites"] = "no accelerator: see the emulated runs in tests/gpu"
        return
    trainer, folder = _small_trainer(True, dry)
    trainer.prepare_reference()
    with warnings.catch_warnings(record=True) as seen, folder:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = [w for w in seen if "synchroniz" in str(w.message)]
    sites = Counter("/".join(w.filename.split("/")[-2:]) + f":{w.lineno}" for w in told)
    result["sites"] = dict(sites.most_common(25))
    result["steps"] = trainer.state.global_step


def _small_trainer(half: bool, dry: bool) -> tuple[Any, Any]:
    import preftune

    shape = TINY if dry else {**TINY, "hidden": 256, "intermediate": 512, "layers": 4, "vocab": 8000}
    folder: Any = tempfile.TemporaryDirectory()
    arguments = preftune.DPOConfig(
        output_dir=folder.name,
        per_device_train_batch_size=8,
        max_steps=4,
        bf16=half,
        use_cpu=dry,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=4,
    )
    trainer = preftune.DPOTrainer(
        model=make_model(shape, device_of(dry), torch.float32),
        args=arguments,
        train_dataset=make_rows(32, shape["vocab"], LENGTHS["hh"]),
        processing_class=make_tokenizer(shape["vocab"]),
    )
    return trainer, folder
