"""What comes first on the page: what was trained, whether it looks better, what to do next.

The rules are few and stated: only held-out pairs can speak for a model, an interval that includes the start speaks
neither way, a start that is not known cannot be left behind, and an alarm is never outvoted by a good figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune.report.curves import Curve, Curves, curves_of
from preftune.report.files import mapping, number, objects, strings
from preftune.report.read import Run, read_run
from preftune.report.settings import settings_of
from preftune.report.tables import figure, interval, is_interval, level_of, percent
from preftune.runs.next_steps import chat, command, evaluation
from preftune.stats.intervals import wilson_interval
from preftune.stats.significance import mcnemar

GOOD, BAD, UNCLEAR = "good", "bad", "unclear"
PROXY = (
    "Preference accuracy is a weak proxy for quality (arXiv:2405.19534): read it together with KL, lengths and samples."
)
_CHANCE = 0.5
_ALPHA = 0.05
_ACCURACY = ("accuracy", "reward_accuracy", "preference_accuracy", "rewards/accuracies")


@dataclass(frozen=True)
class Tile:
    """One large figure.

    Attributes:
        label: What it is.
        value: The figure.
        detail: Interval, or where it came from.
    """

    label: str
    value: str
    detail: str = ""


@dataclass
class Verdict:
    """The summary of a run.

    Attributes:
        tone: ``good``, ``bad`` or ``unclear``.
        headline: One sentence.
        trained: What was trained, one sentence.
        evidence: Sentences that support the headline.
        steps: What to do next.
        tiles: Key figures.
        command: The command that comes next; empty where the folder is no run of preftune.
    """

    tone: str
    headline: str
    trained: str
    evidence: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    command: str = ""


def judge(run: Run, curves: Curves) -> Verdict:
    """Sum a run up.

    Args:
        run: The run.
        curves: Its curves.

    Returns:
        The summary.
    """
    verdict = Verdict(UNCLEAR, "", describe(run, curves))
    accuracy = held_out_accuracy(run, curves)
    if accuracy is not None and accuracy["has_reference"]:
        _judge_accuracy(verdict, accuracy)
    elif accuracy is not None:
        _judge_without_reference(verdict, accuracy, run)
    else:
        _judge_loss(verdict, curves)
    _add_best_step(verdict, curves)
    _add_lengths(verdict, mapping(run.evaluation.get("lengths")))
    _add_alarms(verdict, run.alarms)
    if not run.evaluation and accuracy is None and curves.metrics:
        verdict.steps.append(_how_to_evaluate(run))
    if not run.samples and not objects(run.evaluation.get("samples")) and curves.metrics:
        verdict.steps.append("Read samples: figures alone do not show what the answers look like.")
    verdict.tiles = _tiles(run, curves, accuracy)
    if run.provenance:
        to_score = not run.evaluation and "test" in mapping(run.provenance.get("data"))
        verdict.command = evaluation(run.path) if to_score else chat(run.path)
    return verdict


def describe(run: Run, curves: Curves) -> str:
    """What was trained on what, in one sentence; only what the folder tells."""
    values = {setting.name: setting.value for setting in settings_of(run)}
    plan, data = mapping(run.provenance.get("plan")), mapping(mapping(run.provenance.get("data")).get("train"))
    method = plan.get("method") or values.get("loss_type")
    # A folder's name is enough; where it lies is said with the settings.
    local = (run.base_model or "").startswith(("/", ".", "~"))
    parts = [(run.base_model or "A model").rstrip("/").rpartition("/")[2] if local else run.base_model or "A model"]
    parts.append(f"tuned with {_method(run, str(method))}" if method else "trained")
    knobs = [f"{name.replace('_', ' ')} {values[name]}" for name in ("beta", "learning_rate") if name in values]
    parts += [f"({', '.join(knobs)})"] if knobs else []
    if values.get("use_peft") == "true":
        parts.append("through a LoRA adapter")
    if data.get("num_rows") is not None:
        names = ", ".join(str(name).rpartition("/")[2] for name in strings(data.get("names")))
        parts.append(f"on {figure(data['num_rows'])} rows" + (f" of {names}" if names else ""))
    done, planned = _steps(run, curves)
    if done:
        epoch = number(run.state.get("epoch"))
        parts.append(f"for {figure(done)} steps" + (f" ({figure(round(epoch, 2))} epochs)" if epoch else ""))
    sentence = " ".join(parts) + "."
    if planned and done < planned:
        sentence += f" {figure(done)} of {figure(planned)} planned steps are logged: it goes on, or was stopped early."
    return sentence


def _method(run: Run, method: str) -> str:
    """What people call the method: ``DPO`` where the verb is dpo, with the loss where that is another one."""
    words = strings(run.provenance.get("command"))
    verb = words[1] if len(words) > 1 else ""
    if verb not in ("dpo", "orpo", "cpo", "kto"):
        return method
    usual = {"dpo": "sigmoid"}.get(verb, verb)
    return verb.upper() if method == usual else f"{verb.upper()}, loss {method}"


def held_out_accuracy(run: Run, curves: Curves) -> dict[str, Any] | None:
    """Preference accuracy on held-out pairs, with an interval wherever one can be had.

    Args:
        run: The run.
        curves: Its curves.

    Returns:
        ``mean``, perhaps ``low``, ``high`` and ``n``, ``level`` as text, ``source``, ``has_reference``, and ``start``,
        the accuracy before training where that was logged; ``None`` where nothing was held out.
    """
    metrics = mapping(run.evaluation.get("metrics"))
    for name in _ACCURACY:
        if is_interval(metrics.get(name)):
            free = mapping(run.evaluation.get("settings")).get("reference_free") is True
            none = free or run.evaluation.get("ref_model", "unknown") is None
            about = {"source": "eval.json", "level": level_of(run.evaluation), "has_reference": not none, "start": None}
            return {**metrics[name], **about}
    curve = curves.evaluation.get("rewards/accuracies")
    if curve is None:
        return None
    mean = float(curve.values[-1])
    num_pairs = number(mapping(mapping(run.provenance.get("data")).get("test")).get("num_rows"))
    begins = len(curve.values) > 1 and curves.axes["step"][int(curve.rows[0])] == 0
    result: dict[str, Any] = {
        "mean": mean,
        "source": "the last evaluation during training",
        "level": "95 %",
        "has_reference": mapping(run.provenance.get("plan")).get("reference") != "none",
        "start": float(curve.values[0]) if begins else None,
    }
    if num_pairs and 0 <= mean <= 1:
        # Whole pairs count; rows that share a prompt make the interval narrower than it ought to be, as is said.
        found = wilson_interval(round(mean * num_pairs), int(num_pairs))
        result |= {"low": found.low, "high": found.high, "n": int(num_pairs)}
    return result


def _judge_accuracy(verdict: Verdict, accuracy: dict[str, Any]) -> None:
    low, high, mean = (number(accuracy.get(key)) for key in ("low", "high", "mean"))
    said = _ranked(accuracy)
    if low is not None and low > _CHANCE:
        verdict.tone, verdict.headline = GOOD, "Looks better than its reference on held-out pairs."
        verdict.evidence.append(f"On held-out pairs {said}; the {accuracy['level']} interval lies above chance.")
    elif high is not None and high < _CHANCE:
        verdict.tone, verdict.headline = BAD, "Looks worse than its reference on held-out pairs."
        verdict.evidence.append(f"On held-out pairs {said}; the {accuracy['level']} interval lies below chance.")
    else:
        includes = f"the {accuracy['level']} interval includes chance"
        verdict.headline = "Cannot be told from its reference on held-out pairs."
        if low is None and mean is not None:
            verdict.headline = "Not settled: there is a held-out figure, but no interval."
        why = includes if low is not None else "there is no interval to judge it by"
        verdict.evidence.append(f"On held-out pairs {said}; {why}.")
        verdict.steps.append("Evaluate on more held-out pairs before choosing between models.")
    verdict.evidence.append(PROXY)


def _how_to_evaluate(run: Run) -> str:
    """The command that evaluates a run, complete where the run held rows out."""
    if "test" in mapping(run.provenance.get("data")):
        return f"Score the model on held-out pairs: {evaluation(run.path)}"
    return (
        f"Score the model on held-out pairs: {evaluation(run.path)} --dataset_name heldout.jsonl, on any pairs that it "
        "was not trained on; with --test_split_size 0.1 the next run holds some out by itself."
    )


def _judge_without_reference(verdict: Verdict, accuracy: dict[str, Any], run: Run) -> None:
    """Without a reference an untrained model may rank any share of pairs right: only its own start is a measure."""
    start, mean = number(accuracy["start"]), number(accuracy.get("mean"))
    evidence = f"On held-out pairs {_ranked(accuracy)}"
    if start is None or mean is None:
        verdict.headline = "Not settled: without a reference, it is not known where the model began."
        verdict.evidence.append(
            f"{evidence}. An untrained model may sit anywhere, so that this is neither gain nor loss."
        )
        before = command("eval", "--model", run.path, "--compare", run.base_model or "BASE", "--reference_free")
        verdict.steps.append(f"Compare it with the model before training: {before}")
    else:
        p = _most_cautious(start, mean, number(accuracy.get("n")))
        moved = "better" if mean > start else "worse"
        verdict.headline = "Cannot be told from the model before training on held-out pairs."
        why = f"before training it was {percent(start)}"
        if p is not None and p < _ALPHA:
            verdict.tone = GOOD if mean > start else BAD
            verdict.headline = f"Looks {moved} than before training on held-out pairs."
            why += f", a difference that holds however the pairs overlap (McNemar's test, p at most {p:.2g})"
        else:
            verdict.steps.append("Evaluate on more held-out pairs before choosing between models.")
        verdict.evidence.append(f"{evidence}; {why}.")
    verdict.evidence.append(PROXY)


def _most_cautious(start: float, end: float, num_pairs: float | None) -> float | None:
    """McNemar's p-value where as many pairs changed sides as two accuracies on the same pairs allow.

    A log has no pairs, only shares; the more of them changed sides, the less a difference says.
    """
    if not num_pairs or not (0 <= start <= 1 and 0 <= end <= 1):
        return None
    total, before, after = int(num_pairs), round(start * num_pairs), round(end * num_pairs)
    return mcnemar(min(after, total - before), min(before, total - after)).mid_p


def _ranked(accuracy: dict[str, Any]) -> str:
    count = f" of {figure(accuracy['n'])} pairs" if accuracy.get("n") else ""
    return f"it ranks the chosen answer first in {interval(accuracy, as_share=True)}{count}, by {accuracy['source']}"


def _judge_loss(verdict: Verdict, curves: Curves) -> None:
    loss = curves.evaluation.get("loss")
    if loss is not None and len(loss.values) > 1:
        first, last = float(loss.values[0]), float(loss.values[-1])
        moved = "fell" if last < first else "rose" if last > first else "stayed"
        verdict.headline = f"Held-out loss {moved} from {figure(first)} to {figure(last)}."
        verdict.evidence.append(
            "No held-out preference accuracy was logged, so this says how well it fits, not which answers it prefers."
        )
    elif curves.metrics:
        verdict.headline = "Cannot be judged: nothing was held out."
        verdict.evidence.append("Training figures rise for a model that only learns its data by heart.")
    else:
        verdict.headline = "There is no training log in this folder."


def _add_best_step(verdict: Verdict, curves: Curves) -> None:
    loss = curves.evaluation.get("loss")
    if loss is None or len(loss.values) < 3:
        return
    best = int(loss.values.argmin())
    steps = curves.axes["step"][loss.rows.astype(int)]
    # The evaluation after training repeats that of the last step.
    if steps[best] < steps[-1] and loss.values[best] < loss.values[-1]:
        step = steps[best]
        verdict.evidence.append(
            f"Held-out loss was lowest at step {figure(step)} ({figure(float(loss.values[best]))}) "
            f"and ended at {figure(float(loss.values[-1]))}."
        )
        verdict.steps.append(f"Compare the checkpoint nearest to step {figure(step)} with the final one.")


def _add_lengths(verdict: Verdict, lengths: dict[str, Any]) -> None:
    """Longer answers win many comparisons; a reader should know before believing one."""
    own, before = (_mean_tokens(lengths.get(name)) for name in ("model", "reference"))
    if own is not None and before is not None:
        verdict.evidence.append(
            f"Its own answers have {figure(round(own, 1))} tokens on average, those of its reference "
            f"{figure(round(before, 1))}."
        )


def _mean_tokens(entry: Any) -> float | None:
    tokens = mapping(entry).get("tokens", entry)
    return number(mapping(tokens).get("mean"))


def _add_alarms(verdict: Verdict, alarms: Sequence[dict[str, Any]]) -> None:
    if not alarms:
        return
    names = list(dict.fromkeys(str(alarm.get("guard", "guard")) for alarm in alarms))
    stopped = any(alarm.get("action") == "stop" for alarm in alarms)
    told = f"{len(alarms)} alarm{'s' if len(alarms) > 1 else ''} ({', '.join(names)})"
    if stopped:
        verdict.tone, verdict.headline = BAD, f"Stopped by a guard. {verdict.headline}"
    elif verdict.tone == GOOD:
        verdict.tone, verdict.headline = UNCLEAR, f"{verdict.headline[:-1]}, but with {told}."
    verdict.evidence.append(f"{told[0].upper()}{told[1:]} went off during training.")
    remedies = [_sentence(str(alarm["remedy"])) for alarm in alarms if alarm.get("remedy")]
    verdict.steps[:0] = list(dict.fromkeys(remedies))[:4]


def _tiles(run: Run, curves: Curves, accuracy: dict[str, Any] | None) -> list[Tile]:
    tiles = []
    if accuracy is not None:
        low, high = number(accuracy.get("low")), number(accuracy.get("high"))
        detail = "no interval"
        if low is not None and high is not None:
            detail = f"{accuracy['level']}: {100 * low:.1f} to {100 * high:.1f}"
        tiles.append(Tile("Held-out accuracy", percent(float(accuracy["mean"])), detail))
    tiles += [_last_tile("Held-out loss", curves.evaluation.get("loss"))] if "loss" in curves.evaluation else []
    tiles += [_last_tile("Training loss", curves.train.get("loss"))] if "loss" in curves.train else []
    margin = curves.evaluation.get("rewards/margins", curves.train.get("rewards/margins"))
    tiles += [_last_tile("Reward margin", margin)] if margin is not None else []
    kl = mapping(run.evaluation.get("kl"))
    if is_interval(kl):
        value, _, ends = interval(kl).rstrip(")").partition(" (")
        tiles.append(Tile("KL to reference", value, f"nats, {level_of(run.evaluation)}: {ends}" if ends else "nats"))
    if run.history or run.alarms:
        tiles.append(Tile("Alarms", str(len(run.alarms)), "see the list" if run.alarms else "none recorded"))
    return tiles


def _last_tile(label: str, curve: Curve | None) -> Tile:
    if curve is None or not len(curve.values):
        return Tile(label, "-")
    last, first = (_large(float(value)) for value in (curve.values[-1], curve.values[0]))
    return Tile(label, last, f"from {first}") if len(curve.values) > 1 else Tile(label, last)


def _large(value: float) -> str:
    """A figure that is read at a glance: what lies below a thousandth is told in two digits."""
    return figure(value) if abs(value) >= 1e-3 else f"{value:.2g}"


def _steps(run: Run, curves: Curves) -> tuple[float, float]:
    logged = float(curves.axes["step"].max()) if len(curves.axes["step"]) else 0.0
    done = max(logged, number(run.state.get("global_step")) or 0.0)
    begun: dict[str, Any] = next((event for event in reversed(run.events) if event.get("event") == "begin"), {})
    planned = number(run.state.get("max_steps")) or number(begun.get("max_steps")) or 0.0
    return done, planned


def _sentence(text: str) -> str:
    """The text with a capital at its beginning and a stop at its end."""
    flat = " ".join(text.split())
    return flat[:1].upper() + flat[1:] + ("" if flat.endswith((".", "!", "?")) else ".")


def headline(folder: Path) -> str:
    """The sentence that a report on a run begins with.

    Args:
        folder: The run's folder.
    """
    run = read_run(folder)
    return judge(run, curves_of(run)).headline
