"""Who says what the advice rests on, by the names that are shown, and where it can be read."""

from __future__ import annotations

import re
from types import MappingProxyType

#: What people who use preference training told from their practice; nobody printed it, so that it is quoted where used.
NOTES = "users' practice"
PLAYBOOK = "Smol Training Playbook"
BLOG = "Hugging Face, preference tuning blog"
HANDBOOK = "alignment-handbook, zephyr-7b-beta"
#: This project's own measurement.
LEARNING = "docs/learning.md (measured here)"
NOISE_TABLE = "docs/noise.md (measured here)"
QLORA = "arXiv:2305.14314"
TRL_ORPO = "TRL, examples/scripts/orpo.py"
#: Where a source can be read; papers, recipes and this project's documents are found by their name.
_LINKS = MappingProxyType(
    {
        PLAYBOOK: "https://huggingface.co/spaces/HuggingFaceTB/smol-training-playbook",
        BLOG: "https://huggingface.co/blog/pref-tuning",
        HANDBOOK: "https://github.com/huggingface/alignment-handbook/tree/main/recipes/zephyr-7b-beta",
        TRL_ORPO: "https://github.com/huggingface/trl/blob/v0.9.6/examples/scripts/orpo.py",
    }
)


def link_of(name: str) -> str:
    """Where a source can be read: an address, a command or a file; empty for what nobody printed.

    >>> link_of("arXiv:2305.18290, appendix B")
    'https://arxiv.org/abs/2305.18290'
    """
    if name in _LINKS:
        return _LINKS[name]
    paper = re.search(r"arXiv:(\d+\.\d+)", name)
    if paper:
        return f"https://arxiv.org/abs/{paper[1]}"
    if name.startswith("recipe "):
        return f"`preftune recipes show {name.removeprefix('recipe ')}`"
    return name.partition(" ")[0] if name.startswith("docs/") else ""
