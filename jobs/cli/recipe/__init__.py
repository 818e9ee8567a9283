"""Recipes of SparseML and llm-compressor: read into options of a command, and written back."""

from jobs.cli.recipe.read import Recipe, read_recipe, with_recipe
from jobs.cli.recipe.write import NAME, recipe_text

__all__ = ["NAME", "Recipe", "read_recipe", "recipe_text", "with_recipe"]
