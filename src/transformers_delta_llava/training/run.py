"""A training run, from recipe to finished model."""

import errno
import logging
import shutil
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed

from ..modeling import DeltaLlavaForConditionalGeneration
from ..utils.errors import DataError, DeltaLlavaError, RecipeError, one_line
from .arguments import make_arguments
from .checkpoints import check_resumable, last_checkpoint
from .conversations import ConversationEncoder
from .dataset import Collator, Rows, TrainingDataset, open_rows, record_skipped, some_images
from .frozen_features import FrozenFeatures
from .models import build_model, select_trainable, trains_vision
from .recipe import Recipe, write_yaml
from .trainer import DeltaLlavaTrainer


logger = logging.getLogger(__name__)
SKIPPED_ROWS = "skipped_rows.jsonl"


def train(recipe: Recipe, resume: bool = False) -> Path:
    """
    Run a recipe, under `python`, `torchrun` or `accelerate launch` alike.

    Args:
        recipe: see `load_recipe`.
        resume: resume from the last checkpoint in `arguments.output_dir`, if there is one.

    Returns:
        `arguments.output_dir`, a Hub folder of the finished model (with `recipe.yaml`, `trainer_state.json`,
        `train_results.json` and, if rows were skipped, `skipped_rows.jsonl`).

    Raises:
        RecipeError: the recipe cannot be run, or the run failed.
        DataError: unusable data with `on_error: fail`, or no usable data.
    """
    trainer = make_trainer(recipe, resume)
    arguments = trainer.args
    output_dir = Path(str(arguments.output_dir))
    checkpoint = arguments.resume_from_checkpoint or (last_checkpoint(output_dir) if resume else None)
    if checkpoint:
        check_resumable(checkpoint)
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
        trainer.save_final(str(output_dir), dtype)
        if arguments.should_save:
            write_yaml(recipe.to_dict(), output_dir / "recipe.yaml")
        trainer.save_metrics("train", result.metrics, combined=False)
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()
        return output_dir
    except DeltaLlavaError as error:
        text = str(error)
        if "in DataLoader worker process" in text:  # the worker's traceback, whose last line is its sentence
            raise DataError(text.strip().splitlines()[-1].partition(": ")[2]) from error
        raise
    except Exception as error:
        if sentence := _explain(error, trainer, checkpoint):
            raise RecipeError(sentence) from error
        raise


def _explain(error: Exception, trainer: DeltaLlavaTrainer, checkpoint: str | None) -> str | None:
    """A sentence on an error that a user can solve, or None."""
    output_dir = Path(str(trainer.args.output_dir))
    if _is_disk_full(error, output_dir):
        for folder in output_dir.glob("checkpoint-*"):  # incomplete checkpoints are useless and take space
            if not (folder / "trainer_state.json").is_file() and trainer.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
        last = last_checkpoint(output_dir)
        then = f"then resume from {last} with `resume=True`" if last else "then start again"
        return f"The disk of {output_dir} is full, at step {trainer.state.global_step}: free some space, {then}."
    if isinstance(error, ImportError):
        return f"The run needs something that is not installed: {one_line(error)}."
    if checkpoint and not trainer.started and not isinstance(error, torch.OutOfMemoryError):
        return (
            f"The run cannot resume from {checkpoint} ({type(error).__name__}: {one_line(error)}): it was written with "
            "another recipe, or is damaged; delete that folder to resume from the one before."
        )
    if not trainer.started and isinstance(error, (ValueError, TypeError, LookupError)):
        return f"The run cannot start with these arguments ({type(error).__name__}: {one_line(error)})."
    return None


def _is_disk_full(error: BaseException | None, folder: Path) -> bool:
    """Whether an error means a full disk; safetensors says so only in its text, PyTorch not at all."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left" in str(error) or "os error 28" in str(error):
            return True
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            return shutil.disk_usage(folder).free < 2**20
        error = error.__cause__ or error.__context__
    return False


def make_trainer(recipe: Recipe, resume: bool = False) -> DeltaLlavaTrainer:
    """
    Load model and data of a recipe; the trainer is ready to train.

    Raises:
        RecipeError, DataError: as `train`.
    """
    arguments = make_arguments(recipe.arguments)
    output_dir = Path(str(arguments.output_dir))
    _check_run(arguments, resume)
    set_seed(arguments.seed)
    model, processor = build_model(recipe, arguments)
    with arguments.main_process_first(desc="index of the data"):  # other processes read its cache
        rows = open_rows(recipe.data)
    if arguments.should_save:
        output_dir.mkdir(parents=True, exist_ok=True)
        _record_bad_rows(rows, output_dir / SKIPPED_ROWS, resume)
    encoder = ConversationEncoder(processor, recipe.data.max_length, recipe.data.pad_images)
    dataset = TrainingDataset(rows, encoder, recipe.data.on_error, output_dir / SKIPPED_ROWS)
    if recipe.data.frozen_features is not None:
        FrozenFeatures(model, recipe.data.frozen_features)
    calibrate_new_projector(model, recipe, dataset)
    trained = select_trainable(model, recipe.train, recipe.lora)
    collator = Collator(
        processor.tokenizer.pad_token_id,
        processor.image_token_id,
        encoder.blank_image() if trains_vision(trained) else None,
        min(model.config.visual_token_budgets),
    )
    trainer = DeltaLlavaTrainer(
        model=trained,
        args=arguments,
        data_collator=collator,
        train_dataset=dataset,
        processing_class=processor,
        budgets=recipe.budgets,
        projector_lr=recipe.projector_lr,
    )
    if recipe.model.quantization_config is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise RecipeError("model.quantization_config: run QLoRA under torchrun, without FSDP and DeepSpeed.")
    return trainer


def calibrate_new_projector(
    model: DeltaLlavaForConditionalGeneration, recipe: Recipe, dataset: TrainingDataset
) -> None:
    """Make visual tokens resemble text where the recipe joins two parts by a new projector, on images of its data."""
    if recipe.model.language is not None and (images := some_images(dataset, recipe.budgets[0])) is not None:
        model.calibrate_projector(images.to(model.device))


def _check_run(arguments: TrainingArguments, resume: bool) -> None:
    output_dir = str(arguments.output_dir)
    if arguments.n_gpu > 1:
        raise RecipeError(
            f"This process sees {arguments.n_gpu} GPUs: launch one process for each (torchrun --nproc_per_node "
            f"{arguments.n_gpu} -m transformers_delta_llava train ...), or set CUDA_VISIBLE_DEVICES=0."
        )
    if last_checkpoint(output_dir) and not resume and not arguments.resume_from_checkpoint:
        raise RecipeError(
            f"arguments.output_dir={output_dir} holds checkpoints of an earlier run: resume it with `resume=True`, or "
            "choose another folder."
        )


def _record_bad_rows(rows: Rows, record: Path, resume: bool) -> None:
    if not (resume and record.is_file()):
        record.unlink(missing_ok=True)
        record_skipped(record, rows.index.bad)
    if rows.index.bad:
        logger.warning("%d rows cannot be used and are left out; they are listed in %s.", len(rows.index.bad), record)
