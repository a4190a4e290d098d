"""One rule per setting: from the published rows that apply, and from what is known about data and model, to a value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from preftune.advice.case import Case, Setting, Source, size_text
from preftune.advice.labels import label_state, surely_noisy
from preftune.advice.published import (
    NEAR,
    Published,
    contradiction,
    distance,
    nearest,
    rows_for,
    source_name,
)
from preftune.advice.scaling import ADAPTER_FACTOR, MOST, SAME_SIZE, TOY_RATE, TOY_SIZE, rate_at_size, two_digits
from preftune.advice.sources import HANDBOOK, LEARNING, NOISE_TABLE, NOTES, PLAYBOOK, QLORA
from preftune.objectives import METHODS
from preftune.objectives.knobs import LABEL_SMOOTHING
from preftune.verbs import ROWS

#: Smoothing beyond this leaves little of the signal: the loss keeps 1 - 2 e of it.
MOST_SMOOTHING = 0.4
#: Optimizer steps that a run should at least have; heuristic.
LEAST_STEPS = 100
LEAST_BATCH, USUAL_BATCH = 8, 64
#: Pairs that may lose tokens before max_length counts as too short; heuristic.
UNCUT_SHARE = 0.995
#: Lengths are advised in multiples of this.
LENGTH_STEP = 64


def _first(rows: list[Published]) -> Published | None:
    return next((row for row in rows if row.value is not None), None)


def _sources(rows: list[Published]) -> tuple[Source, ...]:
    return tuple(dict.fromkeys(row.as_source for row in rows))


def loss_type(case: Case) -> Setting | None:
    """The robust form of the logistic loss where labels are surely flipped; otherwise the method is the user's."""
    if case.verb != "dpo" or case.methods != ("sigmoid",) or not surely_noisy(case.noise):
        return None
    sources = (
        Source("arXiv:2403.00409", "unbiased under flipped labels, which smoothing of sigmoid is not"),
        Source(NOISE_TABLE, "eight seeds, which tell no difference between plain, smoothed and robust"),
        Source(NOTES, "label smoothing of 0.1 to 0.2 helps, with the usual loss"),
    )
    reason = (
        "labels are flipped, and this loss takes out what that adds to the gradient on average; a choice by theory, "
        "as measurements tell no difference"
    )
    clash = (
        f"sources disagree: {NOTES} finds smoothing of 0.1 to 0.2 helpful; eight seeds here show no gain of either "
        "form over the plain loss, and robust goes further from the reference. Compare them on held-out pairs"
    )
    return Setting("loss_type", "robust", None, None, reason, sources, "heuristic", clash)


def beta(case: Case) -> Setting | None:
    """Beta on its method's own scale."""
    rows = rows_for("beta", case)
    first = nearest(rows, case)
    if first is None or first.value is None:
        return None
    low, high = min(row.low for row in rows), max(row.high for row in rows)
    reason = f"published for {case.method}; scales differ between methods, so that values cannot be carried over"
    kind = "published"
    if first.source.startswith("recipe "):
        reason = f"of the {first.source}, a model of about this size; scales differ between methods"
    if low == high:
        # A single number has no range of its own.
        low, high = low / 2, high * 2
        reason += "; the range, half to twice the value, is a rule of thumb"
    if first.methods and case.method not in first.methods:
        reason = "published for this mixture of methods"
    if case.method == "ipo" and case.given.get("ipo_normalize", True):
        target = 1 / (2 * first.value)
        reason += (
            f". With averages over tokens, as TRL computes it, {first.value:g} asks for {target:g} nats a token, which "
            "makes the loss all but linear; the paper's value is for sums (ipo_normalize: false). With averages, 0.5 "
            "to 5 asks for 1 to 0.1 nats a token"
        )
        return Setting("beta", first.value, low, 5.0, reason, _sources(rows), "published", contradiction(rows))
    return Setting("beta", first.value, low, high, reason, _sources(rows), kind, contradiction(rows))


def rate_row(case: Case, row: Published) -> Published:
    """A published rate, carried over to the size of the model at hand and to adapter or all weights."""
    factor = ADAPTER_FACTOR if row.lora else 1.0

    def carried(rate: float) -> float:
        at_size = rate_at_size(rate / factor, case.num_parameters, row.num_parameters)
        return two_digits(min(at_size * (ADAPTER_FACTOR if case.lora else 1.0), MOST))

    value = None if row.value is None else carried(row.value)
    return Published(row.field, row.source, value, carried(row.low), carried(row.high), row.methods, row.lora)


def learning_rate(case: Case) -> Setting:
    """The nearest published rate, carried over to the model's size and to adapter or all weights."""
    rows = rows_for("learning_rate", case)
    first = nearest(rows, case) or Published("learning_rate", NOTES, 5e-7, says="5e-7 to 1e-6 from 7B parameters on")
    # What is near in size says what the range is; the rest is named as a source.
    near = [row for row in rows if distance(case, row) <= math.log(8)] or rows
    carried = [rate_row(case, row) for row in near] or [rate_row(case, first)]
    base = rate_row(case, first)
    assert base.value is not None
    assert first.value is not None
    low, high = min(base.low, *(row.low for row in carried)), max(base.high, *(row.high for row in carried))
    told = [f"{first.value:g} is published" + ("" if first.methods else " for DPO in general")]
    sources = list(_sources(rows or [first]))
    kind = "published" if first.methods else "heuristic"
    whole = first.value / (ADAPTER_FACTOR if first.lora else 1.0)
    if rate_at_size(whole, case.num_parameters, first.num_parameters) != whole:
        told.append(
            f"carried over from about {size_text(first.num_parameters)} to {size_text(case.num_parameters)} "
            + (
                f"(log-linear between the published point and {TOY_RATE:g} at {size_text(TOY_SIZE)})"
                if case.num_parameters < first.num_parameters
                else "(as the size to the power -0.42)"
            )
        )
        if case.num_parameters < first.num_parameters:
            sources.append(Source(LEARNING, f"{TOY_RATE:g} at {size_text(TOY_SIZE)}, 16 pairs a step"))
        kind = "heuristic"
    elif distance(case, first) > math.log(SAME_SIZE):
        told.append(f"for about {size_text(first.num_parameters)}, and taken as it is for want of a nearer number")
        kind = "heuristic"
    if case.lora and not first.lora:
        told.append("ten times that for an adapter")
        sources += [Source(HANDBOOK, "5e-7 for all weights, 5e-6 for QLoRA"), Source(PLAYBOOK, "LoRA about 10x")]
        kind = "heuristic"
        # The rate of all weights is slow for an adapter, and not wrong.
        if first.num_parameters > 8 * case.num_parameters >= 8 * TOY_SIZE:
            low = min(low, two_digits(base.low / ADAPTER_FACTOR))
    if first.lora and not case.lora:
        told.append("published for an adapter, a tenth of that for all weights")
        kind = "heuristic"
    if low == high:
        low, high = two_digits(low / 2), two_digits(high * 2)
        told.append("the range, half to twice that, is a rule of thumb")
    sources.append(
        Source(
            NOTES,
            "rewards up by more than 10 % within one epoch: the rate is probably too high (guard reward_jump)",
        )
    )
    clash = contradiction([rate_row(case, row) for row in near if row.lora in (None, case.lora)])
    return Setting("learning_rate", base.value, low, high, "; ".join(told), tuple(dict.fromkeys(sources)), kind, clash)


def adapter(case: Case) -> list[Setting]:
    """Rank, scale and targets of an adapter."""
    if not case.lora:
        return []
    rows = rows_for("lora_r", case)
    first = nearest(rows, case)
    if first is not None and distance(case, first) > math.log(NEAR):
        first = None
    rank = 16 if first is None or first.value is None else int(first.value)
    kind = "heuristic" if first is None else "published"
    usual = "a usual rank for a model of this size; a higher one learns no more where every linear layer has an adapter"
    reason = usual if first is None else f"of the {first.source}"
    low, high = min(8, rank), max(128, rank)
    wide = Source(QLORA, "adapters on all linear layers matter, their rank hardly does")
    alpha = 2 * rank if first is None else rank
    return [
        Setting("lora_r", rank, low, high, reason, (*_sources(rows), wide), kind),
        Setting("lora_alpha", alpha, None, None, "the update is scaled by alpha / r", _sources(rows) or (wide,), kind),
        Setting(
            "lora_target_modules",
            "all-linear",
            None,
            None,
            "every linear layer, as for all weights at a small rank",
            (wide, *_sources(rows)),
            "published",
        ),
    ]


_EPOCHS = {
    # state: value, low, high, reason
    "noisy": (1, 1, 2, "labels this noisy are learnt by heart in further epochs"),
    "mixed": (2, 1, 3, "between the notes' 1 to 2 for noisy and 3 to 5 for clean labels"),
    "clean": (3, 1, 5, "clean labels bear repetition"),
    "unknown": (
        1,
        1,
        3,
        "the noise is not known, and one epoch is the usual choice; `preftune data audit` estimates it",
    ),
}


def num_train_epochs(case: Case) -> Setting:
    """As many epochs as the labels bear."""
    state = label_state(case.noise)
    value, low, high, why = _EPOCHS[state]
    if case.noise is not None:
        why += (
            f" ({case.noise.estimate:.0%} flipped, so that two annotators who err like this agree on "
            f"{case.noise.agreement:.0%})"
        )
    rows = rows_for("num_train_epochs", case, {"noisy": "noisy", "clean": "clean"}.get(state, ""))
    kind = "heuristic" if state in ("mixed", "unknown") else "published"
    return Setting("num_train_epochs", value, low, high, why, _sources(rows), kind, contradiction(rows))


def label_smoothing(case: Case) -> Setting | None:
    """The share of flipped labels, where the method can make use of it and there surely are some."""
    knob = METHODS[case.method].knobs.get(LABEL_SMOOTHING.name)
    if knob is None:
        return None
    noise = case.noise
    rows = rows_for("label_smoothing", case, "noisy")
    of_method = _first(rows)
    default = float(knob.default) if of_method is None or of_method.value is None else of_method.value
    if knob.default:
        # A target probability of the method, not a share of flipped labels.
        return Setting("label_smoothing", default, None, None, "part of the method", _sources(rows[:1]), "published")
    if noise is None:
        reason = "the noise is not known; smoothing clean labels costs signal"
        if of_method is not None:
            return Setting("label_smoothing", default, 0.0, 0.4, reason, _sources(rows), "published")
        return Setting("label_smoothing", 0.0, 0.0, 0.2, reason, _sources(rows), "heuristic")
    if not surely_noisy(noise):
        reason = f"{noise.estimate:.0%} flipped labels cannot be told from none ({noise.span})"
        return Setting("label_smoothing", 0.0, 0.0, round(noise.estimate, 2), reason, _sources(rows), "heuristic")
    value = min(round(noise.estimate, 2), MOST_SMOOTHING)
    reason = f"the estimated share of flipped labels, {noise.span} ({noise.source})"
    outside = value > 0.2 or value < 0.1
    clash = (
        f"sources disagree: {NOTES} say 0.1 to 0.2; arXiv:2403.00409 takes the share of flipped labels, here {value:g}"
        if outside
        else None
    )
    sources = (*_sources(rows), Source("arXiv:2403.00409", "label_smoothing is the share of flipped labels"))
    return Setting(
        "label_smoothing",
        value,
        round(noise.low, 2),
        min(round(noise.high, 2), 0.49),
        reason,
        sources,
        "computed",
        clash,
    )


def batch_size(case: Case) -> int:
    """Pairs of an optimizer step: the published number, or what leaves enough steps; a power of two."""
    first = _first(rows_for("batch_size", case))
    usual = USUAL_BATCH if first is None or first.value is None else int(first.value)
    if not case.num_pairs:
        return usual
    epochs = _EPOCHS[label_state(case.noise)][0]
    most = max(case.num_pairs * epochs / LEAST_STEPS, 1)
    return max(LEAST_BATCH, min(usual, 1 << int(math.log2(most))))


def pairs_per_step(case: Case) -> list[Setting]:
    """Batch size and accumulation whose product is the advised number of pairs."""
    rows = rows_for("batch_size", case)
    wanted = batch_size(case)
    first = _first(rows)
    per_device = max(1, min(16, wanted // case.num_processes))
    accumulation = max(1, round(wanted / (per_device * case.num_processes)))
    reason = f"{per_device * accumulation * case.num_processes} pairs a step"
    kind = "published"
    if first is None or first.value != wanted:
        enough = f"has about {LEAST_STEPS} steps or more"
        if case.num_pairs and case.num_pairs * _EPOCHS[label_state(case.noise)][0] < wanted * LEAST_STEPS:
            enough = "has more steps; with still fewer, steps would be too noisy"
        reason += f": fewer than published, so that the run {enough}"
        kind = "heuristic"
        if first is None:
            reason, kind = f"{wanted} pairs a step; nothing is published for this method", "heuristic"
    sources = (*_sources(rows), Source(NOTES, "a larger effective batch steadies the updates"))
    low, high = max(LEAST_BATCH, wanted // 4), 4 * wanted
    split = "; packing divides a step into rows by itself, so that the split between the two does not matter"
    return [
        Setting(
            "per_device_train_batch_size",
            per_device,
            max(1, low // (accumulation * case.num_processes)),
            max(1, high // (accumulation * case.num_processes)),
            reason + split,
            sources,
            kind,
            contradiction(rows),
        ),
        Setting("gradient_accumulation_steps", accumulation, None, None, reason, sources, kind),
    ]


def warmup(case: Case) -> list[Setting]:
    """Warm-up over a tenth of the steps, then cosine."""
    rows = rows_for("warmup_steps", case)
    said = (*_sources(rows), Source(HANDBOOK, "cosine"))
    share = Setting("warmup_steps", 0.1, 0.03, 0.1, "a share of the steps, as in nearly all recipes", said, "published")
    return [
        share,
        Setting("lr_scheduler_type", "cosine", None, None, "as in nearly all recipes", said[-1:], "published"),
    ]


def max_length(case: Case) -> Setting | None:
    """A length that cuts next to nothing, from the data."""
    lengths = case.lengths
    if lengths is None or not len(lengths.longest):
        return None
    longest = int(lengths.longest.max())
    wanted = _whole_steps(lengths.quantile(UNCUT_SHARE))
    low, high = _whole_steps(lengths.quantile(0.95)), _whole_steps(longest)
    reason = (
        f"{UNCUT_SHARE:.1%} of the pairs fit; half have at most {lengths.quantile(0.5)} tokens, the longest {longest}"
    )
    if case.max_positions and wanted > case.max_positions:
        wanted = high = case.max_positions
        low = min(low, wanted)
        reason = (
            f"the model was made for {wanted} tokens; {lengths.truncated_share(wanted):.1%} of the pairs are longer"
        )
    sources = (
        Source(
            "the data",
            f"{len(lengths.longest):,} {'answers' if ROWS[case.verb] == 'labelled' else 'pairs'}, {lengths.source}",
        ),
    )
    return Setting("max_length", wanted, low, high, reason, sources, "computed")


def _whole_steps(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def further_knobs(case: Case) -> list[Setting]:
    """Published knobs of the method beside those above, such as SimPO's margin."""
    spec = METHODS[case.method]
    # Knobs belong to the beta that they were published with.
    beside = nearest(rows_for("beta", case), case)
    found = []
    for name in spec.knobs:
        rows = [row for row in rows_for(name, case) if beside is not None and row.source == beside.source]
        if name == LABEL_SMOOTHING.name:
            continue
        if rows and rows[0].value is not None:
            reason = f"of the {rows[0].source}, a model of about this size"
            found.append(Setting(name, rows[0].value, None, None, reason, _sources(rows), "published"))
        elif name in spec.defaults:
            source = Source(source_name(spec.defaults_source), f"{spec.defaults[name]}")
            reason = f"published for {case.method}"
            found.append(Setting(name, spec.defaults[name], None, None, reason, (source,), "published"))
    return found


_RULES: tuple[Callable[[Case], Any], ...] = (
    loss_type,
    beta,
    learning_rate,
    num_train_epochs,
    label_smoothing,
    pairs_per_step,
    warmup,
    max_length,
    adapter,
    further_knobs,
)


def settings_for(case: Case) -> list[Setting]:
    """All advised settings of a case, in a fixed order."""
    found: list[Setting] = []
    for rule in _RULES:
        result = rule(case)
        if isinstance(result, Setting):
            found.append(result)
        elif result is not None:
            found += result
    return found
