"""The files of a Hub repo beside its weights."""

import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .. import modeling, processing
from ..modeling import DeltaLlavaConfig
from ..processing import CHAT_TEMPLATES, load_chat_template
from ..utils.errors import explain_errors
from ..utils.files import read_text, write_json
from ..utils.templates import check_template, time_limit
from .errors import ConversionError
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


def read_chat_template(name_or_file: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt format by name, or from a Jinja file of the user's own.

    Raises:
        ConversionError: it is neither a name nor a file, or the file does not render a plain conversation.
    """
    if name_or_file in CHAT_TEMPLATES:
        adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]
        return load_chat_template(name_or_file, bos=adds_bos)
    path = Path(name_or_file)
    if not path.is_file():
        names = ", ".join(CHAT_TEMPLATES)
        raise ConversionError(f"The chat template {name_or_file} is neither a file nor one of {names}.")
    template, what = read_text(path), f"The chat template {path.name}"
    check_template(template, what)
    with explain_errors(f"{what} does not render a conversation"), time_limit(what):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], chat_template=template, tokenize=False)
    return template
