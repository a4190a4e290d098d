"""Is a trained model ever refused for its rounding? The start-up probe over architectures, precisions and tokens.

``python -m benchmarks.probing``. The pretrained model's weights in six architectures (`benchmarks.pretrained`), in
every precision that a CPU has, with adapters, and with the products of tensor cores (TF32's ten bits); twenty draws of
the probe's tokens for each. Methods are no column: the probe asks what the model does with a packed row, whatever is
learned from it. Cells go into a file beside the result (``--go_on`` keeps them); ``docs/real.md`` shows them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import pretrained, seeded, stale

OUT = Path(__file__).resolve().parent / "results" / "probing.json"
NUM_SEEDS = 20
KEYS = ("architecture", "mode")
PATTERNS = (
    "src/preftune/kernels/**/*.py",
    "src/preftune/models/*.py",
    "src/preftune/packing/*.py",
    "benchmarks/probing.py",
    "benchmarks/pretrained.py",
)
Region = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mode:
    """How a model computes.

    Attributes:
        dtype: Of the weights.
        autocast: The region that training runs in.
        around: What the whole trial runs in.
        adapter: Whether it has an adapter whose factors are drawn at random.
    """

    dtype: torch.dtype = torch.float32
    autocast: Region = nullcontext
    around: Region = nullcontext
    adapter: bool = False


def _tensor_cores() -> AbstractContextManager[Any]:
    from tests.models.broken import RoundedInputs

    return RoundedInputs()  # type: ignore[no-untyped-call]


_HALF: Region = partial(torch.autocast, "cpu", torch.bfloat16)
MODES = {
    "fp32": Mode(),
    "fp32, products rounded as TF32": Mode(around=_tensor_cores),
    "bf16 autocast": Mode(autocast=_HALF),
    "bf16 autocast, LoRA": Mode(autocast=_HALF, adapter=True),
    "bf16 weights": Mode(torch.bfloat16),
    "fp16 weights": Mode(torch.float16),
}


def measure(architecture: str, mode: Mode, seeds: range) -> dict[str, Any]:
    """Try a model with one draw of tokens after the other."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from preftune.models.packing_probe import probe

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(pretrained.folder_of(architecture), dtype=mode.dtype)
    if mode.adapter:
        config = LoraConfig(r=8, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
    with mode.around():
        found = [probe(model, autocast=mode.autocast, seed=seed) for seed in seeds]
    refused = [verdict.reason for verdict in found if not verdict.ok]
    return {"num": len(found), "num_refused": len(refused), "reasons": sorted(set(refused))}


def run(out: Path, num_seeds: int, go_on: bool, architectures: tuple[str, ...] = pretrained.NAMES) -> dict[str, Any]:
    """Try every model in every mode.

    Args:
        out: The result file.
        num_seeds: Draws of tokens for each.
        go_on: Keep what a run that was cut short has measured.
        architectures: Names of :data:`benchmarks.pretrained.NAMES`.

    Returns:
        The report.
    """
    from benchmarks.cell import machine

    head = {"num_seeds": num_seeds, "machine": machine({"threads": None})}
    cells = seeded.Cells(out, head, PATTERNS, KEYS, go_on)
    for architecture in architectures:
        for mode, how in MODES.items():
            if not cells.has(architecture=architecture, mode=mode):
                cells.start()
                found = measure(architecture, how, range(num_seeds))
                cells.enter({"architecture": architecture, "mode": mode, **found})
                print(f"{architecture}, {mode}: {found['num_refused']} of {found['num']} refused", flush=True)
    return cells.finish()


def table(report: dict[str, Any]) -> list[str]:
    """Lines for a page: refusals by architecture and precision."""
    cells = {(cell["architecture"], cell["mode"]): cell for cell in report["cells"]}
    architectures = list(dict.fromkeys(name for name, _ in cells))
    lines = ["| refused of tried | " + " | ".join(architectures) + " |", "|---|" + "---:|" * len(architectures)]
    for mode in MODES:
        shown = [cells[name, mode] for name in architectures]
        lines.append(f"| {mode} | " + " | ".join(f"{cell['num_refused']} of {cell['num']}" for cell in shown) + " |")
    reasons = sorted({reason for cell in cells.values() for reason in cell["reasons"]})
    seconds = sum(cell["processor_seconds"] for cell in cells.values()) / sum(cell["num"] for cell in cells.values())
    told = f"A trial takes {seconds:.1f} s of processor time. Measured {report[stale.KEY]['date']}."
    return [*lines, "", told, *(f"- {reason}" for reason in reasons)]


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing.

    Returns:
        1 if a model was refused, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="draws of tokens (default: 20)")
    parser.add_argument("--architectures", nargs="+", choices=pretrained.NAMES, default=list(pretrained.NAMES))
    parser.add_argument("--out", type=Path, default=OUT, help="result file")
    parser.add_argument("--go_on", action="store_true", help="keep the cells of a run that was cut short")
    options = parser.parse_args(argv)
    report = run(options.out, options.seeds, options.go_on, tuple(options.architectures))
    print("\n".join(table(report)))
    return int(any(cell["num_refused"] for cell in report["cells"]))


if __name__ == "__main__":
    sys.exit(main())
