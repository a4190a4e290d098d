"""Published footprints against the estimate, and the runs that people ask about first."""

from __future__ import annotations

from functools import lru_cache

import pytest
from benchmarks.footprints import GIB, ROWS, Footprint

from benchmarks import footprints
from preftune.advice import Case, advise
from preftune.models.shapes import Shape, shape_of
from preftune.training.machines import MACHINES


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.source[0]}-{row.model}-{row.trained}-{row.tokens}")
def test_a_published_footprint_is_predicted_within_a_quarter(row: Footprint) -> None:
    assert abs(footprints.ratio(row) - 1) <= footprints.STATED_SHARE


def test_the_table_is_wide_enough() -> None:
    assert len(ROWS) >= 12
    assert {row.trained for row in ROWS} == {"full", "lora", "qlora"}
    assert {row.model.rpartition("-")[2] for row in ROWS} >= {"7B", "8B", "70B"}
    assert all(row.source[1].startswith("https://") for row in ROWS)
    # Cards of 24, 40, 48 and 80 GB are each filled by some row.
    for card in (24, 40, 48, 80):
        assert any(0.7 * card * GIB < row.published <= 1.01 * card * GIB for row in ROWS), card


@lru_cache(maxsize=1)
def qlora_70b() -> Shape:
    from peft import LoraConfig

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return shape_of(footprints.config_of("Llama-3-70B"), dtype="bfloat16", lora=lora, half=True, bits=4)


@pytest.mark.parametrize("policy", ["needed", "always"])
def test_qlora_of_70b_fits_into_80_gb(policy: str) -> None:
    shape = qlora_70b()
    given = {"max_length": 1024, "bf16": True, "load_in_4bit": True, "dtype": "bfloat16", "checkpoint_policy": policy}
    case = Case("dpo", ("sigmoid",), shape.num_parameters, True, num_pairs=60_000, given=given)
    advice = advise(case, shape, MACHINES["h100-80g"])
    assert advice.memory is not None
    assert advice.memory.fits
    assert 45 * GIB < advice.memory.total < 70 * GIB
    assert not [flag for flag in advice.flags if "memory" in flag.title]


def test_on_48_gb_it_is_said_that_it_may_not() -> None:
    shape = qlora_70b()
    given = {"max_length": 1024, "bf16": True, "load_in_4bit": True, "dtype": "bfloat16"}
    case = Case("dpo", ("sigmoid",), shape.num_parameters, True, num_pairs=60_000, given=given)
    (found,) = [flag for flag in advise(case, shape, MACHINES["l40s"]).flags if "memory" in flag.title]
    assert found.severity == "warn"
    assert "FSDP" in found.remedy


def test_remedies_are_not_what_the_run_has_already() -> None:
    shape = qlora_70b()
    given = {"max_length": 1024, "bf16": True, "load_in_4bit": True, "dtype": "bfloat16"}
    case = Case("dpo", ("sigmoid",), shape.num_parameters, True, num_pairs=60_000, given=given)
    (found,) = [flag for flag in advise(case, shape, MACHINES["a100-40g"]).flags if "memory" in flag.title]
    for has in ("use_peft", "bfloat16", "load_in_4bit"):
        assert has not in found.remedy
    assert "FSDP" in found.remedy


def test_all_weights_of_7b_do_not_fit_into_80_gb_and_the_remedies_would_make_room() -> None:
    shape = shape_of(footprints.config_of("Llama-2-7B"), half=True)
    given = {"max_length": 1024, "bf16": True, "dtype": "float32", "optim": "adamw_torch_fused"}
    case = Case("dpo", ("sigmoid",), shape.num_parameters, num_pairs=60_000, given=given)
    (found,) = [flag for flag in advise(case, shape, MACHINES["a100-80g"]).flags if "memory" in flag.title]
    assert found.severity == "problem"
    for remedy in ("use_peft: true", "FSDP or ZeRO-3", "adamw_8bit"):
        assert remedy in found.remedy
    # What is said to make room does.
    eight = Case("dpo", ("sigmoid",), shape.num_parameters, num_pairs=60_000, given={**given, "optim": "adamw_8bit"})
    assert not [flag for flag in advise(eight, shape, MACHINES["a100-80g"]).flags if "memory" in flag.title]


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_recomputation_is_counted(trained: str) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if trained == "lora" else None
    shape = shape_of(footprints.config_of("Llama-3.1-8B"), dtype="bfloat16", lora=lora)
    row = {"max_length": 4096, "checkpoint_policy": "always"}
    totals = {}
    for on in (True, False):
        given = {**row, "gradient_checkpointing": on}
        case = Case("dpo", ("sigmoid",), shape.num_parameters, trained == "lora", given=given)
        memory = advise(case, shape, MACHINES["h200"]).memory
        assert memory is not None
        totals[on] = memory
    assert totals[True].checkpointed
    assert not totals[False].checkpointed
    # 32 layers keep their inputs instead of all that is in them.
    assert totals[True].activations < 0.15 * totals[False].activations


def test_the_document_holds_the_table() -> None:
    assert footprints.summary() in footprints.DOCS.read_text(encoding="utf-8")
