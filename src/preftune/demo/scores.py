"""What a policy is worth in the review world: true reward, KL to the reference, held-out preference accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from preftune.demo.pairs import MAX_NEW_TOKENS, Pair, make_pairs
from preftune.demo.world import World
from preftune.evaluation.sampling import Sample, completion_logps, log_ratios, sample_completions
from preftune.stats.intervals import Interval, bootstrap_mean

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class DemoScores:
    """Scores of one policy; all intervals are 95 % bootstrap intervals over prompts.

    Attributes:
        reward: Ground-truth reward of samples.
        kl: KL(policy || reference) in nats per completion, estimated on the policy's own samples.
        accuracy: Share of held-out pairs that the implicit reward ``log policy - log reference`` ranks as the ground
            truth does; ties count half, so the reference itself has 0.5.
        length: Mean tokens per sample, end-of-sequence included.
        grammatical: Mean share of sentences that belong to the world.
        rewards: Reward of each sample, in the order of `samples`.
        samples: Those of one prompt next to each other.
    """

    reward: Interval
    kl: Interval
    accuracy: Interval
    length: float
    grammatical: float
    rewards: Array
    samples: list[Sample]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: estimates as numbers with their intervals beside them, samples left out."""
        return {
            "reward": self.reward.as_dict(),
            "kl": self.kl.mean,
            "kl_interval": {"low": self.kl.low, "high": self.kl.high},
            "accuracy": self.accuracy.mean,
            "accuracy_interval": {"low": self.accuracy.low, "high": self.accuracy.high},
            "length": self.length,
            "grammatical": self.grammatical,
            "num_samples": self.reward.num_values,
            "num_prompts": self.reward.num_groups,
            "num_pairs": self.accuracy.num_values,
        }


def evaluate_policy(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    world: World,
    prompts: Sequence[str],
    seed: int,
    *,
    pairs: Sequence[Pair] | None = None,
    samples_per_prompt: int = 2,
    batch_size: int = 256,
) -> DemoScores:
    """Samples from a policy and scores it. The same seed gives every policy the same randomness.

    Args:
        policy: The model to score; scored as the reference where it is the very same object.
        reference: The model it was trained from.
        tokenizer: That of both.
        world: The ground truth.
        prompts: To sample on; not those of training.
        seed: Of samples and resampling.
        pairs: Held-out pairs with true labels; by default one per prompt, sampled from the reference on as many
            held-out prompts.
        samples_per_prompt: Completions per prompt.
        batch_size: Completions sampled at once.

    Returns:
        The scores.
    """
    if pairs is None:
        pairs = make_pairs(reference, tokenizer, world, len(prompts), seed + 1, split="heldout", batch_size=batch_size)
    samples = sample_completions(
        policy,
        tokenizer,
        prompts,
        num_samples=samples_per_prompt,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed,
        batch_size=batch_size,
    )
    texts = [prompts[sample.prompt_index] + sample.text for sample in samples]
    rewards = np.array([world.reward(text) for text in texts])
    groups = [sample.prompt_index for sample in samples]
    # Of the reference against itself only rounding would be left.
    ratios = np.zeros(len(samples)) if policy is reference else log_ratios(samples, reference)
    right = ranked_right(implicit_rewards(policy, reference, tokenizer, pairs))
    return DemoScores(
        reward=bootstrap_mean(rewards, groups=groups, seed=seed),
        kl=bootstrap_mean(ratios, groups=groups, seed=seed),
        accuracy=bootstrap_mean(right, groups=[pair.prompt for pair in pairs], seed=seed),
        length=float(np.mean([len(sample.token_ids) for sample in samples])),
        grammatical=float(np.mean([world.grammatical_share(text) for text in texts])),
        rewards=rewards,
        samples=samples,
    )


def implicit_rewards(policy: Any, reference: Any, tokenizer: Any, pairs: Sequence[Pair]) -> Array:
    """Sequence log-ratios ``log policy - log reference`` of both completions.

    Args:
        policy: The trained model.
        reference: The model it was trained from.
        tokenizer: That of both.
        pairs: Preference pairs.

    Returns:
        `(pairs, 2)`: chosen and rejected, in nats (DPO's implicit reward without its factor beta).
    """
    sequences = []
    for pair in pairs:
        prompt = tokenizer(pair.prompt)["input_ids"]
        for completion in (pair.chosen, pair.rejected):
            # Completions begin with a space, over which byte-level BPE merges nothing: the boundary is exact.
            ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
            sequences.append((prompt, [*ids, tokenizer.eos_token_id]))
    sums = [
        np.array([logps.sum(dtype=np.float64) for logps in completion_logps(model, sequences)])
        for model in (policy, reference)
    ]
    return np.asarray((sums[0] - sums[1]).reshape(-1, 2), dtype=np.float64)


def ranked_right(rewards: Array) -> Array:
    """1 where chosen has the higher reward, 0 where rejected has, 0.5 for a tie; `(pairs, 2)` to `(pairs,)`."""
    return np.asarray((np.sign(rewards[:, 0] - rewards[:, 1]) + 1) / 2, dtype=np.float64)
