"""A `Trainer` for Delta-LLaVA: its order of rows, learning rates, log entries and checkpoints."""

import copy
import hashlib
import logging
import math
import resource
import shutil
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, Trainer, TrainerCallback

from ..conversion.names import EMBEDDINGS, HEAD, published_name
from ..conversion.weights import LazyTensor, split_shards, write_shards
from ..errors import DeltaLlavaError, read_json, write_json
from ..hub import write_code, write_config
from ..modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaLlavaProjector
from ..processing import DeltaLlavaProcessor
from .data import TrainingDataset
from .model import PATTERNS, trained_names
from .sampler import StepSampler


logger = logging.getLogger(__name__)
COUNTS = ("num_tokens", "num_images", "num_skipped")
# Of a checkpoint: what the order of its rows follows from.
ORDER_FILE = "data_order.json"
# In the output folder: a result that is being written, a complete one, and one whose files are being moved to their place.
UNFINISHED, WRITTEN, PLACED = ".result-unfinished", ".result-written", ".result-placed"
CARD = "README.md"


class SetEpochCallback(TrainerCallback):
    """Sets the sampler's epoch, which accelerate does not when an epoch is resumed on several processes."""

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

    It adds: steps of one modality and similar length, each with its budget of visual tokens (`StepSampler`); throughput,
    memory and the size of visual tokens in the log; checkpoints that are Hub folders, under FSDP and DeepSpeed too; and
    resuming that fails if a weight is missing or the rows are others.

    Args:
        budgets: numbers of visual tokens per image that steps draw from.
        projector_lr: learning rate of the projector; by default that of the other parts.
        kwargs: arguments of `transformers.Trainer`; `train_dataset` is a `TrainingDataset`, `processing_class` the
            processor.
    """

    def __init__(self, *args: Any, budgets: tuple[int, ...], projector_lr: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.budgets, self.projector_lr = budgets, projector_lr
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
        args = self.args
        step_rows = args.train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
        seed = args.seed if args.data_seed is None else args.data_seed
        rows, strategy = dataset.rows, str(args.train_sampling_strategy)
        self.sampler = StepSampler(rows.lengths, rows.images, step_rows, self.budgets, seed, strategy)
        return self.sampler

    def data_order(self) -> dict[str, Any]:
        """What the order of rows follows from; two runs of which it differs see other rows in a step."""
        sampler = self.sampler or self._get_train_sampler()
        rows = self.train_dataset.rows
        digest = hashlib.sha256(b"".join(array.tobytes() for array in (rows.numbers, rows.lengths, rows.images)))
        return {
            "rows": len(rows),
            "sha256": digest.hexdigest(),
            "rows_per_step": sampler.step_rows,
            "seed": sampler.seed,
            "strategy": sampler.strategy,
            "budgets": list(sampler.budgets),
        }

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in transformers, with separate parameter groups for the projector if it has its own learning rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.projector_lr is None:
            return optimizer
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
        """As in transformers; counts what the batch holds."""
        counts = {name: inputs.pop(name) for name in COUNTS}
        self.throughput.add(counts)
        self.visual_tokens.shows_images = counts["num_images"] > 0
        return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in transformers."""
        return super().prediction_step(
            model, {name: value for name, value in inputs.items() if name not in COUNTS}, *args, **kwargs
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in transformers, with throughput, memory and the size of visual tokens."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                self.check_finite()
            logs.update({**self.throughput.report(self.accelerator), **self.visual_tokens.report()})
        super().log(logs, *args, **kwargs)

    def check_finite(self) -> None:
        """
        Refuse to continue with, or save, trained weights that are nan or inf.

        Raises:
            DeltaLlavaError: on all processes, if one of them has such a weight.
        """
        names = trained_names(self.model)
        weights = [self.model.get_parameter(name).detach() for name in names]
        # Under FSDP and ZeRO-3 each process checks its own shard.
        shards = [getattr(w, "ds_tensor", w.to_local() if hasattr(w, "to_local") else w) for w in weights]
        bad = torch.stack([shard.isfinite().all() for shard in shards])
        bad = bad.logical_not().to(self.accelerator.device, torch.float32)
        bad = self.accelerator.reduce(bad, "sum").nonzero().flatten().tolist()
        if bad:
            raise DeltaLlavaError(
                f"the run has diverged at step {self.state.global_step}: {len(bad)} of {len(names)} trained tensors hold "
                f"NaN or Inf (first {names[bad[0]]}); lower arguments.learning_rate or raise arguments.warmup_steps"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, but always a complete Hub folder, however the model is sharded."""
        self.check_finite()
        state_dict = self.gather_state_dict()
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            if self.is_adapter or state_dict is not None:
                self._save(str(folder), state_dict=state_dict)
            else:
                self._save(str(folder))
            write_json(self.data_order(), folder / ORDER_FILE)
        self.accelerator.wait_for_everyone()

    def gather_state_dict(self) -> dict[str, torch.Tensor] | None:
        """All weights, on the main process, of a sharded model; `None` where they are in one place anyway."""
        if self.is_deepspeed_enabled:
            return self.accelerator.get_state_dict(self.model_wrapped)
        if self.is_fsdp_enabled:
            return self.accelerator.get_state_dict(self.model)
        return None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.is_adapter:
            super()._save(output_dir, state_dict)
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        weights = state_dict or model.state_dict()
        save_hub_folder(model.config, model.generation_config, weights, self.processing_class, Path(str(output_dir)))

    @property
    def is_adapter(self) -> bool:
        """Whether a `PeftModel` is trained."""
        return is_peft(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def save_final(self, output_dir: Path, dtype: torch.dtype | None = None, card: str | None = None) -> None:
        """
        Write the finished model (LoRA merged, its adapter kept in `adapter/`) in one dtype; replaces an earlier run's.

        Args:
            output_dir: the folder.
            dtype: dtype of all weights; by default each keeps its own.
            card: for `README.md`, where there is none.

        Raises:
            DeltaLlavaError: the weights are not finite.
        """
        self.check_finite()
        state_dict = self.gather_state_dict()
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            if is_peft(model):
                adapter = str(output_dir / "adapter")
                model.save_pretrained(adapter, state_dict=state_dict)
                if state_dict is None and not getattr(model, "is_quantized", False):
                    model = model.merge_and_unload()
                else:  # gathered from shards, or quantized: merge the adapter into the original base model
                    model, state_dict = merge_adapter(model, adapter, dtype), None
            folder = output_dir / UNFINISHED
            shutil.rmtree(folder, ignore_errors=True)
            weights = state_dict or model.state_dict()
            save_hub_folder(model.config, model.generation_config, weights, self.processing_class, folder, dtype)
            if card is not None and not (output_dir / CARD).exists():
                (folder / CARD).write_text(card, encoding="utf-8")
            folder.rename(output_dir / WRITTEN)
            place_result(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in transformers, which only warns of weights that are missing, and reads no sharded folder under FSDP."""
        target = self.model if model is None else model
        if self.is_adapter or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(target, resume_from_checkpoint)


def is_peft(model: Any) -> bool:
    """Whether a model is a `PeftModel`."""
    return hasattr(model, "peft_config") and hasattr(model, "merge_and_unload")


def save_hub_folder(
    config: DeltaLlavaConfig,
    generation_config: GenerationConfig,
    state_dict: dict[str, torch.Tensor],
    processor: DeltaLlavaProcessor,
    folder: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """
    Write config, code, weights and processor. No model is built: under ZeRO-3 that takes all processes.

    Args:
        config, generation_config, processor: of the model.
        state_dict: all weights, by their names in memory.
        folder: created if needed.
        dtype: dtype of all weights; by default each keeps its own.

    Raises:
        DeltaLlavaError: a weight is NaN or Inf, or too large for the dtype.
    """
    tensors = {}
    for name, tensor in state_dict.items():
        to = dtype or tensor.dtype
        load = partial(tensor.detach().to, device="cpu", dtype=to)
        tensors[published_name(name)] = LazyTensor(tuple(tensor.shape), to, load)
    config = copy.deepcopy(config)
    config.dtype = tensors[EMBEDDINGS].dtype
    if config.text_config.tie_word_embeddings or config.tie_word_embeddings:
        # LoRA's `modules_to_save` may have trained one of the two; tied, it would be lost.
        tied = HEAD not in state_dict or torch.equal(state_dict[HEAD], state_dict[EMBEDDINGS])
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
        if tied:
            tensors.pop(HEAD, None)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder)
    write_code(folder)
    generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_shards(tensors, split_shards(tensors, "5GB"), folder)


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """
    Load the weights of a checkpoint into a model, each in the model's own dtype.

    Raises:
        DeltaLlavaError: a weight is missing, or unknown to the model.
        RuntimeError: a weight has another shape.
    """
    addresses = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    missing, unexpected = set(addresses), set[str]()
    for file in sorted(Path(folder).glob("model*.safetensors")):
        result = model.load_state_dict(load_file(file), strict=False)
        missing &= set(result.missing_keys)
        unexpected |= set(result.unexpected_keys)
    # Tied weights are stored once.
    loaded = {address for name, address in addresses.items() if name not in missing}
    missing = {name for name in missing if addresses[name] not in loaded}
    if missing or unexpected:
        problem = f"has no {min(missing)}" if missing else f"has {min(unexpected)}, which this model does not have"
        raise DeltaLlavaError(f"{folder} {problem}; resume with the same recipe")


def check_order(checkpoint: str | Path, order: dict[str, Any]) -> None:
    """
    Refuse a checkpoint of a run over other rows, or in another order.

    Raises:
        DeltaLlavaError: naming what differs.
    """
    file = Path(checkpoint) / ORDER_FILE
    saved = read_json(file) if file.is_file() else order
    if different := [
        f"{name} {saved.get(name)}, now {order[name]}" for name in order if saved.get(name) != order[name]
    ]:
        raise DeltaLlavaError(f"{checkpoint} was written with other data or another order: {'; '.join(different)}")


def check_resumable(folder: str | Path) -> None:
    """
    Refuse a checkpoint that transformers would resume with a new optimizer, schedule or random number generator.

    Raises:
        DeltaLlavaError: the checkpoint lacks the state of one of them.
    """
    parts = {  # as written by transformers, accelerate's FSDP, DeepSpeed
        "trainer's state": ("trainer_state.json",),
        "optimizer's state": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
        "schedule's state": ("scheduler.pt", "global_step*"),
        "random number generators' state": ("rng_state*.pth",),
    }
    for part, patterns in parts.items():
        if not any(any(Path(folder).glob(pattern)) for pattern in patterns):
            raise DeltaLlavaError(f"{folder} lacks the {part}, so the run cannot resume from it")


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete `checkpoint-N` in a folder."""
    states = Path(output_dir).glob("checkpoint-*/trainer_state.json")  # written last
    steps = [int(number) for state in states if (number := state.parent.name.removeprefix("checkpoint-")).isdigit()]
    return str(Path(output_dir) / f"checkpoint-{max(steps)}") if steps else None


def merge_adapter(model: Any, adapter: str, dtype: torch.dtype | None) -> nn.Module:
    """The base model of a PEFT model, reloaded on the CPU and not quantized, with a saved adapter merged into it."""
    from peft import PeftModel
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # under ZeRO-3 every model that is built is sharded over all processes
    config = copy.deepcopy(model.get_base_model().config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    base = DeltaLlavaForConditionalGeneration.from_pretrained(
        config.name_or_path, config=config, dtype=dtype or "auto"
    )
    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def place_result(output_dir: Path) -> None:
    """
    Put a result that was written completely in its place, also one of a run that was killed meanwhile.

    The earlier weights go first, so that no folder has some of either.
    """
    written, placed = output_dir / WRITTEN, output_dir / PLACED
    if written.is_dir():
        for earlier in (output_dir / "config.json", *output_dir.glob("model*.safetensors*")):
            earlier.unlink(missing_ok=True)
        written.rename(placed)
    if placed.is_dir():
        for path in sorted(placed.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(output_dir / path.name)
        placed.rmdir()


class Throughput:
    """Counts tokens, images and skipped rows from one report to the next, over all processes."""

    def __init__(self) -> None:
        self.total_skipped = 0
        self.start()

    def start(self) -> None:
        """Set counts to zero and restart the clock."""
        self._counts: Counter[str] = Counter()
        self._start = time.perf_counter()

    def add(self, counts: dict[str, int]) -> None:
        """Add the counts of a batch."""
        self._counts.update(counts)

    def report(self, accelerator: Any) -> dict[str, float]:
        """Rates since the last report, and the peak memory of any process, in GiB; restarts."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        counts = torch.tensor([self._counts[n] for n in COUNTS], dtype=torch.float32, device=accelerator.device)
        memory = torch.tensor([peak_memory(accelerator.device)], device=accelerator.device)
        tokens, images, skipped = accelerator.reduce(counts, "sum").tolist()
        self.total_skipped += int(skipped)
        rates = {
            "tokens_per_second": round(tokens / seconds, 1),
            "images_per_second": round(images / seconds, 2),
            "memory_gib": round(accelerator.gather(memory).max().item() / 2**30, 3),
        }
        self.start()
        return rates | ({"rows_skipped": self.total_skipped} if self.total_skipped else {})


def peak_memory(device: torch.device) -> float:
    """Peak memory in bytes: of the GPU, or else of this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class VisualTokenLog:
    """
    Size of the last step's visual tokens, in units of the text embeddings' root mean square.

    What is healthy depends on the model, so a change counts: a factor of ten since the run began is warned about once.
    """

    def __init__(self, model: nn.Module):
        self.model, self.tokens = model, None
        self.shows_images = True  # a batch without any has a blank one, which is masked
        self.first: float | None = None
        self.warned = False
        for module in model.modules():
            if isinstance(module, DeltaLlavaProjector):
                module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.shows_images and not torch.compiler.is_compiling():
            self.tokens = output.detach()

    def report(self) -> dict[str, float]:
        """Root mean square of the visual tokens, and of their deviation from the mean over images.

        Empty where no image was seen, or the embeddings are sharded.
        """
        weight = self.model.get_input_embeddings().weight
        if self.tokens is None or not weight.numel():
            return {}
        tokens, text = self.tokens.float(), weight.detach()[:: max(1, len(weight) // 4096)].float()
        text_rms = text.square().mean().sqrt().item()
        values = {"visual_token_rms": tokens, "visual_token_spread": tokens - tokens.mean(0)}
        report = {name: round(value.square().mean().sqrt().item() / text_rms, 4) for name, value in values.items()}
        size = report["visual_token_rms"]
        self.first = self.first or size
        if not self.warned and not self.first / 10 < size < self.first * 10:
            self.warned = True
            logger.warning("visual_token_rms went from %g to %g: the learning rate may be too high", self.first, size)
        return report


def describe_loss(history: list[dict[str, float]]) -> str:
    """What the loss did, of a trainer's log."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    text = f"loss {losses[0]:.4g} -> {losses[-1]:.4g}" if losses else "no loss was logged"
    return text + (f", on held-out rows {held_out[0]:.4g} -> {held_out[-1]:.4g}" if held_out else "")
