"""What engines ask of the model's code, checked without them; tests/integration starts the engines themselves."""

import re

from tests.tiny import tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel


def test_the_base_model_claims_no_weight_of_the_head():
    """vLLM builds the base model and drops what that says to ignore, the head's weights too."""
    patterns = DeltaLlavaModel._keys_to_ignore_on_load_unexpected or []
    names = DeltaLlavaForConditionalGeneration(tiny_config()).state_dict()
    assert not [name for name in names for pattern in patterns if re.search(pattern, name)]
