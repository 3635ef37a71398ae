"""Whatever happens is one sentence: exit code 2 where the input is bad, 1 where this package is."""

import pytest

from transformers_delta_llava.cli import inspect as inspect_command
from transformers_delta_llava.conversion import Inspection


class Panic(BaseException):
    """As tokenizers raises when its Rust code panics."""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("two\nlines."), 2, "delta-llava: two lines.\n"),
        (OSError(28, "No space left on device", "x"), 2, "delta-llava: No space left on device: x\n"),
        (ImportError("install peft"), 2, "delta-llava: install peft\n"),
        (
            ValueError("pass `base_model=...` or `overwrite=True`, not `x`"),
            2,
            "delta-llava: pass --base-model or --overwrite, not `x`\n",
        ),
        (
            KeyError("name"),
            1,
            "delta-llava: This should not happen (KeyError: there is no 'name'); run it again with ",
        ),
        (Panic("index out of bounds"), 1, "delta-llava: This should not happen (Panic: index out of bounds); run it"),
        (AssertionError(), 1, "delta-llava: This should not happen (AssertionError); run it again with --debug"),
        (MemoryError(), 1, "delta-llava: There is not enough memory (MemoryError).\n"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_one_sentence_and_a_traceback_where_asked_for(call, monkeypatch, error, code, message, debug):
    def fail(model):
        raise error

    monkeypatch.setattr(inspect_command, "inspect_model", fail)
    result, out, err = call("inspect", "x", *(["--debug"] if debug else []))
    assert (result, out) == (code, "")
    *traceback, sentence = err.splitlines(keepends=True)
    assert sentence.startswith(message)
    assert bool(traceback) == debug
    if debug:
        assert traceback[0].startswith("Traceback") and "in fail" in err


def test_names_from_files_do_nothing_to_the_terminal(call, monkeypatch):
    name = "\x1b]0;owned\x07[/bold]x"
    found = Inspection(name, "repo", {}, problems=[f"There is no {name}."])
    monkeypatch.setattr(inspect_command, "inspect_model", lambda model: found)
    code, out, _ = call("inspect", "x")
    assert code == 1
    assert "\x1b]" not in out and r"There is no \x1b]0;owned\x07[/bold]x." in out
