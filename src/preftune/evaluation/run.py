"""One evaluation from beginning to end: score, summarise, sample, compare, judge, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from preftune.config import ModelConfig, redact
from preftune.data import DataOptions
from preftune.errors import ConfigError
from preftune.evaluation import comparison, generations, metrics, rewardbench, tracking
from preftune.evaluation.announcement import announce
from preftune.evaluation.config import EvalConfig
from preftune.evaluation.endpoint import JUDGE, SERVER, key_from
from preftune.evaluation.judge import Judge
from preftune.evaluation.labels import Label, read_labels, write_to_label
from preftune.evaluation.metrics import Metric, Summary
from preftune.evaluation.pairs import EvalPairs, prepare_pairs, read_table
from preftune.evaluation.players import Players, beta_of, load_players, name_of
from preftune.evaluation.result import EvalResult
from preftune.evaluation.sampling import Sample, has_left
from preftune.evaluation.scoring import Scorer
from preftune.evaluation.winrate import win_rate
from preftune.stats.rows import Array

#: Prompts that are shown with both completions.
NUM_SHOWN = 8


def evaluate(
    model: Any,
    dataset: Any,
    *,
    tokenizer: Any = None,
    ref_model: Any = None,
    compare: Any = None,
    config: EvalConfig | None = None,
    model_config: ModelConfig | None = None,
    data_options: DataOptions | None = None,
    dataset_config: str | None = None,
    columns: Any = None,
    pairing: str = "best_worst",
    show_progress: bool = False,
    on_result: Callable[[EvalResult], None] | None = None,
    **settings: Any,
) -> EvalResult:
    """Evaluate a model on held-out pairs.

    Args:
        model: Name, folder, adapter folder, or a model of transformers or PEFT.
        dataset: Name, file, folder, or a ``datasets.Dataset`` of any preference format.
        tokenizer: Tokenizer; by default the model's own, where it is given by name.
        ref_model: Reference, by name or as a model. By default an adapter is compared with its own base; a model
            without adapter has no reference, and only what needs none is computed.
        compare: Another checkpoint, by name or as a model, for a paired comparison.
        config: Settings.
        model_config: How models given by name are loaded.
        data_options: How rows become tokens; by default those of `config` and bad rows skipped with a count.
        dataset_config: Configuration of a data set on the Hub.
        columns: Columns to keep or to rename.
        pairing: How pairs are made from ranked and from labelled answers.
        show_progress: Draw progress bars where there is a terminal.
        on_result: Called with the result once it is written, before any tracker gets it.
        settings: Fields of :class:`EvalConfig` by name; they win over `config`.

    Returns:
        The result, written as ``eval.json`` too where ``out`` is set.

    Raises:
        ConfigError: Settings out of range or contradicting each other.
        DataError: Data that cannot be read or used.
        ModelError: A model that cannot be loaded, or does not fit the data.
        SetupError: A judge or tracker that fails; what is finished is kept.
    """
    given = config or EvalConfig()
    ref_model = given.ref_model if ref_model is None else ref_model
    compare = given.compare if compare is None else compare
    config = replace(
        given,
        model=name_of(model),
        ref_model=None if ref_model is None else name_of(ref_model),
        compare=None if compare is None else name_of(compare),
        **settings,
    )
    labels = [] if config.judge_labels is None else read_labels(config.judge_labels)
    trackers = tracking.find(config.report_to or (), config.out or ".")
    clock = _Clock()
    with clock.part("loading"):
        players, tokenizer = load_players(model, ref_model, compare, tokenizer, config, model_config, show_progress)
        options = data_options or DataOptions(
            max_length=config.max_length,
            truncation_mode=config.truncation_mode,  # type: ignore[arg-type]
            on_bad_rows="skip",
            chat_template=None,
        )
        table = read_table(dataset, split=config.split, config=dataset_config, columns=columns)
        pairs = prepare_pairs(table, tokenizer, options, source_column=config.source_column, pairing=pairing)
    result = _Evaluation(config, players, tokenizer, pairs, clock, show_progress, labels).run()
    if config.out is not None:
        result.write(config.out)
    if on_result is not None:
        on_result(result)
    if trackers is not None:
        trackers.report(result.flat())
    return result


class _Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class _Evaluation:
    """The parts of one evaluation, in order."""

    def __init__(
        self,
        config: EvalConfig,
        players: Players,
        tokenizer: Any,
        pairs: EvalPairs,
        clock: _Clock,
        show_progress: bool,
        labels: Sequence[Label] = (),
    ) -> None:
        self.config, self.players, self.tokenizer, self.pairs = config, players, tokenizer, pairs
        self.clock, self.show, self.labels = clock, show_progress, labels
        self.summary = Summary(config.level, config.num_resamples, config.seed)
        self.groups = pairs.groups
        if config.judge_against == "reference" and players.reference is None:
            raise ConfigError("no reference", where="judge_against", value="reference", remedy="set ref_model")
        self.notes = list(pairs.notes)
        self.beta, said = beta_of(config.beta, players.names["model"])
        self.notes += said
        self.has_reference = players.reference is not None and not config.reference_free
        #: Rewards are log-odds of a preference only with a reference, or where somebody says that they are.
        self.prefix = "rewards" if self.has_reference or config.reference_free else "logps"
        if self.prefix == "logps":
            self.notes.append(
                "no reference: the model's own log-probs are compared, which is no implicit reward; name the model "
                "that training started from as ref_model, or say reference_free"
            )

    def run(self) -> EvalResult:
        items = [pair.item for pair in self.pairs.pairs]
        players, clock = self.players, self.clock
        if self.show:
            self.announce()
        with clock.part("scoring"):
            policy = players.policy.sums(items, "Model")
            reference = players.reference.sums(items, "Reference") if players.reference and self.has_reference else None
            rewards = self.rewards(policy, reference)
            other = None
            if players.other is not None:
                other = self.rewards(players.other.sums(items, "Other checkpoint"), reference)
        with clock.part("statistics"):
            result = self.about_pairs(policy, rewards, other)
        numbers = generations.choose_prompts(self.pairs, self.config.num_prompts, self.config.seed)
        if self.config.num_prompts and len(numbers):
            self.about_samples(result, numbers)
        result.seconds = {
            name: round(value, 3)
            for name, value in {**clock.seconds, "total": time.perf_counter() - clock.started}.items()
        }
        return result

    def announce(self) -> None:
        """Say what there is to do; how long it takes follows as soon as the pace is known."""
        config, players = self.config, self.players
        announce(
            self.pairs,
            scored=1 + bool(players.reference and self.has_reference) + (players.other is not None),
            answers=min(config.num_prompts, len(set(self.groups))) * config.samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
            drawn=1 + (players.reference is not None),
        )

    def rewards(self, policy: Array, reference: Array | None) -> Array:
        """``beta`` times log-ratios, or log-probs without a reference, as sums or per token; ``(pairs, 2)``."""
        values = policy if reference is None else policy - reference
        if self.config.length_normalised:
            values = values / self.pairs.scored()
        return np.asarray(self.beta * values if self.prefix == "rewards" else values)

    def formula(self) -> str:
        """What a reward is, for readers."""
        one = "log p(answer | prompt)"
        text = f"{one} - log ref(answer | prompt)" if self.has_reference else one
        text = f"({text}) / tokens" if self.config.length_normalised else text
        return f"beta * ({text})" if self.prefix == "rewards" else text

    def about_pairs(self, policy: Array, rewards: Array, other: Array | None) -> EvalResult:
        """Everything that follows from the pairs' log-probs."""
        summary, groups, pairs, names = self.summary, self.groups, self.pairs, self.players.names
        found: dict[str, Metric] = metrics.reward_metrics(rewards, groups, summary, self.prefix)
        if self.prefix == "rewards":
            found["logps/chosen"] = summary.number(policy[:, 0], groups)
            found["logps/rejected"] = summary.number(policy[:, 1], groups)
            found["logps/accuracies"] = summary.outcome(metrics.ranked_right(policy), groups)
        found["logps/mean_accuracies"] = summary.outcome(metrics.ranked_right(policy / pairs.scored()), groups)
        is_bench = rewardbench.is_rewardbench(pairs.sources)
        lengths = pairs.lengths
        return EvalResult(
            model=str(names["model"]),
            ref_model=names["reference"],
            dataset=pairs.name,
            num_pairs=len(pairs.pairs),
            num_prompts=len(set(groups)),
            reward=self.formula(),
            beta=self.beta,
            metrics=found,
            calibration=(
                metrics.calibration(rewards, groups, summary, self.config.num_bins) if self.prefix == "rewards" else {}
            ),
            by_length=metrics.by_length(rewards, lengths, groups, summary),
            by_source=metrics.by_source(rewards, pairs.sources, groups, summary),
            lengths={
                "chosen": summary.number(lengths[:, 0], groups),
                "rejected": summary.number(lengths[:, 1], groups),
                "unit": "tokens",
            },
            compare=(
                None
                if other is None
                else {"model": names["model"], "other": names["other"]}
                | comparison.compare(rewards, other, groups, summary)
            ),
            rewardbench=rewardbench.report(rewards, pairs.sources or [], groups, summary) if is_bench else None,
            level=self.config.level,
            seed=self.config.seed,
            notes=self.notes,
            settings={name: redact(value, name) for name, value in asdict(self.config).items()},
        )

    # ---- samples ----------------------------------------------------------------------------------------------------

    def about_samples(self, result: EvalResult, numbers: Sequence[int]) -> None:
        """KL, lengths, samples side by side, and the judge."""
        players, summary = self.players, self.summary
        cache = generations.GenerationCache(self.config.out)
        with self.clock.part("sampling"):
            mine, theirs = self.sampled(numbers, cache)
        result.lengths["model"] = generations.lengths_of(mine, summary)
        ref_sums: Array | None = None
        if players.reference is not None and theirs is not None:
            with self.clock.part("kl"):
                # Before the KL, which finds what comes along.
                result.tail_share = generations.tail(mine, players.reference, summary)
                result.kl, ref_sums = generations.kl(mine, players.reference, summary)
            if has_left(*(result.tail_share[name] for name in ("mean", "low", "level"))):
                share, level = (f"{100 * result.tail_share[name]:.3g} %" for name in ("mean", "level"))
                self.notes.append(
                    f"{share} of the sampled tokens are among the {level} that the reference is least likely to write: "
                    "the model has left its language; read the samples"
                )
            result.lengths["reference"] = generations.lengths_of(theirs, summary)
        result.samples = self.side_by_side(mine, theirs, ref_sums)
        if self.config.judge_url is not None:
            with self.clock.part("judging"):
                result.judge = self.judged(mine, theirs, numbers, cache)

    def sampled(
        self, numbers: Sequence[int], cache: generations.GenerationCache
    ) -> tuple[list[Sample], list[Sample] | None]:
        """Samples of the model and of its reference, from a server or drawn here."""
        config, policy, reference = self.config, self.players.policy, self.players.reference
        here = [each for each in (policy, reference) if each is not None]
        if config.sampling_url is None:
            mine, *others = self.generate(here, numbers, cache, "Sampling")
            return mine, others[0] if others else None
        mine = self.served(policy, str(config.sampling_model), numbers, cache)
        if reference is None:
            return mine, None
        if config.sampling_ref_model is not None:
            return mine, self.served(reference, config.sampling_ref_model, numbers, cache)
        return mine, self.generate([reference], numbers, cache, "Sampling (reference)")[0]

    def served(
        self, scorer: Scorer, name: str, numbers: Sequence[int], cache: generations.GenerationCache
    ) -> list[Sample]:
        """Samples of a model that a server holds."""
        from preftune.evaluation.served import Server

        config = self.config
        key = key_from(config.sampling_key_env, SERVER)
        samples, notes = Server(str(config.sampling_url), name, key=key, show_progress=self.show).samples(
            scorer,
            self.tokenizer,
            [self.pairs.pairs[n].prompt for n in numbers],
            cache,
            num_samples=config.samples_per_prompt,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        )
        self.notes += [note for note in notes if note not in self.notes]
        return samples

    def generate(
        self, scorers: Sequence[Scorer], numbers: Sequence[int], cache: generations.GenerationCache, description: str
    ) -> list[list[Sample]]:
        """Samples of each model on the chosen prompts."""
        return generations.generate(
            scorers,
            self.tokenizer,
            [self.pairs.pairs[n].prompt for n in numbers],
            cache,
            num_samples=self.config.samples_per_prompt,
            max_new_tokens=self.config.max_new_tokens,
            seed=self.config.seed,
            batch_size=self.config.generation_batch_size,
            description=description,
            show_progress=self.show,
        )

    def text(self, ids: Any, *, keep_special: bool = False) -> str:
        """Tokens as text."""
        decoded = self.tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    def side_by_side(
        self, mine: Sequence[Sample], theirs: Sequence[Sample] | None, ref_sums: Array | None
    ) -> list[dict[str, Any]]:
        """The first sample of the first prompts, with the reference's beside it."""
        shown = []
        for number in range(0, len(mine), self.config.samples_per_prompt)[:NUM_SHOWN]:
            sample = mine[number]
            shown.append(
                {
                    "prompt": self.text(sample.prompt_ids),
                    "completion": sample.text,
                    "reference_completion": None if theirs is None else theirs[number].text,
                    "num_tokens": len(sample.token_ids),
                    "logp": float(sample.logps.sum(dtype=np.float64)),
                    "ref_logp": None if ref_sums is None else float(ref_sums[number]),
                }
            )
        return shown

    def judged(
        self,
        mine: Sequence[Sample],
        theirs: Sequence[Sample] | None,
        numbers: Sequence[int],
        cache: generations.GenerationCache,
    ) -> dict[str, Any]:
        """Win rate against the opponent of the settings."""
        config = self.config
        against = config.judge_against or ("chosen" if theirs is None else "reference")
        if against == "chosen":
            opponents = [self.text(self.pairs.pairs[numbers[sample.prompt_index]].chosen) for sample in mine]
        elif against == "compare":
            assert self.players.other is not None
            (others,) = self.generate([self.players.other], numbers, cache, "Sampling (other checkpoint)")
            opponents = [sample.text for sample in others]
        else:
            opponents = [sample.text for sample in theirs or ()]
        judge = Judge(
            str(config.judge_url),
            str(config.judge_model),
            key=key_from(config.judge_key_env, JUDGE),
            folder=config.out,
            concurrency=config.judge_concurrency,
            timeout=config.judge_timeout,
            retries=config.judge_retries,
            max_tokens=config.judge_max_tokens,
            show_progress=self.show,
        )
        groups = [sample.prompt_index for sample in mine]
        prompts = [self.text(sample.prompt_ids) for sample in mine]
        answers = [sample.text for sample in mine]
        if config.out is not None and config.judge_labels is None:
            write_to_label(config.out, prompts, answers, opponents, config.seed)
        found = win_rate(judge, prompts, answers, opponents, groups, self.summary, self.labels)
        self.notes += found.pop("notes", [])
        if found["unreadable"]:
            self.notes.append(f"{found['unreadable']} comparisons have a verdict that could not be read")
        return {"model": config.judge_model, "url": redact(config.judge_url), "against": against} | found
