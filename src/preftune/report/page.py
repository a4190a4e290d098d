"""Gathers what the page shows: one view for every run and sweep, the plots, and their text alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from preftune.report.curves import Curve, Curves, PlotSpec, curves_of, payload, plots_for
from preftune.report.files import mapping, number, objects
from preftune.report.maps import Field, Metric, fields_of, is_kl, metrics_of, sweep_payload, trials_table
from preftune.report.read import Run, Sweep
from preftune.report.settings import Setting, differences, settings_of, text_of
from preftune.report.tables import (
    Table,
    duration,
    figure,
    interval,
    is_share,
    percent,
    title_of,
)
from preftune.report.verdict import Verdict, judge

#: Samples of one run that the page shows, spread over its steps.
MAX_SAMPLES = 60
MAX_ALARMS = 200


@dataclass
class RunView:
    """A run, digested.

    Attributes:
        run: What was read.
        curves: Its curves.
        verdict: Its summary.
        settings: Its settings.
        samples: The samples that are shown.
        index: Position among the runs, which decides about its colour.
    """

    run: Run
    curves: Curves
    verdict: Verdict
    settings: list[Setting]
    samples: list[dict[str, Any]]
    index: int

    @property
    def samples_by_step(self) -> list[tuple[float | None, list[dict[str, Any]]]]:
        """The samples that are shown, the latest step first."""
        groups: dict[float | None, list[dict[str, Any]]] = {}
        for sample in self.samples:
            groups.setdefault(number(sample.get("step")), []).append(sample)
        return list(groups.items())

    @property
    def changed(self) -> list[Setting]:
        """Settings that somebody set."""
        return [setting for setting in self.settings if not setting.is_default]


@dataclass
class SweepView:
    """A sweep, digested.

    Attributes:
        sweep: What was read.
        fields: The settings that vary.
        metrics: Results with the best trial and its equals.
        table: All trials.
        cost: What the sweep cost, as name and text.
        best: Settings of the best trial.
        index: Position among the sweeps.
        reason: Why the sweep chose the best trial.
        doubt: What speaks against it; empty where nothing does.
    """

    sweep: Sweep
    fields: list[Field]
    metrics: list[Metric]
    table: Table
    cost: list[tuple[str, str]]
    best: list[tuple[str, str]]
    index: int
    reason: str = ""
    doubt: str = ""

    @property
    def has_kl(self) -> bool:
        """Whether a metric says how far the trials moved."""
        return any(is_kl(metric.name) for metric in self.metrics)


@dataclass
class Page:
    """Everything that the template needs.

    Attributes:
        title: Heading.
        runs: The runs.
        sweeps: The sweeps.
        plots: Plots of curves with their text alternatives.
        final: Final figures of all runs.
        differences: Settings in which runs differ.
        num_own: Runs that were asked for; those behind them are trials of sweeps.
        notes: What could not be read, with the name of the folder.
    """

    title: str
    runs: list[RunView]
    sweeps: list[SweepView]
    plots: list[tuple[PlotSpec, Table]]
    final: Table | None
    differences: list[tuple[str, list[str]]]
    num_own: int
    notes: list[str] = field(default_factory=list)

    @property
    def num_points(self) -> int:
        """Logged values on the page."""
        every = [
            curve for view in self.runs for curve in (*view.curves.train.values(), *view.curves.evaluation.values())
        ]
        return sum(len(curve.values) for curve in every)


def gather(runs: Sequence[Run], sweeps: Sequence[Sweep], title: str | None = None) -> Page:
    """Digest what was read.

    Args:
        runs: Runs, the one to compare with first.
        sweeps: Sweeps; the runs of their trials are compared like others.
        title: Heading; made from the names by default.

    Returns:
        The page's content.
    """
    everything = [*runs, *(run for sweep in sweeps for run in sweep.runs)]
    views = [_view(run, index) for index, run in enumerate(everything)]
    metrics = list(dict.fromkeys(name for view in views for name in view.curves.metrics))
    plots = [(spec, _curve_table(spec, views)) for spec in plots_for(metrics)]
    named = [*(sweep.name for sweep in sweeps), *(run.name for run in runs)]
    sources: list[Run | Sweep] = [*sweeps, *everything]
    notes = [f"{item.name}: {note}" for item in sources for note in item.notes]
    return Page(
        title
        or (
            named[0]
            if len(named) == 1
            else f"{len(named)} {'sweeps' if not runs else 'runs and sweeps' if sweeps else 'runs'} compared"
        ),
        views,
        [_sweep_view(sweep, index) for index, sweep in enumerate(sweeps)],
        plots,
        # Trials have a table of their own.
        _final_table(views[: len(runs)], metrics) if len(runs) > 1 else None,
        differences([view.run for view in views]),
        len(runs),
        notes,
    )


def page_payload(page: Page) -> dict[str, Any]:
    """The numbers behind the page's plots.

    Args:
        page: The page's content.

    Returns:
        A mapping that ``json.dumps`` takes.
    """
    return {
        "runs": [
            {
                "name": view.run.name,
                "curves": payload(view.curves),
                "alarms": [
                    {
                        "step": number(alarm.get("step")),
                        "guard": str(alarm.get("guard", "guard")),
                        "action": str(alarm.get("action", "warn")),
                        "message": str(alarm.get("message", "")),
                    }
                    for alarm in view.run.alarms[:MAX_ALARMS]
                    if number(alarm.get("step")) is not None
                ],
            }
            for view in page.runs
        ],
        "plots": [
            {
                "key": spec.key,
                "title": spec.title,
                "metrics": spec.metrics,
                "level": spec.level,
                "levelLabel": spec.level_label,
                "unit": spec.unit,
            }
            for spec, _ in page.plots
        ],
        "sweeps": [sweep_payload(view.sweep) for view in page.sweeps],
        "evals": [_eval_payload(view) for view in page.runs if view.run.evaluation],
    }


def _view(run: Run, index: int) -> RunView:
    curves = curves_of(run)
    samples = objects(run.samples) or objects(run.evaluation.get("samples"))
    return RunView(run, curves, judge(run, curves), settings_of(run), _spread(samples), index)


def _sweep_view(sweep: Sweep, index: int) -> SweepView:
    metrics = metrics_of(sweep)
    content = sweep.content
    states: dict[str, int] = {}
    for trial in sweep.trials:
        state = str(trial.get("state", "unknown")).lower()
        states[state] = states.get(state, 0) + 1
    seconds = number(content.get("seconds"))
    spent = sum(number(trial.get("seconds")) or 0.0 for trial in sweep.trials)
    cost = [("trials", ", ".join(f"{count} {state}" for state, count in states.items()))]
    cost += [("wall time", duration(seconds))] if seconds is not None else []
    cost += [("sum over trials", duration(spent))] if spent else []
    passes = number(content.get("reference_passes"))
    cost += [("reference passes", figure(passes))] if passes is not None else []
    best = mapping(content.get("best"))
    params = [(name, text_of(value)) for name, value in mapping(best.get("params")).items()]
    said = best.get("reason")
    reason = _sentence(said) if isinstance(said, str) and said else ""
    return SweepView(
        sweep, fields_of(sweep), metrics, trials_table(sweep, metrics), cost, params, index, reason, _doubt(sweep)
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


#: Metrics that compare a policy with its reference.
_ZERO_FOR_THE_REFERENCE = {
    "eval_preference_gain": "preference gain",
    "eval_rewards/margins_per_token": "reward margin per token",
}


def _doubt(sweep: Sweep) -> str:
    """What speaks against any trial: the sweet spot cannot be told from the reference, whose figure is 0."""
    metric = text_of(sweep.content.get("metric"))
    said = _ZERO_FOR_THE_REFERENCE.get(metric)
    if said is None:
        return ""
    named = mapping(sweep.content.get("best")).get("number")
    chosen = next((trial for trial in sweep.trials if trial.get("number") == named), {})
    gain = mapping(mapping(chosen.get("metrics")).get(metric))
    low, high = number(gain.get("low")), number(gain.get("high"))
    if low is None or high is None or low > 0:
        return ""
    told = interval(gain)
    if high < 0:
        return f"Its {said} is {told}: it prefers the rejected answers more than its reference does."
    return f"Its {said} is {told}, which includes 0: it cannot be told from its reference."


def _curve_table(spec: PlotSpec, views: Sequence[RunView]) -> Table:
    """First, last, lowest and highest value of every line: what can be said about a curve without seeing it."""
    columns = ["line", "first", "last", "lowest", "at step", "highest", "at step", "points"]
    rows = []
    for view in views:
        for name, label in spec.metrics:
            for split, curve in (
                ("train", view.curves.train.get(name)),
                ("held-out", view.curves.evaluation.get(name)),
            ):
                if curve is not None:
                    prefix = f"{view.run.name}: " if len(views) > 1 else ""
                    rows.append([f"{prefix}{label}, {split}", *_summary(curve, view.curves)])
    return Table(columns, rows, [False] + [True] * 7)


def _summary(curve: Curve, curves: Curves) -> list[str]:
    steps, values = curves.axes["step"][curve.rows.astype(int)], curve.values
    low, high = int(values.argmin()), int(values.argmax())
    ends = [figure(float(values[0])), figure(float(values[-1]))]
    return [
        *ends,
        figure(float(values[low])),
        figure(steps[low]),
        figure(float(values[high])),
        figure(steps[high]),
        figure(len(values)),
    ]


def _final_table(views: Sequence[RunView], metrics: Sequence[str]) -> Table | None:
    """The last value of every metric, with its difference from the first run."""
    rows = []
    order = [name for spec in plots_for(metrics) for name, _ in spec.metrics]
    for name in order:
        for split in ("train", "evaluation"):
            lines: list[Curve | None] = [getattr(view.curves, split).get(name) for view in views]
            if sum(line is not None for line in lines) < 2:
                continue
            base = float(lines[0].values[-1]) if lines[0] is not None else None
            rows.append(
                [
                    title_of(name if split == "train" else f"eval_{name}"),
                    *(_against(line, base, at, is_share(name)) for at, line in enumerate(lines)),
                ]
            )
    for name in dict.fromkeys(key for view in views for key in mapping(view.run.evaluation.get("metrics"))):
        values = [mapping(view.run.evaluation.get("metrics")).get(name) for view in views]
        if sum(value is not None for value in values) > 1:
            rows.append(
                [
                    f"eval.json: {name.replace('_', ' ')}",
                    *(interval(value, as_share=is_share(name)) for value in values),
                ]
            )
    if not rows:
        return None
    return Table(["last value of", *(view.run.name for view in views)], rows, [False] + [True] * len(views))


def _against(line: Curve | None, base: float | None, position: int, as_share: bool) -> str:
    if line is None:
        return "-"
    value = float(line.values[-1])
    if as_share:
        gap = "" if position == 0 or base is None else f" ({100 * (value - base):+.1f})"
        return percent(value) + gap
    if position == 0 or base is None:
        return figure(value)
    return f"{figure(value)} ({value - base:+.3g})"


def _spread(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most so many samples: the latest first, and those of the first step before any between them."""
    if not samples:
        return []
    steps = sorted({number(sample.get("step")) or 0.0 for sample in samples})
    ends = (steps[-1], steps[0])
    ranked = sorted(samples, key=lambda sample: (number(sample.get("step")) or 0.0) not in ends)[:MAX_SAMPLES]
    return sorted(ranked, key=lambda sample: -(number(sample.get("step")) or 0.0))


def _eval_payload(view: RunView) -> dict[str, Any]:
    evaluation = view.run.evaluation
    calibration = mapping(evaluation.get("calibration"))
    return {
        "run": view.index,
        "bins": next((objects(value) for value in calibration.values() if objects(value)), []),
        "byLength": objects(evaluation.get("by_length")),
    }
