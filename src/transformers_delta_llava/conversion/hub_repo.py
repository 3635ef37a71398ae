"""The files of a Hub repo beside its weights."""

from pathlib import Path

from ..modeling import DeltaLlavaConfig
from ..utils.files import write_json
from .tokenizer import IMAGE_TOKEN


MODEL_CLASS = "DeltaLlavaForConditionalGeneration"
PROCESSOR_CLASS = "DeltaLlavaProcessor"


def write_config(config: DeltaLlavaConfig, folder: Path) -> None:
    """Write `config.json`; the auto_map in it comes from the config class."""
    config.architectures = [MODEL_CLASS]
    config.to_json_file(folder / "config.json")


def write_processor(config: DeltaLlavaConfig, image_processor: dict, do_pad: bool, folder: Path) -> None:
    """Write `processor_config.json`, from which AutoProcessor finds the processor's code."""
    settings = {
        "auto_map": {"AutoProcessor": f"processing_delta_llava.{PROCESSOR_CLASS}"},
        "do_pad": do_pad,
        "image_processor": image_processor,
        "image_seq_length": config.num_visual_tokens,
        "image_token": IMAGE_TOKEN,
        "num_visual_tokens": config.num_visual_tokens,
        "processor_class": PROCESSOR_CLASS,
        "visual_token_budgets": list(config.visual_token_budgets),
    }
    write_json(settings, folder / "processor_config.json")
