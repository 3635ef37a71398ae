"""The Trainer of Delta-LLaVA: checkpoints that save what is trained, and the log's throughput."""

import copy
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from ..modeling import DeltaLlavaForConditionalGeneration
from ..utils.errors import RecipeError
from .conversations import IGNORED
from .dataset import TrainingDataset
from .models import PATTERNS, trained_names
from .sampler import StepSampler


COUNTS = ("num_tokens", "num_images", "num_skipped")


class Throughput:
    """Counts what goes through a model, between one report and the next, on all processes together."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(COUNTS, 0)
        self._start = time.perf_counter()
        self.total_skipped = 0

    def start(self) -> None:
        """Begin to count time."""
        self._start = time.perf_counter()

    def add(self, counts: dict[str, int]) -> None:
        """Add a batch's counts."""
        for name in COUNTS:
            self._counts[name] += counts[name]

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """Rates since the last report, and the most memory taken on any process so far, in GiB."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        counts = torch.tensor(list(self._counts.values()), dtype=torch.float32, device=accelerator.device)
        memory = torch.tensor([peak_memory(accelerator.device)], device=accelerator.device)
        tokens, images, skipped = accelerator.reduce(counts, "sum").tolist()
        self.total_skipped += int(skipped)
        rates = {
            "tokens_per_second": round(tokens / seconds, 1),
            "images_per_second": round(images / seconds, 2),
            "memory_gib": round(accelerator.gather(memory).max().item() / 2**30, 3),
        }
        if self.total_skipped:
            rates["rows_skipped"] = self.total_skipped
        self._reset()
        return rates

    def _reset(self) -> None:
        self._counts = dict.fromkeys(COUNTS, 0)
        self._start = time.perf_counter()


def peak_memory(device: torch.device) -> float:
    """Most bytes taken so far: of the GPU's memory, or else of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def save_hub_folder(
    model: Any,
    state_dict: dict[str, torch.Tensor],
    processor: Any,
    folder: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """
    Write config, code, weights and processor.

    Args:
        model: for its config and generation config; a wrapper around it (DDP, FSDP) does not matter.
        state_dict: the weights, whole.
        processor: a `DeltaLlavaProcessor`.
        folder: is made where it does not exist.
        dtype: of all weights; by default each stays as it is.
    """
    if dtype is not None:
        state_dict = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state_dict.items()}
    config = model.config
    for head, embeddings in DeltaLlavaForConditionalGeneration._tied_weights_keys.items():
        one, other = state_dict.get(head), state_dict.get(embeddings)
        tied = config.text_config.tie_word_embeddings or config.tie_word_embeddings
        if tied and one is not None and other is not None and not torch.equal(one, other):
            # One of the two was trained alone, by LoRA's `modules_to_save`; tied, the other would replace it.
            config = copy.deepcopy(config)
            config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    # An empty model of the plain class: FSDP and PEFT change the class, and so what save_pretrained writes.
    with torch.device("meta"):
        shell = DeltaLlavaForConditionalGeneration(config)
    shell.to(dtype or torch.float32)
    shell.generation_config = model.generation_config
    shell.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """
    Put a checkpoint's weights into a model, each in the model's own dtype; all of them must be there.

    transformers' Trainer would leave out what has another name in memory than in the file (the vision tower).

    Raises:
        RecipeError: a weight is missing, or too many are there.
    """
    targets = dict(model.state_dict())
    # Tied weights are stored once; the other name stays as it is, because it is the same tensor.
    missing = {name: tensor.data_ptr() for name, tensor in targets.items()}
    for stored, tensor in _read(Path(folder)):
        name = stored if stored in targets else stored.replace(".vision_tower.vision_model.", ".vision_tower.")
        if name not in targets:
            raise RecipeError(f"{folder} holds {stored}, which this model does not have: resume with the same recipe.")
        if targets[name].shape != tensor.shape:
            raise RecipeError(
                f"{folder}: {stored} is {tuple(tensor.shape)}, this model's {tuple(targets[name].shape)}."
            )
        targets[name].copy_(tensor)
        place = targets[name].data_ptr()
        missing = {other: address for other, address in missing.items() if address != place}
    if missing:
        raise RecipeError(f"{folder} holds no {next(iter(missing))}: the checkpoint is not whole.")


def _read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    for file in files:
        with safe_open(folder / file, framework="pt") as weights:
            for name in weights.keys():
                yield name, weights.get_tensor(name)


def check_resumable(folder: str | Path) -> None:
    """
    Refuse a checkpoint that transformers would go on from with a new optimizer, schedule or random numbers.

    Raises:
        RecipeError: it lacks one of them.
    """
    folder = Path(folder)
    parts = {  # written by transformers, accelerate's FSDP, DeepSpeed
        "trainer's state": ("trainer_state.json",),
        "optimizer's state": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
        "schedule": ("scheduler.pt", "global_step*"),
        "random numbers": ("rng_state*.pth",),
    }
    for part, patterns in parts.items():
        if not any(True for pattern in patterns for _ in folder.glob(pattern)):
            raise RecipeError(
                f"{folder} lacks the {part}, so the run cannot go on from it (arguments.save_only_model leaves it out): "
                "begin a new run with it as model.path, in another output_dir."
            )


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-N` in a folder that was written to its end."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    # The trainer's state is written last.
    whole = [path for path in folders if (path / "trainer_state.json").is_file()]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


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
