"""An exception is one line and an exit code; the command line starts without torch."""

import subprocess
import sys

import pytest

from transformers_delta_llava import conversion
from transformers_delta_llava.cli.main import split_values
from transformers_delta_llava.errors import DeltaLlavaError


class Panic(BaseException):
    """As tokenizers raises when its Rust code panics."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DeltaLlavaError("two\nlines\x1b]0;owned"), 2, "two lines\\x1b]0;owned"),
        (OSError(28, "No space left on device", "x"), 2, "OSError: No space left on device: x"),
        (ImportError("install peft"), 2, "ImportError: install peft"),
        (KeyError("name"), 1, "KeyError: 'name'"),
        (Panic("index out of bounds"), 1, "Panic: index out of bounds"),
        (MemoryError(), 1, "MemoryError: MemoryError"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_one_line_and_a_traceback_where_asked_for(call, monkeypatch, error, code, message, debug):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(conversion, "inspect_model", fail)
    result, out, err = call("inspect", "x", *(["--debug"] if debug else []))
    *traceback, line = err.splitlines()
    assert (result, out, line) == (code, "", f"delta-llava inspect: {message}")
    assert bool(traceback) == debug


@pytest.mark.parametrize("option", ["--help", "--version", "generate --help"])
def test_help_imports_neither_torch_nor_transformers(option):
    code = "import sys; from transformers_delta_llava.cli.main import main\n"
    code += f"sys.argv = ['delta-llava', *{option.split()}]\n"
    code += "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
    code += "assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_importing_the_package_registers_the_classes_where_transformers_is_there():
    code = "import transformers, transformers_delta_llava as package\n"
    code += "assert transformers.AutoConfig.for_model('delta_llava').__class__ is package.DeltaLlavaConfig"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_option_takes_several_values():
    split = split_values(
        ["generate", "repo", "--num-visual-tokens", "16", "auto", "1", "a.png", "--dtype", "bfloat16"]
    )
    repeated = ["--num-visual-tokens", "16", "--num-visual-tokens", "auto", "--num-visual-tokens", "1"]
    assert split == ["generate", "repo", *repeated, "a.png", "--dtype", "bfloat16"]
