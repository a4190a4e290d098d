"""The page of the study of label noise, and its picture; see `benchmarks.noise`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import seeded, toy

# Okabe & Ito's palette; marks and lines differ as well.
_STYLE = (
    ("#0072B2", "o", "-"),
    ("#E69F00", "s", "--"),
    ("#D55E00", "v", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
)
_INK, _GREY = "#222222", "#777777"


def best_rates(report: dict[str, Any]) -> dict[str, float]:
    """The rate of each method: highest mean reward over levels and seeds of the tuning; the lower of equal ones."""
    found: dict[str, dict[float, list[float]]] = {}
    for cell in report["cells"]:
        if cell.get("stage") == "tuning":
            found.setdefault(cell["method"], {}).setdefault(cell["rate"], []).append(cell["reward"]["mean"])
    return {
        method: max(sorted(rates), key=lambda rate: sum(rates[rate]) / len(rates[rate]))
        for method, rates in found.items()
    }


def verdict_cells(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells of the verdict; in files of before rates were tuned, all."""
    return [cell for cell in report["cells"] if cell.get("stage", "verdict") == "verdict"]


def methods_of(report: dict[str, Any]) -> list[str]:
    """Methods of the verdict, in the order in which they were measured, DPO first."""
    return list(dict.fromkeys(["DPO", *(cell["method"] for cell in verdict_cells(report))]))


def complete_seeds(report: dict[str, Any]) -> list[int]:
    """Seeds with every method at every level of the report; a run that was stopped leaves one that is not."""
    found: dict[int, set[tuple[str, float]]] = {}
    for cell in verdict_cells(report):
        found.setdefault(cell["seed"], set()).add((cell["method"], cell["noise"]))
    wanted = set().union(*found.values()) if found else set()
    return sorted(seed for seed, cells in found.items() if cells == wanted)


def cells_at(report: dict[str, Any], method: str, noise: float) -> list[dict[str, Any]]:
    """Cells of a method at a level, of the complete seeds; where it is plain DPO, those of DPO."""
    seeds = complete_seeds(report)

    def of(name: str) -> list[dict[str, Any]]:
        return [c for c in verdict_cells(report) if (c["method"], c["noise"]) == (name, noise) and c["seed"] in seeds]

    return of(method) or of("DPO")


def series(report: dict[str, Any], method: str) -> list[tuple[float, dict[str, Any], list[float]]]:
    """Level, pooled scores and the reward of each seed, by level."""
    found = []
    for noise in sorted({cell["noise"] for cell in verdict_cells(report)}):
        cells = cells_at(report, method, noise)
        found.append((noise, toy.pooled(cells), [cell["reward"]["mean"] for cell in cells]))
    return found


def differences(report: dict[str, Any]) -> list[seeded.Difference]:
    """Every method against DPO at every level at which it is not DPO itself."""
    found = []
    for noise in sorted({cell["noise"] for cell in verdict_cells(report)}):
        plain = seeded.by_seed(cells_at(report, "DPO", noise))
        for method in methods_of(report)[1:]:
            cells = cells_at(report, method, noise)
            if cells and cells[0]["method"] == method:
                found.append(seeded.difference(f"{method} at {noise:.0%}", seeded.by_seed(cells), plain))
    return found


def render(report: dict[str, Any]) -> str:
    """``docs/noise.md`` as text."""
    seeds, methods = complete_seeds(report), methods_of(report)
    before = toy.pooled([report["references"][str(seed)] for seed in seeds])
    lines = {method: series(report, method) for method in methods}
    rewards, distances = [], []
    for index, (noise, _, _) in enumerate(lines["DPO"]):
        rewards.append([f"{noise:.0%}", *(toy.with_interval(lines[m][index][1]["reward"]) for m in methods)])
        distances.append([f"{noise:.0%}", *(toy.with_interval(lines[m][index][1]["kl"], 2) for m in methods)])
    names = ", ".join(map(str, seeds))
    number = (
        f"One seed ({names})"
        if len(seeds) == 1
        else f"{len(seeds)} seeds ({names}), each with data, SFT model and trainings of its own"
    )
    gaps = differences(report)
    words = seeded.verdicts(gaps)
    above = {
        method: [f"{noise:.0%}" for noise, scores, _ in points if toy.risen(before, scores)]
        for method, points in lines.items()
    }
    parts = [
        "# Noisy labels",
        "Rendered by `benchmarks/noise.py` from `benchmarks/results/toy/noise.json`; repeat it with `make noise`.",
        "![True reward against the share of flipped labels](images/noise.png)",
        toy.conditions(report),
        f"**Methods.** All with beta 0.1: {_about(report)} Without noise robust DPO is DPO, and "
        "shows its figures. Levels share completions and prompts, and a higher level flips the pairs of a lower one "
        "and more.",
        f"**Rates.** {_rates(report)}",
        f"**How to read it.** {number}. Intervals of rewards and KL are 95 % over prompts; the single seeds are the "
        f"small marks in the picture. The SFT model before: {toy.with_interval(before['reward'])}.",
        "**What may be said**, laid down before: a method is better or worse than DPO at a level where the mean over "
        "seeds of the paired difference is told from 0 by Student's t test at 5 %, after Holm's correction over all "
        f"rows of the last table, on at least {seeded.LEAST_SEEDS} seeds.",
        "## True reward",
        toy.markdown_table(["flipped", *methods], rewards),
        "## KL to the reference, nats per review",
        toy.markdown_table(["flipped", *methods], distances),
        "## Differences from DPO, seed by seed",
        toy.markdown_table(
            ["", "reward minus DPO's, 95 % over seeds", "seeds above", "verdict"],
            [
                [gap.name, gap.text(), f"{gap.num_above} of {gap.num}", word]
                for gap, word in zip(gaps, words, strict=True)
            ],
        ),
        "## What it shows",
        "\n".join(
            f"- {method}: above the SFT model beyond the intervals at {', '.join(levels) or 'no level'}."
            for method, levels in above.items()
        ),
        _conclusion(gaps, words),
    ]
    more = seeded.spent(report)
    return "\n\n".join([*parts, *([more] if more else [])]) + "\n"


def _about(report: dict[str, Any]) -> str:
    told = {
        "DPO": "DPO is `sigmoid`",
        "cDPO": "cDPO is `sigmoid` with `label_smoothing` = the true share of flipped labels",
        "cDPO 0.1": "cDPO 0.1 and 0.2 are `sigmoid` with that `label_smoothing` whatever the share",
        "robust": "robust is `robust` with `label_smoothing` = the true share",
        "IPO": "IPO is `ipo`",
    }
    return "; ".join(told[method] for method in methods_of(report) if method in told) + "."


def _rates(report: dict[str, Any]) -> str:
    rates = best_rates(report)
    if not rates:
        return "The shared one for all methods: neither beta nor rate was tuned for a method or a level."
    tried = ", ".join(f"{rate:g}" for rate in report["rates"])
    chosen = ", ".join(f"{method} {rate:g}" for method, rate in rates.items())
    seeds = ", ".join(map(str, report["tuning"]))
    return (
        f"In multiples of the shared one, of {tried} those with the highest mean reward over "
        f"{', '.join(f'{level:.0%}' for level in report['tuned_at'])} flipped on seeds {seeds}, which have no part in "
        f"the rest: {chosen}."
    )


def _conclusion(gaps: Sequence[seeded.Difference], words: Sequence[str]) -> str:
    told = [f"{gap.name} {word}" for gap, word in zip(gaps, words, strict=True) if word in ("better", "worse")]
    if told:
        return f"**Conclusion.** Against DPO: {'; '.join(told)}. Elsewhere no difference can be told."
    if gaps and gaps[0].num < seeded.LEAST_SEEDS:
        return f"**Conclusion.** None: {gaps[0].num} seeds do not decide between these losses."
    widest = max(max(abs(gap.low), abs(gap.high)) for gap in gaps)
    return (
        "**Conclusion.** No difference between these losses and DPO can be told at any level; none is larger than "
        f"{widest:.3f} of reward by the intervals."
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws reward against noise, with 95 % intervals and the single seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    seeds = complete_seeds(report)
    before = toy.pooled([report["references"][str(seed)] for seed in seeds])["reward"]
    figure = Figure(figsize=(6.8, 4.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhspan(before["low"], before["high"], color=_GREY, alpha=0.18, linewidth=0, zorder=0)
    axes.axhline(before["mean"], color=_GREY, linewidth=1, zorder=0, label="SFT model")
    methods = methods_of(report)
    for index, (method, (colour, marker, dashes)) in enumerate(zip(methods, _STYLE, strict=False)):
        points = series(report, method)
        # Side by side, so that no interval hides another.
        x = [noise + 0.006 * (index - (len(methods) - 1) / 2) for noise, _, _ in points]
        rewards = [scores["reward"] for _, scores, _ in points]
        errors = [[r["mean"] - r["low"] for r in rewards], [r["high"] - r["mean"] for r in rewards]]
        axes.errorbar(
            x,
            [r["mean"] for r in rewards],
            yerr=errors,
            color=colour,
            marker=marker,
            linestyle=dashes,
            markersize=6.5,
            markeredgecolor="white",
            markeredgewidth=0.7,
            linewidth=1.4,
            elinewidth=1.3,
            capsize=2.5,
            label=method,
            zorder=3,
        )
        if len(seeds) > 1:
            for place, (_, _, singles) in zip(x, points, strict=True):
                axes.scatter([place] * len(singles), singles, s=9, color=colour, marker=marker, alpha=0.45, zorder=2)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xticks([noise for noise, _, _ in series(report, "DPO")])
    axes.set_xlabel("flipped labels", color=_INK)
    axes.set_ylabel("ground-truth reward (0 to 1)", color=_INK)
    axes.set_title("True reward against label noise", loc="left", fontsize=12, color=_INK)
    axes.grid(True, axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_GREY, labelcolor=_INK)
    axes.legend(frameon=False, labelcolor=_INK, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Title": "Reward against label noise"})
