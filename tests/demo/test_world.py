"""The review world: determinism, and its ground truth by hand."""

from __future__ import annotations

import re

import pytest

from preftune.demo import lexicon
from preftune.demo.world import World
from preftune.errors import ConfigError

OPENING = "I bought this kettle in March."


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.mark.parametrize(
    ("body", "valences"),
    [
        # superb .65; very x 1.25
        (" The lid is very superb. I love it.", [0.8125, 0.9]),
        # Negation: x -.5
        (" The lid is not terrible. The cable does not feel really good.", [0.3, -0.24]),
        # "but": main clause second, two thirds
        (" The lid is good, but the base fell apart. I like it.", [0.4 / 3 - 1.6 / 3, 0.5]),
        # "although" after and before the main clause
        (" The lid is good, although the base fell apart. Although I hate it, the spout is good.", [0, -0.3 + 0.8 / 3]),
        # "and": mean; facts are worth nothing
        (" The lid is good and the base is bad. It came in a brown box.", [0.0, 0.0]),
        # A second word on the same part, or of the same kind of verdict, counts nothing
        (" The lid is good. The lid is superb. I love it. I like it.", [0.4, 0, 0.9, 0]),
        (" The lid is good and the lid is superb. I love it.", [0.2, 0.9]),
    ],
)
def test_valences_by_hand(world: World, body: str, valences: list[float]) -> None:
    assert world.valences(OPENING + body) == pytest.approx(valences, abs=1e-12)
    assert world.reward(OPENING + body) == pytest.approx(0.5 + 0.5 * sum(valences) / len(valences), abs=1e-12)


@pytest.mark.parametrize(
    "body",
    [
        " The lid is great great great. The lid is great great great.",
        " Great great great great. Great.",
        " The lid is good The cable is good",
        " the lid is superb. i love it.",
        " The lens is superb. The keyboard is superb.",
        "  The lid is superb.  I love it.",
        " The lid is superb and. Superb the lid is.",
        " The lid is very. The lid is.",
        "",
        " \n",
        " " + "I love it" * 20,
        " \U0001f600\U0001f600.",
    ],
)
def test_garbage_scores_nothing(world: World, body: str) -> None:
    assert world.reward(OPENING + body) == 0.0
    assert world.grammatical_share(OPENING + body) == 0.0


def test_one_bad_sentence_costs(world: World) -> None:
    good = OPENING + " The lid is very superb. I love it."
    assert world.reward(good) > world.reward(good + " The the.") > 0
    assert world.reward(good[:-1]) < world.reward(good)
    # One sentence alone owes another.
    assert world.reward(OPENING + " I love it.") == pytest.approx(0.5 + 0.5 * (0.9 - 1) / 2)


def test_repetition_never_pays(world: World) -> None:
    text = OPENING + " The lid is truly superb. I love it."
    for _ in range(5):
        longer = text + " The lid is truly superb."
        assert world.reward(longer) < world.reward(text)
        text = longer


def test_text_without_a_known_opening_scores_nothing(world: World) -> None:
    assert world.reward("The lid is superb. I love it.") == 0.0
    assert world.reward("I bought this spaceship in March. I love it. It is worth every cent.") == 0.0


def test_no_text_scores_above_the_bound(world: World) -> None:
    best = OPENING + " The lid is remarkably superb. The cable looks remarkably wonderful."
    assert world.reward(best) == pytest.approx(World.MAX_REWARD) == pytest.approx(0.9875)


def test_corpus_is_grammatical_deterministic_and_balanced(world: World) -> None:
    corpus = world.corpus(1500)
    assert corpus == World(0).corpus(1500)
    assert corpus[:100] == world.corpus(100)
    assert corpus != World(1).corpus(1500)
    assert all(world.grammatical_share(text) == 1.0 for text in corpus)
    rewards = [world.reward(text) for text in corpus]
    assert 0.45 < sum(rewards) / len(rewards) < 0.55
    assert min(rewards) < 0.15
    assert max(rewards) > 0.85
    assert len(set(corpus)) > 1450


def test_every_word_of_the_lexicon_is_used(world: World) -> None:
    words = set(re.findall(r"\w+", " ".join(world.corpus(3000)).lower()))
    phrases = [*lexicon.ADJECTIVES, *lexicon.DEGREES, *lexicon.VERDICTS, *lexicon.PART_PREDICATES, *lexicon.FACTS]
    parts = [part for parts in lexicon.PRODUCTS.values() for part in parts]
    assert set(re.findall(r"\w+", " ".join([*phrases, *parts, *lexicon.COPULAS.values()]).lower())) <= words


def test_prompts_are_distinct_and_held_out_ones_are_fresh(world: World) -> None:
    train, heldout = world.prompts(3000), world.prompts(1000, "heldout")
    assert len(set(train)) == 3000
    assert train == World(0).prompts(3000)
    assert train[:10] == world.prompts(10)
    openings = {prompt[: prompt.index(".") + 1] for prompt in heldout}
    assert openings.isdisjoint(prompt[: prompt.index(".") + 1] for prompt in train)
    assert openings.isdisjoint(text[: text.index(".") + 1] for text in world.corpus(2000))
    assert not any(prompt.endswith(" ") for prompt in train)
    assert world.reward(f"{OPENING} The lid is" + " superb. I love it.") > 0.8


def test_too_many_prompts_are_refused(world: World) -> None:
    with pytest.raises(ConfigError, match=r"too few prompts; got 1000000; allowed: at most \d+"):
        world.prompts(10**6)
