"""On every transformers but the oldest, a deprecation that our code causes fails the test that meets it.

A published repo carries its code. What is deprecated today breaks it later, so it is mended before it is published.
"""

import gc
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.cli.main import main
from transformers_delta_llava.conversion import convert_checkpoint


pytest_plugins = ["tests.checkpoints"]
ROOT = Path(__file__).parents[1]
_PINS = ROOT / "constraints-oldest.txt"
OLDEST = re.findall(r"transformers==([\d.]+)", _PINS.read_text(encoding="utf-8"))[0]
# Deprecations that our code cannot avoid, as regular expressions, and why.
ALLOWED = {
    r"`gradient_checkpointing_enable` is deprecated": "the only name that the whole span has; tests call it as users do",
    r"`is_gradient_checkpointing` is deprecated": "PEFT and Trainer read it",
    r"`torch\.jit\.script.*` is deprecated": "torch.compile itself",
    r"Use 'content=<": "huggingface_hub itself, when it uploads",
    r"_compile flag on create_block_mask": "transformers itself, for flex attention",
}


def pytest_configure(config: pytest.Config) -> None:
    if transformers.__version__ != OLDEST:
        for category in ("FutureWarning", "DeprecationWarning"):
            config.addinivalue_line("filterwarnings", f"error::{category}")
        for pattern in ALLOWED:
            config.addinivalue_line("filterwarnings", f"ignore:.*{pattern}")


class Deprecations(logging.Handler):
    """Keeps the messages that announce a deprecation."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def logged_deprecations() -> Iterator[list[str]]:
    """What transformers logs as deprecated during a test. The test may empty the list; what is left fails it."""
    if transformers.__version__ == OLDEST:
        yield []
        return
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # or only the first test would hear of it
    handler, logger = Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)
    assert not handler.messages


@pytest.fixture(scope="session", autouse=True)
def frozen_garbage() -> None:
    """Trainer collects garbage in every run, which takes a second where all of transformers is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model() -> DeltaLlavaForConditionalGeneration:
    """A model of `tiny_config`, seed 0. Only to be read."""
    torch.manual_seed(0)
    return DeltaLlavaForConditionalGeneration(tiny_config()).eval()


@pytest.fixture(scope="session")
def processor(tiny_model: DeltaLlavaForConditionalGeneration) -> DeltaLlavaProcessor:
    """Its processor. Only to be read."""
    return tiny_processor(tiny_model.config)


@pytest.fixture(scope="session")
def tiny_repo(
    tiny_model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder `tiny` of both. Only to be read."""
    folder = tmp_path_factory.mktemp("repos") / "tiny"
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def easy_vqa_repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, converted. Only to be read."""
    folder = tmp_path_factory.mktemp("repos") / "easy-vqa"
    convert_checkpoint(ROOT / "examples" / "easy-vqa", folder)
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `delta-llava` with arguments; returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["delta-llava", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "140")
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run
