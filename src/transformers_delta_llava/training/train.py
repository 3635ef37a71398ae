"""A training run, from recipe to finished model."""

import logging
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed

from .. import __version__
from ..errors import REPORT_FILE, DeltaLlavaError, read_optional_json
from ..hub import ModelCard, hub_id_of, public_name
from ..modeling import DeltaLlavaForConditionalGeneration
from .data import Collator, ConversationEncoder, TrainingDataset, open_rows, record_skipped, some_images
from .model import build_model, packs_for_flash, select_trainable, trains_vision
from .recipe import Recipe, write_yaml
from .trainer import DeltaLlavaTrainer, check_order, check_resumable, describe_loss, last_checkpoint, place_result


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
        DeltaLlavaError: unusable rows with `on_error: fail`, a run that diverged or was told to stop, or a checkpoint that
            cannot be resumed.
    """
    return run_trainer(make_trainer(recipe, resume), recipe, resume)


def run_trainer(trainer: DeltaLlavaTrainer, recipe: Recipe, resume: bool = False) -> Path:
    """The second half of `train`: run what `make_trainer` returned, and write the finished model."""
    arguments = trainer.args
    output_dir = Path(str(arguments.output_dir))
    checkpoint = arguments.resume_from_checkpoint or (last_checkpoint(output_dir) if resume else None)
    if checkpoint:
        check_resumable(checkpoint)
        check_order(checkpoint, trainer.data_order())
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        last = last_checkpoint(output_dir)
        logger.warning("interrupted at step %d; %s", trainer.state.global_step, _how_to_go_on(last))
        raise
    if trainer.state.global_step < trainer.state.max_steps:
        raise DeltaLlavaError(
            f"the run was stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, so there is no finished "
            f"model; {_how_to_go_on(last_checkpoint(output_dir))}"
        )
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    trainer.save_final(output_dir, dtype, write_card(recipe, trainer))
    if arguments.should_save:
        write_yaml(recipe.to_dict(), output_dir / "recipe.yaml")
    trainer.save_metrics("train", result.metrics, combined=False)
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    logger.info("%s; the model is in %s", describe_loss(trainer.state.log_history), output_dir)
    return output_dir


def write_card(recipe: Recipe, trainer: DeltaLlavaTrainer) -> str:
    """The model card of a run: what was trained from what, on which data. It has no paths of this machine."""
    model, arguments = recipe.model, trainer.args
    source = Path(model.path or "")
    noted = read_optional_json(source / REPORT_FILE) if model.path else {}
    parts = (model.path, model.language, model.vision)
    base_models = [name for part in parts if (name := hub_id_of(part, source)) is not None]
    config = trainer.accelerator.unwrap_model(trainer.model).config
    vision = public_name(model.vision) if model.vision else noted.get("vision_tower", {}).get("name")
    data = public_name(str(recipe.data.path or recipe.data.dataset))
    rows_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    training = (
        f"It was trained with transformers-delta-llava {__version__} from {public_name(model.path or 'random weights')}"
        if model.path or model.language is None
        else f"It was trained with transformers-delta-llava {__version__}"
    )
    numbers = ", ".join(map(str, recipe.budgets or (config.num_visual_tokens,)))
    return ModelCard(
        name=Path(str(arguments.output_dir)).name,
        config=config,
        vision_tower=vision or config.vision_config.model_type,
        base_models=base_models or noted.get("base_models", []),
        training=(
            f"{training}: {', '.join(recipe.train)}, on {len(trainer.train_dataset):,} rows of {data}.",
            f"{trainer.state.global_step:,} steps of {rows_per_step} rows, learning rate {arguments.learning_rate:g}, "
            f"{numbers} visual tokens per image, seed {arguments.seed}.",
        ),
    ).render()


def _how_to_go_on(checkpoint: str | None) -> str:
    return f"resume=True goes on from {checkpoint}" if checkpoint else "there is no checkpoint to resume from"


def make_trainer(recipe: Recipe, resume: bool = False) -> DeltaLlavaTrainer:
    """
    Load model and data of a recipe; the trainer is ready to train.

    Raises:
        DeltaLlavaError: unusable rows with `on_error: fail`, or checkpoints of another run in the output folder.
    """
    arguments = recipe.training_arguments()
    output_dir = Path(str(arguments.output_dir))
    _check_run(arguments, resume)
    set_seed(arguments.seed)
    model, processor = build_model(recipe, arguments)
    budgets = recipe.budgets or (model.config.num_visual_tokens,)
    rows = open_rows(recipe.data)
    record = output_dir / SKIPPED_ROWS
    if arguments.should_save:
        output_dir.mkdir(parents=True, exist_ok=True)
        place_result(output_dir)
        if not (resume and record.is_file()):
            record.unlink(missing_ok=True)
            record_skipped(record, rows.bad)
    if rows.bad:
        logger.warning("%d rows cannot be used and are left out; they are listed in %s", len(rows.bad), record)
    data = recipe.data
    encoder = ConversationEncoder(processor, data.max_length, data.pad_images, data.max_tiles, data.num_frames)
    dataset = TrainingDataset(rows, encoder, recipe.data.on_error, record, budgets[0])
    held_out = None
    if recipe.data.eval_path is not None:
        held_out = TrainingDataset(open_rows(recipe.data, recipe.data.eval_path), encoder, budget=budgets[0])
    calibrate_new_projector(model, recipe, dataset)
    trained = select_trainable(model, recipe.train, recipe.lora)
    collator = Collator(
        processor.tokenizer.pad_token_id,
        processor.image_token_id,
        encoder.blank_image() if trains_vision(trained) else None,
        min(model.config.visual_token_budgets),
        recipe.data.max_length if recipe.pack else 0,
        recipe.pack and packs_for_flash(model),
    )
    return DeltaLlavaTrainer(
        model=trained,
        args=arguments,
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=held_out,
        processing_class=processor,
        budgets=budgets,
        projector_lr=recipe.projector_lr,
    )


def calibrate_new_projector(
    model: DeltaLlavaForConditionalGeneration, recipe: Recipe, dataset: TrainingDataset
) -> None:
    """Make visual tokens resemble text where the recipe joins two parts by a new projector, on images of its data."""
    if recipe.model.language is not None and (images := some_images(dataset, dataset.budget)) is not None:
        model.calibrate_projector(images.to(model.device))


def _check_run(arguments: TrainingArguments, resume: bool) -> None:
    output_dir = str(arguments.output_dir)
    if arguments.n_gpu > 1:
        raise DeltaLlavaError(
            f"this process sees {arguments.n_gpu} GPUs; start one process for each: torchrun --nproc_per_node "
            f"{arguments.n_gpu} -m transformers_delta_llava train ..."
        )
    if last_checkpoint(output_dir) and not resume and not arguments.resume_from_checkpoint:
        raise DeltaLlavaError(
            f"arguments.output_dir={output_dir} holds checkpoints of an earlier run; resume it with resume=True, or choose "
            "another folder"
        )
