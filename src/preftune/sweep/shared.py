"""What the trials of one process share: the loaded base, its tokenizer, the rows and the tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from preftune.models.loading import Loaded


def twin(model: nn.Module, *, adapter: bool) -> Any:
    """A model of its own with the weights of ``model``, which shares with it whatever is not going to be trained.

    Modules are new, so that nothing a trainer attaches outlives its trial. Frozen parameters are the same tensors:
    an adapter's trial costs the memory of its adapter.

    Args:
        model: The base; left as it is.
        adapter: Whether an adapter will be put on, so that all of the base stays frozen.

    Returns:
        The twin.
    """
    kept = {id(p): p for p in model.parameters() if adapter or not p.requires_grad}
    # deepcopy takes what its memo names as copied already.
    return copy.deepcopy(model, dict(kept))


class Base:
    """A loaded base that hands out fresh starts.

    Args:
        loaded: As it came from disk.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._flags = [p.requires_grad for p in loaded.model.parameters()]

    @property
    def reference(self) -> Any:
        """What policies are compared with: the reference given, or else the untouched model."""
        return self._loaded.model if self._loaded.ref_model is None else self._loaded.ref_model

    def fresh(self, peft_config: Any) -> Loaded:
        """What a trial starts from: the same numbers as if it had been loaded anew."""
        loaded = self._loaded
        # An adapter's trial froze the shared parameters.
        for parameter, flag in zip(loaded.model.parameters(), self._flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None
        reference = None if loaded.ref_model is None else twin(loaded.ref_model, adapter=True)
        return replace(
            loaded,
            model=twin(loaded.model, adapter=peft_config is not None),
            tokenizer=copy.deepcopy(loaded.tokenizer),
            ref_model=reference,
            peft_config=peft_config,
        )


class Shelf:
    """Keeps what was made under a key, the last few of each kind."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[Hashable, Any]] = {}

    def get(self, kind: str, key: Hashable, make: Callable[[], Any], size: int = 2) -> Any:
        """The thing under ``key``, made on first use.

        Args:
            kind: What kind of thing.
            key: What decides it.
            make: Makes it.
            size: How many of the kind are kept: a sweep over a data setting must not fill the memory.
        """
        kept = self._kept.setdefault(kind, {})
        if key in kept:
            kept[key] = kept.pop(key)
            return kept[key]
        while len(kept) >= size:
            # Gone before the next one is made, so that both never need room together.
            kept.pop(next(iter(kept)))
        kept[key] = make()
        return kept[key]


def sharing(
    trainer_class: type[Any], shelf: Shelf, key: Hashable, collect: Callable[[Any], dict[str, float]]
) -> type[Any]:
    """A trainer that takes tokens from the shelf and hands its held-out rewards over.

    Args:
        trainer_class: A pair trainer.
        shelf: Where tokens are kept.
        key: What beside the data options decides the tokens: rows, tokenizer, chat template.
        collect: Called with the ``EvalPrediction`` of every evaluation.

    Returns:
        A subclass that computes the same numbers.
    """

    class Sharing(trainer_class):  # type: ignore[misc]
        """The trainer, with tokens from the shelf."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.compute_metrics = collect

        def _prepared(self, dataset: Any, tokenizer: Any, name: str) -> Any:
            def make() -> tuple[Any, Any, Any]:
                prepared = super(Sharing, self)._prepared(dataset, tokenizer, name)
                # The rows stay with their tokens: an identity may be given out again once they are gone.
                return prepared, self.reports[name], dataset

            found = shelf.get(f"tokens {name}", (key, id(dataset), repr(self._data_options)), make)
            self.reports[name] = found[1]
            return found[0]

    Sharing.__name__ = Sharing.__qualname__ = trainer_class.__name__
    return Sharing
