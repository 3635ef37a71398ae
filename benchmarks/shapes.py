"""Configs of the sizes that are measured: Qwen2-0.5B, Vicuna-7B and Vicuna-13B with CLIP-L/14 at 336 px, and a tiny one."""

from typing import Any

from transformers_delta_llava import DeltaLlavaConfig
from transformers_delta_llava.modeling.configuration_delta_llava import DEFAULT_VISION_CONFIG


SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {"model_type": "llama", "vocab_size": 32064},
    "13b": {
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32064,
    },
}
TINY_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY_TEXT = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "eos_token_id": None,
}


def model_config(shape: str, text: dict[str, Any] | None = None, **fields: Any) -> DeltaLlavaConfig:
    """The config of `tiny`, `0.5b`, `7b` or `13b`, with fused attention; `text` replaces its language model, `fields` the rest."""
    vision, text = DEFAULT_VISION_CONFIG, text or SHAPES.get(shape, TINY_TEXT)
    if shape == "tiny":
        vision = {**vision, **TINY_VISION}
        fields = {"vision_feature_levels": [1, 2, 3], "projector_head_dim": 16, "image_token_id": 511, **fields}
    config = DeltaLlavaConfig(vision_config=vision, text_config=text, **fields)
    config.vision_config._attn_implementation = "sdpa"
    return config
