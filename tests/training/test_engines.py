"""Engines that do not train right are refused before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from preftune import DPOConfig
from preftune.errors import ConfigError
from preftune.training.engines import check_engine
from preftune.training.fsdp import settle

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
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO-3 is not supported"),
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
    for name, value in {**_FSDP, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}.items():
        monkeypatch.setenv(name, value)
    check_engine(given(tmp_path))
