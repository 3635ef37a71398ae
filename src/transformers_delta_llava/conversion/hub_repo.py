"""The files of a Hub repo beside its weights."""

import shutil
from pathlib import Path

from .. import modeling, processing
from ..modeling import DeltaLlavaConfig
from ..utils.files import write_json
from .tokenizer import IMAGE_TOKEN


MODEL_CLASS = "DeltaLlavaForConditionalGeneration"
PROCESSOR_CLASS = "DeltaLlavaProcessor"


def write_code(folder: Path) -> None:
    """Copy the modules of the model and the processor, verbatim and flat."""
    for package in (modeling, processing):
        for file in sorted(Path(str(package.__file__)).parent.glob("*.py")):
            if file.name != "__init__.py":
                shutil.copyfile(file, folder / file.name)


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
