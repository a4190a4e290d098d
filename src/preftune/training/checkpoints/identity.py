"""What a run is: settings, data, model and reference, so that another run is not continued by mistake.

The default is to refuse: a setting that this module does not know about may change what is learned. Those that cannot
(where files go, what is logged, when is saved) are listed, and so are those that let a run go on, but not to the bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from preftune.config import redact
from preftune.errors import ConfigError, PreftuneError
from preftune.training.checkpoints.manifest import digest
from preftune.training.provenance import plain, versions
from preftune.version import __version__

if TYPE_CHECKING:
    from preftune.training.checkpoints.saved import SavedTrainer

#: Settings that change neither weights nor metrics.
_FREE = frozenset(
    [
        *("output_dir", "report_to", "run_name", "project", "disable_tqdm", "push_to_hub", "metric_for_best_model"),
        *("greater_is_better", "load_best_model_at_end", "do_train", "do_eval", "do_predict"),
        *("resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
        *("enable_jit_checkpoint", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics"),
        *("per_device_eval_batch_size", "skip_memory_metrics", "debug", "local_rank", "trust_remote_code"),
        *("model_init_kwargs", "dataset_num_proc", "quarantine_path", "on_bad_rows", "max_dropped_share"),
        *("first_step_check", "precompute_ref_log_probs", "precompute_ref_batch_size", "reference_store"),
        *("remove_unused_columns", "label_names", "include_num_input_tokens_seen", "max_skipped_steps"),
        *("torch_empty_cache_steps", "pad_to_multiple_of", "padding_free", "accelerator_config", "dataset_format"),
        *("dataset_kwargs", "use_cache", "checkpoint_policy", "worker_timeout", "existing_output"),
    ]
)
_FREE_PREFIXES = (
    *("logging_", "log_", "save_", "eval_", "hub_", "trackio_", "ddp_", "dataloader_", "guard", "generation", "sampl"),
)
_EXCEPTIONS = frozenset(["dataloader_drop_last"])
#: Whose code computes a step: another version of it may round, or reckon, otherwise.
_LIBRARIES = ("torch", "transformers", "accelerate", "peft")
#: Settings with which a run can go on, though not to the bit.
_LOOSE = frozenset(
    [
        *("max_steps", "num_train_epochs", "max_tokens_per_row", "packing_mode", "attention_backend", "use_cpu"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
        *("activation_checkpointing_kwargs", "activation_offloading", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "torch_compile", "torch_compile_backend", "torch_compile_mode", "tf32"),
        *("num_processes", "fsdp", "fsdp_config", "path", *_LIBRARIES, "preftune"),
    ]
)
_BLOCK = 1024


def settings_of(args: Any) -> dict[str, Any]:
    """All settings as plain values, secrets replaced."""
    return {
        item.name: redact(plain(getattr(args, item.name)), item.name)
        for item in dataclasses.fields(args)
        if item.init and not _is_free(item.name)
    }


def describe_run(trainer: SavedTrainer) -> dict[str, Any]:
    """Settings, derived facts, data, model and reference of a run, with digests of settings and data."""
    args = trainer.args
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings = settings_of(args)
    facts = {
        "method": type(trainer).__name__,
        "pairs_per_step": per_step,
        "num_processes": args.world_size,
        "path": "packed" if trainer.verdict.ok else "padded",
        **code_versions(),
    }
    data = data_digest(trainer.train_dataset, trainer.example_columns)
    return {
        "settings": settings,
        "facts": {**facts, **model_facts(trainer)},
        "data": data,
        "config_sha256": digest([settings, facts]),
        "data_sha256": data["sha256"],
    }


def code_versions() -> dict[str, str | None]:
    """Versions of what computes a step, preftune's own among them."""
    found = versions()
    return {**{name: found.get(name) for name in _LIBRARIES}, "preftune": __version__}


def model_facts(trainer: SavedTrainer) -> dict[str, Any]:
    """What the policy started from, as far as a checkpoint does not hold it itself."""
    from preftune.references.fingerprint import model_weights_key, stable_config

    model = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    facts: dict[str, Any] = {"architecture": digest([type(base).__name__, plain(stable_config(base.config.to_dict()))])}
    reference = getattr(trainer, "reference", None)
    configs = getattr(model, "peft_config", None) or {}
    try:
        if reference is not None:
            facts["reference"] = reference.weights_key
        elif configs:
            # Frozen weights are in no checkpoint of an adapter.
            facts["base_model"] = model_weights_key(model, {})
    except (PreftuneError, RuntimeError):
        # Weights without data of their own, as under sharding: nothing to compare.
        pass
    for name, config in configs.items():
        settings = {k: v for k, v in config.to_dict().items() if k not in ("base_model_name_or_path", "revision")}
        settings["target_modules"] = sorted(map(str, settings.get("target_modules") or []))
        facts[f"adapter {name}"] = {k: plain(v) for k, v in settings.items() if k != "inference_mode"}
    return facts


def data_digest(dataset: Any, columns: Sequence[str]) -> dict[str, Any]:
    """Rows and SHA-256 of prepared training data, in order; reference columns are the reference's affair.

    Args:
        dataset: A ``datasets.Dataset``; anything else cannot be read twice, and has no digest.
        columns: Which columns are trained on.
    """
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "num_rows"):
        return {"num_rows": None, "sha256": None}
    names = sorted(name for name in columns if name in dataset.column_names and not name.startswith("ref_"))
    # In a fixed order and independent of how a file format cuts columns into chunks.
    found = hashlib.sha256("\n".join(names).encode())
    reader = dataset.select_columns(names).with_format("arrow") if names else dataset
    for start in range(0, dataset.num_rows if names else 0, _BLOCK):
        table = reader[start : start + _BLOCK]
        for name in names:
            for part in _column_bytes(table[name]):
                found.update(part)
    return {"num_rows": dataset.num_rows, "sha256": found.hexdigest()}


def _column_bytes(column: Any) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
        values = pc.list_flatten(column).to_numpy(zero_copy_only=False)
        return [lengths.astype(np.int64).tobytes(), values.astype(np.float64).tobytes()]
    return [repr(column.to_pylist()).encode("utf-8", "surrogatepass")]


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Refuse to go on with another run; return what lets it go on, but not to the bit.

    Raises:
        ConfigError: Naming every difference as old value against new value.
    """
    refused: list[str] = []
    loose: list[str] = []
    for part in ("facts", "settings"):
        for name, value in now[part].items():
            if name in before.get(part, {}) and before[part][name] != value and not _is_free(name):
                (loose if name in _LOOSE else refused).append(_difference(name, before[part][name], value))
    adapters = {
        name for facts in (before.get("facts", {}), now["facts"]) for name in facts if name.startswith("adapter ")
    }
    for name in sorted(adapters):
        if (name in before.get("facts", {})) != (name in now["facts"]):
            told = ("none", "new") if name in now["facts"] else ("there", "none")
            refused.append(_difference(name, *told))
    silent = [name for name in code_versions() if name in now["facts"] and name not in before.get("facts", {})]
    if silent:
        loose.append(f"versions of {', '.join(silent)}, which the checkpoint does not tell")
    old, new = before.get("data", {}), now["data"]
    if old.get("sha256") != new["sha256"]:
        rows = (old.get("num_rows"), new["num_rows"])
        shown = f"{rows[0]} -> {rows[1]} rows" if rows[0] != rows[1] else f"other content in the {rows[0]} rows"
        refused.append(f"training data ({shown})")
    if refused:
        raise ConfigError(
            f"the checkpoint belongs to another run: {'; '.join(refused)}",
            where="resume_from_checkpoint",
            remedy="restore the old values to go on, or train anew with the checkpoint as model_name_or_path",
        )
    return loose


def _difference(name: str, old: Any, new: Any) -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        return f"{name} ({', '.join(_difference(str(k), old.get(k), new.get(k)) for k in keys)})"
    return f"{name} {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_free(name: str) -> bool:
    return name not in _EXCEPTIONS and (name in _FREE or name.startswith(_FREE_PREFIXES))
