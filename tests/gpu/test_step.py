"""Whole training steps on an emulated accelerator: nothing mixes, nothing waits, the numbers are the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.kernels.attention import AttentionSpec, RowContext, attend, flex, varlen
from preftune.models.forward import ROW_MULTIPLE
from preftune.packing import RowLayout, TreeSpan
from preftune.training import memory
from tests.emulation import Device, accelerator, varlen_kernel
from tests.faults.worlds import build, make_trainer
from tests.models.tiny import save_tiny_model, tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore:policy and reference differ:UserWarning",
    "ignore:attention backend 'flex':UserWarning",
)
STEPS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "save_strategy": "no",
    "logging_steps": 10,
    "max_steps": 2,
    "disable_dropout": True,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "warmup_steps": 0,
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {}),
    "bf16": ("dpo", {"bf16": True}),
    "logged": ("dpo", {"logging_steps": 1, "guards": "warn"}),
    "weighted": ("dpo", {"loss_type": ["ipo", "sft"], "use_weighting": True, "ld_alpha": None}),
    "ld": ("dpo", {"ld_alpha": 0.5}),
    "joint": ("dpo", {"loss_type": ["aot"]}),
    "bco": ("dpo", {"loss_type": ["bco_pair"]}),
    "along": ("dpo", {"reference_store": False}),
    "lora": ("lora", {"eval_strategy": "no"}),
    "kto": ("kto", {}),
    "orpo": ("orpo", {}),
    "offloading": ("dpo", {"activation_offloading": True}),
}
MPS: dict[str, Any] = {"logging_steps": 1, "guards": "warn", "packing_mode": "padded"}
#: Where the device is waited for once a step, on purpose: whether the gradient is finite, by this project and by
#: transformers, and the norm that clipping is told. Then once a run, and once a log line.
PER_STEP = ("nonfinite_steps.py", "(accelerator.py", "(trainer.py")
PER_LINE = ("metrics.py", "run_figures.py", "trainer.py", "evidence.py")
ONCE = ("preference.py", "fingerprint.py")
#: Not compared by number: AOT sorts log-ratios that are all zero but for rounding, and adapters begin at random.
UNCOMPARED = {"joint", "lora", "orpo"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build(folder)
    # Head size 8, which the variable-length kernel takes.
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))
    save_tiny_model(folder / "model", tokenizer, hidden_size=32, intermediate_size=32)
    return folder


def far_trainer(
    world: Path, out: Path, scenario: str, device: Device, patch: pytest.MonkeyPatch, **changes: Any
) -> Any:
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
    patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: device.move(load(*a, **k)))
    patch.setattr(varlen, "call_kernel", varlen_kernel)
    patch.setattr(flex, "supports", lambda *_: False)
    return make_trainer(world, out, scenario, **{**STEPS, **changes})


def weights(trainer: Any) -> list[torch.Tensor]:
    return [getattr(p.data, "near", p.data).clone() for p in trainer.model.parameters() if p.requires_grad]


@pytest.mark.thin(6)
@pytest.mark.parametrize("run", RUNS)
def test_a_run_ends_with_the_numbers_of_the_cpu_and_never_waits_within_a_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    scenario, options = RUNS[run]
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    here = make_trainer(world, tmp_path / "here", scenario, **{**STEPS, **options})
    here.train()
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "another"))
    with accelerator(monkeypatch) as device:
        trainer = far_trainer(world, tmp_path / "far", scenario, device, monkeypatch, **options)
        assert trainer.verdict.ok, trainer.verdict.reason
        getattr(trainer, "prepare_reference", lambda: None)()
        device.log.waits.clear()
        trainer.train()
        waits = dict(device.log.waits)
        used = trainer.step.forward.backends_used
    assert used == {"varlen" if run == "bf16" else "sdpa"}
    allowed: tuple[str, ...] = (*PER_STEP, *PER_LINE, *ONCE)
    expected_by_kind = {"extra_state.py": run == "bco", "answers.py": run == "kto"}
    allowed += tuple(name for name, told in expected_by_kind.items() if told)
    assert not {where for where in waits if not any(each in where for each in allowed)}
    assert sum(number for where, number in waits.items() if "nonfinite_steps.py" in where) == STEPS["max_steps"]
    lines = len([line for line in trainer.state.log_history if "loss" in line or "train_loss" in line])
    assert sum(number for where, number in waits.items() if "metrics.py" in where) <= lines
    tolerance = 2e-2 if run == "bf16" else 1e-4
    if run in UNCOMPARED:
        assert trainer.state.global_step == STEPS["max_steps"]
        return
    for mine, theirs in zip(weights(trainer), weights(here), strict=True):
        # Adam's first steps are as large as the learning rate, whichever sign a gradient near zero has.
        close = (mine - theirs).abs() <= tolerance * 1e-1
        assert float(close.float().mean()) > 0.98


def test_mps_knows_no_float64(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every trainer runs on a device that refuses float64."""
    spec = AttentionSpec(0.25)
    with monkeypatch.context() as patch, accelerator(patch, "mps") as device:
        row = RowContext(RowLayout((TreeSpan(0, 5, (4, 7)),)))
        query, key, value = (torch.randn(1, heads, 16, 8).to(device.place) for heads in (4, 2, 2))
        attend(query, key, value, row, spec)
    assert row.used == {"sdpa"}
    for scenario in ("dpo", "kto", "orpo", "bco"):
        with monkeypatch.context() as patch, accelerator(patch, "mps") as device:
            patch.setenv("PREFTUNE_CACHE", str(tmp_path / scenario))
            trainer = far_trainer(world, tmp_path / scenario, scenario, device, patch, **MPS)
            trainer.train()
            assert trainer.state.global_step == STEPS["max_steps"]


@pytest.mark.parametrize("lengths", [(1, 64), (63, 64), (64, 64), (2049, 2112), (4097, 4224), (30000, 30208)])
def test_rows_are_filled_up_to_few_lengths(lengths: tuple[int, int]) -> None:
    from preftune.models.forward import RowForward

    forward = RowForward.__new__(RowForward)
    forward.row_multiple = ROW_MULTIPLE
    given, filled = lengths
    assert given + forward._filler(given, torch.device("cuda")) == filled
    forward.row_multiple = 1
    assert forward._filler(given, torch.device("cuda")) == 0


def test_few_shapes_serve_all_lengths_at_little_cost() -> None:
    from preftune.models.forward import RowForward

    forward = RowForward.__new__(RowForward)
    forward.row_multiple = ROW_MULTIPLE
    lengths = range(2048, 32768)
    filled = [length + forward._filler(length, torch.device("cuda")) for length in lengths]
    assert len(set(filled)) <= 130
    assert max(full / length for full, length in zip(filled, lengths, strict=True)) < 1 + 1 / 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_offloading_leaves_parameters_and_their_casts(dtype: torch.dtype, autocast: bool) -> None:
    model = tiny_model("LlamaConfig").to(dtype).train()
    ids = torch.arange(24).view(1, -1)

    def bytes_saved(move_all: bool) -> tuple[int, int]:
        """Bytes of all saved tensors, and of those that move."""
        hooks = memory.offloading(True, model)
        seen = [0, 0]

        def pack(tensor: torch.Tensor) -> Any:
            packed = hooks.pack_hook(tensor)
            seen[0] += tensor.nbytes
            seen[1] += tensor.nbytes if packed[1] is not tensor else 0
            if packed[1] is not tensor:
                assert not any(tuple(tensor.shape) in (tuple(p.shape), tuple(p.shape)[::-1]) for p in parameters)
            return packed

        parameters = list(model.parameters())
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, hooks.unpack_hook),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
        loss.backward()
        return seen[0], seen[1]

    saved, moved = bytes_saved(False)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    size = 2 if autocast or dtype == torch.bfloat16 else 4
    assert moved > 0
    assert saved - moved >= size * sum(p.numel() for p in matrices)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_offloaded_gradients_are_the_same() -> None:
    model = tiny_model("LlamaConfig").train()
    ids = torch.arange(24).view(1, -1)
    found = []
    for on in (False, True):
        model.zero_grad()
        with memory.offloading(on, model):
            model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("CUDA out of memory. Tried to")],
    ids=["accelerator", "python", "text"],
)
def test_the_reference_pass_goes_on_in_shorter_rows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    sums = []
    for limit in (None, 100):
        monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / str(limit)))
        trainer = make_trainer(world, tmp_path / "out", "dpo", **{**STEPS, "max_tokens_per_row": 400})
        true = trainer.reference.row_scores

        def row_scores(row: Any, true: Any = true, limit: Any = limit, **options: Any) -> Any:
            if limit is not None and row.num_tokens > limit:
                raise error
            return true(row, **options)

        trainer.reference.row_scores = row_scores
        if limit is None:
            trainer.prepare_reference()
        else:
            with pytest.warns(UserWarning, match="memory ran out in the reference pass"):
                trainer.prepare_reference()
        sums.append(torch.tensor(trainer.train_dataset["ref_chosen_logps"]))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_one_pair_that_does_not_fit_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.errors import SetupError

    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    trainer = make_trainer(world, tmp_path / "out", "dpo", **STEPS)

    def row_scores(row: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.reference.row_scores = row_scores
    with (
        pytest.warns(UserWarning, match="memory ran out in the reference pass"),
        pytest.raises(SetupError, match="which holds one example"),
    ):
        trainer.prepare_reference()
