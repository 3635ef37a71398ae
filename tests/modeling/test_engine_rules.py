"""What engines need from the model's class, checked without them; tests/integration starts the engines themselves."""

from transformers_delta_llava import DeltaLlavaModel


def test_the_base_model_ignores_no_weights():
    """vLLM builds the base model and drops the weights that match these patterns, `lm_head` too if it were listed."""
    assert not DeltaLlavaModel._keys_to_ignore_on_load_unexpected
