"""Finding a method or its paper by name, with a hint where the name is not quite right."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from preftune.errors import ConfigError
from preftune.objectives.papers import MODIFIER_PAPERS, PAPERS
from preftune.objectives.spec import MethodSpec
from preftune.objectives.table import METHODS

# Names that people use for a method of the table.
SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        "dpo": "sigmoid",
        "cdpo": "sigmoid with label_smoothing",
        "rdpo": "robust",
        "slic": "hinge",
        "rso": "hinge",
        "exo": "exo_pair",
        "nca": "nca_pair",
        "bco": "bco_pair",
        "sppo": "sppo_hard or sppo_soft",
        "dpo_norm": "sigmoid_norm",
        "apo": "apo_zero or apo_down",
        "nll": "sft",
        "margin": "odpo with odpo_transform: identity",
        "mpo": "[sigmoid, bco_pair, sft] with loss_weights [0.8, 0.2, 1.0]",
        "rpo": "[sigmoid, sft] with loss_weights",
        # What TRL once called losses on single answers.
        **{f"{name}_pair": name for name, spec in METHODS.items() if not spec.paired},
    }
)


def find_method(name: str) -> MethodSpec:
    """Look a method up by its ``loss_type`` name.

    Args:
        name: A name in ``METHODS``.

    Returns:
        Its row.

    Raises:
        ConfigError: There is no such method; the message offers the nearest name.
    """
    spec = METHODS.get(name) if isinstance(name, str) else None
    if spec is not None:
        return spec
    key = str(name).lower().replace("-", "_")
    near = difflib.get_close_matches(key, METHODS, n=1)
    hint = SYNONYMS.get(key) or (near[0] if near else None)
    raise ConfigError(
        "unknown loss",
        where="loss_type",
        value=name,
        allowed=", ".join(METHODS),
        remedy=f"did you mean {hint}?" if hint else None,
    )


def bibtex(name: str) -> str:
    """Return the BibTeX entry of a method, a modifier or a paper key.

    Args:
        name: A ``loss_type``, a modifier (``label_smoothing``, ``f_divergence_type``, ``ld_alpha``, ``use_weighting``,
            ``sync_ref_model``, ``mpo``, ``rpo``) or a key of ``PAPERS``.

    Returns:
        One entry.

    Raises:
        ConfigError: The name is unknown.

    Example:
        >>> print(bibtex("simpo").splitlines()[0])
        @misc{meng2024simpo,
    """
    if name in METHODS:
        return METHODS[name].paper.bibtex()
    paper = MODIFIER_PAPERS.get(name) or PAPERS.get(name)
    if paper is None:
        known = (*METHODS, *MODIFIER_PAPERS, *PAPERS)
        near = difflib.get_close_matches(str(name), known, n=1)
        raise ConfigError(
            "nothing to cite under this name",
            where="cite",
            value=name,
            allowed="a loss_type, " + ", ".join(MODIFIER_PAPERS),
            remedy=f"did you mean {near[0]}?" if near else None,
        )
    return paper.bibtex()
