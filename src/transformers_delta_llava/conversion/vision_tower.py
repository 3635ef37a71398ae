"""The vision tower of a checkpoint: its geometry, its image preprocessing and, where needed, its weights."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from ..modeling.configuration_delta_llava import DEFAULT_VISION_CONFIG, SELECT_STRATEGIES
from ..utils.errors import DeltaLlavaError, show
from ..utils.files import cached_repo_id, local_folder, public_name, read_json, read_optional_json
from .config import build_config
from .weights import Checkpoint, has_weights, read_checkpoint


# The geometry of towers that checkpoints name, so that a checkpoint with its tower's weights converts without a download.
KNOWN_TOWERS: dict[str, dict] = {
    "openai/clip-vit-large-patch14-336": DEFAULT_VISION_CONFIG,
    "openai/clip-vit-large-patch14": {**DEFAULT_VISION_CONFIG, "image_size": 224},
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
_KNOWN_BY_NAME = {model_id.rpartition("/")[2]: model_id for model_id in KNOWN_TOWERS}

# Whole image-text models, and the type of the tower inside them.
_TOWER_OF = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
_CONFIG_FILES = ("config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class VisionTower:
    """A resolved tower: `name` to publish (never a path), geometry, preprocessing, and weights where they were asked for."""

    name: str
    config: PreTrainedConfig
    image_processor: dict
    checkpoint: Checkpoint | None = None


def find_vision_tower(named: str | None, checkpoint: Path, with_weights: bool = False) -> str:
    """Find the tower that a checkpoint names by a Hub id or by a path of the machine that trained it.

    Searched in this order: an absolute path; the path, then its last part, inside the checkpoint's folder and beside it;
    the path from the working directory; a known tower of that last name, whose geometry needs no files.

    Args:
        named: `mm_vision_tower` of the checkpoint's config.
        checkpoint: folder of the checkpoint.
        with_weights: skip folders without weights, such as the one that export writes into a checkpoint.

    Returns:
        A folder or a Hub id; `named` itself where nothing is found.

    Raises:
        DeltaLlavaError: the checkpoint names none.
    """
    if not named:
        raise DeltaLlavaError("config.json names no mm_vision_tower; pass its folder or Hub id as `vision_tower=...`.")
    hub_id = cached_repo_id(named)
    path, name = Path(named), Path(hub_id or named).name
    nearby = [folder / part for part in (path, name) for folder in (checkpoint, checkpoint.parent)]
    for folder in (*([path] if path.is_absolute() else []), *nearby, path):
        is_tower = (folder / "config.json").is_file() and (not with_weights or has_weights(folder))
        if is_tower and folder.resolve() != checkpoint.resolve():
            return str(folder)
    return hub_id or (named if named in KNOWN_TOWERS else _KNOWN_BY_NAME.get(name, named))


def load_vision_tower(model_id: str, with_weights: bool) -> VisionTower:
    """Load a tower's settings and, where they are needed, open its weights.

    Args:
        model_id: folder or Hub id of a CLIP or SigLIP tower, or of the whole image-text model.
        with_weights: whether the weights are needed; without them a known id needs no download.

    Raises:
        DeltaLlavaError: not found, of an unsupported kind, or without the weights asked for.
    """
    if model_id in KNOWN_TOWERS and not with_weights and not Path(model_id).is_dir():
        config, _ = build_config(**KNOWN_TOWERS[model_id])
        return VisionTower(model_id, config, _default_image_processor(config))
    weights = ("model*.safetensors*",) if with_weights else ()
    folder = local_folder(model_id, "vision tower", _CONFIG_FILES + weights, "vision_tower")
    config = _tower_config(folder)
    image_processor = _image_processor(folder, config)
    checkpoint = None
    if with_weights:
        if not any(folder.glob("*.safetensors")):
            folder = local_folder(model_id, "vision tower", (*_CONFIG_FILES, "pytorch_model*.bin*"), "vision_tower")
        checkpoint = _tower_weights(folder)
    return VisionTower(public_name(model_id), config, image_processor, checkpoint)


def _tower_config(folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise DeltaLlavaError(
            f"The vision tower {folder.name} has no config.json; pass another folder or Hub id as `vision_tower=...`."
        )
    values = read_json(path)
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in _TOWER_OF:
        values, model_type = values.get("vision_config", {}), _TOWER_OF[model_type]
    if not isinstance(values, dict):
        raise DeltaLlavaError(f"The vision tower {folder.name} has a vision_config that is not a JSON object.")
    if model_type not in tuple(SELECT_STRATEGIES):  # it may be of any type, as JSON is
        known = ", ".join([*_TOWER_OF, *SELECT_STRATEGIES])
        raise DeltaLlavaError(f"The vision tower {folder.name} has model_type={show(model_type)}; use one of {known}.")
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
        mean, std = list(IMAGENET_STANDARD_MEAN), list(IMAGENET_STANDARD_STD)
        return {
            "image_processor_type": "SiglipImageProcessor",
            **common,
            "image_mean": mean,
            "image_std": std,
            "size": side,
        }
    is_clip = config.model_type == "clip_vision_model"
    return {
        "image_processor_type": "CLIPImageProcessor",
        **common,
        "crop_size": side,
        "do_center_crop": True,
        # DINOv2's own, BitImageProcessor, does the same with ImageNet's numbers.
        "image_mean": list(OPENAI_CLIP_MEAN if is_clip else IMAGENET_DEFAULT_MEAN),
        "image_std": list(OPENAI_CLIP_STD if is_clip else IMAGENET_DEFAULT_STD),
        "size": {"shortest_edge": config.image_size},
    }


def _image_processor(folder: Path, config: PreTrainedConfig) -> dict:
    """The family's preprocessing with what the folder's own file says differently."""
    settings = _default_image_processor(config)
    own = read_optional_json(folder / "preprocessor_config.json")
    for name in settings.keys() & own.keys() - {"image_processor_type", "size", "crop_size"}:
        settings[name] = own[name]
    for name in settings.keys() & own.keys() & {"size", "crop_size"}:
        sides = own[name].values() if isinstance(own[name], dict) else [own[name]]
        if any(side != config.image_size for side in sides):
            raise DeltaLlavaError(
                f"The vision tower {folder.name} disagrees with itself: config.json says image_size={config.image_size}, "
                f"preprocessor_config.json says {name}={own[name]}."
            )
    return settings
