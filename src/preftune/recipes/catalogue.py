"""The table of recipes, and how to get at their text."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from preftune.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """One recipe.

    Attributes:
        name: Its name; the file is called the same, with ``.yaml``.
        verb: The verb that runs it: ``preftune <verb> --config FILE``.
        method: The loss that it trains with, as ``preftune methods`` names it.
        model: The model that it makes, with its size.
        summary: What sets it apart, in a few words.
        source: Papers and the published configuration that its numbers come from.
        published: Whether somebody trained with these very numbers, so that an advice may go by them.
    """

    name: str
    verb: str
    method: tuple[str, ...]
    model: str
    summary: str
    source: str
    published: bool = True

    @property
    def file_name(self) -> str:
        """Name of its file."""
        return f"{self.name}.yaml"

    def text(self) -> str:
        """The YAML with its comments; works from a zipped package too."""
        return files("preftune.recipes").joinpath(self.file_name).read_text(encoding="utf-8")


_HANDBOOK = "alignment-handbook, recipes"

_ROWS = (
    Recipe(
        "zephyr-7b-dpo-full",
        "dpo",
        ("sigmoid",),
        "Zephyr-7B",
        "DPO with beta 0.01, all weights",
        f"arXiv:2310.16944; {_HANDBOOK}/zephyr-7b-beta/dpo/config_full.yaml",
    ),
    Recipe(
        "zephyr-7b-dpo-qlora",
        "dpo",
        ("sigmoid",),
        "Zephyr-7B",
        "the same with LoRA on 4-bit weights",
        f"arXiv:2310.16944; {_HANDBOOK}/zephyr-7b-beta/dpo/config_qlora.yaml",
    ),
    Recipe(
        "zephyr-7b-sft-full",
        "sft",
        ("sft",),
        "Zephyr-7B",
        "supervised fine-tuning, the stage before DPO",
        f"arXiv:2310.16944; {_HANDBOOK}/zephyr-7b-beta/sft/config_full.yaml",
    ),
    Recipe(
        "laptop-dpo",
        "dpo",
        ("sigmoid",),
        "SmolLM2-135M",
        "an adapter on a processor, on one's own pairs",
        f"arXiv:2305.18290; {_HANDBOOK}/smollm2/dpo/config_smol.yaml; docs/learning.md",
        published=False,
    ),
    Recipe(
        "zephyr-gemma-dpo",
        "dpo",
        ("sigmoid",),
        "Zephyr-7B-Gemma",
        "DPO with beta 0.05 on 7k pairs",
        f"{_HANDBOOK}/zephyr-7b-gemma/dpo/config_full.yaml",
    ),
    Recipe(
        "smollm2-dpo",
        "dpo",
        ("sigmoid",),
        "SmolLM2-1.7B",
        "DPO of a small model with beta 0.5",
        f"{_HANDBOOK}/smollm2/dpo/config.yaml",
    ),
    Recipe(
        "smollm3-apo-zero",
        "dpo",
        ("apo_zero",),
        "SmolLM3-3B",
        "APO-zero at a context of 24k tokens",
        f"arXiv:2408.06266; {_HANDBOOK}/smollm3/dpo/apo.yaml",
    ),
    Recipe(
        "tulu3-dpo-norm",
        "dpo",
        ("sigmoid_norm",),
        "Tulu 3 8B",
        "log-ratios per token, beta 5",
        "arXiv:2411.15124; open-instruct, configs/train_configs/tulu3/tulu3_dpo_8b.yaml",
    ),
    Recipe(
        "mpo",
        "dpo",
        ("sigmoid", "bco_pair", "sft"),
        "InternVL2-8B, on text",
        "three losses: preference, quality, generation",
        "arXiv:2411.10442; InternVL, internvl2_8b_internlm2_7b_dynamic_res_mpo_full.sh",
    ),
    Recipe(
        "rpo",
        "dpo",
        ("sigmoid", "sft"),
        "Zephyr-7B-Gemma",
        "DPO held in place by an SFT term",
        "arXiv:2405.16436; Regularized-Preference-Optimization, OpenRLHF/train_rpo.sh",
    ),
    Recipe(
        "zephyr-141b-orpo",
        "orpo",
        ("orpo",),
        "Zephyr-141B-A35B",
        "ORPO from the base model in one stage",
        f"arXiv:2403.07691; {_HANDBOOK}/zephyr-141b-A35b/orpo/config_full.yaml",
    ),
    Recipe(
        "simpo-llama3",
        "cpo",
        ("simpo",),
        "Llama-3-8B-Instruct",
        "SimPO: no reference, a target margin",
        "arXiv:2405.14734; SimPO, training_configs/llama-3-8b-instruct-simpo.yaml",
    ),
    Recipe(
        "kto",
        "kto",
        ("kto",),
        "Qwen1.5-1.8B",
        "KTO on single answers marked good or bad",
        "arXiv:2402.01306; TRL, trl/scripts/kto.py",
    ),
)

RECIPES: dict[str, Recipe] = {row.name: row for row in _ROWS}


def find_recipe(name: str) -> Recipe:
    """Look a recipe up.

    Args:
        name: Its name, with or without ``.yaml``.

    Returns:
        The recipe.

    Raises:
        ConfigError: If there is none of that name.
    """
    wanted = name.removesuffix(".yaml")
    if wanted in RECIPES:
        return RECIPES[wanted]
    close = difflib.get_close_matches(wanted, RECIPES, n=1)
    raise ConfigError(
        "no such recipe",
        where="preftune recipes",
        value=name,
        allowed=", ".join(RECIPES),
        remedy=f"did you mean {close[0]}?" if close else None,
    )


def copy_recipe(name: str, path: str | None = None) -> Path:
    """Write a recipe to a file of one's own.

    Args:
        name: Its name.
        path: File to write, or an existing folder to write it into; by default the current folder.

    Returns:
        The file written.

    Raises:
        ConfigError: If there is no such recipe, the file exists already, or it cannot be written.
    """
    recipe = find_recipe(name)
    target = Path(path or ".").expanduser()
    if target.is_dir():
        target = target / recipe.file_name
    try:
        with target.open("x", encoding="utf-8", newline="\n") as file:
            file.write(recipe.text())
    except FileExistsError as error:
        raise ConfigError(
            "the file exists and is left as it is", where=str(target), remedy="name another path, or remove it first"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot write the file ({error.strerror})", where=str(target)) from error
    return target
