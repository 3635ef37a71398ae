"""A Hugging Face Space that shows the page of a model."""

import importlib.metadata
import json
import shutil
from importlib.resources import files
from pathlib import Path

from ..conversion.errors import ConversionError
from ..utils.files import write_json
from ..utils.hub import is_repo_id
from ..utils.output_folder import atomic_folder, check_output


# The versions that tests/integration/environments/app.txt has.
GRADIO, PYTHON = "6.31.0", "3.11"
# A folder that holds this file was written here, so it may be replaced.
MARKER = "space.json"
PACKAGE, DISTRIBUTION = "transformers_delta_llava", "transformers-delta-llava"
README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
models:
- {model}
license: apache-2.0
---

The page of [{model}](https://huggingface.co/{model}): upload a picture, ask, and choose how many visual tokens the model gets.

Written by `delta-llava space`. `{package}/` is the code of {distribution} {version}, as it was installed there; the model's weights
are read from the Hub when the Space starts.
"""
APP = '''"""The page of {model}. Written by `delta-llava space`."""

import os

import torch

from {package}.serving import launch_app


on_gpu = torch.cuda.is_available()
launch_app(
    os.environ.get("DELTA_LLAVA_MODEL", "{model}"),
    num_visual_tokens={num_visual_tokens},
    device="cuda" if on_gpu else "cpu",
    dtype="bfloat16" if on_gpu else "float32",
)
'''


def write_space(
    folder: Path,
    model: str,
    title: str | None = None,
    num_visual_tokens: int | None = None,
    overwrite: bool = False,
) -> None:
    """
    Write the folder of a Gradio Space: README.md with its settings, app.py, requirements.txt, and this package's code.

    The package itself goes in because a Space can only install what a registry or a public repository has. The model is not
    looked at: it need not be published yet.

    Args:
        folder: appears complete or not at all.
        model: Hub id. The Space's variable `DELTA_LLAVA_MODEL`, a Hub id or a path there, takes precedence.
        title: of the Space; by default the model's name.
        num_visual_tokens: where the slider stands at first; by default the model's.
        overwrite: replace a folder that this function wrote.

    Raises:
        ValueError: no Hub id, a folder that exists, or the package's metadata are not to be had.
    """
    if not is_repo_id(model):
        raise ConversionError(f"{model} is not a Hub id of the form owner/name.")
    package = Path(str(files(PACKAGE)))
    check_output(folder, [package], overwrite, MARKER)
    about = {
        "model": model,
        "package": PACKAGE,
        "distribution": DISTRIBUTION,
        "version": importlib.metadata.version(DISTRIBUTION),
        "gradio": GRADIO,
        "python": PYTHON,
        "num_visual_tokens": num_visual_tokens,
        "title": json.dumps(title or model.partition("/")[2], ensure_ascii=False),  # JSON strings are YAML, too
    }
    with atomic_folder(folder, overwrite, MARKER) as growing:
        (growing / "README.md").write_text(README.format(**about), encoding="utf-8")
        (growing / "app.py").write_text(APP.format(**about), encoding="utf-8")
        (growing / "requirements.txt").write_text("".join(f"{line}\n" for line in _requirements()), encoding="utf-8")
        (growing / "LICENSE").write_text(_licence(package), encoding="utf-8")
        shutil.copytree(package, growing / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        write_json({name: about[name] for name in ("model", "version", "gradio")}, growing / MARKER)


def _requirements() -> list[str]:
    """What the package needs, without its extras; Gradio is the Space's SDK."""
    lines = importlib.metadata.requires(DISTRIBUTION) or []
    return sorted(line for line in lines if "extra ==" not in line)


def _licence(package: Path) -> str:
    """The text of the package's licence, which goes wherever its code goes."""
    installed = importlib.metadata.distribution(DISTRIBUTION).read_text("licenses/LICENSE")
    return installed or (package.parents[1] / "LICENSE").read_text(
        encoding="utf-8"
    )  # an editable install of a checkout
