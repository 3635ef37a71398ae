"""A training run, from recipe to finished model."""

import errno
import logging
import shutil
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed

from ..utils.errors import DataError, DeltaLlavaError, RecipeError, one_line
from .conversations import ConversationEncoder
from .dataset import Collator, Rows, TrainingDataset, open_rows, record_skipped
from .models import build_model, select_trainable, trains_vision
from .recipe import Recipe, make_arguments, write_yaml
from .trainer import DeltaLlavaTrainer, check_resumable, last_checkpoint


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
    if checkpoint:
        check_resumable(checkpoint)
    try:
        return _run(recipe, trainer, checkpoint)
    except DeltaLlavaError as error:
        if "in DataLoader worker process" in str(
            error
        ):  # the text is the worker's traceback, and ends in the sentence
            raise DataError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error
        raise
    except Exception as error:
        if sentence := _explain(error, trainer, checkpoint):
            raise RecipeError(sentence) from error
        raise


def _run(recipe: Recipe, trainer: DeltaLlavaTrainer, checkpoint: str | None) -> Path:
    arguments = trainer.args
    output_dir = Path(str(arguments.output_dir))
    result = trainer.train(resume_from_checkpoint=checkpoint)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    trainer.save_final(str(output_dir), dtype)
    if arguments.should_save:
        write_yaml(recipe.to_dict(), output_dir / "recipe.yaml")
    trainer.save_metrics("train", result.metrics, combined=False)
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    return output_dir


def _explain(error: Exception, trainer: DeltaLlavaTrainer, checkpoint: str | None) -> str | None:
    """What a user can do about an error of a run, or None if it is not theirs."""
    output_dir = Path(str(trainer.args.output_dir))
    if _is_disk_full(error, output_dir):
        for folder in output_dir.glob("checkpoint-*"):  # cut off: it is of no use, and takes space
            if not (folder / "trainer_state.json").is_file() and trainer.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
        last = last_checkpoint(output_dir)
        then = f"then go on from {last} with --resume" if last else "then begin anew"
        return f"The disk of {output_dir} is full, at step {trainer.state.global_step}: free some space, {then}."
    if isinstance(error, ImportError):
        return f"The run needs something that is not installed: {one_line(error)}."
    if checkpoint and not trainer.began and not isinstance(error, torch.OutOfMemoryError):
        return (
            f"The run cannot go on from {checkpoint} ({type(error).__name__}: {one_line(error)}): it was written with "
            "another recipe, or is damaged; without that folder --resume goes on from the one before."
        )
    if not trainer.began and isinstance(error, (ValueError, TypeError, LookupError)):
        return f"The run cannot begin with these arguments ({type(error).__name__}: {one_line(error)})."
    return None


def _is_disk_full(error: BaseException | None, folder: Path) -> bool:
    """Whether writing failed for want of space; safetensors and PyTorch tell by text alone, or not at all."""
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
    Everything that a run needs, ready to train; see `train`.

    Raises:
        RecipeError, DataError: as `train`.
    """
    arguments = make_arguments(recipe.arguments)
    output_dir = Path(str(arguments.output_dir))
    _check_run(arguments, resume)
    set_seed(arguments.seed)
    model, processor = build_model(recipe, arguments)
    with arguments.main_process_first(desc="index of the data"):  # the others read its cache
        rows = open_rows(recipe.data)
    if arguments.should_save:
        output_dir.mkdir(parents=True, exist_ok=True)
        _record_left_out(rows, output_dir / SKIPPED_ROWS, resume)
    encoder = ConversationEncoder(processor, recipe.data.max_length, recipe.data.pad_images)
    dataset = TrainingDataset(rows, encoder, recipe.data.on_error, output_dir / SKIPPED_ROWS)
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


def _check_run(arguments: TrainingArguments, resume: bool) -> None:
    output_dir = str(arguments.output_dir)
    if arguments.n_gpu > 1:
        raise RecipeError(
            f"This process sees {arguments.n_gpu} GPUs: launch one process for each (torchrun --nproc_per_node "
            f"{arguments.n_gpu} -m transformers_delta_llava train ...), or set CUDA_VISIBLE_DEVICES=0."
        )
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
