"""Stage 2 of delta-llava-160m, with the frozen tower's features kept on disk.

python -m examples.smol.finetune [--features smol-features] [--resume] [--set arguments.max_steps=10 ...]
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from examples.smol.frozen_features import FrozenFeatures
from transformers_delta_llava.training import Recipe, load_recipe, make_trainer, run_trainer


RECIPE = Path(__file__).with_name("finetune.yaml")


def finetune(recipe: Recipe, features: str | Path | None = None, resume: bool = False) -> Path:
    """Train the recipe; `features` is the folder that keeps what the tower computes of each image."""
    trainer = make_trainer(recipe, resume)
    if features is not None:
        model = trainer.model
        FrozenFeatures(model.get_base_model() if hasattr(model, "get_base_model") else model, features)
    return run_trainer(trainer, recipe, resume)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the folder."""
    parser = argparse.ArgumentParser(description="Train stage 2 with kept features.")
    parser.add_argument("--features", default="smol-features")
    parser.add_argument("--set", action="append", default=[], dest="changes")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(finetune(load_recipe(RECIPE, options.changes), options.features, options.resume))


if __name__ == "__main__":
    main()
