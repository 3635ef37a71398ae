"""Any error becomes one printable sentence."""

import pytest
from pydantic import Field

from transformers_delta_llava.utils.errors import DeltaLlavaError, format_names, one_line
from transformers_delta_llava.utils.validation import FileModel, validate


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\n  lines."), "two lines"),
        (ValueError(), "ValueError"),
        (KeyError("a"), "there is no 'a'"),
        (OSError(28, "No space left on device", "a/b"), "No space left on device: a/b"),
        (OSError("plain"), "plain"),
        (ValueError("\x1b[2J\u202e\ud800"), r"\x1b[2J\u202e\ud800"),
        (ValueError(600 * "x"), 497 * "x"),
    ],
)
def test_one_line(error, text):
    assert one_line(error) == text


def test_names_are_shortened_and_printable():
    assert format_names(["b", "\x1b]0;a", 300 * "c"]) == rf"\x1b]0;a, b, {197 * 'c'}..."
    assert format_names(map(str, range(25))).endswith(" and 5 more")


class Settings(FileModel):
    """For the tests."""

    rank: int = Field(ge=1)
    name: str
    alpha: float = 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0, "name": "a"}, "x.json: rank=0: input should be greater than or equal to 1."),
        ({"rank": True, "name": "a"}, "x.json: rank=True: input should be a valid integer."),
        ({"rank": "1", "name": 5}, "x.json: rank='1': input should be a valid integer; name=5: input should be"),
        ({"rank": 1}, "x.json: name is missing."),
        ({"rank": 1, "name": "a", "alpha": 10**400}, "x.json: alpha=100000"),
        ({"rank": 1, "name": "a", "alpha": float("inf")}, "x.json: alpha=inf: input should be a finite number."),
        ({"rank": 10**5000, "name": 1}, "x.json: name=1"),
        ([], "x.json: "),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_key_and_value(values, message):
    with pytest.raises(DeltaLlavaError) as caught:
        validate(Settings, values, "x.json")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_values_that_fit():
    assert validate(Settings, {"rank": 1, "name": "a", "alpha": 16, "other": []}, "x").alpha == 16.0
