"""Write small checkpoints in the format of the authors' training code, from a seed.

The tests need many checkpoints, and small ones: every tensor has the name and the layout of the released code and a random
value. What such a model says is noise; what it exercises is everything between a checkpoint folder and an answer.

    python -m examples.make_checkpoint OUTPUT

OUTPUT gets `llava-tiny/` (the checkpoint) and `vision-tower/` (the CLIP tower that it names). It has CLIP-L/336's grid
of 24 x 24 patches; the tests use smaller ones.
"""

import argparse
import json
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from examples.make_tokenizer import KINDS, write_tokenizer
from transformers_delta_llava.conversion.names import published_name


Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]

TOWER = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 24,  # the released code reads hidden states 12, 16, 22 and 23
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
}
# Sizes that every supported language model takes.
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAVA_KEYS = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "mm_hidden_size": TOWER["hidden_size"],
    "mm_patch_merge_type": "flat",
    "mm_projector_lr": None,
    "mm_projector_type": "delatallava",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "scale_factor": 2,
    "tokenizer_model_max_length": 2048,
    "tokenizer_padding_side": "right",
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
}
TEXT_TYPES = {
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_gemma": "gemma",
    "llava_Phi3": "phi3",
    "llava_phi3": "phi3",
    "llava_seed_oss": "seed_oss",
    "llava_qwen": "qwen2",
    "llava_qwen2": "qwen2",
    "llava_qwen3": "qwen3",
}


@dataclass
class Recipe:
    """What a checkpoint folder holds.

    Attributes:
        model_type: of the authors' checkpoint.
        config: keys of config.json to set, or to drop where the value is None.
        text: settings of the language model that differ from `TEXT`.
        tower: whether the vision tower's weights are in the checkpoint; its config is always the tower folder's.
        tower_type: `clip`, `siglip`, `dinov2` or `dinov2_with_registers`.
        tower_sizes: settings of the tower that differ from `TOWER`.
        form: `safetensors` or `bin`.
        shards: number of weight files; more than one come with an index.
        tokenizer: whether the folder brings one, or of which kind (see `make_tokenizer`); `real` is that of the base models
            of `model_type`. Every kind but the plain one brings as many rows of the embeddings as it has tokens.
        dtype: of all tensors.
        seed: of all values.
    """

    model_type: str = "llava_llama"
    config: dict = field(default_factory=dict)
    text: dict = field(default_factory=dict)
    tower: bool = True
    tower_type: str = "clip"
    tower_sizes: dict = field(default_factory=dict)
    form: str = "safetensors"
    shards: int = 1
    tokenizer: bool | str = True
    dtype: torch.dtype = torch.float32
    seed: int = 0


# Files and dtype as the authors' trainer leaves them, and the grid of the published models.
DEMO = Recipe(
    text={"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 2048},
    tower_sizes={"image_size": 336, "patch_size": 14, "intermediate_size": 256},
    form="bin",
    shards=2,
    dtype=torch.bfloat16,
)


def write_checkpoint(folder: Path, recipe: Recipe | None = None, **fields: object) -> Tensors:
    """Write a checkpoint into `folder`, and its vision tower into the sibling `vision-tower`; returns its tensors."""
    recipe = recipe or Recipe(**fields)  # type: ignore[arg-type]
    folder.mkdir(parents=True)
    tower_folder = folder.parent / "vision-tower"
    tower = write_tower(tower_folder, recipe.tower_type, seed=recipe.seed, **recipe.tower_sizes)
    if recipe.tokenizer:
        kind = "plain" if recipe.tokenizer is True else recipe.tokenizer
        ids = write_tokenizer(folder, KINDS[recipe.model_type] if kind == "real" else kind)
        recipe = replace(recipe, text={**ids, **recipe.text})
    tensors = checkpoint_tensors(recipe, tower)
    write_weights(folder, tensors, recipe.form, recipe.shards)
    keys = {**LLAVA_KEYS, "mm_vision_tower": str(tower_folder), "model_type": recipe.model_type}
    keys = {**_text_settings(recipe), **keys, **recipe.config}
    _write_json(folder / "config.json", {key: keys[key] for key in keys if keys[key] is not None})
    return tensors


def checkpoint_tensors(recipe: Recipe, tower: Tensors) -> Tensors:
    """All tensors of a checkpoint, by the authors' names."""
    config = AutoConfig.for_model(TEXT_TYPES[recipe.model_type], **_text_settings(recipe))
    with torch.device("meta"):
        shapes = _shapes(AutoModelForCausalLM.from_config(config))
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]  # as save_pretrained does
    width = {**TOWER, **recipe.tower_sizes}["hidden_size"]
    projector = projector_shapes(width, config.hidden_size)
    shapes |= {f"model.mm_projector.{name}": shape for name, shape in projector.items()}
    tensors = draw(shapes, recipe.seed)
    if recipe.tower:
        inner = "" if recipe.tower_type.startswith("dinov2") else "vision_model."
        tensors |= {f"model.vision_tower.vision_tower.{inner}{name}": value for name, value in tower.items()}
    return {name: value.to(recipe.dtype) for name, value in tensors.items()}


def projector_shapes(width: int, hidden_size: int, rank: int = 16) -> Shapes:
    """Names and shapes of the released projector for a tower of `width` (a multiple of 128) and four levels of it."""
    attention, local = width * 3 // 4, width // 4
    shapes: Shapes = {}

    def add(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[:1]

    for role, inputs in (("q", width), ("k", 4 * width), ("v", 4 * width)):
        shapes[f"{role}_proj_1.U"] = (inputs, rank)
        shapes[f"{role}_proj_1.V"] = (rank, width)
        shapes[f"{role}_proj_1.shared_weight.weight"] = (width, inputs)
        add(f"{role}_proj_1.norm", width)
    shapes["clip_attn.in_proj_weight"] = (3 * width, width)
    shapes["clip_attn.in_proj_bias"] = (3 * width,)
    add("clip_attn.out_proj", width, width)
    add("mlp.0", hidden_size, width)
    add("mlp.2", hidden_size, hidden_size)
    block = "combined_block.ntb"
    shapes[f"{block}.patch_embed.conv.weight"] = (attention, width, 1, 1)
    add(f"{block}.norm_mhsa", attention)
    add(f"{block}.e_mhsa.norm", attention)
    for name in ("q", "k", "v", "proj"):
        add(f"{block}.e_mhsa.{name}", attention, attention)
    shapes[f"{block}.projection.conv.weight"] = (local, attention, 1, 1)
    shapes[f"{block}.mhca.group_conv3x3.weight"] = (local, 32, 3, 3)
    add(f"{block}.mhca.norm", local)
    shapes[f"{block}.mhca.projection.weight"] = (local, local, 1, 1)
    add(f"{block}.mlp.conv1", 2 * width, width, 1, 1)
    add(f"{block}.mlp.conv2", width, 2 * width, 1, 1)
    return shapes


def draw(shapes: Shapes, seed: int) -> Tensors:
    """Values that depend on name, shape and seed only, whatever else is drawn and whichever transformers draws it."""
    tensors = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        tensors[name] = torch.randn(shape, generator=generator) / 8
        if len(shape) == 1 and name.endswith("weight"):  # a norm
            tensors[name] += 1
    return tensors


def write_weights(folder: Path, tensors: Tensors, form: str = "safetensors", shards: int = 1) -> None:
    """Write `tensors` as one file, or as shards with an index."""
    stem, suffix = ("model", ".safetensors") if form == "safetensors" else ("pytorch_model", ".bin")
    names = (
        [f"{stem}{suffix}"] if shards == 1 else [f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}" for i in range(shards)]
    )
    weight_map = {name: names[i * shards // len(tensors)] for i, name in enumerate(tensors)}
    for file in names:
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        if form == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        _write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_tower(
    folder: Path, tower_type: str = "clip", whole: bool = False, seed: int = 0, **settings: object
) -> Tensors:
    """Write a vision tower, or with `whole` the image-text model around it; returns the tower's tensors by inner name."""
    folder.mkdir(parents=True, exist_ok=True)
    is_dinov2 = tower_type.startswith("dinov2")
    config = AutoConfig.for_model(tower_type if is_dinov2 else f"{tower_type}_vision_model", **{**TOWER, **settings})
    with torch.device("meta"):
        shapes = _shapes(AutoModel.from_config(config))
    # As files have them, which is not as every version of transformers has them in memory.
    names = {name: published_name(f"model.vision_tower.{name}").removeprefix("model.vision_tower.") for name in shapes}
    tensors = draw({names[name].removeprefix("vision_model."): shape for name, shape in shapes.items()}, seed)
    contents = tensors if is_dinov2 else {f"vision_model.{name}": value for name, value in tensors.items()}
    description = config.to_dict()
    if whole:
        contents |= {"logit_scale": torch.ones(1), "text_model.embeddings.token_embedding.weight": torch.ones(2, 2)}
        description = {"model_type": tower_type, "vision_config": description, "text_config": {}}
    write_weights(folder, contents)
    _write_json(folder / "config.json", description)
    return tensors


def _shapes(model: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _text_settings(recipe: Recipe) -> dict:
    return {**TEXT, **recipe.text}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def main() -> None:
    """Write the demo's checkpoint and tower below the folder given on the command line."""
    parser = argparse.ArgumentParser(description="Write a small checkpoint in the authors' format (random weights).")
    parser.add_argument("output", type=Path)
    write_checkpoint(parser.parse_args().output / "llava-tiny", DEMO)


if __name__ == "__main__":
    main()
