"""The house rules that no linter knows."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import in_part

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "src").rglob("*.py"))


def pyproject() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return found


def requirements(table: dict[str, object]) -> dict[str, str]:
    project = table["project"]
    assert isinstance(project, dict)
    lists = [project["dependencies"], project["optional-dependencies"]["dev"]]
    return {re.split(r"[<>=!~\[; ]", line)[0].lower(): line for lines in lists for line in lines}


def test_constraints_pin_every_requirement_within_its_range() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    for name, line in requirements(pyproject()).items():
        assert name in pins, f"{name} is not pinned"
        assert Requirement(line).specifier.contains(pins[name]), line
    assert pins["torch"] == "2.13.0"
    assert pins["trl"] == "1.16.0"


def test_the_lowest_versions_are_those_promised() -> None:
    lines = (ROOT / "constraints-low.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = pyproject()["project"]
    assert isinstance(project, dict)
    assert pins == dict(line.split(">=") for line in project["dependencies"])


def test_no_package_index_is_named() -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run", ".pre-commit-config.yaml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"https?://|index-url|find-links|pypi|\.whl", text), name


@pytest.mark.parametrize(
    "target",
    ["setup", "demo", "test", "test-ci", "test-all", "test-extras", "test-low", "docs", "check", "bench", "help"],
)
def test_make_has_the_target_and_sets_up_first(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rule = re.search(rf"^{target}:(.*)##", makefile, re.MULTILINE)
    assert rule is not None
    assert target in ("help", "setup", "setup-low", "test-low") or "setup" in rule.group(1)
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"make {target} " in listed


def test_nothing_is_skipped_for_want_of_data_or_packages() -> None:
    skips = re.compile(r"pytest\.(?:skip|importorskip)\(|mark\.skip(?:if)?\b")
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("*.py")
        if path != Path(__file__) and skips.search(path.read_text(encoding="utf-8"))
    }
    # Two tests mount a file system of their own, which takes root; one limits memory, which takes Linux.
    assert found == {"tests/faults/test_faults.py", "tests/training/test_streams_memory.py"}


def test_the_default_tier_takes_some_parameter_sets_and_the_full_one_all() -> None:
    where = "tests/objectives/test_properties.py::test_only_the_difference_to_the_reference_counts"

    def collected(*options: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", where, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if "::" in line]

    every, some = collected(), collected("-m", "not slow")
    assert len(some) == 4 < len(every)
    assert set(some) < set(every)
    assert {every[0], every[-1]} <= set(some)


def test_parts_of_the_tests_are_all_of_them() -> None:
    names = [f"tests/a/test_b.py::test_{n}[{m}]" for n in range(60) for m in range(2)]
    parts = [{name for name in names if in_part(name, f"{k}/3")} for k in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert all(len(part) > 20 for part in parts)
    assert all(in_part(f"{name[:-3]}[0]", f"{k}/3") for k, part in enumerate(parts, 1) for name in part)


def test_ci_runs_what_contributors_run() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    commands = [line.split()[-1] for line in text.splitlines() if line.strip().startswith("make")]
    assert commands == ["setup", "check", "test-low", "test-zero", "test-ci"]


def test_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in readme
    assert "make test" in readme


def test_a_module_and_a_function_of_one_package_have_different_names() -> None:
    """Or ``from package import name`` means one or the other, depending on what was imported before."""
    twice = []
    for folder in {path.parent for path in MODULES}:
        modules = {path.stem for path in folder.glob("*.py")} | {
            path.parent.name for path in folder.glob("*/__init__.py")
        }
        for path in folder.glob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                # Each verb of the command line has a `main` or `run`: found by the table of verbs.
                verb = folder.name == "cli" and getattr(node, "name", None) in {"main", "run"}
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in modules and not verb:
                    twice.append(f"{path.relative_to(ROOT / 'src')}: {node.name}")
    assert not twice, sorted(twice)


def test_modules_and_functions_stay_small() -> None:
    """Modules of at most 400 lines, functions of at most 60 below their docstring."""
    long = []
    for path in MODULES:
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT / "src")
        if text.count("\n") > 400:
            long.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                if (node.end_lineno or 0) - body[0].lineno > 60:
                    long.append(f"{name}: {node.name}")
    assert not long, "split by meaning: " + ", ".join(long)


def test_version_is_said_once() -> None:
    import preftune

    project = pyproject()["project"]
    assert isinstance(project, dict)
    assert project["version"] == preftune.__version__
    assert f"## [{preftune.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_module_reaches_itself_by_its_imports() -> None:
    """Lazy imports and those for type checkers count too; a package stands for its ``__init__``."""
    names = {
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"): path
        for path in MODULES
    }
    needed: dict[str, set[str]] = {}
    for name, path in names.items():
        needed[name] = found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                asked = [f"{node.module}.{each.name}" for each in node.names]
                found |= {each if each in names else str(node.module) for each in asked}
            elif isinstance(node, ast.Import):
                found |= {each.name for each in node.names}
    graph = {name: found & names.keys() for name, found in needed.items()}
    assert sum(map(len, graph.values())) > 1000
    # Raises CycleError, which names the circle.
    graphlib.TopologicalSorter(graph).prepare()
