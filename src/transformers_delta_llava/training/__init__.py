"""Training with transformers' Trainer: recipes, data in LLaVA's format, runs that can be resumed."""

from .recipe import DataRecipe, ModelRecipe, Recipe, load_recipe, make_recipe
from .train import make_trainer, run_trainer, train


__all__ = [
    "DataRecipe",
    "ModelRecipe",
    "Recipe",
    "load_recipe",
    "make_recipe",
    "make_trainer",
    "run_trainer",
    "train",
]
