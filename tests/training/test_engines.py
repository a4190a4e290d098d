"""Engines that do not train right are refused before anything is loaded."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedDataParallelKwargs

from preftune import DPOConfig
from preftune.errors import ConfigError, ModelError, SetupError
from preftune.training.checkpoints.manifest import Manifest
from preftune.training.checkpoints.resume import check_same_shards
from preftune.training.engines import _keep_order_of_sums, check_engine
from preftune.training.fsdp import settle
from preftune.training.zero import check_agreed, check_deepspeed, check_zero_model

_FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}


def given(folder: Path, **settings: Any) -> DPOConfig:
    return DPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "PARALLELISM_CONFIG_TP_SIZE"),
        ({"PARALLELISM_CONFIG_CP_SIZE": "4"}, "PARALLELISM_CONFIG_CP_SIZE"),
        ({"PARALLELISM_CONFIG_SP_SIZE": "2"}, "PARALLELISM_CONFIG_SP_SIZE"),
        ({**_FSDP, "FSDP_VERSION": "1"}, "FSDP1 is not supported"),
        ({**_FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS.*main memory"),
    ],
)
def test_what_a_launcher_asks_for_is_refused(
    environment: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = given(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        check_engine(args)


def test_settings_are_refused(tmp_path: Path) -> None:
    for settings in ({"tp_plan": "auto"}, {"distributed_config": {"tp_size": 2}}):
        with pytest.raises(ConfigError, match="model_init_kwargs"):
            check_engine(given(tmp_path, model_init_kwargs=settings))
    args = given(tmp_path)
    with pytest.raises(ConfigError, match="tensor parallelism"):
        check_engine(args, SimpleNamespace(tp_size=2))
    args.parallelism_config = SimpleNamespace(tp_size=2)
    with pytest.raises(ConfigError, match="parallelism_config"):
        check_engine(args)


def deepspeed(**config: Any) -> Any:
    """Settings with a configuration of DeepSpeed, which need not be installed."""
    config.setdefault("zero_optimization", {"stage": 3})
    more = dict.fromkeys(("torch_compile", "activation_offloading", "save_on_each_node"), False)
    found = SimpleNamespace(hf_ds_config=SimpleNamespace(mismatches=[]), deepspeed_config=config)
    return SimpleNamespace(deepspeed_plugin=found, optim="adamw_torch", **more)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimization": {"stage": 0}}, "stage: is not supported; got 0"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "take stage 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"optimizer": {"type": "AdamW"}}, "set optim"),
        ({"scheduler": {"type": "WarmupLR"}}, "set lr_scheduler_type"),
    ],
)
def test_what_deepspeed_would_change_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_deepspeed(deepspeed(**config))


def test_deepspeeds_stages_are_let_in() -> None:
    none = {"device": "none", "nvme_path": None}
    for stage in (1, 2, 3):
        check_deepspeed(deepspeed(zero_optimization={"stage": stage, "offload_optimizer": none, "offload_param": none}))
    check_deepspeed(deepspeed(curriculum_learning={"enabled": False}, tensor_parallel={"autotp_size": 1}))
    check_deepspeed(SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["torch_compile", "activation_offloading", "save_on_each_node"])
def test_what_was_not_tried_with_zero3_is_refused(name: str) -> None:
    args = deepspeed()
    setattr(args, name, True)
    with pytest.raises(ConfigError, match="not supported with ZeRO-3"):
        check_deepspeed(args)
    args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] = 2
    check_deepspeed(args)


def test_another_optimizer_is_not_put_in_the_place_of_the_one_asked_for() -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    args = deepspeed(zero_optimization=zero)
    args.optim = "adafactor"
    with pytest.raises(ConfigError, match="no such optimizer on the CPU"):
        check_deepspeed(args)
    args.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
    check_deepspeed(args)


def test_that_deepspeed_is_missing_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"deepspeed: DeepSpeed is not installed.*preftune\[deepspeed\]"):
        given(tmp_path, deepspeed={"zero_optimization": {"stage": 2}})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SetupError, match="DeepSpeed is not installed"):
        given(tmp_path)


def test_numbers_that_differ_are_told_in_one_line() -> None:
    args = deepspeed()
    args.deepspeed_plugin.hf_ds_config.mismatches = ["- ds gradient_accumulation_steps=1 vs hf gradient_accum=4"]
    with pytest.raises(ConfigError, match="gradient_accumulation_steps=1, and the run has gradient_accum=4") as found:
        check_agreed(args)
    assert "\n" not in str(found.value)


class _Model(torch.nn.Linear):
    """As far as a check looks at a model."""

    def __init__(self, **config: Any) -> None:
        super().__init__(2, 2)
        text = SimpleNamespace(**config)
        self.config = SimpleNamespace(get_text_config=lambda: text)


def test_a_checkpoint_goes_on_with_the_processes_and_the_stage_that_wrote_it(tmp_path: Path) -> None:
    args = deepspeed()
    args.world_size = 2
    kept = {"num_processes": 2, "zero_stage": 3}
    check_same_shards(Manifest(tmp_path, 1, True, {}, 0, kept), args)
    for name, value in (("num_processes", 1), ("zero_stage", 2)):
        with pytest.raises(ConfigError, match=rf"goes on as it was written: {name} {value} -> "):
            check_same_shards(Manifest(tmp_path, 1, True, {}, 0, {**kept, name: value}), args)


def test_models_that_zero3_does_not_train_right_are_refused() -> None:
    sharded: Any = _Model()
    quantised: Any = _Model()
    dora: Any = _Model()
    sharded.weight.ds_tensor = torch.zeros(2)
    quantised.is_loaded_in_4bit = True
    dora.peft_config = {"default": SimpleNamespace(use_dora=True)}
    cases = {"in shards": sharded, "quantised": quantised, "DoRA": dora, "experts": _Model(output_router_logits=False)}
    for said, model in cases.items():
        with pytest.raises(ModelError, match=said):
            check_zero_model(deepspeed(), model)
        check_zero_model(deepspeed(zero_optimization={"stage": 2}), model)
    check_zero_model(deepspeed(), _Model())


def test_sharded_state_dicts_are_written_whole() -> None:
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), is_main_process=True, mixed_precision="no"
    )
    with pytest.warns(UserWarning, match="written whole, not as SHARDED_STATE_DICT"):
        settle(accelerator, torch.nn.Linear(2, 2))
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    # Nothing is left to be said.
    settle(accelerator, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_gradients_are_added_up_in_fp32(precision: str, dtype: torch.dtype) -> None:
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="FULL_STATE_DICT")
    # What accelerate does.
    plugin.set_mixed_precision(precision)
    accelerator: Any = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), is_main_process=True, mixed_precision=precision
    )
    settle(accelerator, torch.nn.Linear(2, 2))
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (dtype, torch.float32, None)
    with pytest.warns(UserWarning, match="half-precision weights are trained and saved in fp32"):
        settle(accelerator, torch.nn.Linear(2, 2).to(dtype))


@pytest.mark.parametrize("asked_by", ["settings", "launcher"])
def test_every_process_loads_the_weights(asked_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**_FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}.items():
        monkeypatch.setenv(name, value)
    settings: dict[str, Any] = {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}
    with pytest.warns(UserWarning, match="fsdp_cpu_ram_efficient_loading has no effect"):
        args = given(tmp_path, **(settings if asked_by == "settings" else {}))
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert not (args.fsdp_plugin_args or {}).get("cpu_ram_efficient_loading")
    # One that was loaded before cannot be trained.
    with pytest.raises(ConfigError, match="loaded without its weights"):
        check_engine(args, torch.nn.Linear(2, 2, device="meta"))


def test_batches_that_would_be_divided_twice_are_refused(tmp_path: Path) -> None:
    args: Any = SimpleNamespace(world_size=2, accelerator_config=SimpleNamespace(split_batches=True))
    with pytest.raises(ConfigError, match="split_batches"):
        check_engine(args)
    check_engine(given(tmp_path, accelerator_config={"split_batches": True}))


def test_what_trains_right_is_let_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_engine(given(tmp_path))
    check_engine(given(tmp_path, fsdp=True))
    for name, value in _FSDP.items():
        monkeypatch.setenv(name, value)
    check_engine(given(tmp_path))


@pytest.mark.parametrize(
    ("processes", "more", "looks"),
    [
        (2, {}, False),
        (3, {}, True),
        (8, {}, True),
        (8, {"ddp_find_unused_parameters": False}, False),
        (8, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, False),
    ],
)
def test_more_than_two_processes_add_gradients_up_in_one_order(
    processes: int, more: dict[str, Any], looks: bool, tmp_path: Path
) -> None:
    """DDP does not lay its buckets out anew after the first step; two numbers have one sum in either order."""
    accelerator: Any = SimpleNamespace(num_processes=processes, ddp_handler=DistributedDataParallelKwargs())
    with warnings.catch_warnings():
        _keep_order_of_sums(given(tmp_path, **more), accelerator)
    assert accelerator.ddp_handler.find_unused_parameters is looks
