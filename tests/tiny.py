"""Tiny configs and inputs that every test of the models shares."""

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from transformers_delta_llava import DeltaLlavaConfig, DeltaLlavaProcessor
from transformers_delta_llava.processing import load_chat_template


IMAGE_TOKEN_ID = 99
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 2,
}
TEXT = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 100,
    "pad_token_id": 0,
    "eos_token_id": None,
}
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>"]
SPECIAL += ["<|end|>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
# What ends an answer in each conversation format.
ANSWER_ENDS = {
    "vicuna_v1": "</s>",
    "plain": "\n",
    **dict.fromkeys(["llama_2", "llava_llama_2", "mistral_instruct"], " </s>"),
    **dict.fromkeys(["llama3", "hermes-4"], "<|eot_id|>"),
    **dict.fromkeys(["hermes-2", "chatml_direct", "mpt", "chatml", "qwen3"], "<|im_end|>"),
    "phi_3": "<|end|>",
    "gemma": "<end_of_turn>\n<eos>",
}


def tiny_config(vision: dict | None = None, text: dict | None = None, **overrides) -> DeltaLlavaConfig:
    """A 12 x 12 grid, so the budgets are 144, 36, 16, 9, 4 and 1; 36 by default."""
    overrides.setdefault("vision_feature_levels", [1, 2, 3])
    return DeltaLlavaConfig(
        vision_config={**VISION, **(vision or {})},
        text_config={**TEXT, **(text or {})},
        image_token_id=IMAGE_TOKEN_ID,
        **overrides,
    )


def prompt(budgets: list[int], num_text_tokens: int = 4, seed: int = 0) -> torch.Tensor:
    """A (sequence,) of ids: text, and for each budget its placeholders and more text."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randint(1, 98, (3,), generator=generator)]
    for budget in budgets:
        parts.append(torch.full((budget,), IMAGE_TOKEN_ID))
        parts.append(torch.randint(1, 98, (num_text_tokens,), generator=generator))
    return torch.cat(parts)


def noise(width: int = 24, height: int = 24, seed: int = 0) -> Image.Image:
    """An image of which auto keeps all, always the same."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def left_pad(rows: list[torch.Tensor], pad_token_id: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of rows of different lengths, padded on the left."""
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, length - len(row) :] = row
        attention_mask[index, length - len(row) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def make_tokenizer(
    add_bos: bool = True, padding_side: str = "left", special: list[str] = SPECIAL
) -> PreTrainedTokenizerFast:
    """One token per byte, so that every token is known by its characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if add_bos:
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side=padding_side,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_image_processor(side: int = 24, **options: object) -> CLIPImageProcessorPil:
    """CLIP's image processor at a small size, in the form that needs no torchvision."""
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return CLIPImageProcessorPil(**{**sizes, **options})


def tiny_processor(config: DeltaLlavaConfig) -> DeltaLlavaProcessor:
    """A processor for `tiny_config`: 90 letters and signs, one token each, and what a chat template needs."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(33 + index): 3 + index for index in range(90)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary | {"<unk>": 93}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    fast.add_tokens([f"<unused{index}>" for index in range(IMAGE_TOKEN_ID - len(fast))])
    fast.add_tokens(["<image>"], special_tokens=True)
    return DeltaLlavaProcessor(
        make_image_processor(config.vision_config.image_size, do_center_crop=True),
        fast,
        chat_template=load_chat_template("vicuna_v1"),
        num_visual_tokens=config.num_visual_tokens,
        visual_token_budgets=config.visual_token_budgets,
    )
