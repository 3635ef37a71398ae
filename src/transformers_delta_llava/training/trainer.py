"""transformers' Trainer with the data order, the checkpoints and the logs that these runs need."""

import os
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from ..modeling import DeltaLlavaForConditionalGeneration
from .checkpoints import load_weights, save_hub_folder
from .dataset import TrainingDataset
from .sampler import StepSampler
from .throughput import COUNTS, Throughput


class _TellEpoch(TrainerCallback):
    """Tells the sampler the epoch: accelerate does not reach it in an epoch that is resumed on several processes."""

    def __init__(self, trainer: "DeltaLlavaTrainer"):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.throughput.start()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(state.epoch or 0))


class DeltaLlavaTrainer(Trainer):
    """
    A `Trainer` for Delta-LLaVA.

    Beyond transformers': steps of one modality and of similar length, with a budget of visual tokens for each
    (`StepSampler`); tokens and images per second and memory in the logs; checkpoints that are Hub folders also under
    FSDP; and a resume that misses no weight.

    Args:
        budgets: visual tokens per image that steps draw from.
        kwargs: of `transformers.Trainer`; `train_dataset` is a `TrainingDataset`, `processing_class` the processor.
    """

    def __init__(self, *args: Any, budgets: tuple[int, ...], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.budgets = budgets
        self.throughput = Throughput()
        self.sampler: StepSampler | None = None
        self.add_callback(_TellEpoch(self))
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

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in transformers, and counts what the batch holds."""
        self.throughput.add({name: inputs.pop(name) for name in COUNTS})
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in transformers, with throughput and memory beside the loss."""
        if "loss" in logs:
            logs.update(self.throughput.report(self.accelerator))
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, but a whole Hub folder under FSDP whatever its state dict type."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        state_dict = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=state_dict)
        return None

    def save_final(self, output_dir: str, dtype: torch.dtype | None) -> None:
        """
        Write the finished model, whole (LoRA merged), in one dtype.

        Args:
            output_dir: the folder.
            dtype: of all weights; by default each stays as it is.
        """
        if self.is_deepspeed_enabled:
            state_dict = self.accelerator.get_state_dict(self.model_wrapped)
        elif self.is_fsdp_enabled:
            state_dict = self.accelerator.get_state_dict(self.model)
        else:
            state_dict = None
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if is_peft(model):
            adapter = os.path.join(output_dir, "adapter")
            model.save_pretrained(adapter, state_dict=state_dict)
            # Gathered from shards, the model in memory is not whole: the adapter is merged into the base as it was.
            model = model.merge_and_unload() if state_dict is None else merge_adapter(model, adapter, dtype)
            state_dict = None
        save_hub_folder(model, state_dict or model.state_dict(), self.processing_class, output_dir, dtype)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if is_peft(model):
            super()._save(output_dir, state_dict=state_dict)
        elif self.args.should_save:
            folder = output_dir or self.args.output_dir
            weights = model.state_dict() if state_dict is None else state_dict
            save_hub_folder(model, weights, self.processing_class, folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        if self.is_fsdp_enabled or is_peft(target):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(target, resume_from_checkpoint)


def merge_adapter(model: Any, adapter: str, dtype: torch.dtype | None) -> nn.Module:
    """The base of a PEFT model, loaded anew on the CPU, with a saved adapter merged into it."""
    from peft import PeftModel

    config = model.get_base_model().config
    base = DeltaLlavaForConditionalGeneration.from_pretrained(
        config.name_or_path, config=config, dtype=dtype or "auto"
    )
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def is_peft(model: Any) -> bool:
    """Whether a model is PEFT's wrapper."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")
