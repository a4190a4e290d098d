"""Checks of a configuration: one function per risk, each silent where all is well or the numbers are not known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from preftune.advice.case import Flag, Setting, size_text
from preftune.advice.config_view import View
from preftune.advice.labels import CLEAN, SURE_NOISE, label_state
from preftune.advice.memory_check import memory_flags
from preftune.advice.sources import BLOG, HANDBOOK, LEARNING, NOTES, PLAYBOOK
from preftune.objectives import METHODS

#: How far outside its method's published range beta is no longer a choice but a mistake; heuristic.
_OFF_SCALE = 5.0
#: Notes: below this, DPO's policy chases reward.
_LOW_BETA = 0.05
#: Notes: above this, DPO's policy barely moves.
_HIGH_BETA = 0.3
#: Fewer steps than this hardly move a model at the advised rates; heuristic.
_FEW_STEPS = 20
#: Shares of truncated pairs to mention, and to warn of; heuristic.
_CUT_NOTE, _CUT_WARN = 0.01, 0.05
#: Hours after which a run that saves nothing is a risk; heuristic.
_LONG_HOURS = 1.0


def _beta_scale(view: View) -> Iterator[Flag]:
    beta, advised = view.number("beta"), view.advised.get("beta")
    if beta is None or advised is None or advised.low is None or advised.high is None:
        return
    if advised.low / _OFF_SCALE <= beta <= advised.high * _OFF_SCALE:
        return
    side = "below" if beta < advised.low else "above"
    yield Flag(
        "warn",
        ("beta",),
        f"beta {beta:g} is off the scale of {view.case.method}",
        f"published: {advised.low:g} to {advised.high:g}; this is more than {_OFF_SCALE:g} times {side}",
        f"beta: {advised.value:g}, or set loss_type to the method that this beta belongs to",
        _names(advised),
        "heuristic",
    )


def _advised(view: View, name: str) -> Any:
    setting = view.advised.get(name)
    return None if setting is None else setting.value


def _beta_bands(view: View) -> Iterator[Flag]:
    """The bands of beta for the logistic loss, as users tell them."""
    beta = view.number("beta")
    if beta is None or view.case.method not in ("sigmoid", "robust") or beta == _advised(view, "beta"):
        return
    if beta > _HIGH_BETA:
        detail = f"beta {beta:g}; above {_HIGH_BETA:g} the policy barely moves; 0.1 is sound, 0.1 to 0.5 usual"
        yield Flag("note", ("beta",), "a high beta", detail, "beta: 0.1", NOTES, "published")
    elif beta < _LOW_BETA:
        detail = f"beta {beta:g}; below {_LOW_BETA:g} the policy chases reward; recipes of 7B models do take 0.01"
        remedy = "watch KL and samples, or beta: 0.1; raising beta is safer than lowering it"
        yield Flag("note", ("beta",), "a low beta", detail, remedy, f"{NOTES}; {HANDBOOK}", "published")


def _conventions(view: View) -> Iterator[Flag]:
    """Numbers that mean something else than in the paper."""
    given = view.case.given
    if given.get("f_divergence_type") == "alpha_divergence":
        alpha = view.number("f_alpha_divergence_coef")
        if alpha is not None:
            yield Flag(
                "note",
                ("f_divergence_type", "f_alpha_divergence_coef"),
                "alpha runs the other way than in the f-DPO paper",
                f"{alpha:g} here, as in TRL, is {1 - alpha:g} there: 1 is reverse KL and 0 forward KL here",
                f"f_alpha_divergence_coef: {1 - alpha:g} for the paper's {alpha:g}",
                "arXiv:2309.16240",
                "published",
            )
    beta = view.number("beta")
    averages = view.case.method == "ipo" and given.get("ipo_normalize", True)
    if averages and beta and beta < _LOW_BETA and beta != _advised(view, "beta"):
        yield Flag(
            "note",
            ("beta", "ipo_normalize"),
            f"a target of {1 / (2 * beta):g} nats a token",
            f"beta {beta:g} with averages over tokens; no policy comes near it, so that the loss is all but linear",
            "ipo_normalize: false for the paper's sums, or beta: 0.5 to 5",
            "arXiv:2310.12036",
            "computed",
        )


def _rate(view: View) -> Iterator[Flag]:
    """Rate against the advised range; an adapter's and a full rate are told apart from a plain mistake."""
    rate, advised = view.number("learning_rate"), view.advised.get("learning_rate")
    if rate is None or advised is None or advised.low is None or advised.high is None:
        return
    fields: tuple[str, ...] = ("learning_rate",)
    said = f"{rate:g}; advised {advised.value:g} ({advised.low:g} to {advised.high:g})"
    names = _names(advised)
    remedy = f"learning_rate: {advised.value:g}"
    explicit = "learning_rate" in view.case.explicit
    if rate > 3 * advised.high and not view.case.lora:
        title = f"learning rate far too high for {size_text(view.case.num_parameters)}"
        if rate <= 30 * advised.high and explicit:
            title = "an adapter's learning rate for all weights"
        yield Flag("warn", fields, title, said, remedy, f"{names}; {HANDBOOK}", "heuristic")
    elif rate > 3 * advised.high:
        title = "learning rate far too high even for an adapter"
        yield Flag("warn", fields, title, said, remedy, names, "heuristic")
    elif view.case.lora and rate < advised.low / 2:
        title = "a full-fine-tuning rate for an adapter: it will hardly move"
        source = f"{HANDBOOK} (5e-7 and 5e-6), {PLAYBOOK} (about 10x)"
        yield Flag("warn", fields, title, said, remedy, source, "heuristic")
    elif rate < advised.low / 5:
        title = f"learning rate too low for {size_text(view.case.num_parameters)}: the model will hardly move"
        yield Flag("warn", fields, title, said, remedy, names, "heuristic")


def _names(setting: Setting) -> str:
    """The sources of an advised setting, the first three by name."""
    names = list(dict.fromkeys(source.name for source in setting.sources))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _rate_and_beta(view: View) -> Iterator[Flag]:
    rate, beta = view.number("learning_rate"), view.number("beta")
    rates, betas = view.advised.get("learning_rate"), view.advised.get("beta")
    if rate is None or beta is None or rates is None or betas is None or rates.high is None:
        return
    low = _LOW_BETA if view.case.method in ("sigmoid", "robust") else betas.value / 2
    if rate > rates.high and beta < low:
        yield Flag(
            "warn",
            ("learning_rate", "beta"),
            "high learning rate with low beta: the recipe for reward hacking",
            f"learning_rate {rate:g} is above {rates.high:g} and beta {beta:g} below {low:g}",
            f"learning_rate: {rates.value:g}, or beta: {betas.value:g}; raising beta is safer than lowering it",
            NOTES,
            "published",
        )


def _epochs(view: View) -> Iterator[Flag]:
    epochs, advised = view.number("num_train_epochs"), view.advised.get("num_train_epochs")
    noise = view.case.noise
    if epochs is None or advised is None or advised.high is None or (view.number("max_steps") or 0) > 0:
        return
    if epochs <= advised.high:
        return
    known = noise is not None
    detail = f"{epochs:g} epochs; {advised.low:g} to {advised.high:g} advised"
    detail += f" at {noise.estimate:.0%} flipped labels" if noise is not None else ", the noise not being known"
    yield Flag(
        "warn" if known else "note",
        ("num_train_epochs",),
        "more epochs than the labels bear" if known else "many epochs on labels of unknown noise",
        detail,
        f"num_train_epochs: {advised.value:g}" + ("" if known else ", or run `preftune data audit` first"),
        NOTES if known else PLAYBOOK,
        "published" if label_state(noise) == "noisy" else "heuristic",
    )


def _smoothing(view: View) -> Iterator[Flag]:
    smoothing, noise = view.number("label_smoothing"), view.case.noise
    knob = METHODS[view.case.method].knobs.get("label_smoothing")
    if smoothing is None or (knob is not None and knob.default):
        return
    field: tuple[str, ...] = ("label_smoothing",)
    if smoothing > 0 and knob is None:
        yield Flag(
            "problem",
            ("label_smoothing", "loss_type"),
            f"label smoothing does nothing with {view.case.method}",
            f"label_smoothing {smoothing:g} is not a setting of this loss",
            "leave it out, or use sigmoid, robust or aot",
            "`preftune methods`",
            "computed",
        )
    elif noise is not None and smoothing > 0 and noise.high < CLEAN:
        detail = f"label_smoothing {smoothing:g}; {noise.span} of the labels are flipped"
        title, remedy = "label smoothing on labels that are all but free of noise", "label_smoothing: 0"
        yield Flag("warn", field, title, detail, remedy, noise.source, "heuristic")
    elif noise is not None and smoothing > noise.high + 0.1:
        detail = f"label_smoothing {smoothing:g}; at most {noise.high:.0%} of the labels are flipped"
        title, remedy = "more label smoothing than there is noise", f"label_smoothing: {noise.estimate:.2g}"
        yield Flag("warn", field, title, detail, remedy, noise.source, "heuristic")


def _noise(view: View) -> Iterator[Flag]:
    noise = view.case.noise
    if noise is not None and noise.low >= 0.35:
        yield Flag(
            "problem",
            (),
            "the labels carry next to no information",
            f"{noise.span} of them are flipped ({noise.source})",
            "look at the data first: `preftune data audit`, then `preftune data show`",
            noise.source,
            "heuristic",
        )
    elif noise is not None and noise.low > SURE_NOISE and view.case.method == "sigmoid":
        smoothing = view.number("label_smoothing")
        if not smoothing:
            yield Flag(
                "note",
                ("label_smoothing", "loss_type"),
                "flipped labels, and a loss that takes them at their word",
                f"{noise.span} of them are flipped ({noise.source})",
                f"label_smoothing: {noise.estimate:.2g}, with loss_type sigmoid or robust",
                "arXiv:2403.00409; " + NOTES,
                "published",
            )


def _batch(view: View) -> Iterator[Flag]:
    pairs, advised = view.case.pairs_per_step, view.advised.get("per_device_train_batch_size")
    accumulation = view.advised.get("gradient_accumulation_steps")
    if pairs is None or advised is None or accumulation is None or advised.low is None:
        return
    wanted = advised.value * accumulation.value * view.case.num_processes
    least = advised.low * accumulation.value * view.case.num_processes
    fields = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if pairs < least:
        yield Flag(
            "warn" if pairs < 4 else "note",
            fields,
            f"only {pairs} pair{'s' if pairs != 1 else ''} in a step",
            f"advised {wanted} for {view.case.num_pairs or 'this number of'} pairs; small steps are noisy",
            f"gradient_accumulation_steps: {max(1, round(wanted / max(pairs, 1)))} times what it is",
            NOTES,
            "heuristic",
        )


def _steps(view: View) -> Iterator[Flag]:
    pairs, count, epochs = view.case.pairs_per_step, view.case.num_pairs, view.number("num_train_epochs")
    if not pairs or not count or epochs is None:
        return
    limit = view.number("max_steps") or 0
    batch, accumulation = _advised(view, "per_device_train_batch_size"), _advised(view, "gradient_accumulation_steps")
    if limit <= 0 and batch and accumulation and pairs <= batch * accumulation * view.case.num_processes:
        # As many steps as these data give.
        return
    steps = int(limit) if limit > 0 else max(1, round(epochs * -(-count // pairs)))
    if steps < _FEW_STEPS:
        yield Flag(
            "note",
            ("num_train_epochs", "per_device_train_batch_size"),
            f"the whole run has {steps} step{'s' if steps != 1 else ''}",
            f"{count:,} pairs, {pairs} a step, {epochs:g} epochs",
            "a smaller batch, or more data",
            "rule of thumb",
            "heuristic",
        )


def _warmup(view: View) -> Iterator[Flag]:
    warmup = view.number("warmup_steps")
    if warmup == 0 and not view.number("warmup_ratio"):
        yield Flag(
            "note",
            ("warmup_steps",),
            "no warm-up",
            "the first steps go at the full rate, with optimizer statistics of one step",
            "warmup_steps: 0.1",
            HANDBOOK,
            "published",
        )


def _truncation(view: View) -> Iterator[Flag]:
    limit, case = view.number("max_length"), view.case
    share = case.truncated_share
    if case.lengths is not None:
        share = case.lengths.truncated_share(None if limit is None else int(limit))
    if share is None or share <= _CUT_NOTE or limit is None:
        return
    if case.given.get("max_prompt_length") is not None:
        most = case.given["max_prompt_length"]
        yield Flag(
            "warn" if share > _CUT_WARN else "note",
            ("max_prompt_length", "max_length"),
            f"max_prompt_length {most} and max_length {limit:g} cut {share:.0%} of the pairs",
            "what is cut off a prompt is not read",
            "raise max_prompt_length",
            "the data",
            "heuristic",
        )
        return
    keeps_end = case.given.get("truncation_mode") == "keep_end"
    advised = view.advised.get("max_length")
    remedy = f"max_length: {advised.value}" if advised and advised.value > limit else "raise max_length"
    yield Flag(
        "warn" if share > _CUT_WARN else "note",
        ("max_length",),
        f"max_length {limit:g} cuts {share:.0%} of the pairs",
        "what is cut off the beginning of a prompt is not read"
        if keeps_end
        else "a cut completion ends without its end-of-sequence token, and teaches not to stop",
        remedy,
        "the data",
        "heuristic",
    )


def _evaluation(view: View) -> Iterator[Flag]:
    given = view.case.given
    if str(given.get("eval_strategy", "")) == "no":
        yield Flag(
            "note",
            ("eval_strategy",),
            "nothing is evaluated during training" if view.case.has_test else "nothing is held out",
            "a growing training margin looks the same with and without overfitting",
            "eval_strategy: steps" + ("" if view.case.has_test else ", with a test split or test_split_size"),
            NOTES,
            "published",
        )
    hours = 0.0 if view.time is None else view.time.seconds / 3600
    if str(given.get("save_strategy", "")) == "no" and hours > _LONG_HOURS:
        yield Flag(
            "warn",
            ("save_strategy",),
            "nothing is saved before the end",
            f"about {hours:.1f} hours would be lost with the machine",
            "save_strategy: steps",
            "rule of thumb",
            "heuristic",
        )


CHECKS: tuple[Callable[[View], Iterator[Flag]], ...] = (
    memory_flags,
    _rate_and_beta,
    _beta_scale,
    _beta_bands,
    _rate,
    _epochs,
    _smoothing,
    _noise,
    _truncation,
    _batch,
    _evaluation,
    _warmup,
    _steps,
    _conventions,
)
_ORDER = {"problem": 0, "warn": 1, "note": 2}
#: What the checks rest on, for the documentation.
SOURCES = (NOTES, PLAYBOOK, HANDBOOK, BLOG, LEARNING)


def flags_for(view: View) -> list[Flag]:
    """All flags of a configuration, the gravest first."""
    found = [flag for check in CHECKS for flag in check(view)]
    return sorted(found, key=lambda flag: _ORDER[flag.severity])
