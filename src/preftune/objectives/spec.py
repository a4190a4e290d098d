"""What the table says about a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from preftune.objectives import knobs
from preftune.objectives.knobs import Knob
from preftune.objectives.papers import PAPERS, Paper

Setting = float | int | str


@dataclass(frozen=True)
class MethodSpec:
    """One method.

    Attributes:
        name: Value of ``loss_type``.
        family: ``logistic``, ``margin``, ``distributional``, ``anchored``, ``reference_free``, ``sft`` or ``unpaired``.
        function: The loss: batch positional, ``beta`` and the knobs keyword-only, result unreduced.
        formula: The loss of one pair in plain text; r is the log-ratio to the reference, h = β times the
            difference of the two.
        paper: Its source.
        equation: Where in the source, or empty.
        knobs: Settings beside ``beta``, by name.
        defaults: Published settings, such as ``beta``, ``learning_rate`` and ``batch_size``.
        defaults_source: Where those come from.
        needs_reference: Whether reference log-probs are needed.
        needs_lengths: Whether completion lengths enter the loss.
        separable: Whether the loss of a step is a sum over its pairs, given the step-wide numbers.
        paired: Whether it takes ``PairLogps`` (else ``UnpairedLogps``).
        supports_f_divergence: Whether a divergence other than reverse KL may be set.
        requires: Optional columns that must be present.
        check_margins: For methods that need ``margins``: check of the whole column, given it and the method's knobs.
        scores: For reference-free methods: the log-prob scores whose multiple by beta is logged as the reward.
    """

    name: str
    family: str
    function: Callable[..., Tensor]
    formula: str
    paper: Paper
    equation: str
    knobs: Mapping[str, Knob]
    defaults: Mapping[str, Setting]
    defaults_source: str
    needs_reference: bool = True
    needs_lengths: bool = False
    separable: bool = True
    paired: bool = True
    supports_f_divergence: bool = False
    requires: frozenset[str] = frozenset()
    check_margins: Callable[[Tensor, Mapping[str, Any]], None] | None = None
    scores: Callable[..., tuple[Tensor, Tensor]] | None = None

    @property
    def bibtex_key(self) -> str:
        """Key of the paper's BibTeX entry."""
        return self.paper.key

    @property
    def needs_kl(self) -> bool:
        """Whether a KL baseline joins the answers of a step, which have no pair of their own."""
        return not (self.paired or self.separable)


def _named(*taken: Knob) -> Mapping[str, Knob]:
    return MappingProxyType({knob.name: knob for knob in taken})


def method_row(
    name: str,
    family: str,
    function: Callable[..., Tensor],
    formula: str,
    paper: str,
    equation: str = "",
    *,
    takes: tuple[Knob, ...] = (),
    published: Mapping[str, Setting] | None = None,
    source: str = "",
    needs_reference: bool = True,
    needs_lengths: bool = False,
    separable: bool = True,
    paired: bool = True,
    difference: bool = False,
    check_margins: Callable[[Tensor, Mapping[str, Any]], None] | None = None,
    scores: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> MethodSpec:
    """Build a row of the table.

    Most arguments are the fields of ``MethodSpec``. ``paper`` is a key of ``PAPERS``; ``takes`` are the knobs beside
    ``beta``; ``published`` and ``source`` become ``defaults`` and ``defaults_source``; ``difference`` says that it
    is a function of the score difference, which adds the divergence knobs; ``check_margins`` implies that margins are
    required.
    """
    divergence = (knobs.F_DIVERGENCE_TYPE, knobs.F_ALPHA_DIVERGENCE_COEF) if difference else ()
    return MethodSpec(
        name=name,
        family=family,
        function=function,
        formula=formula,
        paper=PAPERS[paper],
        equation=equation,
        knobs=_named(*takes, *divergence),
        defaults=MappingProxyType(dict(published or {})),
        defaults_source=source,
        needs_reference=needs_reference,
        needs_lengths=needs_lengths,
        separable=separable,
        paired=paired,
        # The SFT term has no log-ratio, so a divergence leaves it as it is and does not forbid it.
        supports_f_divergence=difference or family == "sft",
        requires=frozenset() if check_margins is None else frozenset({"margins"}),
        check_margins=check_margins,
        scores=scores,
    )
