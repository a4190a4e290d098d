"""SECURITY.md names tests that exist, and nothing in the package unpacks archives or unpickles."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Modules that write files from names inside an archive, or run code while they read.
UNWANTED = {"tarfile", "zipfile", "pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"unpack_archive", "extractall"}


def test_every_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 10
    known = {
        name: path
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", path.read_text(encoding="utf-8"))
    }
    for row in rows:
        held = row.split("|")[-2]
        assert re.search(r"`[\w/.]+`", held), row
        for name in re.findall(r"`(test_\w+)`", held):
            assert name in known, name
        for name in re.findall(r"`(test_\w+\.py)`", held):
            assert (ROOT / "tests" / "security" / name).is_file(), name
        for name in re.findall(r"`(tests/[\w/.]+)`", held):
            assert (ROOT / name).exists(), name


def test_nothing_unpacks_an_archive_or_unpickles() -> None:
    """Members of an archive cannot lead out of a folder where nothing takes archives apart."""
    paths = sorted((ROOT / "src").rglob("*.py"))
    assert len(paths) > 100
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            taken = {module.partition(".")[0] for module in modules}
            assert not taken & UNWANTED, f"{path.name}: {taken & UNWANTED}"
            if isinstance(node, ast.Attribute):
                assert node.attr not in CALLS, f"{path.name}: {node.attr}"
                on_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
                assert not (on_torch and node.attr == "load"), f"{path.name}: torch.load"
