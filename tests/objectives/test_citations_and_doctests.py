"""BibTeX entries, and the examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys

import pytest

import preftune.objectives
from preftune.errors import ConfigError
from preftune.objectives import METHODS, PAPERS, bibtex
from preftune.objectives.papers import MODIFIER_PAPERS

MODULES = sorted(module.name for module in pkgutil.iter_modules(preftune.objectives.__path__))


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    loaded = importlib.import_module(f"preftune.objectives.{module}")
    assert doctest.testmod(loaded, raise_on_error=False).failed == 0


def test_there_are_docstring_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(f"preftune.objectives.{module}") for module in MODULES]
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) >= 15


@pytest.mark.parametrize("name", [*METHODS, *MODIFIER_PAPERS, *PAPERS])
def test_bibtex_entries_are_well_formed(name: str) -> None:
    entry = bibtex(name)
    assert entry.isascii()
    assert re.match(r"@misc\{[a-z]+\d{4}[a-z]+,\n", entry)
    assert entry.count("{") == entry.count("}")
    fields = dict(re.findall(r"^  (\w+) += \{(.*)\},?$", entry, flags=re.MULTILINE))
    assert {"title", "author", "year", "url"} <= set(fields)
    assert fields["title"].startswith("{")
    if "eprint" in fields:
        # An arXiv number starts with the two-digit year of its first version.
        assert re.fullmatch(r"\d{4}\.\d{5}", fields["eprint"])
        assert fields["year"] == "20" + fields["eprint"][:2]
        assert fields["url"] == f"https://arxiv.org/abs/{fields['eprint']}"
    assert all(len(author.split()) >= 2 for author in fields["author"].split(" and "))


def test_every_paper_is_cited_by_something() -> None:
    cited = {spec.bibtex_key for spec in METHODS.values()} | {paper.key for paper in MODIFIER_PAPERS.values()}
    assert cited == set(PAPERS)


def test_unknown_citation() -> None:
    with pytest.raises(ConfigError, match="did you mean simpo"):
        bibtex("simppo")


def test_docstrings_name_the_same_paper_as_the_table() -> None:
    for spec in METHODS.values():
        assert spec.function.__doc__ is not None
        if spec.paper.arxiv and spec.family != "sft":
            assert spec.paper.arxiv in spec.function.__doc__, spec.name
        for number in re.findall(r"eqs?\. ([\d.]*\d)", spec.equation):
            assert re.search(rf"eqs?\..*\b{re.escape(number)}\b", spec.function.__doc__), spec.name


def test_the_package_imports_torch_alone() -> None:
    """The mathematics stays usable without any training library."""
    code = (
        "import sys, preftune.objectives; "
        "print([m for m in ('transformers', 'accelerate', 'peft', 'datasets', 'trl') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
