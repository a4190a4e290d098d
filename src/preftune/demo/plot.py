"""The picture of the demo: true reward against the distance from the reference, one point per beta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe & Ito's palette keeps apart for every kind of colour vision; marks differ in shape as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK = "#222222"
_GREY = "#777777"


def plot_reward_kl(results: dict[str, Any], path: Path) -> None:
    """Draws the points of a demo's results with 95 % intervals in both directions.

    Args:
        results: As in ``demo.json``: "sft" with its scores and "betas", a list of scores with their "beta".
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: a library must not touch the caller's figures or backend.
    figure = Figure(figsize=(6.4, 4.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    runs = sorted(results["betas"], key=lambda run: run["beta"])
    by_kl = sorted(runs, key=lambda run: run["kl"])
    axes.plot(
        [0.0, *(run["kl"] for run in by_kl)],
        [results["sft"]["reward"]["mean"], *(run["reward"]["mean"] for run in by_kl)],
        color="#BBBBBB",
        linewidth=1.2,
        zorder=1,
    )
    _band(axes, results["sft"])
    for index, run in enumerate(runs):
        _point(axes, run, _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)])
    _dress(axes, results)
    figure.savefig(path, metadata={"Title": "Reward against KL"})


def _band(axes: Any, sft: dict[str, Any]) -> None:
    reward = sft["reward"]
    axes.axhspan(reward["low"], reward["high"], color=_GREY, alpha=0.18, linewidth=0, zorder=0)
    axes.plot([0.0], [reward["mean"]], marker="*", markersize=13, color=_INK, linestyle="none", zorder=3)
    axes.annotate(
        "reference (SFT)",
        (0.0, reward["mean"]),
        xytext=(12, 0),
        textcoords="offset points",
        fontsize=10,
        color=_INK,
        va="center",
    )


def _point(axes: Any, run: dict[str, Any], colour: str, marker: str) -> None:
    reward, kl = run["reward"], run["kl_interval"]
    axes.errorbar(
        run["kl"],
        reward["mean"],
        xerr=[[run["kl"] - kl["low"]], [kl["high"] - run["kl"]]],
        yerr=[[reward["mean"] - reward["low"]], [reward["high"] - reward["mean"]]],
        color=colour,
        marker=marker,
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=0.8,
        elinewidth=1.4,
        capsize=3,
        zorder=2,
        label=rf"$\beta$ = {run['beta']:g}",
    )


def _dress(axes: Any, results: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    sft = results["sft"]
    axes.set_xlabel("KL(policy || reference) on the policy's samples, nats per review", color=_INK)
    axes.set_ylabel("ground-truth reward (0 to 1)", color=_INK)
    axes.set_title("True reward against distance from the reference", loc="left", fontsize=12, color=_INK, pad=24)
    axes.annotate(
        f"{sft['num_samples']:,} samples per model on {sft['num_prompts']:,} fresh prompts; "
        "bars and band: 95 % intervals",
        (0.0, 1.0),
        xycoords="axes fraction",
        xytext=(0, 9),
        textcoords="offset points",
        fontsize=9,
        color=_GREY,
    ).set_in_layout(False)
    # The curve bends to the right as it rises: below its end there is room, whatever the betas.
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 0.16), title="DPO", frameon=False, labelcolor=_INK, alignment="left"
    )
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    axes.grid(True, color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_GREY, labelcolor=_INK)
    axes.margins(x=0.08, y=0.12)
