"""Preference pairs: two completions of one prompt, sampled from a model and labelled by the ground truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import expit

from preftune.demo.world import Split, World
from preftune.errors import ConfigError
from preftune.evaluation.sampling import sample_completions

LabelRule = Literal["hard", "bradley_terry"]

# Longer than 99.9 % of the corpus; what runs past it is cut off and scores accordingly.
MAX_NEW_TOKENS = 96


@dataclass(frozen=True)
class Pair:
    """One labelled pair.

    Attributes:
        prompt: Opening of a review.
        chosen: Completion that the label prefers.
        rejected: The other completion.
        reward_chosen: Ground-truth reward of prompt and chosen together.
        reward_rejected: The same for rejected; the higher of the two where noise turned the label round.
        flipped: Whether `label_noise` turned the label round.
    """

    prompt: str
    chosen: str
    rejected: str
    reward_chosen: float
    reward_rejected: float
    flipped: bool

    def row(self) -> dict[str, str]:
        """The three columns that a trainer gets to see."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


def make_pairs(
    model: Any,
    tokenizer: Any,
    world: World,
    num_prompts: int,
    seed: int,
    label_noise: float = 0.0,
    *,
    split: Split = "train",
    label_rule: LabelRule = "hard",
    sharpness: float = 10.0,
    batch_size: int = 256,
) -> list[Pair]:
    """Samples two completions per prompt and labels them.

    The same seed gives the same completions whatever the noise, and a larger noise flips the pairs of a smaller one and
    more: experiments over noise levels differ in nothing else.

    Args:
        model: Sampled at temperature 1.
        tokenizer: Its tokenizer.
        world: Gives prompts and ground truth.
        num_prompts: One pair per prompt, less those without a preference.
        seed: Of samples and labels.
        label_noise: Share of pairs whose label is turned round, rounded to whole pairs.
        split: Prompts to draw from.
        label_rule: "hard" prefers the higher reward; "bradley_terry" prefers y1 over y2 with probability
            ``sigmoid(sharpness * (r1 - r2))``.
        sharpness: Of the Bradley-Terry labels.
        batch_size: Completions sampled at once.

    Returns:
        Pairs in the order of the prompts. Prompts are left out where both rewards are equal or a completion is empty.

    Raises:
        ConfigError: A setting is out of range, or the world has too few prompts.
    """
    if not 0 <= label_noise <= 1:
        raise ConfigError("not a share", where="label_noise", value=label_noise, allowed="0 to 1")
    if label_rule not in ("hard", "bradley_terry"):
        raise ConfigError("unknown rule", where="label_rule", value=label_rule, allowed="hard, bradley_terry")
    prompts = world.prompts(num_prompts, split)
    samples = sample_completions(
        model, tokenizer, prompts, num_samples=2, max_new_tokens=MAX_NEW_TOKENS, seed=seed, batch_size=batch_size
    )
    draws = np.random.default_rng([seed, 3]).random(num_prompts)
    labelled: list[Pair] = []
    for index, prompt in enumerate(prompts):
        first, second = (sample.text for sample in samples[2 * index : 2 * index + 2])
        rewards = world.reward(prompt + first), world.reward(prompt + second)
        if rewards[0] == rewards[1] or not first.strip() or not second.strip():
            continue
        gap = rewards[0] - rewards[1]
        first_wins = gap > 0 if label_rule == "hard" else draws[index] < expit(sharpness * gap)
        if first_wins:
            labelled.append(Pair(prompt, first, second, rewards[0], rewards[1], False))
        else:
            labelled.append(Pair(prompt, second, first, rewards[1], rewards[0], False))
    order = np.random.default_rng([seed, 4]).permutation(len(labelled))
    for position in order[: round(label_noise * len(labelled))]:
        pair = labelled[position]
        labelled[position] = Pair(
            pair.prompt, pair.rejected, pair.chosen, pair.reward_rejected, pair.reward_chosen, True
        )
    return labelled


def write_pairs(pairs: Sequence[Pair], path: Path) -> None:
    """Writes pairs as JSON lines, rewards and flips included."""
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps(asdict(pair), ensure_ascii=False) + "\n")
