"""Runs of one or of several processes that have to end with the same weights; also started by a launcher."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import preftune
from preftune.errors import ConfigError
from preftune.references.parts import is_divided
from preftune.training import streams
from tests.parity import worlds
from tests.training.uneven import different

#: How many processes train together in the tests; `make distributed` says four.
PROCESSES = int(os.environ.get("PREFTUNE_PROCESSES", "2"))

#: ``{name: (kind, rows, settings)}``, with ``lora`` and ``given`` (a reference model) among the settings.
Case = tuple[str, int, dict[str, Any]]

_STORED: dict[str, Any] = {"num_train_epochs": 2}
_LIVE: dict[str, Any] = {**_STORED, "reference_store": False}
_SYNC: dict[str, Any] = {**_STORED, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
EVEN: dict[str, Case] = {
    "stored": ("DPO", 24, _STORED),
    "live": ("DPO", 24, _LIVE),
    "lora-live": ("DPO", 24, {**_LIVE, "lora": True}),
    "lora-stored": ("DPO", 24, {**_STORED, "lora": True}),
    "synced": ("DPO", 24, _SYNC),
    "given": ("DPO", 24, {**_LIVE, "given": True}),
    "given-synced": ("DPO", 24, {**_SYNC, "given": True}),
    "short-rows": ("DPO", 24, {**_LIVE, "max_tokens_per_row": 40}),
    "kto": ("KTO", 24, _LIVE),
    "orpo": ("ORPO", 24, _STORED),
    "sft": ("SFT", 24, _STORED),
}
#: What a sharded model may have beside.
SHARDED: dict[str, Case] = {
    "tied": ("DPO", 37, {**_LIVE, "tied": True}),
    "checkpointing": ("DPO", 37, {**_LIVE, "gradient_checkpointing": True, "checkpoint_policy": "always"}),
    "recomputing": (
        "DPO",
        37,
        {**_LIVE, "gradient_checkpointing": False, "fsdp_config": {"activation_checkpointing": True}},
    ),
    "sharded-state": (
        "DPO",
        24,
        {**_LIVE, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True}},
    ),
    # Nothing below the head has a gradient.
    "head-alone": ("DPO", 24, {**_LIVE, "lora": ["lm_head"], "gradient_checkpointing": False}),
}
_SAMPLED: dict[str, Any] = {"generation_steps": 4, "num_generations": 5, "generation_max_new_tokens": 12}
#: Five prompts for two processes; of the long texts some end early, so that processes have different numbers of tokens.
SAMPLED: dict[str, Case] = {
    "sampled": ("DPO", 24, {**_STORED, **_SAMPLED, "generation_max_new_tokens": 60}),
    "sampled-given": ("DPO", 24, {**_LIVE, **_SAMPLED, "given": True}),
    "sampled-synced": ("DPO", 24, {**_SYNC, **_SAMPLED, "lora": True}),
    "sampled-orpo": ("ORPO", 24, {**_STORED, **_SAMPLED}),
}
_MIXED: dict[str, Any] = {"bf16": True}
_HALF: dict[str, Any] = {"model_init_kwargs": {"dtype": "bfloat16"}}
#: Runs in half precision, several rows a step.
HALF: dict[str, Case] = {
    "mixed": ("DPO", 37, {**_LIVE, **_MIXED, "max_tokens_per_row": 40}),
    "mixed-stored": ("DPO", 37, {**_STORED, **_MIXED}),
    "mixed-lora": ("DPO", 37, {**_STORED, **_MIXED, "lora": True}),
    "half": ("DPO", 37, {**_LIVE, **_HALF}),
    "half-lora": ("DPO", 37, {**_LIVE, **_HALF, **_MIXED, "lora": True}),
}
#: Adapters of 4-bit weights, which every process keeps whole, or which lie in shards.
QUANTISED: dict[str, Case] = {
    "whole": ("DPO", 24, {**_LIVE, "lora": True, "quantised": "uint8"}),
    "sharded": ("DPO", 24, {**_STORED, "lora": True, "quantised": "float32"}),
    "whole-mixed": ("DPO", 24, {**_STORED, **_MIXED, "lora": True, "quantised": "uint8"}),
    "sharded-mixed": ("DPO", 24, {**_LIVE, **_MIXED, "lora": True, "quantised": "bfloat16"}),
}
#: Runs whose processes are asked how much memory they hold after each step.
COUNTED: dict[str, Case] = {
    "counted-live": ("DPO", 24, {**_LIVE, "counted": True}),
    "counted-stored": ("DPO", 24, {**_STORED, **_SAMPLED, "counted": True}),
    "counted-synced": ("DPO", 24, {**_SYNC, "counted": True}),
    "counted-given": ("DPO", 24, {**_LIVE, "given": True, "counted": True}),
}
_ACCUMULATED = {"gradient_accumulation_steps": 3}
#: Rows that do not divide by the step: the last one leaves a process with fewer than the other, or with none.
UNEVEN: dict[str, Case] = {
    "uneven": ("DPO", 37, _STORED),
    "uneven-live": ("DPO", 51, {**_LIVE, **_ACCUMULATED}),
    "uneven-lora": ("DPO", 37, {**_LIVE, "lora": True}),
    "uneven-synced": ("DPO", 37, _SYNC),
    "uneven-kto": ("KTO", 37, _LIVE),
    "uneven-orpo": ("ORPO", 51, {**_STORED, **_ACCUMULATED}),
    "uneven-sft": ("SFT", 51, {**_STORED, **_ACCUMULATED}),
}
#: Orders of the data, and a loss that joins the pairs of a step, in fp64: the optimizer makes much of how fp32 rounds.
ORDERS: dict[str, Case] = {
    "sequential": ("DPO", 37, {**_LIVE, "fp64": True, "train_sampling_strategy": "sequential"}),
    "by-length": ("DPO", 37, {**_LIVE, "fp64": True, "train_sampling_strategy": "group_by_length"}),
    "rebalanced": ("DPO", 37, {**_LIVE, **_ACCUMULATED, "fp64": True, "train_sampling_strategy": "batch_rebalance"}),
    "unseeded": ("DPO", 37, {**_LIVE, "fp64": True, "accelerator_config": {"use_seedable_sampler": False}}),
    "dropped": ("DPO", 37, {**_LIVE, "fp64": True, **_ACCUMULATED, "dataloader_drop_last": True}),
    "workers": ("DPO", 37, {**_LIVE, "fp64": True, "dataloader_num_workers": 1}),
    "joint": ("DPO", 37, {**_LIVE, "fp64": True, "loss_type": ["bco_pair"]}),
    "stream": ("DPO", 37, {**_LIVE, **_ACCUMULATED, "fp64": True, "max_steps": 8, "stream": True}),
    "short": ("DPO", 37, {**_STORED, "fp64": True, "max_steps": 3}),
}
#: Runs that keep a checkpoint in the middle of their first epoch, and in the middle of an accumulated one.
RESUMED: dict[str, Case] = {
    "kept": ("DPO", 37, {**_LIVE, "save_strategy": "steps", "save_steps": 6}),
    "kept-lora": ("DPO", 51, {**_LIVE, **_ACCUMULATED, "lora": True, "save_strategy": "steps", "save_steps": 3}),
    "kept-synced": ("DPO", 37, {**_SYNC, "save_strategy": "steps", "save_steps": 6}),
}


def resumed(cases: dict[str, Case], folder: Path) -> dict[str, Case]:
    """The same runs, to be gone on with at the first checkpoint that they left in a folder."""
    found = {}
    for name, (kind, rows, settings) in cases.items():
        checkpoint = folder / name / f"checkpoint-{settings['save_steps']}"
        found[name] = (kind, rows, {**settings, "resume": str(checkpoint)})
    return found


def let_fsdp_in() -> None:
    """Let FSDP be used on a CPU, which accelerate does for accelerators only."""
    original = AcceleratorState.__init__

    def opened(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = opened


def let_deepspeed_in() -> None:
    """Let DeepSpeed be used on a CPU, which accelerate does for accelerators only."""
    original = AcceleratorState.__init__

    def opened(self: Any, mixed_precision: Any = None, cpu: bool = False, *args: Any, **kwargs: Any) -> None:
        used = kwargs.get("deepspeed_plugin") is not None
        original(self, mixed_precision, cpu and not used, *args, **kwargs)
        if used:
            PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED

    AcceleratorState.__init__ = opened


class Held(TrainerCallback):
    """Counts the bytes of all tensors that there are after a step, beside those from before, and keeps the most."""

    def __init__(self) -> None:
        self.before, self.most = self.bytes(), 0

    @staticmethod
    def bytes() -> int:
        """Bytes of all tensors of this process; a sharded one is another tensor's wrapper."""
        gc.collect()
        tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
        storages = [each.untyped_storage() for each in tensors if type(each) is not DTensor]
        return sum({each._cdata: each.nbytes() for each in storages}.values())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Count."""
        self.most = max(self.most, self.bytes() - self.before)


def rows_of(kind: str, number: int) -> list[dict[str, Any]]:
    """Rows for a trainer."""
    if kind == "KTO":
        return worlds.unpaired_rows(number)
    pairs = worlds.pair_rows(number)
    return [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs] if kind == "SFT" else pairs


def tied(path: str) -> Any:
    """The model with its embeddings as head; of a checkpoint that holds both, transformers ties none."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, tie_word_embeddings=True))
    left_out = model.load_state_dict(
        {k: v for k, v in load_file(Path(path, "model.safetensors")).items() if k != "lm_head.weight"}, strict=False
    )
    model.tie_weights()
    assert left_out.missing_keys == ["lm_head.weight"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def trained(case: Case, path: str, out: Path, **more: Any) -> Any:
    """A trainer after its run; a step has as many examples for any number of processes."""
    kind, number, settings = case
    settings = {**worlds.DEFAULTS, "max_steps": -1, "learning_rate": 3e-3, **settings, **more}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings["per_device_train_batch_size"] = settings["per_device_train_batch_size"] // processes
    resume = settings.pop("resume", None)
    callbacks = [Held()] if settings.pop("counted", False) else []
    if "fsdp" not in settings:
        settings.pop("fsdp_config", None)
    given: dict[str, Any] = {}
    if settings.pop("given", False):
        given["ref_model"] = different(path)
    if storage := settings.pop("quantised", None):
        from transformers import BitsAndBytesConfig

        kept = getattr(torch, storage)
        given["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=kept)
    if lora := settings.pop("lora", False):
        from peft import LoraConfig

        torch.manual_seed(3)
        # all-linear leaves the head out.
        targets = ["q_proj", "v_proj", "lm_head"] if settings.pop("adapts_head", False) else lora
        whole = ["lm_head"] if settings.pop("trains_head", False) else None
        modules = "all-linear" if targets is True else targets
        given["peft_config"] = LoraConfig(r=4, target_modules=modules, modules_to_save=whole, init_lora_weights=False)
    trainer_class, config_class = getattr(preftune, f"{kind}Trainer"), getattr(preftune, f"{kind}Config")
    model: Any = path
    if settings.pop("fp64", False):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    if settings.pop("tied", False):
        model = tied(path)
    data: Any = Dataset.from_list(rows_of(kind, number))
    most_ahead = streams.MOST_ROWS_AHEAD
    if settings.pop("stream", False):
        most_ahead, data = 0, data.to_iterable_dataset()
    # One process trains within the tests, whose others it must not change.
    with mock.patch.object(streams, "MOST_ROWS_AHEAD", most_ahead):
        trainer = trainer_class(
            model=model,
            args=config_class(output_dir=str(out), **settings),
            train_dataset=data,
            eval_dataset=Dataset.from_list(rows_of(kind, 13)),
            processing_class=AutoTokenizer.from_pretrained(path),
            callbacks=callbacks,
            **given,
        )
    trainer.train(resume)
    return trainer


def evaluated(trainer: Any) -> dict[str, float]:
    """What a trainer measures on its 13 held-out rows."""
    timing = ("runtime", "per_second", "epoch")
    return {name: value for name, value in trainer.evaluate().items() if not name.endswith(timing)}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights in an output folder."""
    name = "adapter_model.safetensors" if (folder / "adapter_model.safetensors").exists() else "model.safetensors"
    # PEFT may write the head under an adapter, which is frozen; ZeRO-3 gathers only what is trained.
    return {key: value for key, value in load_file(folder / name).items() if "base_layer" not in key}


def refused_as_model(trainer: Any) -> str | None:
    """What is said to those who want the reference as a model, where it cannot be had as one."""
    try:
        _ = trainer.ref_model
    except ConfigError as error:
        return str(error)
    return None


def run(case: Case, path: str, out: Path, **more: Any) -> None:
    """Train, save and evaluate, into a folder."""
    trainer = trained(case, path, out, **more)
    trainer.save_model()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    held = [each.most for each in trainer.callback_handler.callbacks if isinstance(each, Held)]
    wrapper = type(trainer.model_wrapped).__name__
    found: dict[str, Any] = {"losses": losses, "eval": evaluated(trainer), "held": held, "wrapper": wrapper}
    if getattr(trainer, "reference", None) is not None and trainer.reference.separate is not None:
        beside = trainer.reference.separate.model
        found["whole"] = sum(not is_divided(parameter) for parameter in beside.parameters())
    found["refused"] = refused_as_model(trainer)
    (out / f"found-{trainer.args.process_index}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    model, folder, cases, further = sys.argv[1:]
    extra = json.loads(further)
    if "fsdp" in extra:
        let_fsdp_in()
    if "deepspeed" in extra or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        let_deepspeed_in()
    for case_name, each in json.loads(cases).items():
        run(tuple(each), model, Path(folder, case_name), **extra)
    # Threads that still serve the group when Python ends abort the process.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
