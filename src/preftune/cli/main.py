"""``preftune``: find the verb, run it, and turn foreseen failures into one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from preftune import __version__
from preftune.errors import ConfigError, PreftuneError, SetupError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect it."""

VERBS: dict[str, str] = {
    "sft": "supervised fine-tuning on completions or conversations",
    "dpo": "preference optimisation on pairs (DPO and its family)",
    "orpo": "odds-ratio preference optimisation on pairs, without a reference",
    "cpo": "contrastive preference optimisation and SimPO on pairs, without a reference",
    "kto": "learning from single answers labelled good or bad",
    "eval": "accuracy, calibration, KL, samples and comparisons of a model on held-out pairs, with intervals",
    "data": "look at prepared rows: prompt, chosen, rejected, and what is trained on",
    "advise": "settings with reasons, risks of a configuration, memory and time, before anything is trained",
    "report": "write one HTML page about runs and sweeps: curves, samples, maps, settings",
    "ui": "show runs and sweeps live in the browser of this machine",
    "methods": "list the methods with formula, settings and paper",
    "recipes": "list, show or copy the published recipes",
    "export": "merge a run into a model that others can load: safetensors, GGUF, Ollama, vLLM; and say what was lost",
    "chat": "talk with a tuned model and its reference side by side",
    "cache": "show or clear the stored reference log-probs",
    "sweep": "search over settings: trials that share model, tokens and reference, and the sweet spot",
    "cite": "print BibTeX for the methods of a run",
    "demo": "teach a small model to write friendlier reviews, in minutes, without downloads",
}

# These read their arguments themselves: settings are the fields of classes whose import takes seconds.
_READ_THEMSELVES = frozenset({"sft", "dpo", "orpo", "cpo", "kto", "advise", "data", "demo", "sweep", "eval"})


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are errors like all others, one line long."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            ConfigError: Always.
        """
        where = f"`{self.prog}`" if " " in self.prog else "command line"
        raise ConfigError(message, where=where, remedy=f"see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """The outermost parser: verbs and one line for each, nothing imported."""
    width = max(map(len, VERBS)) + 2
    verbs = "\n".join(f"  {name:<{width}}{text}" for name, text in VERBS.items())
    parser = OneLineParser(
        prog="preftune",
        usage="preftune VERB [--config FILE.yaml] [--name value ...]",
        description="Offline preference optimisation of language models.",
        epilog=f"verbs:\n{verbs}\n\n`preftune VERB --help` lists what a verb takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"preftune {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; ``sys.argv[1:]`` by default.

    Returns:
        The exit code: 0, the code of the error's kind, or 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A formula should not end the program where the terminal has no letter for it.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")
    try:
        code = _reported(arguments)
        # Now, and not while Python exits, where nobody could say what went wrong.
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, for example `head`, has gone.
        _drop_output()
        return 0
    except OSError as error:
        if not _output_fails():
            raise
        _drop_output()
        why = f"cannot write ({error.strerror})"
        failure = SetupError(why, where="standard output", remedy="free some space, or send it elsewhere")
        print(f"preftune: {failure}", file=sys.stderr)
        return failure.exit_code


def _reported(arguments: list[str]) -> int:
    """Run the verb; what was foreseen is said in one line."""
    try:
        return _dispatch(arguments)
    except PreftuneError as error:
        from preftune.config.secrets import redact

        # Every process of a distributed run finds the same mistake in its settings: one of them says so.
        if not (isinstance(error, ConfigError) and os.environ.get("RANK", "0") != "0"):
            # Loaders quote addresses, and an address may hold a password.
            print(f"preftune: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("preftune: interrupted", file=sys.stderr)
        return INTERRUPTED


def _output_fails() -> bool:
    """Whether it is standard output that takes no more: the error names no file, and another line tells."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _drop_output() -> None:
    """Let what is left go nowhere; Python would complain again while closing the stream."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb.startswith("-"):
        try:
            parser.parse_args(arguments)
        except SystemExit as done:
            return int(done.code or 0)
        raise ConfigError("no verb", where="command line", allowed=", ".join(VERBS))
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
        raise ConfigError(
            f"unknown verb {verb!r}",
            where="command line",
            allowed=", ".join(VERBS),
            remedy=f"did you mean `preftune {close[0]}`?" if close else None,
        )
    module = import_module(f"preftune.cli.{verb}")
    if verb in _READ_THEMSELVES:
        code: int | None = module.main(rest)
    else:
        code = _run_argparse(module, arguments)
    return code or 0


def _run_argparse(module: object, arguments: list[str]) -> int:
    """Let the verb's module add its own arguments, and only its own."""
    parser = OneLineParser(prog="preftune")
    subparsers = parser.add_subparsers(dest="verb", required=True, parser_class=OneLineParser)
    module.add_parser(subparsers)  # type: ignore[attr-defined]
    try:
        parsed = parser.parse_args(arguments)
    except SystemExit as done:  # --help
        return int(done.code or 0)
    result: int | None = module.run(parsed)  # type: ignore[attr-defined]
    return result or 0
