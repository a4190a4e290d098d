"""A whole evaluation against slow, separate fp64 code; resuming; the trainers' own numbers."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.errors import ConfigError, DataError, ModelError, SetupError
from preftune.evaluation import EvalConfig, EvalResult, evaluate, preference_metrics
from preftune.evaluation.generations import FILE_NAME as SAMPLES
from preftune.evaluation.generations import GenerationCache
from preftune.evaluation.judge import FILE_NAME as ANSWERS
from preftune.evaluation.scoring import Scorer
from preftune.references.scoring import SequenceScorer
from tests.evaluation.conftest import Start

FAST: dict[str, Any] = {"num_prompts": 0, "num_resamples": 200}


def rows_of(world: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (world / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]


def model_of(world: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    if name == "adapter":
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(world / name).to(dtype).eval()
    loaded: Any = AutoModelForCausalLM.from_pretrained(world / name, dtype=dtype)
    return loaded.eval()


def slow_logps(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, int]:
    """Log-prob of an answer in fp64, one sequence at a time, from plain logits."""
    first = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    total = 0.0
    for position in range(len(first), len(ids)):
        scores = logits[position - 1]
        total += float(scores[ids[position]] - torch.logsumexp(scores, 0))
    return total, len(ids) - len(first)


def slow_table(world: Path, name: str) -> Any:
    """``(pairs, 2)`` log-probs and token counts of a model."""
    tokenizer = AutoTokenizer.from_pretrained(world / "ref")
    model = model_of(world, name, torch.float64)
    found = [
        [slow_logps(model, tokenizer, r["prompt"], r[side]) for side in ("chosen", "rejected")] for r in rows_of(world)
    ]
    return np.array(found)


@pytest.fixture(scope="module")
def slow(world: Path) -> dict[str, Any]:
    return {name: slow_table(world, name) for name in ("ref", "policy", "other", "adapter")}


@pytest.mark.parametrize("mode", ["packed", "padded"])
def test_equals_a_slow_separate_computation(world: Path, slow: dict[str, Any], mode: str) -> None:
    found = evaluate(
        str(world / "policy"),
        str(world / "pairs.jsonl"),
        ref_model=str(world / "ref"),
        compare=str(world / "other"),
        beta=0.2,
        packing_mode=mode,
        reference_store=False,
        **FAST,
    )
    policy, ref, other = (slow[name][:, :, 0] for name in ("policy", "ref", "other"))
    rewards = 0.2 * (policy - ref)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {
        "rewards/accuracies": np.mean(margins > 0),
        "rewards/margins": margins.mean(),
        "rewards/chosen": rewards[:, 0].mean(),
        "rewards/rejected": rewards[:, 1].mean(),
        "logps/accuracies": np.mean(policy[:, 0] > policy[:, 1]),
        "logps/mean_accuracies": np.mean(
            (policy / slow["policy"][:, :, 1])[:, 0] > (policy / slow["policy"][:, :, 1])[:, 1]
        ),
    }
    for name, value in expected.items():
        assert found.metrics[name]["mean"] == pytest.approx(float(value), abs=1e-5), name
    for side, column in (("chosen", 0), ("rejected", 1)):
        assert found.metrics[f"logps/{side}"]["mean"] == pytest.approx(policy[:, column].mean(), abs=2e-5)
    assert found.calibration["brier"]["mean"] == pytest.approx(np.mean((1 / (1 + np.exp(margins))) ** 2), abs=1e-5)
    assert found.calibration["log_loss"]["mean"] == pytest.approx(np.mean(np.log1p(np.exp(-margins))), abs=1e-5)
    theirs = 0.2 * (other - ref)
    right, other_right = margins > 0, theirs[:, 0] > theirs[:, 1]
    assert found.compare is not None
    assert found.compare["mcnemar"]["only_model"] == int((right & ~other_right).sum())
    assert found.compare["accuracy"]["difference"]["mean"] == pytest.approx(right.mean() - other_right.mean())
    assert (found.num_pairs, found.num_prompts) == (len(margins), 24)
    assert {part["name"] for part in found.by_source} == {"x", "y"}


def test_an_adapter_is_compared_with_its_base(world: Path, slow: dict[str, Any]) -> None:
    found = evaluate(str(world / "adapter"), str(world / "pairs.jsonl"), tokenizer=None, beta=1.0, **FAST)
    rewards = slow["adapter"][:, :, 0] - slow["ref"][:, :, 0]
    assert found.metrics["rewards/margins"]["mean"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), abs=1e-5)
    assert str(found.ref_model).endswith("adapter without its adapter")


def test_rewards_per_token_and_without_a_reference(world: Path, slow: dict[str, Any]) -> None:
    name, data = str(world / "policy"), str(world / "pairs.jsonl")
    per_token = slow["policy"][:, :, 0] / slow["policy"][:, :, 1]
    found = evaluate(name, data, beta=2.0, reference_free=True, length_normalised=True, **FAST)
    margins = 2 * (per_token[:, 0] - per_token[:, 1])
    assert found.metrics["rewards/margins"]["mean"] == pytest.approx(margins.mean(), abs=1e-5)
    assert found.calibration
    plain = evaluate(name, data, **FAST)
    assert not plain.calibration
    assert plain.ref_model is None
    assert not any(metric.startswith("rewards") for metric in plain.metrics)
    assert any("no reference" in note for note in plain.notes)


def test_json_holds_what_it_promises_and_runs_are_equal(world: Path, tmp_path: Path) -> None:
    results = [
        evaluate(
            str(world / "policy"),
            str(world / "pairs.jsonl"),
            ref_model=str(world / "ref"),
            out=str(tmp_path / f"out-{number}"),
            num_prompts=5,
            samples_per_prompt=2,
            max_new_tokens=8,
            num_resamples=200,
            seed=3,
        )
        for number in range(2)
    ]
    documents = [json.loads((tmp_path / f"out-{n}" / "eval.json").read_text(encoding="utf-8")) for n in range(2)]
    for document in documents:
        document.pop("seconds")
        document["settings"].pop("out")
    assert documents[0] == documents[1]
    document = documents[0]
    for key in ("model", "ref_model", "dataset", "num_pairs", "metrics", "calibration", "by_length", "by_source", "kl"):
        assert document[key], key
    assert {"lengths", "samples", "compare", "judge", "seed"} <= set(document)
    assert all({"mean", "low", "high", "n"} <= set(metric) for metric in document["metrics"].values())
    assert len(document["samples"]) == 5
    assert {"prompt", "completion", "reference_completion", "num_tokens", "logp", "ref_logp"} <= set(
        document["samples"][0]
    )
    assert results[0].flat()["kl"] == document["kl"]["mean"]
    assert document["kl"]["n"] == 10


@pytest.mark.parametrize("level", [0.3, 0.9999])
def test_kl_and_far_tail_are_those_of_the_samples(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: float
) -> None:
    # Small random models are nearly uniform: nothing lies in the last hundredth.
    monkeypatch.setattr("preftune.evaluation.generations.TAIL_LEVEL", level)
    found = evaluate(
        str(world / "policy"),
        str(world / "pairs.jsonl"),
        ref_model=str(world / "ref"),
        out=str(tmp_path),
        num_prompts=4,
        max_new_tokens=10,
        num_resamples=200,
        reference_store=False,
    )
    ref = model_of(world, "ref", torch.float64)
    policy = model_of(world, "policy", torch.float64)
    lines = [json.loads(line) for line in (tmp_path / SAMPLES).read_text(encoding="utf-8").splitlines()]
    shown = {sample["completion"]: sample for sample in found.samples}
    tokenizer = AutoTokenizer.from_pretrained(world / "ref")
    ratios, shares = [], []
    for line in lines:
        if line["text"] not in shown or abs(sum(line["logps"]) - shown[line["text"]]["logp"]) > 1e-4:
            continue  # the reference's own samples
        prompt = tokenizer(shown[line["text"]]["prompt"])["input_ids"]
        ids = torch.tensor([prompt + line["token_ids"]])
        values = []
        for model in (policy, ref):
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
            values.append(sum(float(logps[len(prompt) + i - 1, t]) for i, t in enumerate(line["token_ids"])))
        ratios.append(values[0] - values[1])
        p = logps.exp()[len(prompt) - 1 : -1]  # of the reference, the last of the two
        shares.append(
            np.mean([float(row[row <= row[t]].sum()) <= level for row, t in zip(p, line["token_ids"], strict=True)])
        )
    assert len(ratios) == 4
    assert found.tail_share["mean"] == pytest.approx(np.mean(shares), abs=1e-6)
    assert found.flat()["tail_share"] == found.tail_share["mean"]
    assert found.tail_share["mean"] > 0
    left = [note for note in found.notes if "left its language" in note]
    assert bool(left) == (found.tail_share["low"] > level and found.tail_share["mean"] >= 1.4 * level)


def test_a_second_run_scores_and_samples_nothing(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "store"))
    arguments: dict[str, Any] = {
        "ref_model": str(world / "ref"),
        "out": str(tmp_path / "out"),
        "num_prompts": 4,
        "max_new_tokens": 6,
        "num_resamples": 200,
    }
    first = evaluate(str(world / "policy"), str(world / "pairs.jsonl"), **arguments)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(SequenceScorer, "_row", never)
    monkeypatch.setattr("preftune.evaluation.generations.continue_prompts", never)
    second = evaluate(str(world / "policy"), str(world / "pairs.jsonl"), **arguments)
    assert second.metrics == first.metrics
    assert second.samples == first.samples


def test_interrupted_scoring_keeps_what_it_has(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "store"))
    original, calls = SequenceScorer._row, []

    def limited(self: SequenceScorer, items: Any, keys: Any) -> Any:
        calls.append(len(items))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, items, keys)

    monkeypatch.setattr(SequenceScorer, "_row", limited)
    arguments: dict[str, Any] = {"ref_model": str(world / "ref"), "max_tokens_per_row": 120, **FAST}
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(world / "policy"), str(world / "pairs.jsonl"), **arguments)
    done = sum(calls[:2])
    calls[:] = [0, 0, 0]  # go on without another interruption
    found = evaluate(str(world / "policy"), str(world / "pairs.jsonl"), **arguments)
    assert sum(calls) == 2 * found.num_pairs - done


def test_torn_samples_are_drawn_again_and_come_out_the_same(world: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "ref_model": str(world / "ref"),
        "out": str(tmp_path),
        "num_prompts": 6,
        "max_new_tokens": 6,
        "generation_batch_size": 2,
        "num_resamples": 200,
    }
    first = evaluate(str(world / "policy"), str(world / "pairs.jsonl"), **arguments)
    file = tmp_path / SAMPLES
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert evaluate(str(world / "policy"), str(world / "pairs.jsonl"), **arguments).samples == first.samples
    assert len(GenerationCache(tmp_path)._known) == 12


def test_three_completions_of_a_prompt_share_it(world: Path) -> None:
    model, tokenizer = model_of(world, "policy"), AutoTokenizer.from_pretrained(world / "ref")
    prompt = np.array(tokenizer(" the film was :")["input_ids"])
    answers = [np.array(tokenizer(text)["input_ids"]) for text in (" nice", " very dull", " a good plot")]
    packed = Scorer(model, packing_mode="packed").logps([tuple((prompt, answer) for answer in answers)])[0]
    for answer, values in zip(answers, packed, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(-1)
        expected = [float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]
        assert values == pytest.approx(expected, abs=1e-5)


def test_training_and_evaluation_share_reference_and_numbers(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    from preftune import DPOConfig, DPOTrainer

    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "store"))
    rows = Dataset.from_list([{k: v for k, v in row.items() if k != "source"} for row in rows_of(world)])
    trainer = DPOTrainer(
        model=str(world / "policy"),
        ref_model=model_of(world, "ref"),
        args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=0.1, disable_tqdm=True),
        train_dataset=rows.select(range(2)),
        eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(world / "ref"),
        compute_metrics=preference_metrics,
    )
    trained = trainer.evaluate()
    scored: list[str] = []
    original = SequenceScorer._row

    def watched(self: SequenceScorer, items: Any, keys: Any) -> Any:
        scored.extend(self._weights_key() for _ in items)
        return original(self, items, keys)

    monkeypatch.setattr(SequenceScorer, "_row", watched)
    found = evaluate(str(world / "policy"), rows, ref_model=str(world / "ref"), beta=0.1, **FAST)
    # The reference was in the store already; only the policy had to be scored.
    assert len(set(scored)) == 1
    for ours, theirs in (("accuracies", "accuracies"), ("margins", "margins"), ("chosen", "chosen")):
        value = found.metrics[f"rewards/{ours}"]["mean"]
        assert trained[f"eval_rewards/{theirs}"] == pytest.approx(value, abs=1e-5)
    assert trained["eval_accuracy"] == pytest.approx(found.metrics["rewards/accuracies"]["mean"])
    assert trained["eval_margin"] == pytest.approx(found.metrics["rewards/margins"]["mean"], abs=1e-5)
    assert trained["eval_ece"] == pytest.approx(found.calibration["ece"], abs=1e-5)


def test_beta_of_the_training_run(world: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    model_of(world, "policy").save_pretrained(copy)
    AutoTokenizer.from_pretrained(world / "ref").save_pretrained(copy)
    settings = {"settings": {"trainer": {"beta": {"value": 0.35, "from": "flag"}}}}
    (copy / "provenance.json").write_text(json.dumps(settings), encoding="utf-8")
    found = evaluate(str(copy), str(world / "pairs.jsonl"), ref_model=str(world / "ref"), **FAST)
    assert found.beta == 0.35
    assert any("0.35" in note for note in found.notes)


def test_judged_against_each_opponent(world: Path, tmp_path: Path, start_judge: Start) -> None:
    server = start_judge(taste="longer")

    def run(**more: Any) -> EvalResult:
        return evaluate(
            str(world / "policy"),
            str(world / "pairs.jsonl"),
            out=str(tmp_path / "out"),
            num_prompts=4,
            max_new_tokens=8,
            num_resamples=200,
            judge_url=server.url,
            judge_model="m",
            **more,
        )

    against_data = run()
    assert against_data.judge is not None
    assert against_data.judge["against"] == "chosen"
    first = len(server.requests())
    assert first == 8
    run()
    assert len(server.requests()) == first
    against_ref = run(ref_model=str(world / "ref"))
    assert against_ref.judge is not None
    assert against_ref.judge["against"] == "reference"
    # What it must have said, from the samples alone.
    scores = [
        0.5 + 0.5 * np.sign(len(s["completion"].strip()) - len(s["reference_completion"].strip()))
        for s in against_ref.samples
    ]
    assert against_ref.judge["win_rate"]["mean"] == pytest.approx(np.mean(scores))
    against_other = run(compare=str(world / "other"), judge_against="compare")
    assert against_other.judge is not None
    assert against_other.judge["against"] == "compare"
    assert (tmp_path / "out" / ANSWERS).exists()


def test_labels_of_people_correct_the_win_rate(world: Path, tmp_path: Path, start_judge: Start) -> None:
    server = start_judge(taste="longer")
    out, labels = tmp_path / "out", tmp_path / "labels.jsonl"

    def run(**more: Any) -> EvalResult:
        return evaluate(
            str(world / "policy"),
            str(world / "pairs.jsonl"),
            ref_model=str(world / "ref"),
            out=str(out),
            num_prompts=4,
            max_new_tokens=8,
            num_resamples=200,
            judge_url=server.url,
            judge_model="m",
            **more,
        )

    plain = run()
    assert plain.judge is not None
    assert "corrected" not in plain.judge
    rows = [json.loads(line) for line in (out / "to_label.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["prompt"] for row in rows} <= {sample["prompt"] for sample in plain.samples}
    # Others too, in which people prefer what is longer in 20 of 24.
    rows = [
        {"prompt": f"p{n}", "first": "long " * 3, "second": "short", "label": "second" if n % 6 == 0 else "first"}
        for n in range(24)
    ]
    rows += [{"prompt": f"q{n}", "first": "short", "second": "long " * 3, "label": "second"} for n in range(12)]
    labels.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = run(judge_labels=str(labels))
    assert found.judge is not None
    about = found.judge["corrected"]
    assert (about["method"], about["labels"]) == ("error rates", 36)
    assert about["agreement"]["mean"] == pytest.approx(32 / 36)
    # By hand: the judge says first in all that are won and in 4 of 16 that are lost.
    win_rate = found.judge["win_rate"]["mean"]
    equal = found.judge["identical"] / found.judge["n"]
    expected = min(1.0, max(0.0, ((win_rate - equal / 2) / (1 - equal) - 4 / 16) / (1 - 4 / 16)))
    assert about["mean"] == pytest.approx(equal / 2 + (1 - equal) * expected)
    assert found.flat()["win_rate_corrected_high"] == about["high"]
    assert any("36 human labels" in note for note in found.notes)
    written = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    assert written["judge"]["corrected"]["labels"] == 36
    assert "notes" not in written["judge"]


def test_numbers_reach_the_tracker(world: Path, tmp_path: Path) -> None:
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = evaluate(
        str(world / "policy"), str(world / "pairs.jsonl"), out=str(tmp_path), report_to=["tensorboard"], **FAST
    )
    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = reader.EventAccumulator(str(file)).Reload()
    value = events.Scalars("eval/logps/accuracies")[0].value
    assert value == pytest.approx(found.metrics["logps/accuracies"]["mean"], abs=1e-6)
    # Found before the model is looked for.
    with pytest.raises(ConfigError, match=r"unknown tracker.*tensorboard"):
        evaluate(str(world / "absent"), str(world / "pairs.jsonl"), report_to=["nonesuch"], **FAST)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"split": "validation"}, ConfigError, "no such split"),
        ({"source_column": "where"}, ConfigError, "source_column: no such column"),
        ({"beta": 0.0}, ConfigError, "beta: out of range"),
        ({"judge_model": "m"}, ConfigError, "no effect without a judge"),
        ({"judge_labels": "labels.jsonl"}, ConfigError, "judge_labels: has no effect without a judge"),
        ({"judge_url": "localhost:1", "judge_model": "m"}, ConfigError, "judge_url: not an address"),
        ({"judge_url": "http://localhost:1"}, ConfigError, "judge_model"),
        ({"packing_mode": "loose"}, ConfigError, "packing_mode"),
        ({"max_length": 4}, DataError, "no row is left"),
        ({"compare": "nowhere/at/all"}, ModelError, "nowhere"),
    ],
)
def test_refusals_are_one_line(world: Path, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    extra = {"compare": settings["compare"]} if "compare" in settings else {}
    rest = {name: value for name, value in settings.items() if name != "compare"}
    with pytest.raises(error, match=message) as caught:
        evaluate(str(world / "policy"), str(world / "pairs.jsonl"), **extra, **{**FAST, **rest})
    assert "\n" not in str(caught.value)


def test_another_vocabulary_is_refused(world: Path, tmp_path: Path) -> None:
    from tests.models.tiny import tiny_model

    with pytest.raises(ModelError, match="one vocabulary"):
        evaluate(
            str(world / "policy"),
            str(world / "pairs.jsonl"),
            ref_model=tiny_model("LlamaConfig", vocab_size=40),
            **FAST,
        )


def test_unwritable_folder(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot write"):
        evaluate(str(world / "policy"), str(world / "pairs.jsonl"), out=str(tmp_path / "file"), **FAST)


def test_settings_alone_are_light() -> None:
    import subprocess
    import sys

    code = "import sys, preftune.evaluation.config, preftune.cli.eval; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert EvalConfig().level == 0.95
    assert math.isclose(EvalConfig(beta=0.3).beta or 0, 0.3)
