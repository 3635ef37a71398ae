"""Load a repo, encode a question, ask it: used by everything that runs a model."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image

from .errors import DeltaLlavaError, format_names
from .modeling import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration
from .processing import DeltaLlavaProcessor


DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def local_folder(
    model_id: str | Path, allow_patterns: Sequence[str] | None = None, revision: str | None = None
) -> Path:
    """The folder `model_id`, or the local copy of the Hub repo of that name, downloaded as far as `allow_patterns` match."""
    if Path(model_id).is_dir():
        return Path(model_id)
    allowed = None if allow_patterns is None else list(allow_patterns)
    return Path(snapshot_download(str(model_id), allow_patterns=allowed, revision=revision))


def load_config(repo: str | Path, revision: str | None = None) -> DeltaLlavaConfig:
    """The configuration of a Delta-LLaVA repo.

    Raises:
        DeltaLlavaError: it is another kind of model.
        OSError: there is no such repo.
    """
    settings, _ = DeltaLlavaConfig.get_config_dict(repo, revision=revision)
    if settings.get("model_type") != DeltaLlavaConfig.model_type:
        raise DeltaLlavaError(
            f"{repo} is a {settings.get('model_type')}, not a delta_llava; `delta-llava convert` converts checkpoints "
            "of the authors' trainer"
        )
    return DeltaLlavaConfig.from_dict(settings)


def default_device() -> str:
    """The accelerator where there is one, else the CPU."""
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


def load_repo(
    repo: str | Path, device: str | None = None, dtype: str | None = None, revision: str | None = None
) -> tuple[DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor]:
    """
    The model, in evaluation mode, and the processor of a Delta-LLaVA repo.

    Args:
        repo: folder or Hub id.
        device: a device of PyTorch; the accelerator where there is one by default.
        dtype: float32, bfloat16 or float16; by default bfloat16 on an accelerator and float32 on the CPU.
        revision: of a Hub repo.

    Raises:
        DeltaLlavaError: it is another kind of model, or weights are missing.
        OSError: there is no such repo, or a file of it.
    """
    load_config(repo, revision)
    device = default_device() if device is None else device
    dtype = ("float32" if torch.device(device).type == "cpu" else "bfloat16") if dtype is None else dtype
    model, report = DeltaLlavaForConditionalGeneration.from_pretrained(
        repo, dtype=DTYPES[dtype], revision=revision, output_loading_info=True
    )
    if report["missing_keys"]:  # transformers warns, and draws them at random
        raise DeltaLlavaError(f"{repo} has no weights for {format_names(report['missing_keys'])}")
    return model.to(device).eval(), DeltaLlavaProcessor.from_pretrained(repo, revision=revision)


def encode_question(
    processor: DeltaLlavaProcessor, image: Image.Image | None, prompt: str, **processor_kwargs: Any
) -> Any:
    """
    Inputs, a batch of one, of one user turn in the processor's chat template.

    Args:
        processor: of any repo.
        image: comes before the prompt; `None` for a text-only question.
        prompt: text of the question.
        processor_kwargs: such as `num_visual_tokens`.
    """
    content: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", **processor_kwargs},
    )


@torch.no_grad()
def answer_ids(model: DeltaLlavaForConditionalGeneration, inputs: Any, max_new_tokens: int) -> list[int]:
    """Token ids of the greedy answer to the inputs of one question, without the token that ends it."""
    output = model.generate(
        **inputs.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=False,
    )
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    return list(takewhile(lambda index: index not in ends, output[0, inputs["input_ids"].shape[1] :].tolist()))
