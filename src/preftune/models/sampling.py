"""Seeded samples from a policy with their log-probs, and the teacher-forced log-probs of given completions.

A sample depends on (model, prompt, seed, prompt index, sample index) and not on its batch: every row draws from its own
random stream by inverse transform, so other batch sizes, or more samples per prompt, leave it as it is (up to rounding
of the model's arithmetic), and two policies sampled under one seed share their randomness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from preftune.errors import ConfigError, DataError
from preftune.kernels.head import scores_from_logits
from preftune.models.decoding import decode, tokens_that_fit, without_graph

# (prompt ids, completion ids)
Tokens = tuple[Sequence[int], Sequence[int]]
#: Most logits of one teacher-forced batch, in elements: 1 GiB in fp32. A single sequence may exceed it.
_MOST_LOGITS = 1 << 28
#: Most tokens of a teacher-forced batch, padding included: rows of like length then share one.
_MOST_TOKENS = 4096


@dataclass(frozen=True)
class Sample:
    """One completion drawn from a policy.

    Attributes:
        prompt_index: Position of its prompt in the list given.
        text: The completion without special tokens.
        prompt_ids: Token ids of the prompt, as the tokenizer encodes it (BOS included where it adds one).
        token_ids: Token ids of the completion; ends with the end-of-sequence token if `finished`.
        logps: Log-prob of each completion token under the policy at temperature 1, float32 `(len(token_ids),)`.
        finished: Whether the policy ended the text itself within the limit.
    """

    prompt_index: int
    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    logps: np.ndarray[Any, np.dtype[np.float32]]
    finished: bool


def sample_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> list[Sample]:
    """Draws completions with a key-value cache, left-padding only where prompts of one batch differ in length.

    Args:
        model: A causal language model of transformers (its mode is restored afterwards).
        tokenizer: Its tokenizer; needs an end-of-sequence token.
        prompts: Prompt texts.
        num_samples: Completions per prompt.
        max_new_tokens: Most tokens of one completion, end-of-sequence included.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        seed: Of all random streams.
        batch_size: Most completions drawn at once.

    Returns:
        ``len(prompts) * num_samples`` samples, those of one prompt next to each other.

    Raises:
        ConfigError: A number is out of range.
        DataError: A prompt has no tokens.
    """
    _check_at_least("num_samples", num_samples, 1)
    _check_at_least("max_new_tokens", max_new_tokens, 1)
    _check_at_least("batch_size", batch_size, 1)
    _check_at_least("temperature", temperature, 0)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end-of-sequence token",
            where="tokenizer.eos_token",
            remedy="set it, otherwise no sample would end",
        )
    encoded = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    for index, ids in enumerate(encoded):
        if not ids:
            raise DataError(
                "a prompt without tokens cannot be continued", where=f"prompt {index}", value=prompts[index]
            )
    return continue_prompts(
        model,
        tokenizer,
        encoded,
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )


def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    streams: Sequence[int] | None = None,
    adapters: Sequence[str] | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Sample]:
    """Draws completions of prompts that are tokens already; see :func:`sample_completions`.

    Args:
        model: A causal language model of transformers (its mode is restored afterwards).
        tokenizer: Decodes the completions and names the end-of-sequence token.
        prompts: Token ids of each prompt, at least one.
        num_samples: Completions per prompt.
        max_new_tokens: Most tokens of one completion, end-of-sequence included.
        temperature: Divides the logits before sampling; 0 takes the most likely token.
        seed: Of all random streams.
        batch_size: Most completions drawn at once.
        streams: Number of each prompt's random stream; by default its position. With a number of its own, a prompt
            keeps its samples whatever other prompts are drawn with it.
        adapters: Name of the adapter that each prompt is continued with; see
            :func:`~preftune.models.decoding.switchable`.
        on_tokens: Called after every step with the tokens that are done: those drawn, and those that a completion
            which has ended does not need any more.

    Returns:
        ``len(prompts) * num_samples`` samples, those of one prompt next to each other.
    """
    rows = [(index, draw) for index in range(len(prompts)) for draw in range(num_samples)]
    lengths = [len(prompts[index]) + max_new_tokens for index, _ in rows]
    eos = end_tokens(model, tokenizer)
    results: list[Sample | None] = [None] * len(rows)
    with _evaluating(model):
        for batch in _batches(lengths, batch_size, tokens_that_fit(model)):
            steps = decode(
                model,
                [prompts[rows[row][0]] for row in batch],
                np.stack([_stream(seed, rows[row], streams).random(max_new_tokens) for row in batch]),
                temperature,
                eos,
                adapters=None if adapters is None else [adapters[rows[row][0]] for row in batch],
            )
            drawn: list[tuple[list[int], list[float]]] = [([], []) for _ in batch]
            for count, step in enumerate(steps, start=1):
                ended = 0
                for number, token, logp in step:
                    drawn[number][0].append(token)
                    drawn[number][1].append(logp)
                    ended += token in eos
                if on_tokens is not None:
                    on_tokens(len(step) + ended * (max_new_tokens - count))
            for row, (ids, logps) in zip(batch, drawn, strict=True):
                prompt_index = rows[row][0]
                results[row] = Sample(
                    prompt_index=prompt_index,
                    text=tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
                    prompt_ids=list(prompts[prompt_index]),
                    token_ids=ids,
                    logps=np.asarray(logps, dtype=np.float32),
                    finished=ids[-1] in eos,
                )
    return [sample for sample in results if sample is not None]


def _stream(seed: int, row: tuple[int, int], streams: Sequence[int] | None) -> np.random.Generator:
    number = row[0] if streams is None else int(streams[row[0]])
    return np.random.default_rng([seed, number, row[1]])


def completion_logps(
    model: Any, sequences: Sequence[Tokens], *, batch_size: int = 64
) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Log-probs of given completions in one teacher-forced forward pass per batch, right-padded.

    Args:
        model: A causal language model of transformers (its mode is restored afterwards).
        sequences: (prompt ids, completion ids); the prompt has at least one token.
        batch_size: Most sequences in one forward pass.

    Returns:
        Per sequence the float32 log-prob of each completion token, `(len(completion ids),)`.

    Raises:
        DataError: A prompt has no tokens, so that its first completion token is never predicted.
    """
    results: list[np.ndarray[Any, np.dtype[np.float32]]] = [np.empty(0, np.float32)] * len(sequences)
    with _evaluating(model):
        for index, logits, targets in _completion_logits(model, sequences, batch_size):
            results[index] = _numpy(_target_logps(logits, targets))
    return results


#: The far tail: tokens that a model itself writes at most this often, all together.
TAIL_LEVEL = 0.01
#: How many times that a share of the far tail is at least where a policy is said to have left; heuristic.
LEFT_LEVEL_FACTOR = 1.4


def has_left(share: float, low: float, level: float = TAIL_LEVEL) -> bool:
    """Whether texts with this share of a model's far tail, and this low end of its interval, are far from its own.

    An effect of some size, and not chance: of the model's own tokens at most ``level`` lie there, and what has
    been trained is never the same model, so that enough texts would tell any two apart.
    """
    return low > level and share >= LEFT_LEVEL_FACTOR * level


def tail_probabilities(
    model: Any, sequences: Sequence[Tokens], *, batch_size: int = 64
) -> list[tuple[np.ndarray[Any, np.dtype[np.float32]], np.ndarray[Any, np.dtype[np.float32]]]]:
    """How far out each token of given completions is in the model's predictions.

    The tail probability of a token is the total probability of all tokens that are no more likely than it,
    ``sum of p(v) over v with p(v) <= p(token)``. Of tokens drawn from the model itself at most a share ``a`` has a tail
    probability of ``a`` or less, at every position and for every ``a`` (it is a p-value): texts with more of them were
    written by something else.

    Args:
        model: A causal language model of transformers (its mode is restored afterwards).
        sequences: (prompt ids, completion ids); the prompt has at least one token.
        batch_size: Most sequences in one forward pass.

    Returns:
        Per sequence the log-probs and the tail probabilities of its completion tokens, each `(len(completion ids),)`.
    """
    empty = np.empty(0, np.float32)
    results = [(empty, empty)] * len(sequences)
    with _evaluating(model):
        for index, logits, targets in _completion_logits(model, sequences, batch_size):
            scores = scores_from_logits(logits, targets, with_tail=True)
            assert scores.tail is not None
            results[index] = _numpy(scores.logps), _numpy(scores.tail)
    return results


def tail_shares(
    model: Any, sequences: Sequence[Tokens], *, batch_size: int = 64
) -> list[tuple[np.ndarray[Any, np.dtype[np.float32]], float, float]]:
    """Shares of tokens in the model's far tail: of given completions, and of tokens drawn from the model instead.

    The second is exact: the probability, averaged over the positions, that a token drawn from the model lies there. It
    is at most :data:`TAIL_LEVEL`, and less where single tokens are more likely than that.

    Args:
        model: A causal language model of transformers (its mode is restored afterwards).
        sequences: (prompt ids, completion ids); the prompt has at least one token.
        batch_size: Most sequences in one forward pass.

    Returns:
        Per sequence the log-probs of its completion tokens, the share of them in the far tail, and the model's own.
    """
    results = [(np.empty(0, np.float32), math.nan, math.nan)] * len(sequences)
    with _evaluating(model):
        for index, logits, targets in _completion_logits(model, sequences, batch_size):
            scores = scores_from_logits(logits, targets, with_tail=True)
            assert scores.tail is not None
            # From the least likely token on: the most that can be added up within the level.
            sums = torch.softmax(logits.float(), -1).sort(-1).values.cumsum(-1)
            own = torch.where(sums <= TAIL_LEVEL, sums, 0.0).amax(-1)
            share = (scores.tail <= TAIL_LEVEL).float().mean()
            results[index] = _numpy(scores.logps), float(share), float(own.mean())
    return results


def log_ratios(
    samples: Sequence[Sample], reference: Any, *, batch_size: int = 64
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sequence log-ratios of samples, whose mean is an unbiased estimate of KL(policy || reference).

    KL = E_{y ~ policy}[log policy(y|x) - log reference(y|x)], summed over the completion. The samples must have been
    drawn from the policy at temperature 1; for texts cut off at a length limit it is the KL of the cut-off process.

    Args:
        samples: Drawn from the policy by `sample_completions`.
        reference: The reference model.
        batch_size: Most sequences in one forward pass.

    Returns:
        `(len(samples),)` in nats per sequence.
    """
    reference_logps = completion_logps(
        reference, [(sample.prompt_ids, sample.token_ids) for sample in samples], batch_size=batch_size
    )
    return summed_ratios(samples, reference_logps)


def summed_ratios(
    samples: Sequence[Sample], reference_logps: Sequence[np.ndarray[Any, np.dtype[np.float32]]]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Log-ratio of each sample, in nats ``(len(samples),)``, from the log-probs of its tokens under the reference."""
    # Sums in fp64: the difference of two sums of many terms would lose digits in fp32.
    return np.array(
        [
            float(sample.logps.sum(dtype=np.float64) - logps.sum(dtype=np.float64))
            for sample, logps in zip(samples, reference_logps, strict=True)
        ]
    )


def _check_at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise ConfigError("the value is out of range", where=name, value=value, allowed=f"at least {least}")


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those that the model's generation settings list."""
    # Chat models often end a turn with a token other than the tokenizer's; their generation config lists it.
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = [configured] if isinstance(configured, int) else list(configured or [])
    return frozenset([int(tokenizer.eos_token_id), *listed])


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = bool(model.training)
    model.eval()
    try:
        with without_graph(model):
            yield
    finally:
        model.train(was_training)


def _completion_logits(
    model: Any, sequences: Sequence[Tokens], batch_size: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Position, logits `(len(completion ids), vocabulary)` in fp32 and completion ids of every sequence."""
    _check_at_least("batch_size", batch_size, 1)
    for index, (prompt, _) in enumerate(sequences):
        if not prompt:
            raise DataError(
                "the first token of a text has no log-prob", where=f"prompt of sequence {index}", value=prompt
            )
    most = min(_MOST_TOKENS, _MOST_LOGITS // int(model.config.get_text_config().vocab_size))
    for batch in _batches([len(prompt) + len(completion) for prompt, completion in sequences], batch_size, most):
        rows = [[*sequences[index][0], *sequences[index][1]] for index in batch]
        width = max(len(ids) for ids in rows)
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows], device=model.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows], device=model.device)
        # No mask where nothing is padded; behind a row's end it changes nothing that is read, but keeps models honest.
        extra = {} if bool((mask == 1).all()) else {"attention_mask": mask}
        # Of what all prompts have in common in length no logits are needed.
        wanted = width - min(len(sequences[index][0]) for index in batch) + 1
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=wanted, **extra).logits
        first = width - logits.shape[1]  # a model may have given more than it was asked for
        for row, index in enumerate(batch):
            prompt, completion = sequences[index]
            start, end = len(prompt), len(prompt) + len(completion)
            yield index, logits[row, start - 1 - first : end - 1 - first].float(), tokens[row, start:end]


def _batches(lengths: Sequence[int], batch_size: int, most_tokens: int) -> Iterator[list[int]]:
    """Positions of sequences of like length, with at most so many tokens at once; a single one may have more."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[index] > most_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _target_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(dim=-1)


def _numpy(values: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.asarray(values.float().cpu().numpy(), dtype=np.float32)
