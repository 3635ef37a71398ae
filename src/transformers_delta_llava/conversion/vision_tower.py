"""The vision tower of a checkpoint: its geometry, its image preprocessing and, where needed, its weights."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..utils.errors import DeltaLlavaError
from ..utils.files import cached_repo_id, local_folder, public_name, read_json
from .checkpoint import Checkpoint, has_weights, read_checkpoint
from .config_mapping import build_config


_CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
# Public facts about towers that checkpoints name, so that a checkpoint which brings its tower's weights converts
# without a download.
KNOWN_TOWERS: dict[str, dict] = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 384,
    },
}

_KNOWN_BY_NAME = {spec.rpartition("/")[2]: spec for spec in KNOWN_TOWERS}

# Whole image-text models, and the type of the tower inside them.
_TOWER_OF = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_OPTION = "--vision-tower (in Python vision_tower=...)"
_CONFIG_FILES = ("config.json", "preprocessor_config.json")
# Only pickles if there is nothing else.
_WEIGHT_FILES = (("model*.safetensors*",), ("pytorch_model*.bin*",))


@dataclass(frozen=True)
class VisionTower:
    """A resolved tower: `name` to publish (never a path), geometry, preprocessing, and weights where they were asked for."""

    name: str
    config: PreTrainedConfig
    image_processor: dict
    checkpoint: Checkpoint | None = None


def find_vision_tower(named: str | None, checkpoint: Path, with_weights: bool = False) -> str:
    """Where the tower is that a checkpoint names, which was a Hub id or a path on the machine that trained it.

    Looked for in this order: the path; the same path, then its last part, inside the checkpoint's folder and beside it;
    the path from the working directory; a known tower of that last name, whose geometry needs no files.

    Args:
        named: `mm_vision_tower` of the checkpoint's config.
        checkpoint: folder of the checkpoint.
        with_weights: pass by folders that hold settings alone, as export leaves one in a checkpoint.

    Returns:
        A folder or a Hub id; `named` itself where nothing is found.

    Raises:
        DeltaLlavaError: the checkpoint names none.
    """
    if not named:
        raise DeltaLlavaError(f"config.json names no mm_vision_tower; pass its folder or Hub id with {_OPTION}.")
    hub_id = cached_repo_id(named)
    path, name = Path(named), Path(hub_id or named).name
    beside = [folder / part for part in (path, name) for folder in (checkpoint, checkpoint.parent)]
    for folder in (*([path] if path.is_absolute() else []), *beside, path):
        is_tower = (folder / "config.json").is_file() and (not with_weights or has_weights(folder))
        if is_tower and folder.resolve() != checkpoint.resolve():
            return str(folder)
    return hub_id or (named if named in KNOWN_TOWERS else _KNOWN_BY_NAME.get(name, named))


def load_vision_tower(spec: str, with_weights: bool) -> VisionTower:
    """Find a tower by folder or Hub id.

    Args:
        spec: a folder of a CLIP or SigLIP tower (or of the whole image-text model), or a Hub id.
        with_weights: whether the weights are needed; without them a known id needs no download.

    Raises:
        DeltaLlavaError: not found, of a kind that is not supported, or without the weights asked for.
    """
    if spec in KNOWN_TOWERS and not with_weights and not Path(spec).is_dir():
        config, _ = build_config(**KNOWN_TOWERS[spec])
        return VisionTower(spec, config, _default_image_processor(config))
    files = _CONFIG_FILES + (_WEIGHT_FILES[0] if with_weights else ())
    folder = local_folder(spec, "vision tower", files, "vision_tower")
    config = _tower_config(folder)
    image_processor = _image_processor(folder, config)
    checkpoint = None
    if with_weights:
        if not any(folder.glob("*.safetensors")):
            folder = local_folder(spec, "vision tower", _CONFIG_FILES + _WEIGHT_FILES[1], "vision_tower")
        checkpoint = _tower_weights(folder)
    return VisionTower(public_name(spec), config, image_processor, checkpoint)


def _tower_config(folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise DeltaLlavaError(
            f"The vision tower {folder.name} has no config.json; pass the folder or Hub id of another with {_OPTION}."
        )
    values = read_json(path)
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in _TOWER_OF:
        values, model_type = values.get("vision_config", {}), _TOWER_OF[model_type]
    if not isinstance(values, dict):
        raise DeltaLlavaError(f"The vision tower {folder.name} has a vision_config that is not a JSON object.")
    if model_type not in _TOWER_OF.values():
        known = ", ".join([*_TOWER_OF, *_TOWER_OF.values()])
        raise DeltaLlavaError(f"The vision tower {folder.name} has model_type={model_type!r}; use one of {known}.")
    return build_config(**{**values, "model_type": model_type})[0]


def _tower_weights(folder: Path) -> Checkpoint:
    """The tower's tensors by their names below `vision_model.`; a text model beside it is left out."""
    checkpoint = read_checkpoint(folder)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.endswith(".position_ids")}
    level = "vision_model."
    inner = {name.removeprefix(level): tensor for name, tensor in tensors.items() if name.startswith(level)}
    return Checkpoint(inner or tensors, checkpoint.files)


def adapt_to_weights(config: PreTrainedConfig, names: Collection[str]) -> None:
    """SigLIP's pooling head is optional: no visual token reads it, and some checkpoints drop it."""
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = any(name.startswith("head.") for name in names)


def _default_image_processor(config: PreTrainedConfig) -> dict:
    side = {"height": config.image_size, "width": config.image_size}
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    if config.model_type == "siglip_vision_model":
        return {
            "image_processor_type": "SiglipImageProcessor",
            **common,
            "image_mean": list(IMAGENET_STANDARD_MEAN),
            "image_std": list(IMAGENET_STANDARD_STD),
            "size": side,
        }
    return {
        "image_processor_type": "CLIPImageProcessor",
        **common,
        "crop_size": side,
        "do_center_crop": True,
        "image_mean": list(OPENAI_CLIP_MEAN),
        "image_std": list(OPENAI_CLIP_STD),
        "size": {"shortest_edge": config.image_size},
    }


def _image_processor(folder: Path, config: PreTrainedConfig) -> dict:
    """The family's preprocessing with what the folder's own file says differently."""
    settings = _default_image_processor(config)
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return settings
    found = read_json(path)
    for name in settings.keys() & found.keys() - {"image_processor_type", "size", "crop_size"}:
        settings[name] = found[name]
    for name in settings.keys() & found.keys() & {"size", "crop_size"}:
        sides = found[name].values() if isinstance(found[name], dict) else [found[name]]
        if any(side != config.image_size for side in sides):
            raise DeltaLlavaError(
                f"The vision tower {folder.name} disagrees with itself: config.json says image_size={config.image_size}, "
                f"preprocessor_config.json says {name}={found[name]}."
            )
    return settings
