"""Which results were made by code that has changed since: ``python -m benchmarks.stale``.

A result file records a stamp: the files that its figures depend on, a digest of the code they held (comments,
docstrings, the words of errors and empty lines do not count), and the day. What has no stamp, or one that no longer
fits, is stale: its figures may still be right, and nothing here says that they are.

``--docs`` checks the documents instead: every result file that they name is there, and every page with figures in a
table names one, or says that they are not kept.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: Key of the stamp in a result file.
KEY = "sources"
#: What nearly every measurement of a training depends on; of the data, the way from rows to tokens. How a file's layout
#: is recognised is left out: a row is read as it was before, or the run stops.
ENGINE = (
    "src/preftune/kernels/**/*.py",
    "src/preftune/models/*.py",
    "src/preftune/objectives/*.py",
    "src/preftune/packing/*.py",
    "src/preftune/references/*.py",
    "src/preftune/training/**/*.py",
    *(
        f"src/preftune/data/{name}.py"
        for name in (
            "assistant", "batches", "pairing", "preference", "rendering", "sft", "sft_tokens", "tokenise",
            "transcripts", "truncation", "unpaired",
        )
    ),
)  # fmt: skip
#: Pages whose figures are nobody's measurement: settings, limits, sizes of files, hand calculations.
WITHOUT_RESULTS = frozenset(
    {"design.md", "first_hour.md", "hardware.md", "migration.md", "recipes.md", "report.md", "serve.md"}
)
_FIGURE = re.compile(r"^\|.*\b\d+\.\d+\b.*\|", re.MULTILINE)
_NAMED = re.compile(r"benchmarks/results(?:/[\w./-]*\w)?")
#: What a page says of figures that it gives without a file.
_UNKEPT = "not kept as"


def files_of(patterns: Sequence[str]) -> list[Path]:
    """Files under the repository's root that match, sorted."""
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})


def digest(patterns: Sequence[str]) -> str:
    """Digest of names and code of all files that match."""
    found = hashlib.sha256()
    for path in files_of(patterns):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        code = code_of(path.read_text(encoding="utf-8")) if path.suffix == ".py" else path.read_text(encoding="utf-8")
        found.update(hashlib.sha256(code.encode()).digest())
    return found.hexdigest()


def code_of(text: str) -> str:
    """A module's text without comments, docstrings, ``raise`` statements and empty lines.

    What raises ends a measurement: it has no figures, whatever the error says.
    """
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    with_docstrings = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        words: ast.stmt | None = node if isinstance(node, ast.Raise) else None
        if isinstance(node, with_docstrings) and ast.get_docstring(node) is not None:
            words = node.body[0]
        if words is not None:
            for row in range(words.lineno, (words.end_lineno or words.lineno) + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def stamp(*patterns: str) -> dict[str, Any]:
    """What a result file records under :data:`KEY`.

    Args:
        patterns: Files that its figures depend on, as globs from the repository's root.

    Raises:
        ValueError: A pattern matches nothing, so that no change would be seen.
    """
    for pattern in patterns:
        if not files_of([pattern]):
            raise ValueError(f"{pattern} matches no file")
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"patterns": list(patterns), "digest": digest(patterns), "date": today}


def why_stale(content: Any) -> str | None:
    """Why the figures of a result file may not be those of today's code; ``None`` where they are."""
    made = None
    if isinstance(content, dict):
        # Most results record it with the machine that they were made on.
        made = content.get(KEY) or (content.get("machine") or {}).get(KEY)
    if not isinstance(made, dict) or not made.get("patterns") or not made.get("digest"):
        return "no record of what it was made with"
    if digest(made["patterns"]) != made["digest"]:
        return f"the code has changed since {made.get('date', 'it was made')}"
    return None


def stale() -> Iterator[tuple[str, str]]:
    """Result files that are stale, each with the reason."""
    for path in sorted(RESULTS.rglob("*.json")):
        why = why_stale(json.loads(path.read_text(encoding="utf-8")))
        if why is not None:
            yield path.relative_to(ROOT).as_posix(), why


def faults(root: Path = ROOT) -> Iterator[str]:
    """What is wrong with figures in the documents."""
    for page in [*sorted((root / "docs").glob("*.md")), root / "README.md"]:
        text = page.read_text(encoding="utf-8")
        name = page.relative_to(root).as_posix()
        named = sorted(set(_NAMED.findall(text)))
        for result in named:
            if not (root / result).exists():
                yield f"{name}: {result} does not exist"
        if not named and _UNKEPT not in text and page.name not in WITHOUT_RESULTS and _FIGURE.search(text):
            yield f"{name}: has figures in a table and names no result file"


def main(argv: list[str] | None = None) -> int:
    """Lists what is stale, or checks the documents.

    Returns:
        0, or 1 where the documents name what is not there.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="check that documents name result files that exist")
    options = parser.parse_args(argv)
    if options.docs:
        found = list(faults())
        print("\n".join(found), end="\n" if found else "")
        return 1 if found else 0
    for path, why in stale():
        print(f"{path}: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
