"""Samples and log-probs: against separate forward passes, and against exact enumeration of a tiny model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preftune.errors import ConfigError, DataError
from preftune.evaluation.sampling import (
    Sample,
    completion_logps,
    continue_prompts,
    log_ratios,
    sample_completions,
    tail_probabilities,
    tail_shares,
)
from preftune.models import sampling
from preftune.stats.intervals import bootstrap_mean

EOS = 3


class Digits:
    """A tokenizer of single digits; text "012" is [0, 1, 2]."""

    eos_token_id: int | None = EOS

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(character) for character in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(str(token) for token in ids if token != EOS)


def tiny_model(seed: int, vocab_size: int = 8) -> Any:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def reference_logps(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """One unbatched fp64 pass per sequence, log-softmax by the book."""
    with torch.no_grad():
        logits = model.double()(torch.tensor([[*prompt, *completion]])).logits[0]
    model.float()
    table = torch.log_softmax(logits, dim=-1)
    return [float(table[len(prompt) + index - 1, token]) for index, token in enumerate(completion)]


PROMPTS = ["1", "2451", "0000", "52", "7"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_logps_of_samples_equal_a_separate_forward(batch_size: int) -> None:
    model = tiny_model(0)
    samples = sample_completions(
        model, Digits(), PROMPTS, num_samples=6, max_new_tokens=9, seed=4, batch_size=batch_size
    )
    assert [sample.prompt_index for sample in samples] == [index for index in range(5) for _ in range(6)]
    assert {len(sample.token_ids) for sample in samples} > {1, 9}
    for sample in samples:
        assert sample.prompt_ids == Digits()(PROMPTS[sample.prompt_index])["input_ids"]
        assert sample.logps.tolist() == pytest.approx(
            reference_logps(model, sample.prompt_ids, sample.token_ids), abs=1e-5
        )
        assert sample.finished == (sample.token_ids[-1] == EOS)
        assert EOS not in sample.token_ids[:-1]
        assert sample.finished or len(sample.token_ids) == 9


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = tiny_model(1)

    def draw(**options: Any) -> list[Sample]:
        return sample_completions(model, Digits(), PROMPTS, max_new_tokens=12, **options)

    alone = draw(num_samples=2, seed=7, batch_size=1)
    together = draw(num_samples=2, seed=7, batch_size=64)
    more = draw(num_samples=4, seed=7, batch_size=5)
    assert [sample.token_ids for sample in alone] == [sample.token_ids for sample in together]
    kept = [more[4 * index + draw_index] for index in range(5) for draw_index in range(2)]
    assert [sample.token_ids for sample in alone] == [sample.token_ids for sample in kept]
    assert [sample.token_ids for sample in alone] != [
        sample.token_ids for sample in draw(num_samples=2, seed=8, batch_size=64)
    ]


def test_tokens_come_with_the_models_probabilities() -> None:
    model = tiny_model(2)
    samples = sample_completions(model, Digits(), ["12"], num_samples=20_000, max_new_tokens=1, batch_size=20_000)
    seen = np.bincount([sample.token_ids[0] for sample in samples], minlength=8)
    expected = np.exp([reference_logps(model, [1, 2], [token])[0] for token in range(8)])
    chi_square = ((seen - 20_000 * expected) ** 2 / (20_000 * expected)).sum()
    # 99.9 % quantile of chi-square with 7 degrees of freedom.
    assert chi_square < 24.3


def test_temperature_zero_is_greedy_and_logps_stay_the_policys() -> None:
    model = tiny_model(3)
    (sample,) = sample_completions(model, Digits(), ["14"], max_new_tokens=5, temperature=0)
    ids = [1, 4]
    for token in sample.token_ids:
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    warm = sample_completions(model, Digits(), ["14"], num_samples=20, max_new_tokens=5, temperature=0.3)
    for one in warm:
        assert one.logps.tolist() == pytest.approx(reference_logps(model, [1, 4], one.token_ids), abs=1e-5)


def test_completion_logps_of_uneven_sequences() -> None:
    model = tiny_model(4)
    sequences = [([1], [2, 3]), ([4, 4, 4, 4], [5]), ([0, 1, 2], [3, 2, 1, 0, 7, 7]), ([6, 1], [])]
    for batch_size in (1, 2, 10):
        found = completion_logps(model, sequences, batch_size=batch_size)
        for (prompt, completion), logps in zip(sequences, found, strict=True):
            assert logps.tolist() == pytest.approx(reference_logps(model, prompt, completion), abs=1e-5)


def test_tail_probabilities_are_those_of_an_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(4)
    sequences = [([1], [2, 3]), ([4, 4, 4, 4], [5]), ([0, 1, 2], [3, 2, 1, 0, 7, 7]), ([6, 1], [])]
    found = tail_probabilities(model, sequences)
    for (prompt, completion), (logps, tails) in zip(sequences, found, strict=True):
        assert logps.tolist() == pytest.approx(reference_logps(model, prompt, completion), abs=1e-5)
        for place, token in enumerate(completion):
            before = [*prompt, *completion[:place]]
            probs = [math.exp(reference_logps(model, before, [other])[0]) for other in range(8)]
            assert tails[place] == pytest.approx(sum(p for p in probs if p <= probs[token]), abs=1e-5)
    # However little memory the logits may take, a sequence at a time always goes.
    monkeypatch.setattr(sampling, "_MOST_LOGITS", 1)
    for (_, tails), (_, again) in zip(found, tail_probabilities(model, sequences), strict=True):
        assert again.tolist() == pytest.approx(tails.tolist(), abs=1e-6)


@pytest.mark.parametrize("level", [0.2, 0.35, 0.6])
def test_own_shares_of_the_far_tail_are_those_of_an_enumeration(level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "TAIL_LEVEL", level)
    model = tiny_model(4)
    sequences = [([1], [2, 3]), ([4, 4, 4, 4], [5]), ([0, 1, 2], [3, 2, 1, 0, 7, 7])]
    found = tail_shares(model, sequences, batch_size=2)
    seen = tail_probabilities(model, sequences)
    for (prompt, completion), (logps, share, own), (also, tails) in zip(sequences, found, seen, strict=True):
        assert logps.tolist() == pytest.approx(also.tolist(), abs=1e-6)
        assert share == pytest.approx(float((tails <= level).mean()))
        expected = []
        for place in range(len(completion)):
            before = [*prompt, *completion[:place]]
            probs = [math.exp(reference_logps(model, before, [other])[0]) for other in range(8)]
            far = [p for p in probs if sum(each for each in probs if each <= p) <= level]
            expected.append(sum(far))
        assert own == pytest.approx(float(np.mean(expected)), abs=1e-5)


def test_a_models_own_samples_hold_its_own_share_of_the_far_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "TAIL_LEVEL", 0.1)
    model, other = tiny_model(4, vocab_size=16), tiny_model(9, vocab_size=16)
    for policy in (model, other):
        samples = continue_prompts(policy, Digits(), [[1, 2]] * 600, max_new_tokens=10, streams=range(600))
        found = tail_shares(model, [(sample.prompt_ids, sample.token_ids) for sample in samples])
        excess = bootstrap_mean(
            np.array([share - own for _, share, own in found]), level=0.999, num_resamples=1000, method="student"
        )
        # Of its own texts as many as it would draw, in whatever places; of another model's more.
        assert (excess.low <= 0 <= excess.high) == (policy is model)


def test_a_models_own_samples_lie_in_its_tail_as_often_as_they_may() -> None:
    model, other = tiny_model(4, vocab_size=64), tiny_model(9, vocab_size=64)
    samples = continue_prompts(model, Digits(), [[1, 2]] * 400, max_new_tokens=10, streams=range(400))
    sequences = [(sample.prompt_ids, sample.token_ids) for sample in samples]
    for level in (0.01, 0.1, 0.5):
        shares = [
            [float((tails <= level).mean()) for _, tails in tail_probabilities(judge, sequences)]
            for judge in (model, other)
        ]
        own, foreign = (bootstrap_mean(np.array(each), level=0.999, num_resamples=1000) for each in shares)
        assert own.low <= level
        assert own.mean > level / 2  # the bound is nearly reached where no token has much probability
        assert foreign.mean > own.mean


def test_kl_estimate_agrees_with_enumeration() -> None:
    policy, reference = tiny_model(5, vocab_size=4), tiny_model(6, vocab_size=4)
    prompt, limit = [1, 2], 4
    exact = 0.0
    total = 0.0
    for length in range(1, limit + 1):
        for body in itertools.product(range(3), repeat=length - 1):
            ends = [EOS] if length < limit else range(4)
            for end in ends:
                tokens = [*body, end]
                log_policy = sum(reference_logps(policy, prompt, tokens))
                exact += math.exp(log_policy) * (log_policy - sum(reference_logps(reference, prompt, tokens)))
                total += math.exp(log_policy)
    assert total == pytest.approx(1.0, abs=1e-9)
    samples = sample_completions(
        policy, Digits(), ["12"], num_samples=20_000, max_new_tokens=limit, seed=1, batch_size=20_000
    )
    ratios = log_ratios(samples, reference, batch_size=20_000)
    found = bootstrap_mean(ratios, level=0.999, num_resamples=1000)
    assert exact > 0.1
    assert found.low < exact < found.high
    assert found.high - found.low < 0.2 * exact


def test_the_models_mode_is_restored() -> None:
    model = tiny_model(0)
    model.train()
    sample_completions(model, Digits(), ["1"], max_new_tokens=1)
    completion_logps(model, [([1], [2])])
    assert model.training


def test_bad_input_is_refused() -> None:
    model, tokenizer = tiny_model(0), Digits()
    with pytest.raises(DataError, match="prompt 1: a prompt without tokens"):
        sample_completions(model, tokenizer, ["1", ""])
    with pytest.raises(DataError, match="sequence 0"):
        completion_logps(model, [([], [1])])
    with pytest.raises(ConfigError, match="temperature"):
        sample_completions(model, tokenizer, ["1"], temperature=-1.0)
    with pytest.raises(ConfigError, match="num_samples"):
        sample_completions(model, tokenizer, ["1"], num_samples=0)
    tokenizer.eos_token_id = None
    with pytest.raises(ConfigError, match="end-of-sequence"):
        sample_completions(model, tokenizer, ["1"])


def test_a_stream_of_its_own_keeps_a_prompts_samples() -> None:
    model, tokenizer = tiny_model(0), Digits()
    together = continue_prompts(model, tokenizer, [[1], [2, 4], [5]], max_new_tokens=6, seed=3, streams=[11, 12, 13])
    alone = continue_prompts(model, tokenizer, [[5]], max_new_tokens=6, seed=3, streams=[13])
    assert alone[0].token_ids == together[2].token_ids
    other = continue_prompts(model, tokenizer, [[5]], max_new_tokens=6, seed=3)
    assert other[0].token_ids != alone[0].token_ids
