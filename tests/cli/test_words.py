"""Words that people use are understood, or answered with the word that is meant."""

from __future__ import annotations

import pytest

from preftune.cli.main import main
from preftune.cli.verbs import SYNONYMS, VERBS


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("tune", "run"),
        ("train", "run"),
        ("merge", "export"),
        ("evaluate", "eval"),
        ("chta", "chat"),
        ("exprot", "export"),
        ("simpo", "cpo --loss_type simpo"),
        ("audit", "data audit"),
        ("filter", "data select"),
    ],
)
def test_a_verb_is_guessed(capsys: pytest.CaptureFixture[str], word: str, meant: str) -> None:
    assert main([word]) == 2
    error = capsys.readouterr().err
    assert f"did you mean `preftune {meant}`?" in error
    assert len(error) < 130


def test_no_guess_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyzzy"]) == 2
    error = capsys.readouterr().err
    assert "did you mean" not in error
    assert all(verb in error for verb in VERBS)


def test_every_guess_is_a_verb() -> None:
    assert {guess.split()[0] for guess in SYNONYMS.values()} <= {*VERBS, "--version"}
    assert not set(SYNONYMS) & set(VERBS)


@pytest.mark.parametrize("words", [["help"], ["help", "cite"], ["help", "recipes"]])
def test_help_is_a_verb_too(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.startswith(f"usage: preftune {words[1] if len(words) > 1 else 'VERB'}")


@pytest.mark.parametrize(
    ("name", "key"), [("dpo", "rafailov2023direct"), ("DPO", "rafailov2023direct"), ("cdpo", "rafailov2023direct")]
)
def test_a_method_is_cited_by_what_people_call_it(capsys: pytest.CaptureFixture[str], name: str, key: str) -> None:
    assert main(["cite", name]) == 0
    assert f"{{{key}," in capsys.readouterr().out


@pytest.mark.parametrize(("name", "method"), [("dpo", "sigmoid"), ("bco", "bco_pair"), ("ipo", "ipo")])
def test_a_method_is_explained_by_what_people_call_it(
    capsys: pytest.CaptureFixture[str], name: str, method: str
) -> None:
    assert main(["methods", name]) == 0
    out = capsys.readouterr().out
    assert f"{method} (" in out
    assert (f"{name} is loss_type {method}" in out) is (name != method)


def test_an_unknown_method_is_still_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cite", "nothing_like_it"]) == 2
    assert main(["methods", "nothing_like_it"]) == 2
