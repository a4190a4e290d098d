"""Label noise: true reward of DPO, cDPO, robust DPO and IPO when a share of the labels is turned round: ``make noise``.

Completions are the same at every level, and the pairs flipped at one level are flipped at all higher ones, so that
levels differ in nothing but the noise. cDPO and robust DPO are told the true share. Results go into a JSON file cell by
cell, and from there into ``docs/noise.md`` and its picture. A later run with other seeds adds to the file as long as
sizes, versions and processor are the same.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import toy
from preftune.demo.training import DemoSettings

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4)
METHODS = ("DPO", "cDPO", "robust", "IPO")
KEYS = ("method", "noise", "seed")
_BETA = 0.1
# Okabe & Ito's palette; marks and lines differ as well.
_STYLE = {
    "DPO": ("#0072B2", "o", "-"),
    "cDPO": ("#E69F00", "s", "--"),
    "robust": ("#009E73", "^", "-."),
    "IPO": ("#CC79A7", "D", ":"),
}
_INK, _GREY = "#222222", "#777777"


def fields_of(method: str, noise: float) -> dict[str, Any]:
    """Configuration of a method at a level of noise."""
    loss = {"DPO": "sigmoid", "cDPO": "sigmoid", "robust": "robust", "IPO": "ipo"}[method]
    smoothing = {"label_smoothing": noise} if method in ("cDPO", "robust") else {}
    return {"loss_type": loss, "beta": _BETA, **smoothing}


def run(settings: DemoSettings, levels: tuple[float, ...], seeds: list[int], threads: int, out: Path) -> dict[str, Any]:
    """Measures all methods at all levels and writes the result file after each.

    Args:
        settings: Sizes and rates.
        levels: Shares of flipped labels.
        seeds: Of data, weights and samples; a whole experiment each.
        threads: Of torch.
        out: The result file.

    Returns:
        The report.
    """
    from preftune.demo.pairs import make_pairs

    report = toy.continued(out, toy.new_report(settings, threads))
    clock = toy.Clock()
    with toy.workplace() as folder:
        for seed in seeds:
            bench = toy.make_bench(seed, settings, folder)
            toy.enter_reference(report, bench)
            clock.say(f"seed {seed}: SFT, {len(bench.pairs)} pairs")
            for noise in levels:
                pairs = bench.pairs
                if noise:
                    model = bench.reference, bench.tokenizer, bench.world
                    pairs = make_pairs(*model, settings.num_prompts, seed, label_noise=noise)
                rows = [pair.row() for pair in pairs]
                flipped = sum(pair.flipped for pair in pairs)
                # Without noise there is nothing to smooth: cDPO and robust DPO are DPO, and are not trained again.
                for method in METHODS if noise else ("DPO", "IPO"):
                    fields = fields_of(method, noise)
                    policy = toy.train(bench, "DPO", rows, fields, folder / "trainer")
                    cell = {"method": method, "noise": noise, "seed": seed, "fields": fields, "flipped": flipped}
                    cell |= toy.scores_record(bench.score(policy), bench.before, seed)
                    cell["seconds"] = clock.say(
                        f"{method} at {noise:.0%}: reward {toy.with_interval(cell['reward'])}, "
                        f"KL {cell['kl']['mean']:.2f}"
                    )
                    toy.enter_cell(report, cell, KEYS)
                    toy.write_report(report, out)
    return report


# ---- the document ---------------------------------------------------------------------------------------------------


def complete_seeds(report: dict[str, Any]) -> list[int]:
    """Seeds with every method at every level of the report; a run that was stopped leaves one that is not."""
    wanted = {
        (method, noise)
        for noise in {cell["noise"] for cell in report["cells"]}
        for method in (METHODS if noise else ("DPO", "IPO"))
    }
    found: dict[int, set[tuple[str, float]]] = {}
    for cell in report["cells"]:
        found.setdefault(cell["seed"], set()).add((cell["method"], cell["noise"]))
    return sorted(seed for seed, cells in found.items() if cells == wanted)


def series(report: dict[str, Any], method: str) -> list[tuple[float, dict[str, Any], list[float]]]:
    """Level, pooled scores and the reward of each seed, by level; without noise all logistic losses are DPO."""
    seeds = complete_seeds(report)
    found = []
    for noise in sorted({cell["noise"] for cell in report["cells"]}):
        name = "DPO" if noise == 0 and method in ("cDPO", "robust") else method
        cells = [c for c in report["cells"] if (c["method"], c["noise"]) == (name, noise) and c["seed"] in seeds]
        found.append((noise, toy.pooled(cells), [cell["reward"]["mean"] for cell in cells]))
    return found


def render(report: dict[str, Any]) -> str:
    """``docs/noise.md`` as text."""
    seeds = complete_seeds(report)
    before = toy.pooled([report["references"][str(seed)] for seed in seeds])
    lines = {method: series(report, method) for method in METHODS}
    levels = [noise for noise, _, _ in lines["DPO"]]
    rewards, distances = [], []
    for index, noise in enumerate(levels):
        rewards.append([f"{noise:.0%}", *(toy.with_interval(lines[m][index][1]["reward"]) for m in METHODS)])
        distances.append([f"{noise:.0%}", *(toy.with_interval(lines[m][index][1]["kl"], 2) for m in METHODS)])
    names = ", ".join(map(str, seeds))
    number = (
        f"One seed ({names})"
        if len(seeds) == 1
        else f"{len(seeds)} seeds ({names}), each with data, SFT model and trainings of its own"
    )
    parts = [
        "# Noisy labels",
        "Rendered by `benchmarks/noise.py` from `benchmarks/results/toy/noise.json`; repeat it with `make noise`.",
        "![True reward against the share of flipped labels](images/noise.png)",
        toy.conditions(report),
        f"**Methods.** DPO: `sigmoid`. cDPO: `sigmoid` with `label_smoothing` = the true share of flipped labels. "
        f"robust: `robust` with the same. IPO: `ipo`. All with beta {_BETA:g}. Without noise cDPO and robust DPO are "
        "DPO itself and show its figures. Levels share completions and prompts, and a higher level flips the pairs of "
        "a lower one and more.",
        f"**How to read it.** {number}. Neither beta nor rate was tuned for a method or a level. Intervals are 95 % "
        "over prompts"
        + (
            "; how much a result varies from one training run to the next is not in them."
            if len(seeds) == 1
            else "; their spread over seeds, the small marks in the picture, is not in them."
        )
        + f" The SFT model before: {toy.with_interval(before['reward'])}.",
        "## True reward",
        toy.markdown_table(["flipped", *METHODS], rewards),
        "## KL to the reference, nats per review",
        toy.markdown_table(["flipped", *METHODS], distances),
        "## What it shows",
        *_findings(lines, before),
    ]
    return "\n\n".join(parts) + "\n"


def _findings(lines: dict[str, list[tuple[float, dict[str, Any], list[float]]]], before: dict[str, Any]) -> list[str]:
    """Sentences that follow from the table by fixed rules."""
    found = []
    for method, points in lines.items():
        up = [f"{noise:.0%}" for noise, scores, _ in points if toy.risen(before, scores)]
        loss = points[0][1]["reward"]["mean"] - points[-1][1]["reward"]["mean"]
        found.append(
            f"- {method}: above the SFT model beyond the intervals at "
            + (", ".join(up) if up else "no level")
            + f"; from {points[0][0]:.0%} to {points[-1][0]:.0%} flipped it loses {loss:.3f} of reward."
        )
    apart = []
    for method in METHODS[1:]:
        for (noise, ours, _), (_, plain, _) in zip(lines[method], lines["DPO"], strict=True):
            if ours["reward"]["low"] > plain["reward"]["high"]:
                apart.append(f"{method} above DPO at {noise:.0%}")
            elif ours["reward"]["high"] < plain["reward"]["low"]:
                apart.append(f"{method} below DPO at {noise:.0%}")
    told = "; ".join(apart) if apart else "none"
    return [
        "\n".join(found),
        f"Differences from DPO whose intervals do not overlap: {told}.",
        " ".join(_against(lines, one, other) for one, other in (("robust", "cDPO"), ("robust", "DPO"), ("cDPO", "DPO")))
        + " A few seeds do not decide between these losses.",
    ]


def _against(lines: dict[str, list[tuple[float, dict[str, Any], list[float]]]], one: str, other: str) -> str:
    """Two methods seed by seed, at the levels with noise."""
    gaps = {
        noise: [a - b for a, b in zip(ours, theirs, strict=True)]
        for (noise, _, ours), (_, _, theirs) in zip(lines[one], lines[other], strict=True)
        if noise
    }
    above = sum(gap > 0 for each in gaps.values() for gap in each)
    means = ", ".join(f"{sum(each) / len(each):+.3f} at {noise:.0%}" for noise, each in gaps.items())
    number = sum(map(len, gaps.values()))
    return f"{one} is above {other} in {above} of {number} cells of a seed and a level (mean {means})."


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
    for index, (method, (colour, marker, dashes)) in enumerate(_STYLE.items()):
        points = series(report, method)
        # Side by side, so that no interval hides another.
        x = [noise + 0.006 * (index - 1.5) for noise, _, _ in points]
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


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the JSON file, the document and the picture.

    Returns:
        1 if no seed is complete, so that there is nothing to show, else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 10], help="a whole experiment each")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--out", type=Path, default=toy.RESULTS / "noise.json", help="result file")
    parser.add_argument("--docs", type=Path, default=toy.DOCS, help="folder for noise.md and images (default: docs)")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the document from the file")
    options = parser.parse_args(argv)
    if options.render:
        report = toy.read_report(options.out)
    else:
        report = run(toy.default_settings(), LEVELS, toy.seeds_of(options.seeds), options.threads, options.out)
    if not complete_seeds(report):
        print("no seed is complete: nothing to show yet", file=sys.stderr)
        return 1
    plot(report, options.docs / "images" / "noise.png")
    (options.docs / "noise.md").write_text(render(report), encoding="utf-8")
    print(f"wrote {options.docs / 'noise.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
