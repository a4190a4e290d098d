"""``preftune demo``: the DPO paper's controlled sentiment experiment in miniature (arXiv:2305.18290, section 6.1).

Everything is generated and trained on the spot: a corpus of short reviews, a tokenizer, a small Llama (SFT), pairs of
its own completions labelled by a reward that is known exactly, DPO for several betas, an evaluation on fresh prompts.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from preftune.errors import ConfigError, SetupError, TrainingError
from preftune.files import write_json
from preftune.ownership import claim_files

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.demo.scores import DemoScores
    from preftune.demo.show import Account
    from preftune.demo.training import DemoSettings

# The paper's default; the beta nearest to it is the one that "before and after" means.
_HEADLINE_BETA = 0.1
_SHOWN_SAMPLES = 4
_KEPT_SAMPLES = 40
_FILES = ("demo.json", "sweep.json", "report.html", "samples.json", "samples.md", "pairs.jsonl", "reward_kl.png", "sft")


def main(argv: Sequence[str] | None = None, after: Callable[[Path], None] = lambda out: None) -> int:
    """Runs the demo from command-line arguments.

    Args:
        argv: Arguments after ``preftune demo``; those of the process by default.
        after: Called with the folder when all results are in it, while it is still this demo's.

    Returns:
        0 if the true reward rose by more than its interval, else 1.

    Raises:
        ConfigError: A wrong argument.
        SetupError: The output folder cannot be written.
    """
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError("the folder cannot be made", where="--out", value=options.out, remedy=str(error)) from error
    import torch

    from preftune.demo.training import DemoSettings

    # The demo's matrices are so small that a second thread gains little, and beside another busy process it loses all:
    # every parallel region then waits for the thread that was put aside.
    torch.set_num_threads(1)
    settings = DemoSettings()
    if options.quick:
        settings = settings.quick()
    if options.betas:
        settings = replace(settings, betas=tuple(sorted(set(options.betas))))
    results = run_demo(out, settings, options.seed, after=after)
    return 0 if results["risen"] else 1


def run_demo(
    out: Path,
    settings: DemoSettings | None = None,
    seed: int = 0,
    console: Console | None = None,
    after: Callable[[Path], None] = lambda out: None,
) -> dict[str, Any]:
    """Runs the experiment and writes its files.

    Args:
        out: Folder for ``demo.json``, ``reward_kl.png``, ``pairs.jsonl``, ``samples.md``, ``samples.json``, the models.
        settings: Sizes and rates.
        seed: Of everything.
        console: Where to print; standard output by default.
        after: Called with the folder in the end.

    Returns:
        The content of ``demo.json``.
    """
    from rich.console import Console

    from preftune.demo import show, training

    settings = settings or training.DemoSettings()
    account = show.Account(console or Console())
    account.console.print("[bold]preftune demo[/bold]: teaching a small model to write friendlier reviews\n")
    folders = [f"dpo_beta_{beta:g}" for beta in settings.betas]
    with _own_files(out, [*_FILES, *folders]):
        results = _run_demo(out, settings, seed, account)
        after(out)
        return results


@contextmanager
def _own_files(out: Path, names: list[str]) -> Iterator[None]:
    """Refuse a folder in which these names are not an earlier demo's, and record what this one leaves."""
    run = claim_files(out, "demo", names, "--out")
    try:
        yield
    finally:
        with suppress(OSError):
            run.seal(names)


def _run_demo(out: Path, settings: DemoSettings, seed: int, account: Account) -> dict[str, Any]:
    from preftune.demo import plot, show

    with _store_within(out):
        experiment = _Experiment(out, settings, seed, account)
        experiment.fine_tune()
        experiment.make_pairs()
        experiment.evaluate_reference()
        for beta in settings.betas:
            experiment.train(beta)
    results = _results(experiment.before, experiment.after, settings, seed, account.seconds)
    samples = _side_by_side(experiment.prompts, experiment.before, experiment.after[results["dpo"]["beta"]])
    results["num_side_by_side"] = len(samples)
    plot.plot_reward_kl(results, out / "reward_kl.png")
    write_json(out / "demo.json", results)
    write_json(out / "sweep.json", as_sweep(results))
    write_json(out / "samples.json", samples)
    (out / "samples.md").write_text(_markdown(samples, results), encoding="utf-8")
    account.console.print()
    account.console.print(show.scores_table(results))
    account.console.print(show.samples_table(samples[:_SHOWN_SAMPLES]))
    account.console.print(show.verdict(results, out))
    return results


class _Experiment:
    """The stages in their order, each leaving its outcome as an attribute for those after it."""

    def __init__(self, out: Path, settings: DemoSettings, seed: int, account: Account) -> None:
        from preftune.demo.world import World

        self.out, self.settings, self.seed, self.account = out, settings, seed, account
        self.world = World(seed)
        self.prompts = self.world.prompts(settings.num_eval_prompts, "heldout")
        self.after: dict[float, DemoScores] = {}

    def fine_tune(self) -> None:
        """Corpus, tokenizer, SFT model."""
        from preftune.demo import models, training

        with self.account.stage("corpus", "Corpus and tokenizer") as stage:
            corpus = self.world.corpus(self.settings.num_reviews)
            self.tokenizer = models.build_tokenizer(corpus)
            stage.result = f"{len(corpus):,} reviews, vocabulary {len(self.tokenizer)}"
        with self.account.stage("sft", "Supervised fine-tuning") as stage:
            start = models.build_model(self.tokenizer, self.seed, self.settings.hidden_size, self.settings.num_layers)
            self.reference = training.train_sft(
                start,
                self.tokenizer,
                corpus,
                self.settings,
                self.seed,
                self.out / "trainer" / "sft",
                progress=stage.tell,
            )
            stage.result = f"Llama with {self.reference.num_parameters():,} parameters"
        _save(self.reference, self.tokenizer, self.out / "sft")

    def make_pairs(self) -> None:
        """Pairs to train on, and those held out."""
        from preftune.demo import pairs

        with self.account.stage("pairs", "Sampling and labelling") as stage:
            # Seeds apart, so that no two sets of samples share their random streams.
            self.pairs = pairs.make_pairs(
                self.reference, self.tokenizer, self.world, self.settings.num_prompts, self.seed
            )
            self.heldout = pairs.make_pairs(
                self.reference, self.tokenizer, self.world, len(self.prompts), self.seed + 1, split="heldout"
            )
            if min(len(self.pairs), len(self.heldout)) < 2:
                raise TrainingError(
                    "the fine-tuned model writes nothing that could be told apart",
                    where="pairs",
                    value=(len(self.pairs), len(self.heldout)),
                    allowed="2 or more to train on and held out",
                    remedy="fine-tune on more reviews, or for more epochs",
                )
            stage.result = f"{len(self.pairs):,} pairs to train on, {len(self.heldout):,} held out"
        pairs.write_pairs(self.pairs, self.out / "pairs.jsonl")

    def evaluate_reference(self) -> None:
        """Scores before preference training."""
        with self.account.stage("sft_evaluation", "Evaluating the reference") as stage:
            self.before = self._score(self.reference)
            stage.result = f"true reward {self.before.reward.mean:.3f} on {len(self.prompts):,} fresh prompts"

    def train(self, beta: float) -> None:
        """DPO with one beta, and its scores."""
        from preftune.demo import training

        with self.account.stage(f"dpo_beta_{beta:g}", f"DPO with beta {beta:g}") as stage:
            policy = training.train_dpo(
                self.reference,
                self.tokenizer,
                self.pairs,
                beta,
                self.settings,
                self.seed,
                self.out / "trainer" / f"dpo_beta_{beta:g}",
                progress=stage.tell,
            )
            scored = self.after[beta] = self._score(policy)
            stage.result = f"true reward {scored.reward.mean:.3f}, KL {scored.kl.mean:.2f}"
        _save(policy, self.tokenizer, self.out / f"dpo_beta_{beta:g}")

    def _score(self, policy: Any) -> DemoScores:
        from preftune.demo.scores import evaluate_policy

        return evaluate_policy(
            policy,
            self.reference,
            self.tokenizer,
            self.world,
            self.prompts,
            self.seed + 2,
            pairs=self.heldout,
            samples_per_prompt=self.settings.samples_per_prompt,
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where="`preftune demo`", remedy="see `preftune demo --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="preftune demo",
        description="Teach a small model to write friendlier reviews: SFT, pairs labelled by a reward that is known "
        "exactly, DPO for several betas, evaluation on fresh prompts. Nothing is downloaded.",
        epilog="Exit code: 0 if the true reward rose by more than its 95 % interval, else 1.",
    )
    parser.add_argument("--out", default="demo-out", metavar="DIR", help="folder for results (default: demo-out)")
    parser.add_argument("--seed", type=_seed, default=0, help="of data, weights and samples (default: 0)")
    parser.add_argument(
        "--betas", type=_beta, nargs="+", metavar="BETA", help="trained one after the other (default: 0.05 0.1 0.3 1)"
    )
    parser.add_argument("--quick", action="store_true", help="less data, about a third of the time")
    return parser


def _beta(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"beta must be above 0, got {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32 - 1:
        raise argparse.ArgumentTypeError(f"seed must be 0 or more and below 2^32 - 1, got {text}")
    return value


@contextmanager
def _store_within(out: Path) -> Iterator[None]:
    """Keeps reference log-probs of the demo in its own folder, unless the user has chosen one."""
    if "PREFTUNE_CACHE" in os.environ:
        yield
        return
    os.environ["PREFTUNE_CACHE"] = str((out / "references").resolve())
    try:
        yield
    finally:
        del os.environ["PREFTUNE_CACHE"]


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from preftune.demo.training import quiet

    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _results(
    before: DemoScores, after: dict[float, DemoScores], settings: DemoSettings, seed: int, seconds: dict[str, float]
) -> dict[str, Any]:
    import torch
    import transformers

    from preftune import __version__
    from preftune.stats.intervals import paired_difference

    headline = min(after, key=lambda beta: (abs(beta - _HEADLINE_BETA), beta))
    policy = after[headline]
    rise = paired_difference(
        before.rewards, policy.rewards, groups=[sample.prompt_index for sample in before.samples], seed=seed
    )
    return {
        "sft": before.as_dict(),
        "dpo": {"beta": headline, **policy.as_dict()},
        "betas": [{"beta": beta, **scored.as_dict()} for beta, scored in after.items()],
        "rise": rise.as_dict(),
        # The strict reading: even the low end after lies above the high end before.
        "risen": policy.reward.low > before.reward.high,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 2)},
        "settings": {"seed": seed, **asdict(settings)},
        "versions": {
            "preftune": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def as_sweep(results: dict[str, Any]) -> dict[str, Any]:
    """The betas as trials of a sweep, which a report draws.

    Args:
        results: The content of ``demo.json``.
    """
    trials = [
        {
            "number": number,
            "params": {"beta": entry["beta"]},
            "state": "complete",
            "metrics": {
                "true_reward": entry["reward"],
                "kl": {"mean": entry["kl"], **entry["kl_interval"]},
                "accuracy": {"mean": entry["accuracy"], **entry["accuracy_interval"]},
            },
            "seconds": results["seconds"].get(f"dpo_beta_{entry['beta']:g}"),
        }
        for number, entry in enumerate(results["betas"])
    ]
    best = max(trials, key=lambda trial: trial["metrics"]["true_reward"]["mean"])
    reward, before = best["metrics"]["true_reward"]["mean"], results["sft"]["reward"]["mean"]
    return {
        "preftune": results["versions"]["preftune"],
        "method": "sigmoid",
        "verb": "dpo",
        "search": "grid",
        "metric": "true_reward",
        "direction": "maximize",
        "trials": trials,
        "best": {
            "number": best["number"],
            "params": best["params"],
            "reason": f"the highest true reward, {reward:.3f}; before DPO it was {before:.3f}",
        },
        "seconds": results["seconds"]["total"],
    }


def _side_by_side(prompts: Sequence[str], before: DemoScores, after: DemoScores) -> list[dict[str, Any]]:
    """The first sample of the first prompts under both models: not chosen by hand, nor by score."""
    found = []
    each = len(before.samples) // len(prompts)
    for index, prompt in list(enumerate(prompts))[:_KEPT_SAMPLES]:
        sides = {
            name: {"completion": scored.samples[index * each].text, "reward": float(scored.rewards[index * each])}
            for name, scored in (("before", before), ("after", after))
        }
        found.append({"prompt": prompt, **sides})
    return found


def _markdown(samples: list[dict[str, Any]], results: dict[str, Any]) -> str:
    lines = [
        f"# Samples before and after DPO (beta {results['dpo']['beta']:g})",
        "",
        "The first sample of each of the first fresh prompts, in their order; the number is its true reward (0 to 1).",
        "",
        "| prompt | before (SFT) | after (DPO) |",
        "|---|---|---|",
    ]
    for sample in samples:
        cells = [sample["prompt"]] + [
            f"**{sample[side]['reward']:.2f}** {sample[side]['completion'].strip()}" for side in ("before", "after")
        ]
        # A small model may write anything, a line break or a bar included.
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
