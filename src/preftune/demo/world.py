"""A small world of product reviews with a sentiment reward that is known exactly.

A review opens with a neutral sentence about one product and goes on with two to four sentences of opinion::

    I bought this kettle in March. The lid is very sturdy, but the cable looks cheap. I would buy it again.

Prompts are openings, some with the first words of the next sentence. The ground truth `World.reward` is a function of
the text alone, in [0, 1]:

1. Every sentence after the opening has a valence in [-1, 1]. A clause is worth what `preftune.demo.lexicon` says:
   valence x degree, x -0.5 when negated. Two clauses joined by *and* are averaged; after *but*, and around *although*,
   the main clause weighs two thirds.
2. Whatever is not a sentence of this world is worth -1: unknown or repeated words, a part that the product does not
   have, a sentence that is cut off.
3. What has been said already is worth nothing the second time (valence 0): each part, and each kind of verdict, counts
   once. Repeating praise therefore dilutes the mean.
4. The reward is ``0.5 + 0.5 * mean valence``; each sentence short of two counts as one of valence -1.

So garbage, an empty answer and cut-off text score 0, and "great great great" is no sentence. No text scores above
`World.MAX_REWARD`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from preftune.demo import lexicon
from preftune.errors import ConfigError

Split = Literal["train", "heldout"]
Rng = np.random.Generator

# Three in ten openings are kept for evaluation; neither corpus nor training prompts contain them.
_HELDOUT_TENTHS = 3
_MIN_SENTENCES = 2
_NONSENSE = -1.0


@dataclass(frozen=True)
class Clause:
    """One opinion or fact.

    Attributes:
        text: The clause in lower-case sentence position, without a stop.
        subject: What the opinion is about (a part or a kind of verdict); None for a fact.
        valence: Its worth in [-1, 1].
    """

    text: str
    subject: str | None
    valence: float


def _alternatives(words: Iterable[str]) -> str:
    # Longest first, so that no alternative hides behind its own prefix.
    return "|".join(sorted((re.escape(word) for word in words), key=len, reverse=True))


_PART = re.compile(
    rf"the (?P<part>\w+) (?:"
    rf"(?:{_alternatives(lexicon.COPULAS)}|(?P<negated>{_alternatives(lexicon.COPULAS.values())}))"
    rf"(?: (?P<degree>{_alternatives(lexicon.DEGREES)}))? (?P<adjective>{_alternatives(lexicon.ADJECTIVES)})"
    rf"|(?P<predicate>{_alternatives(lexicon.PART_PREDICATES)}))"
)
_OPENING = re.compile(
    "|".join(
        re.escape(template)
        .replace(r"\{product\}", rf"(?P<product{index}>{_alternatives(lexicon.PRODUCTS)})")
        .replace(r"\{time\}", f"(?:{_alternatives(lexicon.TIMES)})")
        .replace(r"\{person\}", f"(?:{_alternatives(lexicon.PEOPLE)})")
        for index, template in enumerate(lexicon.OPENINGS)
    )
)


def part_clause(
    part: str, adjective: str, copula: str = "is", degree: str | None = None, negated: bool = False
) -> Clause:
    """A clause of the form "the lid is not very sturdy", with its valence."""
    words = ["the", part, lexicon.COPULAS[copula] if negated else copula, *([degree] if degree else []), adjective]
    valence = lexicon.ADJECTIVES[adjective] * (lexicon.DEGREES[degree] if degree else 1.0)
    return Clause(" ".join(words), part, valence * (lexicon.NEGATION if negated else 1.0))


def read_clause(text: str, product: str) -> Clause | None:
    """The clause that `text` is in a review of `product`, or None where it is no clause of this world."""
    if text in lexicon.VERDICTS:
        return Clause(text, *lexicon.VERDICTS[text])
    if text in lexicon.FACTS:
        return Clause(text, None, 0.0)
    match = _PART.fullmatch(text)
    if match is None or match["part"] not in lexicon.PRODUCTS[product]:
        return None
    if match["predicate"]:
        return Clause(text, match["part"], lexicon.PART_PREDICATES[match["predicate"]])
    clause = part_clause(
        match["part"], match["adjective"], degree=match["degree"], negated=match["negated"] is not None
    )
    return Clause(text, clause.subject, clause.valence)


def _decapitalise(sentence: str) -> str:
    return sentence if sentence.startswith("I ") else sentence[0].lower() + sentence[1:]


def _capitalise(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def read_sentence(sentence: str, product: str) -> list[tuple[Clause, float]] | None:
    """Splits a sentence (without its stop) into clauses and their weights, which sum to 1.

    Returns:
        One or two (clause, weight) pairs, or None where the sentence is not one of this world.
    """
    if not sentence or sentence != _capitalise(sentence):
        return None
    body = _decapitalise(sentence)
    # The main clause weighs two thirds where the other one concedes something.
    if body.startswith("although ") and ", " in body:
        halves, weights = body.removeprefix("although ").split(", ", 1), (1 / 3, 2 / 3)
    elif ", but " in body:
        halves, weights = body.split(", but ", 1), (1 / 3, 2 / 3)
    elif ", although " in body:
        halves, weights = body.split(", although ", 1), (2 / 3, 1 / 3)
    elif " and " in body:
        halves, weights = body.split(" and ", 1), (0.5, 0.5)
    else:
        halves, weights = [body], (1.0, 0.0)
    clauses = [read_clause(half, product) for half in halves]
    known = [(clause, weight) for clause, weight in zip(clauses, weights, strict=False) if clause is not None]
    return known if len(known) == len(halves) else None


class World:
    """Corpus, prompts and ground truth of the demo.

    Args:
        seed: Drives corpus and prompts; the language and the reward are the same for every seed.
    """

    MAX_REWARD: ClassVar[float] = 0.5 + 0.5 * max(
        max(lexicon.ADJECTIVES.values()) * max(lexicon.DEGREES.values()),
        max(lexicon.PART_PREDICATES.values()),
        max(valence for _, valence in lexicon.VERDICTS.values()),
    )

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def corpus(self, num_reviews: int) -> list[str]:
        """Reviews whose opinions lean neither way on average.

        Args:
            num_reviews: How many reviews; a larger corpus begins with a smaller one.

        Returns:
            Texts, one review each.
        """
        rng = np.random.default_rng([self.seed, 1])
        openings = [(text, product) for text, product in _all_openings() if _split_of(text) == "train"]
        reviews = []
        for _ in range(num_reviews):
            opening, product = openings[int(rng.integers(len(openings)))]
            reviews.append(f"{opening} {_write_body(rng, product)}")
        return reviews

    def prompts(self, num_prompts: int, split: Split = "train") -> list[str]:
        """Distinct openings of reviews, two in three with the first words of the next sentence.

        Args:
            num_prompts: How many prompts.
            split: "train", or "heldout" for openings that neither the corpus nor training prompts contain.

        Returns:
            Texts without trailing space.

        Raises:
            ConfigError: The split has fewer prompts than asked for.
        """
        candidates: list[str] = []
        for opening, product in _all_openings():
            if _split_of(opening) == split:
                parts = lexicon.PRODUCTS[product]
                chosen = (zlib.crc32(opening.encode()) // 10) % len(parts)
                candidates += [opening, f"{opening} The {parts[chosen]}", f"{opening} The {parts[chosen - 1]} is"]
        if num_prompts > len(candidates):
            raise ConfigError(
                "the review world has too few prompts",
                where=f"prompts of split {split!r}",
                value=num_prompts,
                allowed=f"at most {len(candidates)}",
            )
        rng = np.random.default_rng([self.seed, 2, split == "heldout"])
        return [candidates[pick] for pick in rng.permutation(len(candidates))[:num_prompts]]

    def valences(self, text: str) -> list[float]:
        """The valence of each sentence after the opening (rules 1 to 3 of the module's description).

        Args:
            text: A whole review, opening included.

        Returns:
            One number in [-1, 1] per sentence; nonsense is -1. Empty where the opening is not one of this world.
        """
        opening = _OPENING.match(text)
        if opening is None:
            return []
        product = next(name for name in opening.groups() if name)
        rest = text[opening.end() :]
        if not rest:
            return []
        # Sentences are set off by exactly one space; the last must end in a stop.
        sentences = rest.split(".")
        unfinished = sentences.pop() != ""
        said: set[str] = set()
        values = [_sentence_valence(sentence, product, said) for sentence in sentences]
        return values + [_NONSENSE] * unfinished

    def reward(self, text: str) -> float:
        """Ground-truth sentiment of a whole review.

        Args:
            text: Prompt and completion together.

        Returns:
            A number in [0, 1]; 0 for anything that is not a review.
        """
        values = self.valences(text)
        values = values + [_NONSENSE] * max(0, _MIN_SENTENCES - len(values))
        return 0.5 + 0.5 * sum(values) / len(values)

    def grammatical_share(self, text: str) -> float:
        """Share of the sentences after the opening that belong to this world; 0 where there are none."""
        values = self.valences(text)
        return sum(value > _NONSENSE for value in values) / len(values) if values else 0.0


def _sentence_valence(sentence: str, product: str, said: set[str]) -> float:
    clauses = read_sentence(sentence[1:], product) if sentence.startswith(" ") else None
    if clauses is None:
        return _NONSENSE
    total = 0.0
    for clause, weight in clauses:
        if clause.subject is not None and clause.subject not in said:
            total += weight * clause.valence
            said.add(clause.subject)
    return total


def _all_openings() -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for template in lexicon.OPENINGS:
        for product in lexicon.PRODUCTS:
            for time in lexicon.TIMES:
                for person in lexicon.PEOPLE:
                    found[template.format(product=product, time=time, person=person)] = product
    return list(found.items())


def _split_of(opening: str) -> Split:
    # A checksum, not a draw: an opening stays on its side whatever the seed.
    return "heldout" if zlib.crc32(opening.encode()) % 10 < _HELDOUT_TENTHS else "train"


def _write_body(rng: Rng, product: str) -> str:
    attitude = float(rng.beta(0.5, 0.5))
    free_parts = list(rng.permutation(lexicon.PRODUCTS[product]))
    free_verdicts = list(rng.permutation(["feeling", "advice", "price", "rival"]))
    sentences = []
    for index in range(int(rng.integers(2, 5))):
        # A review starts with a part, as the longer prompts do; later sentences vary.
        kind = 0.0 if index == 0 else float(rng.random())
        if kind < 0.65 and free_parts:
            first = _write_part(rng, str(free_parts.pop()), attitude)
        elif kind < 0.92 and free_verdicts:
            first = _write_verdict(rng, str(free_verdicts.pop()), attitude)
        else:
            sentences.append(str(rng.choice(lexicon.FACTS)))
            continue
        if rng.random() < 0.4 and free_parts:
            sentences.append(_join(rng, first, _write_part(rng, str(free_parts.pop()), attitude), opens=index == 0))
        else:
            sentences.append(first.text)
    return " ".join(f"{_capitalise(sentence)}." for sentence in sentences)


def _join(rng: Rng, first: Clause, second: Clause, opens: bool) -> str:
    if first.valence * second.valence > 0:
        return f"{first.text} and {second.text}"
    form = int(rng.integers(2 if opens else 3))
    if form == 0:
        return f"{first.text}, but {second.text}"
    if form == 1:
        return f"{first.text}, although {second.text}"
    return f"although {first.text}, {second.text}"


def _write_part(rng: Rng, part: str, attitude: float) -> Clause:
    wanted = rng.random() < attitude
    if rng.random() < 0.25:
        choices = [text for text, valence in lexicon.PART_PREDICATES.items() if (valence > 0) == wanted]
        predicate = str(rng.choice(choices))
        return Clause(f"the {part} {predicate}", part, lexicon.PART_PREDICATES[predicate])
    negated = rng.random() < 0.2
    degree = str(rng.choice(list(lexicon.DEGREES))) if rng.random() < 0.45 else None
    choices = [text for text, valence in lexicon.ADJECTIVES.items() if (valence > 0) == (wanted != negated)]
    return part_clause(part, str(rng.choice(choices)), str(rng.choice(list(lexicon.COPULAS))), degree, bool(negated))


def _write_verdict(rng: Rng, kind: str, attitude: float) -> Clause:
    wanted = rng.random() < attitude
    choices = [text for text, (about, valence) in lexicon.VERDICTS.items() if about == kind and (valence > 0) == wanted]
    text = str(rng.choice(choices))
    return Clause(text, *lexicon.VERDICTS[text])
