"""Write a small checkpoint in the format of the authors' training code, from a seed.

No trained Delta-LLaVA weights have been published, so the demo and the tests make their own: every tensor has the name
and the layout of the released code and random values. What such a model says is noise; what it exercises is everything
between a checkpoint folder and an answer.

    python examples/make_checkpoint.py OUTPUT [--scale-factor 2]

OUTPUT gets `llava-tiny/` (the checkpoint) and `vision-tower/` (the CLIP tower that it names).
"""

from __future__ import annotations

import argparse
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig


Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]

NUM_LEVELS = 4  # the released code concatenates the hidden states 12, 16, 22 and 23: the tower needs 24 layers
TOKENIZER_TEXT = """\
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and
polite answers to the user's questions. USER: What is in this picture? ASSISTANT: The picture shows a cat with green
eyes that looks at something outside of the frame. USER: Describe the image in detail. ASSISTANT: The image is a close
view of the face of a brown cat with stripes, long white whiskers and a pink nose; the background is out of focus.
USER: How many animals are there? Answer with a single number. ASSISTANT: 1 2 3 4 5 6 7 8 9 0
"""


@dataclass(frozen=True)
class Recipe:
    """Sizes and seed of a checkpoint; `width` is a multiple of 128, as the released projector needs."""

    seed: int = 0
    scale_factor: int = 2
    image_size: int = 336
    patch_size: int = 14
    width: int = 128
    tower_layers: int = 24
    hidden_size: int = 128
    text_layers: int = 2
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16  # what the authors train in


def projector_shapes(width: int, hidden_size: int, rank: int = 16) -> Shapes:
    """Name and shape of each tensor of the released projector, names as below `model.mm_projector.`."""
    split = width * 3 // 4  # channels of global attention; the rest goes to the convolution
    local = width - split
    shapes: Shapes = {}
    for role, inputs in (("q", width), ("k", NUM_LEVELS * width), ("v", NUM_LEVELS * width)):
        shapes[f"{role}_proj_1.shared_weight.weight"] = (width, inputs)
        shapes[f"{role}_proj_1.U"] = (inputs, rank)
        shapes[f"{role}_proj_1.V"] = (rank, width)
        shapes |= _with_bias(f"{role}_proj_1.norm", (width,))
    shapes |= {"clip_attn.in_proj_weight": (3 * width, width), "clip_attn.in_proj_bias": (3 * width,)}
    shapes |= _with_bias("clip_attn.out_proj", (width, width))

    block = "combined_block.ntb"
    shapes[f"{block}.patch_embed.conv.weight"] = (split, width, 1, 1)
    shapes |= _with_bias(f"{block}.norm_mhsa", (split,)) | _with_bias(f"{block}.e_mhsa.norm", (split,))
    for layer in ("q", "k", "v", "proj"):
        shapes |= _with_bias(f"{block}.e_mhsa.{layer}", (split, split))
    shapes[f"{block}.projection.conv.weight"] = (local, split, 1, 1)
    shapes[f"{block}.mhca.group_conv3x3.weight"] = (local, 32, 3, 3)
    shapes |= _with_bias(f"{block}.mhca.norm", (local,))
    shapes[f"{block}.mhca.projection.weight"] = (local, local, 1, 1)
    shapes |= _with_bias(f"{block}.mlp.conv1", (2 * width, width, 1, 1))
    shapes |= _with_bias(f"{block}.mlp.conv2", (width, 2 * width, 1, 1))
    return shapes | _with_bias("mlp.0", (hidden_size, width)) | _with_bias("mlp.2", (hidden_size, hidden_size))


def _with_bias(name: str, shape: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def draw(shapes: Shapes, recipe: Recipe) -> Tensors:
    """Values that depend on name, shape and seed only: norms are 1, biases 0, the rest is normal."""
    tensors = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{recipe.seed}:{name}".encode()))
        if name.endswith("bias"):
            tensor = torch.zeros(shape)
        elif len(shape) == 1 and name.endswith("weight"):
            tensor = torch.ones(shape)
        else:
            tensor = torch.randn(shape, generator=generator) / 8
        tensors[name] = tensor.to(recipe.dtype)
    return tensors


def vision_config(recipe: Recipe) -> CLIPVisionConfig:
    """Configuration of the CLIP tower."""
    return CLIPVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.tower_layers,
        num_attention_heads=recipe.width // 32,
        image_size=recipe.image_size,
        patch_size=recipe.patch_size,
    )


def text_config(recipe: Recipe, vocab_size: int) -> LlamaConfig:
    """Configuration of the Llama language model."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.hidden_size // 32,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def tower_tensors(recipe: Recipe) -> Tensors:
    """The tower's tensors as they are published: `vision_model.` in front, also where transformers has dropped it."""
    with torch.device("meta"):
        state = AutoModel.from_config(vision_config(recipe)).state_dict()
    shapes = {f"vision_model.{name.removeprefix('vision_model.')}": tuple(t.shape) for name, t in state.items()}
    return draw(shapes, recipe)


def text_tensors(recipe: Recipe, vocab_size: int) -> Tensors:
    """The language model's tensors under Llama's names."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(text_config(recipe, vocab_size)).state_dict()
    return draw({name: tuple(tensor.shape) for name, tensor in state.items()}, recipe)


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer with Llama's special tokens, trained on the text in this file."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"],  # ASCII, the space and the newline
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def write_tokenizer(folder: Path) -> int:
    """Write the tokenizer's files into `folder` and return the size of its vocabulary."""
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "model_max_length": 2048,
            "padding_side": "right",
        },
    )
    return tokenizer.get_vocab_size()


def write_vision_tower(folder: Path, recipe: Recipe) -> None:
    """Write the CLIP tower as a model folder of its own: configuration, image processor and weights."""
    folder.mkdir(parents=True)
    vision_config(recipe).save_pretrained(folder)
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": recipe.image_size},
            "crop_size": {"height": recipe.image_size, "width": recipe.image_size},
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "do_resize": True,
            "do_center_crop": True,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "do_convert_rgb": True,
        },
    )
    save_file(tower_tensors(recipe), folder / "model.safetensors", metadata={"format": "pt"})


def write_checkpoint(
    folder: Path,
    recipe: Recipe,
    *,
    vision_tower: str,
    file_format: Literal["bin", "safetensors"] = "bin",
    num_shards: int = 2,
    with_tower: bool = True,
    with_tokenizer: bool = True,
) -> None:
    """Write a checkpoint folder as the authors' trainer leaves it.

    Args:
        folder: where to write; must not exist.
        recipe: sizes and seed.
        vision_tower: what `mm_vision_tower` names: a folder or a Hub id.
        file_format: PyTorch pickles or safetensors.
        num_shards: number of weight files; more than one comes with an index.
        with_tower: also store the tower's tensors, as training with a loaded tower does.
        with_tokenizer: also store the tokenizer.
    """
    folder.mkdir(parents=True)
    vocab_size = write_tokenizer(folder) if with_tokenizer else train_tokenizer().get_vocab_size()
    tensors = text_tensors(recipe, vocab_size)
    projector = draw(projector_shapes(recipe.width, recipe.hidden_size, recipe.rank), recipe)
    tensors |= {f"model.mm_projector.{name}": tensor for name, tensor in projector.items()}
    if with_tower:
        tensors |= {f"model.vision_tower.vision_tower.{name}": t for name, t in tower_tensors(recipe).items()}
    _write_json(folder / "config.json", _released_config(recipe, vocab_size, vision_tower))
    _write_shards(folder, tensors, file_format, num_shards)


def _released_config(recipe: Recipe, vocab_size: int, vision_tower: str) -> dict[str, object]:
    config = text_config(recipe, vocab_size).to_dict()
    return config | {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "dtype": str(recipe.dtype).removeprefix("torch."),
        "mm_vision_tower": vision_tower,
        "mm_hidden_size": recipe.width,
        "mm_projector_type": "delatallava",
        "use_mm_proj": True,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "scale_factor": recipe.scale_factor,
        "image_aspect_ratio": "pad",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 2048,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_projector_lr": None,
    }


def _write_shards(folder: Path, tensors: Tensors, file_format: str, num_shards: int) -> None:
    stem, suffix = {"bin": ("pytorch_model", "bin"), "safetensors": ("model", "safetensors")}[file_format]
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        part = {name: tensors[name] for name in names[shard::num_shards]}
        number = f"-{shard + 1:05d}-of-{num_shards:05d}" if num_shards > 1 else ""
        path = folder / f"{stem}{number}.{suffix}"
        if file_format == "bin":
            torch.save(part, path)
        else:
            save_file(part, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, path.name)
    if num_shards > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index_file = folder / f"{stem}.{suffix}.index.json"
        _write_json(index_file, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write checkpoint and tower below the folder given on the command line."""
    parser = argparse.ArgumentParser(description="Write a small checkpoint in the authors' format (random weights).")
    parser.add_argument("output", type=Path)
    parser.add_argument("--scale-factor", type=int, default=2)
    arguments = parser.parse_args()
    recipe = Recipe(scale_factor=arguments.scale_factor)
    write_vision_tower(arguments.output / "vision-tower", recipe)
    write_checkpoint(arguments.output / "llava-tiny", recipe, vision_tower=str(arguments.output / "vision-tower"))


if __name__ == "__main__":
    main()
