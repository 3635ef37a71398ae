"""A training run, from recipe to finished model."""

import logging
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed

from .arguments import make_arguments
from .checkpoints import last_checkpoint
from .collator import Collator
from .data import Rows, open_rows
from .dataset import TrainingDataset, record_skipped
from .encoding import ConversationEncoder
from .errors import RecipeError
from .models import build_model
from .recipe import Recipe
from .trainable import select_trainable, trains_vision
from .trainer import DeltaLlavaTrainer
from .yaml_files import write_yaml


logger = logging.getLogger(__name__)
SKIPPED_ROWS = "skipped_rows.jsonl"


def train(recipe: Recipe, resume: bool = False) -> Path:
    """
    Train what a recipe says, under `python`, `torchrun` or `accelerate launch` alike.

    Args:
        recipe: of `load_recipe`.
        resume: go on from the last checkpoint in `arguments.output_dir`, if there is one.

    Returns:
        `arguments.output_dir`, now a Hub folder of the finished model (with `recipe.yaml`, `trainer_state.json`,
        `train_results.json` and, where rows were skipped, `skipped_rows.jsonl`).

    Raises:
        RecipeError: something in the recipe does not work.
        DataError: data that cannot be used, where the recipe says so.
    """
    trainer = make_trainer(recipe, resume)
    arguments = trainer.args
    output_dir = Path(str(arguments.output_dir))
    checkpoint = arguments.resume_from_checkpoint or (last_checkpoint(output_dir) if resume else None)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    trainer.save_final(str(output_dir), dtype)
    if arguments.should_save:
        write_yaml(recipe.to_dict(), output_dir / "recipe.yaml")
    trainer.save_metrics("train", result.metrics, combined=False)
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    return output_dir


def make_trainer(recipe: Recipe, resume: bool = False) -> DeltaLlavaTrainer:
    """
    Everything that a run needs, ready to train; see `train`.

    Raises:
        RecipeError, DataError: as `train`.
    """
    arguments = make_arguments(recipe.arguments)
    output_dir = Path(str(arguments.output_dir))
    _check_run(recipe, arguments, resume)
    set_seed(arguments.seed)
    model, processor = build_model(recipe, arguments)
    with arguments.main_process_first(desc="index of the data"):  # the others read its cache
        rows = open_rows(recipe.data)
    if arguments.should_save:
        output_dir.mkdir(parents=True, exist_ok=True)
        _record_left_out(rows, output_dir / SKIPPED_ROWS, resume)
    encoder = ConversationEncoder(processor, recipe.data.max_length, recipe.data.pad_images)
    dataset = TrainingDataset(rows, encoder, recipe.data.on_error, output_dir / SKIPPED_ROWS)
    collator = Collator(
        processor.tokenizer.pad_token_id,
        processor.image_token_id,
        encoder.blank_image() if trains_vision(recipe.train) else None,
        min(model.config.visual_token_budgets),
    )
    trained = select_trainable(model, recipe.train, recipe.lora)
    return DeltaLlavaTrainer(
        model=trained,
        args=arguments,
        data_collator=collator,
        train_dataset=dataset,
        processing_class=processor,
        budgets=recipe.budgets,
    )


def _check_run(recipe: Recipe, arguments: TrainingArguments, resume: bool) -> None:
    output_dir = str(arguments.output_dir)
    if arguments.n_gpu > 1:
        raise RecipeError(
            f"This process sees {arguments.n_gpu} GPUs: launch one process for each (torchrun --nproc_per_node "
            f"{arguments.n_gpu} -m transformers_delta_llava train ...), or set CUDA_VISIBLE_DEVICES=0."
        )
    if "lora" in recipe.train and recipe.model.path is None:
        raise RecipeError("train names lora, which adapts a Delta-LLaVA that exists: name it as model.path.")
    if last_checkpoint(output_dir) and not resume and not arguments.resume_from_checkpoint:
        raise RecipeError(
            f"arguments.output_dir={output_dir} holds checkpoints of an earlier run: go on with --resume, or name "
            "another folder."
        )


def _record_left_out(rows: Rows, record: Path, resume: bool) -> None:
    if not (resume and record.is_file()):
        record.unlink(missing_ok=True)
        record_skipped(record, rows.index.bad)
    if rows.index.bad:
        logger.warning("%d rows cannot be used and are left out; %s names them.", len(rows.index.bad), record)
