"""Training on transformers' Trainer: recipes, data in LLaVA's format, and what makes a run resumable."""

from .errors import DataError, RecipeError
from .recipe import DataRecipe, ModelRecipe, Recipe, load_recipe, make_recipe


__all__ = ["DataError", "DataRecipe", "ModelRecipe", "Recipe", "RecipeError", "load_recipe", "make_recipe"]
