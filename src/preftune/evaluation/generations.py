"""Seeded samples from policy and reference on the data's prompts, kept on disk; KL, lengths and a few side by side.

A sample is filed under what it depends on: weights, prompt tokens, seed, number of the draw, length limit. Finished
batches are appended to ``generations.jsonl`` in one write each, so that an interrupted run goes on with the next batch,
and batches are cut the same way every time, so that it ends with the same samples. A model with its adapter on and off
is two policies in one batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preftune.evaluation.files import append
from preftune.evaluation.metrics import Summary
from preftune.evaluation.pairs import EvalPairs, Ids
from preftune.evaluation.sampling import TAIL_LEVEL, Sample, continue_prompts
from preftune.evaluation.scoring import Scorer
from preftune.files import parse_json
from preftune.models.decoding import BASE, rows_at_once, switchable
from preftune.stats.intervals import bootstrap_ratio
from preftune.stats.rows import Array
from preftune.terminal.progress import Progress

FILE_NAME = "generations.jsonl"


class GenerationCache:
    """Samples on disk, by content key.

    Args:
        folder: Folder of the file; ``None`` keeps samples in memory only.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.path = None if folder is None else Path(folder) / FILE_NAME
        self._known: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    record = parse_json(line)
                    self._known[record["key"]] = record
                except (ValueError, KeyError, TypeError):
                    # The last line of a run that was killed; its batch is drawn again.
                    continue

    def get(self, key: str) -> dict[str, Any] | None:
        """The sample, or ``None``."""
        return self._known.get(key)

    def put(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep a batch of samples, each with its ``key``.

        Raises:
            SetupError: The file cannot be written.
        """
        self._known.update({record["key"]: record for record in records})
        if self.path is None:
            return
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        append(self.path, text)


def choose_prompts(pairs: EvalPairs, num_prompts: int, seed: int) -> list[int]:
    """Pairs whose prompts are sampled on: one of every prompt, drawn at random, in the order of the data."""
    first: dict[bytes, int] = {}
    for number, group in enumerate(pairs.groups):
        if len(pairs.pairs[number].prompt):
            first.setdefault(group, number)
    numbers = list(first.values())
    if len(numbers) > num_prompts:
        picked = np.random.default_rng([seed, 1]).permutation(len(numbers))[:num_prompts]
        numbers = [numbers[i] for i in sorted(picked.tolist())]
    return numbers


def generate(
    scorers: Sequence[Scorer],
    tokenizer: Any,
    prompts: Sequence[Ids],
    cache: GenerationCache,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int | None = None,
    description: str = "Sampling",
    show_progress: bool = False,
) -> list[list[Sample]]:
    """Samples of one or several policies at temperature 1, from the cache where known.

    Args:
        scorers: The policies.
        tokenizer: Their tokenizer.
        prompts: Token ids of each prompt.
        cache: Where samples are kept.
        num_samples: Completions per prompt.
        max_new_tokens: Most tokens of a completion.
        seed: Of all draws.
        batch_size: Completions drawn at once; by default as many as fit.
        description: Title of the progress bar.
        show_progress: Draw a progress bar, or where nobody watches say once how long it takes.

    Returns:
        Per policy ``len(prompts) * num_samples`` samples, those of one prompt next to each other.
    """
    digests = [hashlib.blake2b(np.asarray(prompt, "<i8").tobytes(), digest_size=16).hexdigest() for prompt in prompts]
    keys = [
        [
            [f"{scorer.weights_key}|{seed}|{max_new_tokens}|{digest}|{n}" for n in range(num_samples)]
            for digest in digests
        ]
        for scorer in scorers
    ]
    # Prompts of like length share a batch; the cut depends on the prompts alone, never on what is known already.
    order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), digests[number]))
    longest = max(map(len, prompts), default=0) + max_new_tokens
    total = len(scorers) * len(prompts) * num_samples * max_new_tokens
    with Progress(total, description, show_progress) as progress:
        for policies, adapters in _together(scorers):
            size = batch_size or rows_at_once(scorers[policies[0]].model, longest)
            step = max(1, size // (num_samples * len(policies)))
            for start in range(0, len(order), step):
                batch = order[start : start + step]
                cells = [(policy, number) for policy in policies for number in batch]
                if all(cache.get(key) is not None for policy, number in cells for key in keys[policy][number]):
                    progress.skip(len(cells) * num_samples * max_new_tokens)
                    continue
                samples = _draw(
                    scorers[policies[0]],
                    tokenizer,
                    [prompts[number].tolist() for _, number in cells],
                    [digests[number] for _, number in cells],
                    adapters=None if adapters is None else [adapters[policies.index(policy)] for policy, _ in cells],
                    num_samples=num_samples,
                    max_new_tokens=max_new_tokens,
                    seed=seed,
                    on_tokens=progress.add,
                )
                names = [key for policy, number in cells for key in keys[policy][number]]
                cache.put([_record(sample) | {"key": key} for sample, key in zip(samples, names, strict=True)])
    return [
        [
            _sample(number, prompts[number], cache.get(key) or {})
            for number in range(len(prompts))
            for key in keys[policy][number]
        ]
        for policy in range(len(scorers))
    ]


def _together(scorers: Sequence[Scorer]) -> list[tuple[list[int], list[str] | None]]:
    """Policies that share a batch, and the adapter of each; a policy by itself brings its own state."""
    if len(scorers) == 2 and scorers[0].model is scorers[1].model and scorers[0].adapter_off != scorers[1].adapter_off:
        with scorers[0].autocast():
            name = switchable(scorers[0].model)
        if name is not None:
            return [([0, 1], [BASE if scorer.adapter_off else name for scorer in scorers])]
    return [([number], None) for number in range(len(scorers))]


def _draw(
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    digests: Sequence[str],
    *,
    adapters: Sequence[str] | None,
    **settings: Any,
) -> list[Sample]:
    with scorer.autocast() if adapters is not None else scorer.running():
        return continue_prompts(
            scorer.model,
            tokenizer,
            prompts,
            batch_size=len(prompts) * settings["num_samples"],
            # A prompt's draws are its own, whatever else is evaluated with it.
            streams=[int(digest[:15], 16) for digest in digests],
            adapters=adapters,
            **settings,
        )


def _record(sample: Sample) -> dict[str, Any]:
    return {
        "text": sample.text,
        "token_ids": sample.token_ids,
        "logps": [float(value) for value in sample.logps],
        "finished": sample.finished,
    }


def _sample(number: int, prompt: Ids, record: dict[str, Any]) -> Sample:
    return Sample(
        prompt_index=number,
        text=record["text"],
        prompt_ids=[int(i) for i in prompt],
        token_ids=list(record["token_ids"]),
        logps=np.asarray(record["logps"], dtype=np.float32),
        finished=bool(record["finished"]),
    )


def sample_items(samples: Sequence[Sample]) -> list[tuple[tuple[Ids, Ids], ...]]:
    """The samples of each prompt as one item for a scorer, so that the prompt is computed once."""
    items: dict[int, list[tuple[Ids, Ids]]] = {}
    for sample in samples:
        pair = (np.asarray(sample.prompt_ids, dtype=np.int64), np.asarray(sample.token_ids, dtype=np.int64))
        items.setdefault(sample.prompt_index, []).append(pair)
    return [tuple(pairs) for pairs in items.values()]


def kl(samples: Sequence[Sample], reference: Scorer, summary: Summary) -> tuple[dict[str, Any], Array]:
    """KL(policy || reference) on the policy's own samples.

    ``KL = E_{y ~ policy} [log policy(y|x) - log reference(y|x)]``, summed over the completion; the mean over samples is
    an unbiased estimate, and may come out negative by chance. For completions cut off at the length limit it is the KL
    of the process that stops there.

    Args:
        samples: Drawn from the policy at temperature 1.
        reference: The reference.
        summary: Settings of the intervals, which are over prompts.

    Returns:
        ``mean``, ``low``, ``high``, ``n`` in nats per completion, ``per_token`` likewise, and the estimator's name; and
        the reference's log-prob of each sample.
    """
    sums = np.concatenate(
        [[each.sum(dtype=np.float64) for each in item] for item in reference.logps(sample_items(samples), "KL")]
    )
    ratios = np.array([sample.logps.sum(dtype=np.float64) for sample in samples]) - sums
    groups = [sample.prompt_index for sample in samples]
    found: dict[str, Any] = dict(summary.number(ratios, groups))
    tokens = np.array([len(sample.token_ids) for sample in samples], dtype=np.float64)
    per_token: dict[str, float] = {"mean": float(ratios.sum() / tokens.sum()), "n": len(samples)}
    if len(set(groups)) > 1:
        interval = bootstrap_ratio(
            ratios,
            tokens,
            groups=groups,
            level=summary.level,
            num_resamples=summary.num_resamples,
            method="student",
            seed=summary.seed,
        )
        per_token |= interval.as_dict()
    found |= {"per_token": per_token, "unit": "nats per completion", "estimator": "mean log-ratio of policy samples"}
    return found, sums


def tail(samples: Sequence[Sample], reference: Scorer, summary: Summary) -> dict[str, Any]:
    """Share of the samples' tokens that lie in the reference's far tail.

    A token lies there if the reference gives it and all less likely ones together at most :data:`TAIL_LEVEL`. Of the
    reference's own texts at most that share does, whatever it writes; more means that something else was written.

    Args:
        samples: Drawn from the policy at temperature 1.
        reference: The reference.
        summary: Settings of the intervals, which are over prompts.

    Returns:
        ``mean``, ``low``, ``high``, ``n``, the mean over samples of each one's share, and the level.
    """
    found = reference.tails(sample_items(samples), "Far tail")
    shares = np.array([float((each <= TAIL_LEVEL).mean()) for item in found for each in item])
    return {**summary.share(shares, [sample.prompt_index for sample in samples]), "level": TAIL_LEVEL}


def lengths_of(samples: Sequence[Sample], summary: Summary) -> dict[str, Any]:
    """Tokens per completion, and the share that ended by itself within the limit."""
    groups = [sample.prompt_index for sample in samples]
    tokens = np.array([len(sample.token_ids) for sample in samples], dtype=np.float64)
    return {
        "tokens": summary.number(tokens, groups),
        "median": float(np.median(tokens)),
        "longest": int(tokens.max()),
        "finished": summary.outcome([float(sample.finished) for sample in samples], groups),
    }
