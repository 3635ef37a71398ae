"""Training with transformers' Trainer: recipes, data in LLaVA's format, runs that can be resumed."""

from ..utils.errors import DataError, RecipeError
from .recipe import DataRecipe, ModelRecipe, Recipe, load_recipe, make_recipe
from .run import train


__all__ = ["DataError", "DataRecipe", "ModelRecipe", "Recipe", "RecipeError", "load_recipe", "make_recipe", "train"]
