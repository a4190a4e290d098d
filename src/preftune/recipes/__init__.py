"""Published recipes that ship with preftune: YAML files, and the table that says which verb runs each."""

from __future__ import annotations

from preftune.recipes.catalogue import RECIPES, Recipe, copy_recipe, find_recipe

__all__ = ["RECIPES", "Recipe", "copy_recipe", "find_recipe"]
