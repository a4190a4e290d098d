"""The table of published settings: one row per number that somebody has published, with who and for what.

Rows come from three places, so that no number is written twice: the table of methods, the recipes, and
:data:`_FURTHER` for what neither holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from preftune.advice.case import Case, Source
from preftune.advice.sources import BLOG, HANDBOOK, NOTES, PLAYBOOK, TRL_ORPO
from preftune.objectives import METHODS
from preftune.recipes.catalogue import RECIPES

#: Sizes of the models that papers of preference methods train, where the row does not say.
USUAL_SIZE = 7e9
#: From here on a model is called one of 7B: Llama-2-7B has 6.74 billion parameters.
SEVEN_BILLION = 6.5e9
#: A recipe of a model of about the same size, within this factor, comes before a method's general numbers.
NEAR = 1.5

# Names of the method table that differ from those of the settings.
_FIELDS = MappingProxyType({"batch_size": "batch_size", "epochs": "num_train_epochs"})
_ADVISED = ("beta", "learning_rate", "batch_size", "num_train_epochs", "warmup_steps", "label_smoothing")
_OF_RECIPES = ("beta", "learning_rate", "num_train_epochs", "warmup_steps", "lora_r", "lora_alpha")
# CPO's authors train an adapter of ALMA-13B, so that its rate is an adapter's.
_ADAPTER_METHODS = frozenset({"cpo"})


@dataclass(frozen=True)
class Published:
    """One published setting.

    Attributes:
        field: Name of the setting; ``batch_size`` is pairs per optimizer step.
        source: Who published it.
        value: The number, or ``None`` where only a range is published.
        low: Lower end of the published range, else ``value``.
        high: Upper end.
        methods: Methods that it was published for; empty for all.
        lora: Whether for an adapter (true), for all weights (false), or for either (``None``).
        num_parameters: Size of the model that it was published for.
        smallest: Size from which it applies.
        labels: ``noisy`` or ``clean`` where it was published for such labels; empty for either.
        says: Words where the number alone would mislead.
    """

    field: str
    source: str
    value: float | None = None
    low: float = math.nan
    high: float = math.nan
    methods: frozenset[str] = frozenset()
    lora: bool | None = None
    num_parameters: float = USUAL_SIZE
    smallest: float = 0.0
    labels: str = ""
    says: str = ""

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if math.isnan(getattr(self, name)) and self.value is not None:
                object.__setattr__(self, name, self.value)

    @property
    def as_source(self) -> Source:
        """Who says what."""
        return Source(self.source, self.says or self.number)

    @property
    def number(self) -> str:
        """Value and range in short."""
        span = "" if self.low == self.high else f"{self.low:g} to {self.high:g}"
        if self.value is None:
            return span
        return f"{self.value:g}" + (f" ({span})" if span else "")


_LOGISTIC_SUMS = frozenset({"sigmoid", "robust"})
_FURTHER = (
    Published("beta", "arXiv:2305.18290, TL;DR", 0.5, methods=frozenset({"sigmoid"})),
    Published(
        "beta",
        NOTES,
        0.1,
        0.1,
        0.5,
        methods=_LOGISTIC_SUMS,
        says="0.1 is sound, 0.1 to 0.5 usual; above 0.3 the policy barely moves, below 0.05 it chases reward",
    ),
    Published(
        "beta",
        BLOG,
        low=0.01,
        high=0.6,
        methods=frozenset({"sigmoid"}),
        says="depends on the model: best was 0.01 for Zephyr-7B, 0.6 for OpenHermes-7B",
    ),
    Published("beta", "arXiv:2403.07691", low=0.1, high=0.25, methods=frozenset({"orpo"})),
    Published("beta", "arXiv:2405.14734", low=2.0, high=10.0, methods=frozenset({"simpo"})),
    Published(
        "learning_rate",
        NOTES,
        low=5e-7,
        high=1e-6,
        lora=False,
        smallest=SEVEN_BILLION,
        says="5e-7 to 1e-6 from 7B parameters on",
    ),
    Published(
        "learning_rate", TRL_ORPO, 8e-6, methods=frozenset({"orpo"}), lora=False, num_parameters=124e6, says="8e-6"
    ),
    Published(
        "learning_rate",
        TRL_ORPO,
        8e-5,
        methods=frozenset({"orpo"}),
        lora=True,
        num_parameters=124e6,
        says="8e-5 for an adapter",
    ),
    Published("learning_rate", "arXiv:2405.14734", low=3e-7, high=1e-6, methods=frozenset({"simpo"}), lora=False),
    Published("learning_rate", "arXiv:2402.01306", low=5e-7, high=5e-6, methods=frozenset({"kto"}), lora=False),
    Published(
        "learning_rate",
        "arXiv:2411.15124, 70B",
        2e-7,
        methods=frozenset({"sigmoid_norm"}),
        lora=False,
        num_parameters=70e9,
        smallest=30e9,
    ),
    Published(
        "num_train_epochs", NOTES, low=1, high=2, labels="noisy", says="1 to 2 where annotators agree 50 to 60 %"
    ),
    Published("num_train_epochs", NOTES, low=3, high=5, labels="clean", says="3 to 5 on cleaner data"),
    Published("num_train_epochs", PLAYBOOK, 1, says="most methods overfit after one epoch"),
    Published("batch_size", HANDBOOK, 128, methods=frozenset({"sigmoid"})),
    Published("batch_size", "arXiv:2408.06266, SmolLM3", 32, methods=frozenset({"apo_zero"})),
    Published("warmup_steps", HANDBOOK, 0.1, says="a tenth of the steps, then cosine"),
    Published("label_smoothing", NOTES, low=0.1, high=0.2, labels="noisy", says="0.1 to 0.2 against annotation noise"),
)


def source_name(text: str) -> str:
    """The paper of a source in the table of methods, without what else it says."""
    found = re.match(r"arXiv:[\d.]*\d", text)
    return found.group() if found else text


def _from_methods() -> Iterator[Published]:
    for spec in METHODS.values():
        for name, value in spec.defaults.items():
            field = _FIELDS.get(name, name)
            if field in _ADVISED and isinstance(value, (int, float)):
                adapter = spec.name in _ADAPTER_METHODS if field == "learning_rate" else None
                yield Published(
                    field, source_name(spec.defaults_source), float(value), methods=frozenset({spec.name}), lora=adapter
                )


def _from_recipes() -> Iterator[Published]:
    import yaml

    for recipe in RECIPES.values():
        if not recipe.published or recipe.verb == "sft":
            continue
        content: dict[str, Any] = yaml.safe_load(recipe.text())
        size = re.search(r"(\d+(?:\.\d+)?)B", recipe.model)
        about = Published(
            "",
            f"recipe {recipe.name}",
            methods=frozenset({"+".join(recipe.method)}),
            num_parameters=float(size.group(1)) * 1e9 if size else USUAL_SIZE,
        )
        knobs = {knob for name in recipe.method for knob in METHODS[name].knobs if knob != "label_smoothing"}
        for field in (*_OF_RECIPES, *sorted(knobs)):
            value = content.get(field)
            if isinstance(value, (int, float, str)) and not isinstance(value, bool) and _is_number(value):
                adapter = bool(content.get("use_peft")) if field == "learning_rate" else None
                number = float(value)
                says = f"{number:g} for an adapter" if adapter else ""
                yield replace(about, field=field, value=number, low=math.nan, high=math.nan, lora=adapter, says=says)


def _is_number(value: object) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True


@lru_cache(maxsize=1)
def table() -> tuple[Published, ...]:
    """All rows: methods first, then recipes, then what neither holds."""
    return (*_from_methods(), *_from_recipes(), *_FURTHER)


def rows_for(field: str, case: Case, labels: str | None = None) -> list[Published]:
    """Rows about a setting that apply to a case, its own method's first.

    Args:
        field: Name of the setting.
        case: The run; its methods and size decide. Whether an adapter is trained does not: a rule converts rates.
        labels: ``noisy`` or ``clean`` keeps rows for such labels beside those for any; ``None`` keeps all.

    Returns:
        Rows for these methods, then general ones. A mixture of methods is looked up as a whole, then as its first.
    """
    whole = "+".join(case.methods)
    found = [row for row in table() if row.field == field and case.num_parameters >= row.smallest]
    if labels is not None:
        found = [row for row in found if row.labels in ("", labels)]
    exact = [row for row in found if whole in row.methods]
    first = [row for row in found if case.method in row.methods and row not in exact]
    return [*exact, *first, *(row for row in found if not row.methods)]


def nearest(rows: list[Published], case: Case) -> Published | None:
    """The published number to begin with.

    That of a recipe for a model of about this size comes first where it is nearer in size than the method's general
    number, or as near and for an adapter where one is trained; among equals the order of the rows decides.

    Args:
        rows: Rows about one setting and one case, those of its method first.
        case: The run.
    """
    valued = [row for row in rows if row.value is not None]
    own = [row for row in valued if row.methods] or valued
    if not own:
        return None
    close = [row for row in own if distance(case, row) <= math.log(NEAR)]

    def rank(row: Published) -> tuple[float, int]:
        # Sizes are rounded: 8.03 billion are 8B.
        return round(distance(case, row), 1), int(row.lora is not None and row.lora is not case.lora)

    return min(close, key=rank) if close else own[0]


def distance(case: Case, row: Published) -> float:
    """How far apart in size, as a logarithm."""
    return abs(math.log(case.num_parameters / row.num_parameters))


def contradiction(rows: list[Published], factor: float = 2.5) -> str | None:
    """Who says what, where rows differ by more than ``factor`` and neither range holds the other's number.

    Args:
        rows: Rows about one setting and one case.
        factor: How far two numbers may be apart and still agree.

    Returns:
        One sentence that names both extremes and all others, or ``None``.
    """
    ranged = [row for row in rows if row.high > 0]
    if len(ranged) < 2:
        return None
    lowest, highest = min(ranged, key=lambda row: row.high), max(ranged, key=lambda row: row.low)
    if highest.low <= factor * lowest.high:
        return None
    told = f"{lowest.source} says {lowest.number}, {highest.source} says {highest.number}"
    others = [row for row in ranged if row not in (lowest, highest)]
    if others:
        told += "; " + ", ".join(f"{row.source} {row.number}" for row in others)
    return f"sources disagree: {told}"
