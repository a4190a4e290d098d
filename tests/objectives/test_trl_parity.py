"""TRL as the independent oracle: its own loss code, run on prescribed log-probs.

Its trainers are not built; their loss methods are called unbound with a plain namespace in the place of ``self`` and a
function in the place of the model, which returns the per-token log-probs that both sides get.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from preftune.objectives import (
    MODIFIERS,
    NEUTRAL,
    PairLogps,
    UnpairedLogps,
    build_objective,
    kl_baseline,
    ld_weights,
    wpo_weight,
)

with warnings.catch_warnings():
    # The experimental namespace says so on import.
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

PAIRS, TOKENS = 6, 14


# Called unbound, with a namespace for self, so their signatures are not ours to type.
ORACLE: Any = SimpleNamespace(dpo=DPOTrainer, kto=KTOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer)


def same(ours: Tensor, theirs: Tensor) -> None:
    """Equal to float32 rounding."""
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


class Tokens:
    """Random per-token log-probs in a padded batch, chosen sequences first, as TRL lays them out."""

    def __init__(self, scale: float = 1.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.mask = torch.zeros(2 * PAIRS, TOKENS + 1, dtype=torch.long)
        for row in range(2 * PAIRS):
            start, length = torch.randint(1, 4, (2,), generator=generator).tolist()
            self.mask[row, start : start + 2 * length + row % 3] = 1
        self.scored = self.mask[:, 1:]
        shape = (2 * PAIRS, TOKENS)
        self.logps = -scale * torch.rand(shape, generator=generator) * self.scored
        self.ref_logps = -scale * torch.rand(shape, generator=generator) * self.scored
        self.sum_sq = -torch.rand(shape, generator=generator)
        self.lengths = self.mask.sum(1)

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = values.chunk(2)
        return chosen, rejected

    def tail_weights(self, alpha: float | None) -> Tensor:
        """LD-DPO weights in the padded layout, from our flat ones."""
        weights = torch.ones(self.scored.shape)
        if alpha is not None:
            own = self.scored.sum(1)
            other = own.roll(PAIRS)
            weights[self.scored.bool()] = ld_weights(own, other, alpha)
        return weights

    def ours(self, logps: Tensor, ld_alpha: float | None = None, use_weighting: bool = False) -> PairLogps:
        """The same tokens as a batch of sums."""
        weights = self.tail_weights(ld_alpha)
        chosen, rejected = self.split((logps * weights).sum(1))
        ref_chosen, ref_rejected = self.split((self.ref_logps * weights).sum(1))
        chosen_lengths, rejected_lengths = self.split(self.lengths)
        scored = self.split(self.scored.sum(1))
        aligned = self.split(((logps - self.sum_sq) * self.scored).sum(1))
        return PairLogps(
            chosen_logps=chosen,
            rejected_logps=rejected,
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            chosen_sum_logps=self.split(logps.sum(1))[0],
            chosen_scored=scored[0],
            wpo_weights=wpo_weight(*aligned, *scored) if use_weighting else None,
        )


def trl_dpo(tokens: Tokens, logps: Tensor, loss_type: list[str], **settings: Any) -> tuple[Tensor, dict[str, float]]:
    """Loss and logged metrics of TRL's DPO trainer."""
    ld_alpha = settings.get("ld_alpha")
    weights = tokens.tail_weights(None)
    if ld_alpha is not None:
        # TRL's reference sums come from its own reference pass; its rule, on its own masks.
        position = tokens.scored.cumsum(1)
        shared = torch.minimum(*tokens.split(tokens.scored.sum(1))).repeat(2)
        weights = torch.where(position > shared[:, None], ld_alpha, 1.0)
    ref_chosen, ref_rejected = tokens.split((tokens.ref_logps * weights).sum(1))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        ld_alpha=ld_alpha,
        f_divergence_type=settings.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=settings.get("f_alpha_divergence_coef", 0.5),
        loss_types=loss_type,
        loss_weights=settings.get("loss_weights") or [1.0] * len(loss_type),
        beta=settings["beta"],
        label_smoothing=settings.get("label_smoothing", 0.0),
        args=SimpleNamespace(discopop_tau=settings.get("discopop_tau", 0.05)),
        use_weighting=settings.get("use_weighting", False),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    outputs = SimpleNamespace(
        log_probs=logps,
        log_sum_sq_probs=tokens.sum_sq,
        entropy=torch.zeros(logps.shape),
        mean_logits=torch.zeros(logps.shape),
        is_top1=torch.zeros(logps.shape, dtype=torch.bool),
    )
    inputs = {
        "input_ids": torch.ones_like(tokens.mask),
        "attention_mask": torch.ones_like(tokens.mask),
        "completion_mask": tokens.mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss = ORACLE.dpo._compute_loss(trainer, lambda **kwargs: outputs, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items() if values}


def compare(loss_type: str | list[str], scale: float = 1.0, **settings: Any) -> None:
    """Loss, gradient of every token and logged rewards, ours against TRL's."""
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    tokens = Tokens(scale)
    theirs_in, ours_in = (tokens.logps.clone().requires_grad_() for _ in range(2))
    theirs, metrics = trl_dpo(tokens, theirs_in, names, **settings)
    objective = build_objective(loss_type, **settings)
    batch = tokens.ours(ours_in, settings.get("ld_alpha"), settings.get("use_weighting", False))
    ours = objective(batch).loss.mean()
    same(ours, theirs)
    mask = tokens.scored
    (grad_theirs,), (grad_ours,) = torch.autograd.grad(theirs, [theirs_in]), torch.autograd.grad(ours, [ours_in])
    same(grad_ours * mask, grad_theirs * mask)
    assert grad_theirs.abs().max() > 0
    chosen, rejected = objective.rewards(batch)
    assert chosen.mean().item() == pytest.approx(metrics["rewards/chosen"], rel=1e-5, abs=1e-7)
    assert rejected.mean().item() == pytest.approx(metrics["rewards/rejected"], rel=1e-5, abs=1e-7)
    assert (chosen > rejected).float().mean().item() == pytest.approx(metrics["rewards/accuracies"])


# All loss types of TRL's DPO trainer, with the beta that their papers use and one at the other end.
@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        ("sigmoid", {}),
        ("hinge", {}),
        ("ipo", {}),
        ("exo_pair", {"label_smoothing": 1e-3}),
        ("exo_pair", {"label_smoothing": 0.2}),
        ("nca_pair", {}),
        ("robust", {}),
        ("robust", {"label_smoothing": 0.1}),
        ("robust", {"label_smoothing": 0.4}),
        ("bco_pair", {}),
        ("sppo_hard", {}),
        ("aot", {}),
        ("aot", {"label_smoothing": 0.1}),
        ("aot_unpaired", {}),
        ("aot_unpaired", {"label_smoothing": 0.1}),
        ("apo_zero", {}),
        ("apo_down", {}),
        ("discopop", {}),
        ("discopop", {"discopop_tau": 0.7}),
        ("sft", {}),
        ("sigmoid_norm", {}),
    ],
)
@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_every_dpo_loss_type(loss_type: str, settings: dict[str, Any], beta: float) -> None:
    compare(loss_type, beta=beta, **settings)


@pytest.mark.parametrize(
    "loss_type", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", ["sigmoid", "sft"]]
)
@pytest.mark.parametrize(
    "divergence",
    [
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.8},
    ],
)
def test_every_divergence(loss_type: str | list[str], divergence: dict[str, Any]) -> None:
    extra = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust") else {}
    compare(loss_type, scale=0.5, beta=0.2, **divergence, **extra)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm", "apo_zero", "aot", ["sigmoid", "sft"]])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0])
def test_ld_dpo(loss_type: str | list[str], ld_alpha: float) -> None:
    compare(loss_type, beta=0.3, ld_alpha=ld_alpha)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sppo_hard", "apo_down", "sigmoid_norm", "nca_pair"])
def test_wpo(loss_type: str) -> None:
    compare(loss_type, beta=0.3, use_weighting=True)


def test_wpo_together_with_ld() -> None:
    compare(["sigmoid", "bco_pair"], beta=0.3, use_weighting=True, ld_alpha=0.5, loss_weights=[0.7, 0.4])


def test_mixtures() -> None:
    compare(["sigmoid", "bco_pair", "sft"], beta=0.1, loss_weights=[0.8, 0.2, 1.0])  # MPO
    compare(["sigmoid", "sft"], beta=0.1, loss_weights=[1.0, 0.005])  # RPO
    compare(["ipo", "apo_zero", "robust"], beta=0.1, label_smoothing=0.2)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_label_smoothing_is_applied_where_trl_drops_it(loss_type: str) -> None:
    """A deliberate difference: TRL takes label_smoothing with these losses and computes plain DPO.

    A cDPO configuration then trains something else than it says. Here it is cDPO, and TRL's own robust loss proves it:
    cDPO = (1 - e) DPO + e swapped DPO and robust = ((1 - e) DPO - e swapped DPO) / (1 - 2 e).
    """
    tokens, beta, e = Tokens(), 0.3, 0.2
    plain, _ = trl_dpo(tokens, tokens.logps, [loss_type], beta=beta)
    ignored, _ = trl_dpo(tokens, tokens.logps, [loss_type], beta=beta, label_smoothing=e)
    assert torch.equal(plain, ignored)
    ours = build_objective(loss_type, beta=beta, label_smoothing=e)(tokens.ours(tokens.logps)).loss.mean()
    assert not torch.isclose(ours, plain, rtol=1e-3)
    if loss_type == "sigmoid":
        robust, _ = trl_dpo(tokens, tokens.logps, ["robust"], beta=beta, label_smoothing=e)
        flipped = (1 - e) * plain - (1 - 2 * e) * robust  # e times the swapped DPO loss
        same(ours, (1 - e) * plain + flipped)


def test_wpo_where_trl_breaks() -> None:
    """TRL multiplies the weights in place, which two losses do not survive.

    hinge has no gradient then (relu needs its own output), and the SFT term, one expanded number, cannot be written to
    at all. Here each pair's weight scales its own term, for every loss.
    """
    tokens = Tokens()
    logps = tokens.logps.clone().requires_grad_()
    theirs, _ = trl_dpo(tokens, logps, ["hinge"], beta=0.3, use_weighting=True)
    with pytest.raises(RuntimeError, match="inplace"):
        theirs.backward()
    with pytest.raises(RuntimeError, match="single memory location"):
        trl_dpo(tokens, tokens.logps, ["sft"], beta=0.3, use_weighting=True)

    batch = tokens.ours(logps, use_weighting=True)
    hinge = build_objective("hinge", beta=0.3, use_weighting=True)(batch).loss.mean()
    same(hinge, theirs)
    assert torch.autograd.grad(hinge, [logps])[0].abs().sum() > 0

    sft = build_objective("sft", beta=0.3, use_weighting=True)(
        tokens.ours(tokens.logps, use_weighting=True)
    ).loss.mean()
    assert batch.wpo_weights is not None
    chosen, own = tokens.split(tokens.logps)[0].sum(1), tokens.split(tokens.scored)[0].sum(1)
    same(sft.detach(), -(chosen * batch.wpo_weights).sum() / own.sum())


@pytest.mark.parametrize("ratio", [40.0, 1e4])
def test_extremes_are_finite_where_trl_overflows(ratio: float) -> None:
    """The guard is a difference too: TRL's forward KL overflows, and its alpha-divergence clamps to a zero gradient."""
    tokens = Tokens()
    tokens.logps = torch.where(tokens.scored.bool(), tokens.ref_logps - ratio, 0.0)
    for divergence in ("forward_kl", "alpha_divergence"):
        logps = tokens.logps.clone().requires_grad_()
        objective = build_objective("sigmoid", beta=0.1, f_divergence_type=divergence)
        ours = objective(tokens.ours(logps)).loss.mean()
        (gradient,) = torch.autograd.grad(ours, [logps])
        assert ours.isfinite()
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0
    theirs, _ = trl_dpo(tokens, tokens.logps, ["sigmoid"], beta=0.1, f_divergence_type="forward_kl")
    assert ratio < 100 or not theirs.isfinite()


def pair_averages(seed: int = 1) -> tuple[PairLogps, Tensor, Tensor]:
    """Reference-free pairs, and their average log-probs."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = (-0.5 - 8 * torch.rand(2, PAIRS, generator=generator)).unbind(0)
    lengths = torch.randint(1, 9, (2, PAIRS), generator=generator)
    batch = PairLogps(
        chosen_logps=chosen.requires_grad_(),
        rejected_logps=rejected.requires_grad_(),
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
    )
    return batch, chosen / lengths[0], rejected / lengths[1]


def same_loss_and_gradient(ours: Tensor, theirs: Tensor, batch: PairLogps) -> None:
    same(ours, theirs)
    leaves = [batch.chosen_logps, batch.rejected_logps]
    for left, right in zip(
        torch.autograd.grad(ours.sum(), leaves, retain_graph=True),
        torch.autograd.grad(theirs.sum(), leaves, retain_graph=True),
        strict=True,
    ):
        same(left, right)


@pytest.mark.parametrize(
    ("ours_name", "loss_type", "averaged"),
    [("cpo", "sigmoid", False), ("cpo_hinge", "hinge", False), ("cpo_ipo", "ipo", True), ("simpo", "simpo", True)],
)
@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.3])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cpo_family(ours_name: str, loss_type: str, averaged: bool, alpha: float, label_smoothing: float) -> None:
    if label_smoothing and loss_type in ("hinge", "ipo"):
        with pytest.raises(ValueError, match="label_smoothing"):  # TRL warns and ignores it
            build_objective(ours_name, beta=0.7, label_smoothing=label_smoothing)
        return
    batch, chosen, rejected = pair_averages()
    trainer = SimpleNamespace(
        alpha=alpha,
        beta=0.7,
        loss_type=loss_type,
        simpo_gamma=0.4,
        label_smoothing=label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    sums = (batch.chosen_logps, batch.rejected_logps)
    theirs, *rewards = ORACLE.cpo.cpo_loss(trainer, *((chosen, rejected) if averaged else sums))
    knobs: dict[str, Any] = {"alpha": alpha, "cpo_alpha": 0.0, "simpo_gamma": 0.4 if loss_type == "simpo" else None}
    if label_smoothing:
        knobs["label_smoothing"] = label_smoothing
    objective = build_objective(ours_name, beta=0.7, **knobs)
    same_loss_and_gradient(objective(batch).loss, theirs, batch)
    for left, right in zip(objective.rewards(batch), rewards, strict=True):
        same(left, right)


def test_cpo_sft_term_is_trl_cross_entropy() -> None:
    """TRL adds torch's cross-entropy over all chosen tokens of the batch; a uniform vocabulary of 8 makes it log 8."""
    lengths = torch.tensor([1.0, 5.0])
    batch = PairLogps(
        chosen_logps=-lengths * torch.log(torch.tensor(8.0)),
        rejected_logps=-torch.ones(2),
        chosen_lengths=lengths,
        rejected_lengths=torch.ones(2),
    )
    labels = torch.tensor([3, 1, 4, 1, 5, 2])
    theirs = torch.nn.functional.cross_entropy(torch.zeros(6, 8), labels)
    with_term = build_objective("cpo", beta=0.1, cpo_alpha=0.6)(batch).loss.mean()
    without = build_objective("cpo", beta=0.1, cpo_alpha=0.0)(batch).loss.mean()
    same(with_term - without, 0.6 * theirs)


@pytest.mark.parametrize("beta", [0.05, 0.7])
def test_orpo(beta: float) -> None:
    batch, chosen, rejected = pair_averages()
    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    ratio, *rewards = ORACLE.orpo.odds_ratio_loss(trainer, chosen, rejected)[:3]
    nll = -batch.chosen_logps.sum() / batch.chosen_lengths.sum()
    objective = build_objective("orpo", beta=beta)
    ours = objective(batch).loss.mean()
    same_loss_and_gradient(ours, nll - ratio.mean(), batch)
    for left, right in zip(objective.rewards(batch), rewards, strict=True):
        same(left, right)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kl_shift", [-3.0, 3.0])
@pytest.mark.parametrize("labels", [[1, 0, 1, 1, 0, 0], [1] * 6, [0] * 6])
def test_kto_trainer(loss_type: str, kl_shift: float, labels: list[int]) -> None:
    tokens, mismatched = Tokens(seed=2), Tokens(seed=3)
    logps = tokens.logps[:PAIRS].clone().requires_grad_()
    mask, kl_mask = tokens.mask[:PAIRS], mismatched.mask[:PAIRS]
    ref_logps = tokens.ref_logps[:PAIRS].sum(1)
    kl_logps = mismatched.logps[:PAIRS]
    ref_kl_logps = kl_logps.sum(1) - kl_shift + mismatched.ref_logps[:PAIRS].sum(1) * 0.1
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=0.4,
        desirable_weight=1.2,
        undesirable_weight=0.9,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = partial(ORACLE.kto._compute_kl_logps, trainer)
    kl_ids = torch.full_like(kl_mask, 2)

    def model(input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        chosen = kl_logps if torch.equal(input_ids, kl_ids) else logps
        zeros = torch.zeros(logps.shape)
        return SimpleNamespace(log_probs=chosen, entropy=zeros, mean_logits=zeros)

    inputs = {
        "input_ids": torch.ones_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": kl_ids,
        "KL_attention_mask": torch.ones_like(mask),
        "KL_completion_mask": kl_mask,
        "label": torch.tensor(labels),
        "ref_logps": ref_logps,
        "ref_KL_logps": ref_kl_logps,
    }
    theirs = ORACLE.kto._compute_loss(trainer, model, inputs, False)
    (grad_theirs,) = torch.autograd.grad(theirs, [logps])
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items() if values}

    batch = UnpairedLogps(logps=logps.sum(1), ref_logps=ref_logps, labels=torch.tensor(labels).bool())
    objective = build_objective(loss_type, beta=0.4, desirable_weight=1.2, undesirable_weight=0.9)
    kl = kl_baseline(kl_logps.sum(1), ref_kl_logps) if objective.uses_kl else None
    if kl is not None:
        assert kl.item() == pytest.approx(metrics["kl"], rel=1e-5, abs=1e-6)
    ours = objective(batch, kl=kl).loss.mean()
    same(ours, theirs)
    same(torch.autograd.grad(ours, [logps])[0], grad_theirs)
    desirable, undesirable = objective.rewards(batch)
    for name, rewards in (("rewards/chosen", desirable), ("rewards/rejected", undesirable)):
        assert len(rewards) == sum(labels) if name == "rewards/chosen" else len(rewards) == 6 - sum(labels)
        if len(rewards):
            assert rewards.mean().item() == pytest.approx(metrics[name], rel=1e-5, abs=1e-6)


def test_every_dpo_setting_of_trl_is_known() -> None:
    """A script written for TRL passes these names; each is a knob or a modifier here."""
    loss_settings = {
        "label_smoothing",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "discopop_tau",
        "ld_alpha",
        "use_weighting",
        "desirable_weight",
        "undesirable_weight",
    }
    declared: dict[str, Any] = {
        entry.name: entry.default for config in (DPOConfig, KTOConfig) for entry in fields(config)
    }
    known = {**NEUTRAL, **{name: knob.default for name, knob in MODIFIERS.items()}}
    for name in loss_settings:
        assert declared[name] == known[name], name
    defaults = {name: declared[name] for name in loss_settings}
    assert build_objective("sigmoid", beta=0.1, **defaults).names == ("sigmoid",)
