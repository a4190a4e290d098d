"""What is built holds all it needs, and is the same to the byte whoever builds it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "preftune"
EPOCH = 1_750_000_000
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md")
OTHERS = ("SECURITY.md", "constraints.txt", "Makefile")
BUILD = "from setuptools import build_meta as b; import sys; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"


def package_files() -> set[str]:
    """Everything in the package that is no by-product of running it."""
    return {
        path.relative_to(ROOT / "src").as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def build(kind: str, place: Path, *, mask: int, time: int) -> Path:
    """Build from a copy of the tree, as a checkout of another person has it."""
    tree, out = place / "tree", place / "dist"
    out.mkdir(parents=True)
    tree.mkdir()
    for name in (*FILES, *OTHERS):
        shutil.copy(ROOT / name, tree / name)
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
    for name in ("src", "tests", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, tree / name, ignore=leave_out)
    for path in tree.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        os.utime(path, (time, time))
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)],
        cwd=tree,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (made,) = out.iterdir()
    return made


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_kind_of_file_in_the_package_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    covered = set()
    for package, patterns in declared["package-data"].items():
        folder = ROOT / "src" / package.replace(".", "/")
        for pattern in patterns:
            found = {path.relative_to(ROOT / "src").as_posix() for path in folder.glob(pattern) if path.is_file()}
            assert found, f"{package}: {pattern} matches nothing"
            covered |= found
    assert {name for name in package_files() if not name.endswith(".py")} == covered
    # Folders of modules are packages, or setuptools would leave them out.
    for name in package_files():
        if name.endswith(".py"):
            assert (ROOT / "src" / name).with_name("__init__.py").is_file(), name


def test_the_wheel_holds_the_package_and_nothing_else_and_is_reproducible(tmp_path: Path) -> None:
    first = build("wheel", tmp_path / "one", mask=0o022, time=EPOCH - 5000)
    second = build("wheel", tmp_path / "two", mask=0o077, time=EPOCH + 5000)
    assert digest(first) == digest(second)
    names = set(zipfile.ZipFile(first).namelist())
    assert {name for name in names if not name.startswith("preftune-")} == package_files()
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_distribution_is_whole_and_reproducible(tmp_path: Path) -> None:
    first = build("sdist", tmp_path / "one", mask=0o022, time=EPOCH - 5000)
    second = build("sdist", tmp_path / "two", mask=0o077, time=EPOCH + 5000)
    assert digest(first) == digest(second)
    with tarfile.open(first) as archive:
        entries = archive.getmembers()
    top = first.name.removesuffix(".tar.gz")
    assert all(entry.isfile() or entry.isdir() for entry in entries)
    assert all(entry.name == top or entry.name.startswith(f"{top}/") for entry in entries)
    assert all((entry.uid, entry.gid, entry.uname, entry.mtime) == (0, 0, "", EPOCH) for entry in entries)
    names = {entry.name.removeprefix(f"{top}/") for entry in entries if entry.isfile()}
    assert {f"src/{name}" for name in package_files()} <= names
    assert {*FILES, *OTHERS} <= names
    tests = {f"tests/{path.relative_to(ROOT / 'tests').as_posix()}" for path in (ROOT / "tests").rglob("*.py")}
    assert tests <= names
    assert not [name for name in names if "__pycache__" in name or "/results/" in name]


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """Installed, not imported from a checkout; its dependencies are lent by this environment."""
    wheel = build("wheel", tmp_path / "built", mask=0o022, time=EPOCH)
    home = tmp_path / "home"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (packages,) = home.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, but no .pth files inside it are read: no checkout comes along.
    lent = "\n".join(path for path in map(str, sys.path) if path.endswith("site-packages"))
    (packages / "lent.pth").write_text(lent + "\n", encoding="utf-8")
    environment = {**os.environ, "HOME": str(tmp_path), "PREFTUNE_CACHE": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)
    where = [str(python), "-I", "-c", "import preftune; print(preftune.__file__)"]
    said = subprocess.run(where, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout
    assert Path(said.strip()).is_relative_to(home)
    out = tmp_path / "out"
    command = [str(home / "bin" / "preftune"), "demo", "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "demo.json").is_file()
