"""``preftune export``: from a run to merged weights, a GGUF file, and the commands that serve them."""

from __future__ import annotations

import argparse
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preftune.export import Export


def add_parser(subparsers: Any) -> None:
    """Add the verb's arguments.

    Args:
        subparsers: What ``ArgumentParser.add_subparsers`` returned.
    """
    parser = subparsers.add_parser(
        "export",
        description="Merge a run's adapter into its base model and write a folder that transformers, vLLM, Ollama and "
        "llama.cpp load: safetensors, tokenizer, generation settings, chat template, Modelfile, and on demand a GGUF "
        "file. Held-out pairs are scored before and after, and what was lost is said.",
        epilog="example: preftune export out --dtype bfloat16 --gguf q8_0 --llama_cpp ~/llama.cpp",
    )
    parser.add_argument("run", metavar="RUN", help="output folder of a run, a checkpoint, or a sweep's folder")
    parser.add_argument("--output_dir", metavar="DIR", help="where to write (default: RUN/export)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: that of the base model's files)")
    parser.add_argument("--gguf", metavar="TYPE", help="also write a GGUF file: f16, bf16, q8_0, q4_k_m, ...")
    parser.add_argument("--llama_cpp", metavar="DIR", help="folder of llama.cpp (default: $LLAMA_CPP, PATH)")
    parser.add_argument("--base_model", metavar="MODEL", help="base model, in place of the one that the run names")
    parser.add_argument(
        "--qlora_base",
        default="dequantized",
        metavar="WHICH",
        help="a quantised base: merge into the weights it was trained on (dequantized, the default) or into the "
        "original ones (original)",
    )
    parser.add_argument("--dataset_name", metavar="DATA", help="held-out pairs (default: those the run held out)")
    parser.add_argument("--split", help="split of --dataset_name")
    parser.add_argument("--num_pairs", type=int, default=100, metavar="N", help="most pairs to score (default: 100)")
    parser.add_argument("--system", metavar="TEXT", help="system message for the Modelfile")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of pairs and of the intervals (default: 0)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")


def run(arguments: argparse.Namespace) -> int:
    """Export a run.

    Args:
        arguments: Parsed arguments.

    Returns:
        0.

    Raises:
        PreftuneError: Any foreseen failure.
    """
    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from preftune.cli.console import plain_warnings
    from preftune.export import ExportOptions, export
    from preftune.runs.failures import foreseen
    from preftune.runs.network import go_offline_if_unreachable

    console = Console(highlight=False)
    options = ExportOptions(**{name: value for name, value in vars(arguments).items() if name != "verb"})

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True, style="dim")

    disable_progress_bar()
    with plain_warnings(console), foreseen(SimpleNamespace(output_dir=options.output_dir or options.run)):
        offline = go_offline_if_unreachable([options.base_model, options.dataset_name])
        if offline:
            console.print(offline, style="yellow")
        show(export(options, say), console)
    return 0


def show(done: Export, console: Any) -> None:
    """Print what was made, what was lost, and how to go on.

    Args:
        done: What :func:`preftune.export.export` returned.
        console: A Rich console.
    """
    from rich.table import Table

    if done.stages:
        table = Table(
            title=f"What was lost, on {done.num_pairs} held-out pairs (accuracy of {done.reward}; 95 % intervals)",
            title_justify="left",
        )
        table.add_column("model", overflow="fold")
        for name in ("accuracy, %", "log-prob per token, nats", "largest"):
            table.add_column(name, justify="right", overflow="fold")
        for stage in done.stages:
            table.add_row(
                stage.name,
                _interval(stage.accuracy, 100, 1),
                "" if stage.change is None else _interval(stage.change, 1, 4, sign=True),
                "" if stage.largest is None else f"{stage.largest:.1g}",
            )
        console.print(table)
        if done.stages[-1].conclusion:
            first, last = done.stages[0].name, done.stages[-1].name
            console.print(f"{last} against {first}: {verdict(done)}", markup=False, soft_wrap=True)
    for note in done.notes:
        console.print(f"- {note}", style="yellow", markup=False, soft_wrap=True)
    console.print(f"saved {done.folder} ({done.dtype})", markup=False, soft_wrap=True)
    if done.gguf is not None:
        console.print(f"saved {done.gguf}", markup=False, soft_wrap=True)
    console.print("To serve it:")
    for program, command in done.commands:
        console.print(f"  {program + ':':<11}{command}", markup=False, soft_wrap=True)


def verdict(done: Export) -> str:
    """The loss in a sentence."""
    stage = done.stages[-1]
    change, accuracy = stage.accuracy_change, stage.change
    assert change is not None
    assert accuracy is not None
    if change["mean"] == 0 and change["low"] == change["high"] == 0:
        ranked = "every pair is ranked as before"
    else:
        ranked = f"accuracy changed by {_interval(change, 100, 1, sign=True)} points"
        if change["low"] <= 0 <= change["high"]:
            ranked += ", which may be chance"
    return f"{ranked}; {_interval(accuracy, 1, 4, sign=True)} nats per token"


def _interval(metric: Any, factor: float, digits: int, *, sign: bool = False) -> str:
    def one(name: str) -> str:
        value = factor * metric[name]
        if math.isnan(value):
            return "?"
        text = f"{value:{'+' if sign else ''}.{digits}f}"
        return text.lstrip("+-") if float(text) == 0 else text

    return f"{one('mean')} [{one('low')}, {one('high')}]"
