"""Prompts that are too long are refused before they are encoded whole."""

from types import SimpleNamespace

import pytest

from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava.utils.errors import DeltaLlavaError
from transformers_delta_llava.utils.prompts import check_prompt, check_texts, max_prompt_tokens


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 100),
        ({"rope_type": "default", "rope_theta": 10000.0}, 100),
        ({"rope_type": "linear", "factor": 4.0}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 10}, 100),
        ({"rope_type": "longrope", "original_max_position_embeddings": 10}, 100),
    ],
)
def test_the_positions_of_a_model(rope, expected):
    text = SimpleNamespace(max_position_embeddings=100, rope_parameters=rope)
    assert max_prompt_tokens(SimpleNamespace(get_text_config=lambda: text)) == expected


def test_models_that_do_not_say_and_models_that_do():
    assert max_prompt_tokens(SimpleNamespace(get_text_config=SimpleNamespace)) is None
    assert max_prompt_tokens(tiny_config(text={"max_position_embeddings": 77})) == 77
    check_texts(["a" * 1000], None, None)
    check_prompt(10**9, None)


class Counting:
    """A tokenizer of one token per character that knows how much it was given."""

    given = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.given += len(text)
        return [0] * len(text)


@pytest.mark.parametrize("texts", [["a" * 10**7], ["a" * 200] * 10**5, ["short", "a" * 10**6]])
def test_a_long_text_is_not_encoded_whole(texts):
    tokenizer = Counting()
    with pytest.raises(DeltaLlavaError, match="^The prompt is too long: it has more than 100 tokens"):
        check_texts(texts, tokenizer, 100)
    assert tokenizer.given <= 1000


def test_texts_that_fit_pass_however_they_are_cut():
    tokenizer = tiny_processor(tiny_config()).tokenizer
    check_texts(["a" * 100], tokenizer, 100)
    check_texts(["a" * 60, "a" * 40], tokenizer, 100)
    with pytest.raises(DeltaLlavaError):
        check_texts(["a" * 102], tokenizer, 100)
    with pytest.raises(DeltaLlavaError, match="half a character"):
        check_texts(["a \ud800"], tokenizer, 100)
    check_prompt(100, 100)
    with pytest.raises(DeltaLlavaError, match="it has 101 tokens, and the model has 100 positions"):
        check_prompt(101, 100)
