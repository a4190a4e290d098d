"""``preftune``: find the verb, run it, and turn foreseen failures into one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType
from typing import NoReturn

from preftune.cli.verbs import INTERRUPTED, SYNONYMS, TRAINING_VERBS, VERBS
from preftune.errors import ConfigError, PreftuneError, SetupError
from preftune.terminal.wrapping import wrapped
from preftune.version import __version__

# These read their arguments themselves: settings are the fields of classes whose import takes seconds.
_READ_THEMSELVES = frozenset({"advise", "data", "demo", "sweep", "eval", "run"})
# Several processes of these would do the same work and write the same files.
_ONE_PROCESS = frozenset({"run", "sweep", "data", "demo", "eval", "export", "chat", "ui"})
_INSTEAD = {
    "run": "write the settings with preftune advise --write FILE, then accelerate launch -m preftune dpo",
    "sweep": "start it without torchrun or accelerate launch, with --workers N",
}

__all__ = ["VERBS", "build_parser", "main"]


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
        epilog=wrapped(f"verbs:\n{verbs}\n\n`preftune VERB --help` lists what a verb takes."),
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
    if argv is None:
        sys.excepthook = _without_secrets
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
    except SystemExit as done:
        # What is drawn for terminals ends so where the reader has gone.
        if not isinstance(done.__context__, BrokenPipeError):
            raise
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


def _without_secrets(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback is a defect, and ends up in public reports of it: without the values that it quotes."""
    import traceback

    from preftune.config.secrets import redact

    print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


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
    if verb == "help":
        return _dispatch([*rest[:1], "--help"])
    if verb not in VERBS:
        close = [SYNONYMS[verb]] if verb in SYNONYMS else difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.6)
        raise ConfigError(
            f"unknown verb {verb!r}",
            where="command line",
            # The guess would be lost behind the list of all.
            allowed=None if close else ", ".join(VERBS),
            remedy=f"did you mean `preftune {close[0]}`? `preftune help` lists the verbs" if close else None,
        )
    if verb in TRAINING_VERBS:
        from preftune.cli import train

        return train.main(verb, rest)
    processes = os.environ.get("WORLD_SIZE", "1")
    if verb in _ONE_PROCESS and processes not in ("", "1") and not {"-h", "--help"} & set(rest):
        raise SetupError(
            f"preftune {verb} runs in one process, and a launcher has started several",
            where="WORLD_SIZE",
            value=processes,
            remedy=_INSTEAD.get(verb, "start it without torchrun or accelerate launch, or unset WORLD_SIZE"),
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
