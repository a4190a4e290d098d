"""Tokenizer, model, pairs and scores of the demo, on an untrained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.demo.models import build_model, build_tokenizer
from preftune.demo.pairs import make_pairs, write_pairs
from preftune.demo.plot import plot_reward_kl
from preftune.demo.scores import evaluate_policy, implicit_rewards, ranked_right
from preftune.demo.world import World
from preftune.errors import ConfigError

WORLD = World(3)
TOKENIZER = build_tokenizer(WORLD.corpus(800))


@pytest.fixture(scope="module")
def model() -> Any:
    """A one-layer model after some steps of plain next-token training, enough to write sentences now and then."""
    found = build_model(TOKENIZER, 1, hidden_size=64, num_layers=1)
    optimizer = torch.optim.Adam(found.parameters(), lr=1e-2)
    rows = [TOKENIZER(text)["input_ids"] + [TOKENIZER.eos_token_id] for text in WORLD.corpus(800)]
    for step in range(50):
        batch = rows[16 * step : 16 * step + 16]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        found(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found.eval()


@given(st.text(max_size=40))
@settings(max_examples=60)
def test_tokenizer_round_trip(text: str) -> None:
    clean = text.encode("utf-8", "ignore").decode()
    if any(token in clean for token in ("<pad>", "<bos>", "<eos>")):
        return
    ids = TOKENIZER(clean)["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    assert ids.count(TOKENIZER.bos_token_id) == 1
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == clean


def test_prompt_and_completion_meet_at_a_token_boundary() -> None:
    for text in WORLD.corpus(50):
        cut = text.index(".") + 1
        prompt, completion = TOKENIZER(text[:cut])["input_ids"], TOKENIZER(text[cut:], add_special_tokens=False)
        assert prompt + completion["input_ids"] == TOKENIZER(text)["input_ids"]


def test_model_depends_on_its_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second, third = (build_model(TOKENIZER, seed, 64, 1) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [next(model.parameters()) for model in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_pairs_carry_the_ground_truth(model: Any, tmp_path: Path) -> None:
    pairs = make_pairs(model, TOKENIZER, WORLD, 120, seed=2)
    assert len(pairs) > 60
    for pair in pairs:
        assert pair.reward_chosen == WORLD.reward(pair.prompt + pair.chosen)
        assert pair.reward_rejected == WORLD.reward(pair.prompt + pair.rejected)
        assert pair.reward_chosen > pair.reward_rejected
        assert not pair.flipped
    assert pairs == make_pairs(model, TOKENIZER, WORLD, 120, seed=2, batch_size=7)
    write_pairs(pairs, tmp_path / "pairs.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert lines[0]["chosen"] == pairs[0].chosen
    assert len(lines) == len(pairs)


def test_label_noise_flips_its_share_and_nests(model: Any) -> None:
    clean = make_pairs(model, TOKENIZER, WORLD, 120, seed=2)
    previous: set[int] = set()
    for noise in (0.1, 0.3, 1.0):
        noisy = make_pairs(model, TOKENIZER, WORLD, 120, seed=2, label_noise=noise)
        flipped = {index for index, pair in enumerate(noisy) if pair.flipped}
        assert len(flipped) == round(noise * len(clean))
        assert previous < flipped
        previous = flipped
        for index, pair in enumerate(noisy):
            source = clean[index]
            turned = (source.rejected, source.chosen) if index in flipped else (source.chosen, source.rejected)
            assert (pair.chosen, pair.rejected) == turned
            assert (pair.reward_chosen < pair.reward_rejected) == (index in flipped)


def test_bradley_terry_labels_follow_the_gap(model: Any) -> None:
    options: dict[str, Any] = {"seed": 2, "label_rule": "bradley_terry"}
    sharp = make_pairs(model, TOKENIZER, WORLD, 300, sharpness=1e6, **options)
    assert all(pair.reward_chosen > pair.reward_rejected for pair in sharp)
    soft = make_pairs(model, TOKENIZER, WORLD, 300, sharpness=5.0, **options)
    gaps = np.array([pair.reward_chosen - pair.reward_rejected for pair in soft])
    expected = 1 / (1 + np.exp(-5.0 * np.abs(gaps)))
    spread = np.sqrt((expected * (1 - expected)).sum())
    assert abs((gaps > 0).sum() - expected.sum()) < 3.5 * spread


@pytest.mark.parametrize("options", [{"label_noise": 1.5}, {"label_rule": "coin"}])
def test_wrong_settings_are_refused(model: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_pairs(model, TOKENIZER, WORLD, 4, seed=0, **options)


def test_reference_scores_itself_as_undecided(model: Any) -> None:
    prompts = WORLD.prompts(60, "heldout")
    scores = evaluate_policy(model, model, TOKENIZER, WORLD, prompts, 0)
    assert (scores.kl.mean, scores.kl.low, scores.kl.high) == (0.0, 0.0, 0.0)
    assert scores.accuracy.mean == 0.5
    texts = [prompts[sample.prompt_index] + sample.text for sample in scores.samples]
    assert scores.reward.mean == pytest.approx(np.mean([WORLD.reward(text) for text in texts]))
    assert (scores.reward.num_values, scores.reward.num_groups) == (120, 60)


def test_another_policy_has_a_positive_kl_and_a_definite_accuracy(model: Any) -> None:
    other = build_model(TOKENIZER, 1, hidden_size=64, num_layers=1)
    other.load_state_dict({name: weight * 1.05 for name, weight in model.state_dict().items()})
    pairs = make_pairs(model, TOKENIZER, WORLD, 60, seed=9, split="heldout")
    scores = evaluate_policy(other.eval(), model, TOKENIZER, WORLD, WORLD.prompts(60, "heldout"), 0, pairs=pairs)
    assert scores.kl.low > 0
    rewards = implicit_rewards(other, model, TOKENIZER, pairs)
    assert scores.accuracy.mean == pytest.approx((rewards[:, 0] > rewards[:, 1]).mean())
    # One pair by hand: a plain forward over prompt, chosen and end-of-sequence.
    prompt = TOKENIZER(pairs[0].prompt)["input_ids"]
    ids = torch.tensor([TOKENIZER(pairs[0].prompt + pairs[0].chosen)["input_ids"] + [TOKENIZER.eos_token_id]])
    sums = []
    for one in (other, model):
        with torch.no_grad():
            table = one(ids).logits[0].double().log_softmax(-1)
        sums.append(sum(float(table[index - 1, ids[0, index]]) for index in range(len(prompt), ids.shape[1])))
    assert rewards[0, 0] == pytest.approx(sums[0] - sums[1], abs=1e-4)


def test_ranked_right() -> None:
    assert ranked_right(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])).tolist() == [1.0, 0.0, 0.5]


def test_plot_is_a_png_of_its_own(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    def scores(reward: float, kl: float) -> dict[str, Any]:
        return {
            "reward": {"mean": reward, "low": reward - 0.01, "high": reward + 0.01},
            "kl": kl,
            "kl_interval": {"low": kl * 0.9, "high": kl * 1.1},
            "num_samples": 10,
            "num_prompts": 5,
        }

    runs = [{"beta": beta, **scores(0.7 - beta / 10, 1 - beta / 2)} for beta in (0.1, 1.0)]
    plot_reward_kl({"sft": scores(0.5, 0.0), "betas": runs}, tmp_path / "picture.png")
    pixels = plt.imread(tmp_path / "picture.png")
    assert pixels.shape == (880, 1280, 4)
    # Both palette colours are on it: their points were drawn.
    for red, green, blue in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        assert (np.abs(pixels[..., :3] * 255 - [red, green, blue]).max(axis=-1) < 3).sum() > 100
    assert plt.get_fignums() == []
