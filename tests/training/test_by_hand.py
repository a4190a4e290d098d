"""Options of the paired methods, each trained for some steps against a loss written down by hand."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from preftune import ConfigError, DPOConfig, TrainingError
from preftune.training import extra_state
from tests.parity import worlds
from tests.training.oracle import PLAIN, Pairs, assert_same_training, model_of, slow_steps, train

BETA = 0.3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> worlds.World:
    return worlds.World(tmp_path_factory.mktemp("world"))


def scored_rows(number: int = 16) -> list[dict[str, Any]]:
    """Pairs with a score gap in (0, 1] and a weight."""
    rows = worlds.pair_rows(number)
    return [{**row, "margin": (1 + n % 5) / 5, "weight": 0.5 + n % 3} for n, row in enumerate(rows)]


def without(column: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != column} for row in scored_rows()]


def h(p: Pairs) -> Tensor:
    """Difference of the log-ratios, times beta."""
    chosen, rejected = p.ratios
    return BETA * (chosen - rejected)


def cdpo(p: Pairs) -> Tensor:
    return -0.8 * F.logsigmoid(h(p)) - 0.2 * F.logsigmoid(-h(p))


def normalised_cdpo(p: Pairs) -> Tensor:
    chosen, rejected = p.ratios
    x = BETA * (chosen / p.len_w - rejected / p.len_l)
    return -0.8 * F.logsigmoid(x) - 0.2 * F.logsigmoid(-x)


def odpo(offset: Callable[[Tensor], Tensor]) -> Callable[[Pairs], Tensor]:
    return lambda p: -F.logsigmoid(h(p) - 0.7 * offset(p.column("margin")))


def sppo_soft(p: Pairs) -> Tensor:
    # The data's margin is p(chosen wins) - p(rejected wins), so that p - 1/2 is half of it.
    chosen, rejected = p.ratios
    lead = p.column("margin") / 2 / BETA
    return (chosen - lead) ** 2 + (rejected + lead) ** 2


def dpop(p: Pairs) -> Tensor:
    chosen, rejected = p.ratios
    return -F.logsigmoid(BETA * (chosen - rejected - 5.0 * torch.relu(-chosen)))


def ipo_sums(p: Pairs) -> Tensor:
    chosen, rejected = p.ratios
    return (chosen - rejected - 1 / (2 * BETA)) ** 2


def divergent(derivative: Callable[[Tensor], Tensor]) -> Callable[[Pairs], Tensor]:
    def loss(p: Pairs) -> Tensor:
        chosen, rejected = p.ratios
        return -F.logsigmoid(BETA * (derivative(chosen) - derivative(rejected)))

    return loss


def reverse_kl(p: Pairs) -> Tensor:
    return -F.logsigmoid(h(p))


ALPHA: dict[str, Any] = {"f_divergence_type": "alpha_divergence"}
PLAIN_ROWS = [{k: v for k, v in row.items() if k not in ("margin", "weight")} for row in scored_rows()]
# Settings, rows, and the loss.
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], Callable[[Pairs], Tensor]]] = {
    "label_smoothing": ({"label_smoothing": 0.2}, PLAIN_ROWS, cdpo),
    "label_smoothing, sigmoid_norm": (
        {"label_smoothing": 0.2, "loss_type": ["sigmoid_norm"]}, PLAIN_ROWS, normalised_cdpo,
    ),
    "weights": ({}, without("margin"), lambda p: p.column("weight") * reverse_kl(p)),
    "odpo": ({"loss_type": ["odpo"], "odpo_alpha": 0.7}, without("weight"), odpo(torch.log)),
    "odpo, identity": (
        {"loss_type": ["odpo"], "odpo_alpha": 0.7, "odpo_transform": "identity"}, without("weight"), odpo(lambda m: m),
    ),
    "sppo_soft": ({"loss_type": ["sppo_soft"], "learning_rate": 2e-4}, without("weight"), sppo_soft),
    "ipo, sums": ({"loss_type": ["ipo"], "ipo_normalize": False, "learning_rate": 2e-4}, PLAIN_ROWS, ipo_sums),
    "alpha exactly 1": ({**ALPHA, "f_alpha_divergence_coef": 1.0}, PLAIN_ROWS, reverse_kl),
    "alpha almost 1, below": ({**ALPHA, "f_alpha_divergence_coef": 1 - 1e-7}, PLAIN_ROWS, reverse_kl),
    "alpha almost 1, above": ({**ALPHA, "f_alpha_divergence_coef": 1 + 1e-7}, PLAIN_ROWS, reverse_kl),
    "alpha 0.5": (
        {**ALPHA, "f_alpha_divergence_coef": 0.5}, PLAIN_ROWS, divergent(lambda r: (torch.exp(-r / 2) - 1) / -0.5),
    ),
    "forward_kl": ({"f_divergence_type": "forward_kl"}, PLAIN_ROWS, divergent(lambda r: 1 - torch.exp(-r))),
    "js_divergence": (
        {"f_divergence_type": "js_divergence"}, PLAIN_ROWS, divergent(lambda r: math.log(2) - F.softplus(-r)),
    ),
}  # fmt: skip


@pytest.mark.thin(1)
@pytest.mark.parametrize("name", CASES)
def test_four_steps(world: worlds.World, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, rows, loss = CASES[name]
    start = model_of(world)
    trainer = train(model_of(world), world, rows, tmp_path, **{"beta": BETA, **options})
    policy = model_of(world)
    if "learning_rate" in options:
        monkeypatch.setitem(PLAIN, "learning_rate", options["learning_rate"])
    losses = slow_steps(policy, lambda: start, list(trainer.train_dataset), loss)
    assert_same_training(trainer, losses, policy, start)


def test_dpop(world: worlds.World, tmp_path: Path) -> None:
    """Against another reference: where it is the initial policy, the first step lies on the kink of the penalty."""
    start, policy, reference = model_of(world), model_of(world), model_of(world)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    options = {"loss_type": ["dpop"], "dpop_lambda": 5.0, "beta": BETA}
    trainer = train(model_of(world), world, PLAIN_ROWS, tmp_path, **options, ref_model=copy.deepcopy(reference))
    losses = slow_steps(policy, lambda: reference, list(trainer.train_dataset), dpop)
    assert_same_training(trainer, losses, policy, start)


# ---- BCO's running delta ---------------------------------------------------------------------------------------------

BCO: dict[str, Any] = {"loss_type": ["bco_pair"], "bco_running_delta": True, "beta": BETA}


class Shifted:
    """BCO's loss by hand, with the shift of all steps before the present one."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.deltas: list[float] = []

    def __call__(self, p: Pairs) -> Tensor:
        chosen, rejected = (BETA * ratio for ratio in p.ratios)
        delta = sum(self.rewards) / len(self.rewards) if self.rewards else 0.0
        self.deltas.append(delta)
        self.rewards += [*chosen.tolist(), *rejected.tolist()]
        return -F.logsigmoid(chosen - delta) - F.logsigmoid(-(rejected - delta))


def test_bco_shifts_rewards_by_their_mean_over_the_steps_before(world: worlds.World, tmp_path: Path) -> None:
    start, policy, loss = model_of(world), model_of(world), Shifted()
    trainer = train(model_of(world), world, PLAIN_ROWS, tmp_path, **BCO)
    losses = slow_steps(policy, lambda: start, list(trainer.train_dataset), loss)
    assert_same_training(trainer, losses, policy, start)
    deltas = [line["bco_delta"] for line in trainer.state.log_history if "loss" in line]
    assert deltas == pytest.approx(loss.deltas, rel=1e-5, abs=1e-7)
    assert deltas[0] == 0.0
    # The rewards of the first step are all zero; without those of the others the shift would not have been tested.
    assert min(map(abs, deltas[2:])) > 1e-3
    without_shift = train(model_of(world), world, PLAIN_ROWS, tmp_path, **{**BCO, "bco_running_delta": False})
    assert without_shift.state.log_history[3]["loss"] != pytest.approx(losses[3], rel=1e-4)


def test_a_shift_within_the_step_would_depend_on_how_it_is_split(world: worlds.World, tmp_path: Path) -> None:
    """Why the shift lags by a step: TRL's former trainer moved it with every micro-batch and used it at once.

    By hand, on the rewards of one step: the mean loss then differs between one batch of four and four batches of one.
    """
    trainer = train(model_of(world), world, PLAIN_ROWS, tmp_path, **BCO)
    with torch.no_grad():
        pairs = Pairs(trainer.model, model_of(world), list(trainer.train_dataset)[:4])
    chosen, rejected = (BETA * ratio for ratio in pairs.ratios)

    def moved_at_once(size: int) -> float:
        seen: list[float] = []
        total = 0.0
        for first in range(0, 4, size):
            part = slice(first, first + size)
            seen += [*chosen[part].tolist(), *rejected[part].tolist()]
            delta = sum(seen) / len(seen)
            total += float((-F.logsigmoid(chosen[part] - delta) - F.logsigmoid(delta - rejected[part])).sum())
        return total / 4

    assert abs(moved_at_once(1) - moved_at_once(4)) > 1e-4


@pytest.mark.thin(1)
@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_tokens_per_row": 25},
        {"max_tokens_per_row": 1},
        {"packing_mode": "padded"},
        {"reference_store": False},
    ],
    ids=["one by one", "accumulation", "budget", "padded", "live reference"],
)
@pytest.mark.parametrize("losses", [["bco_pair"], ["bco_pair", "aot"]], ids=["alone", "joined"])
def test_the_shift_does_not_depend_on_the_split(
    world: worlds.World, tmp_path: Path, options: dict[str, Any], losses: list[str]
) -> None:
    start = model_of(world)
    mine = {**BCO, "loss_type": losses}
    whole, split = (train(model_of(world), world, PLAIN_ROWS, tmp_path, **mine, **more) for more in ({}, options))
    names = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert_same_training(split, names, whole.model, start)
    deltas = [[line["bco_delta"] for line in t.state.log_history if "loss" in line] for t in (whole, split)]
    # The store keeps fp32 log-probs, whose rounding is that of sums of some tens of nats.
    assert deltas[0] == pytest.approx(deltas[1], rel=1e-5, abs=1e-7)


def test_the_shift_does_not_depend_on_the_order_within_a_step(world: worlds.World, tmp_path: Path) -> None:
    turned = [row for first in range(0, 16, 4) for row in reversed(PLAIN_ROWS[first : first + 4])]
    runs = [train(model_of(world), world, rows, tmp_path, **BCO) for rows in (PLAIN_ROWS, turned)]
    states = [run.running_delta.state for run in runs]
    assert states[0].count == states[1].count == 4 * 4 * 2
    assert states[0].delta == pytest.approx(states[1].delta, rel=1e-9)


def test_a_resumed_run_goes_on_with_the_same_shift(world: worlds.World, tmp_path: Path) -> None:
    # In fp32, as users train: what comes back must be the same to the bit.
    options = {**BCO, "optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    through = train(world.path, world, PLAIN_ROWS, tmp_path, **options)
    checkpoint = tmp_path / "checkpoint-2"
    saved = json.loads((checkpoint / "preftune_state.json").read_text(encoding="utf-8"))["bco"]
    assert saved["count"] == 2 * 4 * 2
    resumed = train(world.path, world, PLAIN_ROWS, tmp_path, **options, resume_from_checkpoint=str(checkpoint))
    assert resumed.running_delta.state == through.running_delta.state
    for (name, a), (_, b) in zip(resumed.model.named_parameters(), through.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_that_lacks_what_is_carried_is_refused(world: worlds.World, tmp_path: Path) -> None:
    trainer = train(model_of(world), world, PLAIN_ROWS, tmp_path, **BCO, max_steps=1)
    with pytest.raises(TrainingError, match="does not hold the running mean"):
        extra_state.load(trainer, str(tmp_path))
    followed = train(model_of(world), world, PLAIN_ROWS, tmp_path, sync_ref_model=True, max_steps=1)
    with pytest.raises(TrainingError, match="does not hold the reference as it had followed"):
        extra_state.load(followed, str(tmp_path))


def test_evaluation_leaves_the_shift_alone(world: worlds.World, tmp_path: Path) -> None:
    from datasets import Dataset

    trainer = train(model_of(world), world, PLAIN_ROWS, tmp_path, **BCO)
    before = trainer.running_delta.state
    found = trainer.evaluate(Dataset.from_list(worlds.pair_rows(6, seed=3)))
    assert found["eval_bco_delta"] == pytest.approx(before.delta)
    assert trainer.running_delta.state == before


def test_the_shift_is_refused_where_no_loss_has_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it works with bco_pair"):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, bco_running_delta=True)


# ---- references that follow the policy -------------------------------------------------------------------------------


def lora() -> Any:
    import peft

    return peft.LoraConfig(r=3, lora_alpha=12, task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj", "up_proj"])


def factors(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def merged(base: Any, adapter: dict[str, Tensor]) -> Any:
    """A plain model with the adapter's product added to its weights, by hand."""
    model = copy.deepcopy(base)
    weights = dict(model.named_parameters())
    for name, down in adapter.items():
        if "lora_A" in name:
            up = adapter[name.replace("lora_A", "lora_B")]
            target = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
            weights[target].data += 12 / 3 * (up @ down)
    return model


@pytest.mark.thin(2)
@pytest.mark.parametrize("share", [0.6, 1.0], ids=["soft", "hard"])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_tr_dpo_with_lora(world: worlds.World, tmp_path: Path, share: float, every: int, mode: str) -> None:
    """The reference is an explicit merged model, made anew from factors that are mixed by hand every so many steps."""
    import peft

    torch.manual_seed(0)
    begun = peft.get_peft_model(model_of(world), lora())
    with torch.no_grad():
        # An adapter that was trained before: both factors move, and the reference begins as the policy.
        for name, p in begun.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    policy, base = copy.deepcopy(begun), model_of(world)
    options = {"sync_ref_model": True, "ref_model_mixup_alpha": share, "ref_model_sync_steps": every, "beta": BETA}
    trainer = train(copy.deepcopy(begun), world, PLAIN_ROWS, tmp_path, **options, packing_mode=mode)
    followed = factors(begun)
    references = [merged(base, followed)]

    def follow(step: int) -> None:
        if step % every == 0:
            for name, value in factors(policy).items():
                followed[name] = share * value + (1 - share) * followed[name]
            references.append(merged(base, followed))

    losses = slow_steps(policy, lambda: references[-1], list(trainer.train_dataset), reverse_kl, follow)
    assert_same_training(trainer, losses, policy, begun)
    assert len(references) == 1 + PLAIN["max_steps"] // every
    if share == 1.0:
        # A hard update makes the reference the policy, whatever the factors.
        now, after = merged(base, factors(policy)), references[-1]
        for (name, a), (_, b) in zip(now.named_parameters(), after.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def test_a_resumed_run_goes_on_with_the_same_followed_reference(world: worlds.World, tmp_path: Path) -> None:
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6}
    options = {**sync, "optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    for number, adapter in enumerate((None, lora())):
        out = tmp_path / str(number)
        through = train(world.path, world, PLAIN_ROWS, out, **options, peft_config=adapter)
        checkpoint = str(out / "checkpoint-2")
        resumed = train(
            world.path, world, PLAIN_ROWS, out, **options, peft_config=adapter, resume_from_checkpoint=checkpoint
        )
        for a, b in zip(resumed.reference.following(), through.reference.following(), strict=True):
            assert torch.equal(a, b)
        for (name, a), (_, b) in zip(resumed.model.named_parameters(), through.model.named_parameters(), strict=True):
            assert torch.equal(a, b), name
