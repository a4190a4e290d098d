"""What is lost from one form of a model to the next, on held-out pairs, with intervals over prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from preftune.errors import PreftuneError
from preftune.evaluation.comparison import compare
from preftune.evaluation.metrics import Metric, Summary, ranked_right
from preftune.evaluation.pairs import EvalPairs
from preftune.evaluation.scoring import Scorer
from preftune.stats.rows import Array


@dataclass(frozen=True)
class Stage:
    """One form of the model.

    Attributes:
        name: ``adapter``, ``merged``, the type it was saved in, or that of the GGUF file.
        accuracy: Share of pairs whose chosen answer has the higher reward.
        change: Of the log-prob per token, this form minus the first; ``None`` for the first itself.
        accuracy_change: Likewise of the accuracy.
        largest: Largest absolute change of an answer's log-prob per token.
        conclusion: What the paired comparison with the first form says.
    """

    name: str
    accuracy: Metric
    change: Metric | None = None
    accuracy_change: Metric | None = None
    largest: float | None = None
    conclusion: str | None = None


class Losses:
    """Scores forms of one model on the same pairs.

    Args:
        pairs: Held-out pairs.
        pad_token_id: Fills padded batches.
        beta: Factor of the rewards.
        seed: Of the resampling.
    """

    def __init__(self, pairs: EvalPairs, *, pad_token_id: int, beta: float = 0.1, seed: int = 0) -> None:
        self.pairs, self.beta = pairs, beta
        self.stages: list[Stage] = []
        self._pad, self._summary = pad_token_id, Summary(seed=seed)
        self._groups = pairs.groups
        self._first: Array | None = None
        self._reference: Array | None = None

    @property
    def has_reference(self) -> bool:
        """Whether accuracy is that of rewards, and not of log-probs per token."""
        return self._reference is not None

    def reference(self, model: Any, *, adapter_off: bool = False) -> None:
        """Score the model before training, which rewards are measured from."""
        self._reference = self._sums(model, adapter_off=adapter_off)

    def add(self, name: str, model: Any) -> Stage:
        """Score one form.

        Args:
            name: What to call it.
            model: The model.

        Returns:
            Its figures, beside those of the first form.
        """
        sums = self._sums(model)
        rewards = self._rewards(sums)
        accuracy = self._summary.outcome(ranked_right(rewards), self._groups)
        if self._first is None:
            self._first = sums
            stage = Stage(name, accuracy)
        else:
            change = (sums - self._first) / np.maximum(self.pairs.scored(), 1)
            found = compare(rewards, self._rewards(self._first), self._groups, self._summary)
            stage = Stage(
                name,
                accuracy,
                change=self._summary.number(change.mean(axis=1), self._groups),
                accuracy_change=found["accuracy"]["difference"],
                largest=float(np.abs(change).max()),
                conclusion=found["conclusion"],
            )
        self.stages.append(stage)
        return stage

    def _rewards(self, sums: Array) -> Array:
        if self._reference is None:
            return np.asarray(sums / np.maximum(self.pairs.scored(), 1))
        return np.asarray(self.beta * (sums - self._reference))

    def _sums(self, model: Any, *, adapter_off: bool = False) -> Array:
        items = [pair.item for pair in self.pairs.pairs]
        scorer = Scorer(model, store=None, adapter_off=adapter_off, pad_token_id=self._pad)
        return np.asarray(scorer.sums(items))


def of_gguf(folder: Any, name: str) -> Any:
    """The weights of a GGUF file as transformers reads them, dequantised to fp32; or why it cannot.

    Args:
        folder: Folder of the file, with the model's configuration.
        name: Name of the file.

    Returns:
        A model, or a sentence.
    """
    import importlib.util

    import torch
    from transformers import AutoModelForCausalLM

    if importlib.util.find_spec("gguf") is None:
        return "the GGUF file was not scored: pip install gguf"
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=name, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, PreftuneError) as error:
        said = " ".join(str(error).split())[:160]
        return f"the GGUF file was not scored: transformers cannot read it ({said})"
    return model.eval()
