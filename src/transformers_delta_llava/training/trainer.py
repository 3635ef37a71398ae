"""A `Trainer` for Delta-LLaVA: its order of rows, learning rates, log entries and checkpoints."""

import math
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from ..utils.errors import RecipeError
from .checkpoints import is_peft, load_weights, merge_adapter, replace_files, save_hub_folder
from .conversations import IGNORED
from .dataset import TrainingDataset
from .metrics import COUNTS, Throughput, VisualTokenLog
from .models import PATTERNS, trained_names
from .sampler import StepSampler


class SetEpochCallback(TrainerCallback):
    """Sets the sampler's epoch, which accelerate does not when an epoch is resumed on several processes; notes the start."""

    def __init__(self, trainer: "DeltaLlavaTrainer"):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.throughput.start()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.started = True


class DeltaLlavaTrainer(Trainer):
    """
    A `Trainer` for Delta-LLaVA.

    It adds: steps of one modality and similar length, each with its budget of visual tokens (`StepSampler`); throughput
    and memory in the log; checkpoints that are Hub folders, under FSDP too; and resuming that fails if a weight is
    missing.

    Args:
        budgets: numbers of visual tokens per image that steps draw from.
        projector_lr: learning rate of the projector; by default that of the other parts.
        kwargs: arguments of `transformers.Trainer`; `train_dataset` is a `TrainingDataset`, `processing_class` the
            processor.
    """

    def __init__(self, *args: Any, budgets: tuple[int, ...], projector_lr: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            # The Trainer's own smoothing depends on the class name, which FSDP and torch.compile change.
            self.compute_loss_func = partial(smoothed_loss, factor=self.args.label_smoothing_factor)
        self.budgets, self.projector_lr = budgets, projector_lr
        self.started = False  # whether a step was run, so that a checkpoint to resume from was read
        self.throughput = Throughput()
        self.visual_tokens = VisualTokenLog(self.model)
        self.sampler: StepSampler | None = None
        self.add_callback(SetEpochCallback(self))
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
            # transformers' list has classes that a tower without its text model lacks, which accelerate refuses.
            present = {type(module).__name__ for module in self.model.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(present & set(self.model._no_split_modules))

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        assert isinstance(dataset, TrainingDataset)
        index = dataset.rows.index
        args = self.args
        step_rows = args.train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
        seed = args.seed if args.data_seed is None else args.data_seed
        self.sampler = StepSampler(
            index.lengths, index.images, step_rows, self.budgets, seed, str(args.train_sampling_strategy)
        )
        return self.sampler

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in transformers, with separate parameter groups for the projector if it has its own learning rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.projector_lr is None:
            return optimizer
        if not getattr(optimizer, "param_groups", None):
            raise RecipeError("projector_lr: this optimizer has no parameter groups; use one of PyTorch's.")
        model = args[0] if args and args[0] is not None else self.model
        projector = {id(p) for name, p in model.named_parameters() if PATTERNS["projector"].search(name)}
        optimizer.param_groups = [
            {**group, "params": params, "lr": lr}
            for group in optimizer.param_groups
            for lr, is_projector in ((group["lr"], False), (self.projector_lr, True))
            if (params := [p for p in group["params"] if (id(p) in projector) == is_projector])
        ]
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in transformers; counts what the batch holds, and computes logits only where a label needs them."""
        counts = {name: inputs.pop(name) for name in COUNTS}
        self.throughput.add(counts)
        self.visual_tokens.shows_images = counts["num_images"] > 0
        if not self.args.label_smoothing_factor:  # that needs logits and labels of one length
            inputs.update(keep_labelled_logits(inputs["labels"]))
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in transformers, with throughput and memory."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                self.check_finite()
            logs.update({**self.throughput.report(self.accelerator), **self.visual_tokens.report()})
        super().log(logs, *args, **kwargs)

    def check_finite(self) -> None:
        """
        Refuse to continue with, or save, trained weights that are nan or inf.

        Raises:
            RecipeError: on all processes, if one of them has such a weight.
        """
        names = trained_names(self.model)
        weights = [self.model.get_parameter(name).detach() for name in names]
        # Under FSDP each process checks its own shard.
        finite = [(w.to_local() if hasattr(w, "to_local") else w).isfinite().all() for w in weights]
        bad = torch.stack(finite).logical_not().to(self.accelerator.device, torch.float32)
        bad = self.accelerator.reduce(bad, "sum").nonzero().flatten().tolist()
        if bad:
            raise RecipeError(
                f"At step {self.state.global_step} {len(bad)} of {len(names)} trained tensors hold values that are not "
                f"finite numbers (first {names[bad[0]]}): the run has diverged, and is not saved. Lower "
                "arguments.learning_rate or raise arguments.warmup_steps, and begin anew or from an earlier checkpoint."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, but under FSDP always a complete Hub folder, whatever the type of its state dict."""
        self.check_finite()
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        state_dict = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=state_dict)
        return None

    def save_final(self, output_dir: str, dtype: torch.dtype | None) -> None:
        """
        Write the finished model (LoRA merged) in one dtype; replaces the files of an earlier run.

        Args:
            output_dir: the folder.
            dtype: dtype of all weights; by default each keeps its own.

        Raises:
            RecipeError: the weights are not finite.
        """
        self.check_finite()
        if self.is_deepspeed_enabled:
            state_dict = self.accelerator.get_state_dict(self.model_wrapped)
        elif self.is_fsdp_enabled:
            state_dict = self.accelerator.get_state_dict(self.model)
        else:
            state_dict = None
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=output_dir) as folder:
            if is_peft(model):
                adapter = os.path.join(folder, "adapter")
                model.save_pretrained(adapter, state_dict=state_dict)
                if state_dict is None and not getattr(model, "is_quantized", False):
                    model = model.merge_and_unload()
                else:  # gathered from shards, or quantized: merge the adapter into the original base model
                    model, state_dict = merge_adapter(model, adapter, dtype), None
            save_hub_folder(model, state_dict or model.state_dict(), self.processing_class, folder, dtype)
            replace_files(Path(folder), Path(output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Without the arguments, which transformers would pickle: they may contain a token.
        if not self.args.should_save:
            return
        folder = output_dir or str(self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if is_peft(model):
            model.save_pretrained(folder, state_dict=state_dict)
            self.processing_class.save_pretrained(folder)
        else:
            weights = model.state_dict() if state_dict is None else state_dict
            save_hub_folder(model, weights, self.processing_class, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if self.is_fsdp_enabled or is_peft(target):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(target, resume_from_checkpoint)


def shift(labels: torch.Tensor) -> torch.Tensor:
    """(rows, tokens): at each position the label of the next token, which its logits predict."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def keep_labelled_logits(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Arguments of `forward` that leave out the logits of positions where no row of the batch has a label.

    Most tokens of an image and a question have none, and a logit of each word of the vocabulary is dear.

    Args:
        labels: (rows, tokens), -100 where there is no loss.

    Returns:
        `logits_to_keep` (kept,), at least one position, and `shift_labels` (rows, kept).
    """
    shifted = shift(labels)
    kept = (shifted != IGNORED).any(0).nonzero().flatten()
    if not len(kept):
        kept = kept.new_zeros(1)
    return {"logits_to_keep": kept, "shift_labels": shifted[:, kept].contiguous()}


def smoothed_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, factor: float = 0.1
) -> torch.Tensor:
    """
    The model's loss, with smoothed labels.

    Args:
        outputs: has `logits` (rows, tokens, vocabulary).
        labels: (rows, tokens), -100 where there is no loss.
        num_items_in_batch: divides the sum; by default the number of labels.
        factor: part of the target that is spread over the vocabulary; with 0 this is the model's own loss.
    """
    targets = shift(labels).to(outputs.logits.device)
    total = F.cross_entropy(
        outputs.logits.float().flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=factor
    )
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)
