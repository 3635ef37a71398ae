"""transformers' Trainer with the data order, the checkpoints and the logs that these runs need."""

import copy
import math
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from ..modeling import DeltaLlavaForConditionalGeneration
from .checkpoints import load_weights, save_hub_folder
from .dataset import TrainingDataset
from .encoding import IGNORED
from .errors import RecipeError
from .sampler import StepSampler
from .throughput import COUNTS, Throughput
from .trainable import PATTERNS, trained_names


class _Watch(TrainerCallback):
    """Tells the sampler the epoch: accelerate does not reach it in an epoch that is resumed on several processes."""

    def __init__(self, trainer: "DeltaLlavaTrainer"):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.throughput.start()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.began = True


class DeltaLlavaTrainer(Trainer):
    """
    A `Trainer` for Delta-LLaVA.

    Beyond transformers': steps of one modality and of similar length, with a budget of visual tokens for each
    (`StepSampler`); tokens and images per second and memory in the logs; checkpoints that are Hub folders also under
    FSDP; and a resume that misses no weight.

    Args:
        budgets: visual tokens per image that steps draw from.
        projector_lr: learning rate of the projector, where it is not that of the rest.
        kwargs: of `transformers.Trainer`; `train_dataset` is a `TrainingDataset`, `processing_class` the processor.
    """

    def __init__(self, *args: Any, budgets: tuple[int, ...], projector_lr: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            # The Trainer's own smoothing knows classes by name, which FSDP and torch.compile change.
            self.compute_loss_func = partial(smoothed_loss, factor=self.args.label_smoothing_factor)
        self.budgets, self.projector_lr = budgets, projector_lr
        self.began = False  # whether a step has, so that what a checkpoint holds has been read
        self.throughput = Throughput()
        self.sampler: StepSampler | None = None
        self.add_callback(_Watch(self))
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
            # transformers' own list names parts that a tower without its text model does not have; accelerate stops there.
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
        """As in transformers, with the projector's parameters in groups of their own where it has its own rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.projector_lr is None:
            return optimizer
        if not getattr(optimizer, "param_groups", None):
            raise RecipeError("projector_lr: this optimizer has no groups of parameters; use one of PyTorch's.")
        model = args[0] if args and args[0] is not None else self.model
        projector = {id(p) for name, p in model.named_parameters() if PATTERNS["projector"].search(name)}
        optimizer.param_groups = [
            {**group, "params": params, **({"lr": self.projector_lr} if own else {})}
            for group in optimizer.param_groups
            for own in (False, True)
            if (params := [p for p in group["params"] if (id(p) in projector) == own])
        ]
        return optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in transformers, and counts what the batch holds."""
        self.throughput.add({name: inputs.pop(name) for name in COUNTS})
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in transformers, with throughput and memory beside the loss."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                self.check_finite()
            logs.update(self.throughput.report(self.accelerator))
        super().log(logs, *args, **kwargs)

    def check_finite(self) -> None:
        """
        Refuse to go on with, or to save, weights that are not numbers.

        Raises:
            RecipeError: on all processes, if one of them has such a weight among those that are trained.
        """
        names = trained_names(self.model)
        weights = [self.model.get_parameter(name).detach() for name in names]
        # Under FSDP each process looks at its own part.
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
        """As in transformers, but a whole Hub folder under FSDP whatever its state dict type."""
        self.check_finite()
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        state_dict = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=state_dict)
        return None

    def save_final(self, output_dir: str, dtype: torch.dtype | None) -> None:
        """
        Write the finished model, whole (LoRA merged), in one dtype, in place of what an earlier run wrote there.

        Args:
            output_dir: the folder.
            dtype: of all weights; by default each stays as it is.

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
                else:  # gathered from shards, or quantized: the adapter is merged into the base as it was
                    model, state_dict = merge_adapter(model, adapter, dtype), None
            save_hub_folder(model, state_dict or model.state_dict(), self.processing_class, folder, dtype)
            _replace_files(Path(folder), Path(output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Not the arguments, which transformers would pickle beside it: they may hold a token.
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


def merge_adapter(model: Any, adapter: str, dtype: torch.dtype | None) -> nn.Module:
    """The base of a PEFT model, loaded anew on the CPU, not quantized, with a saved adapter merged into it."""
    from peft import PeftModel

    config = copy.deepcopy(model.get_base_model().config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    base = DeltaLlavaForConditionalGeneration.from_pretrained(
        config.name_or_path, config=config, dtype=dtype or "auto"
    )
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def smoothed_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, factor: float = 0.1
) -> torch.Tensor:
    """
    The model's own loss, with smoothed labels.

    Args:
        outputs: with `logits` (rows, tokens, vocabulary).
        labels: (rows, tokens), -100 where there is no loss.
        num_items_in_batch: labels that the sum is divided by; by default those of `labels`.
        factor: share of the target that is spread over the vocabulary; with 0 this is the model's own loss.
    """
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].to(outputs.logits.device)
    total = F.cross_entropy(
        outputs.logits.float().flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=factor
    )
    count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)


def _replace_files(source: Path, target: Path) -> None:
    """Move what is in one folder into another, in place of files of the same name and of its weights."""
    for stale in target.glob("model*.safetensors*"):
        stale.unlink()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        path.replace(target / path.name)


def is_peft(model: Any) -> bool:
    """Whether a model is PEFT's wrapper."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")
