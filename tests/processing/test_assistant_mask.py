"""Assistant masks hold exactly what is trained on, on every supported transformers, with placeholders expanded."""

from typing import Any

import pytest
import torch

from tests.tiny import ANSWER_ENDS
from transformers_delta_llava.processing import load_chat_template, processing_delta_llava


# One format of each kind.
FORMATS = ["vicuna_v1", "plain", "llava_llama_2", "llama3", "chatml_direct", "qwen3", "phi_3", "gemma"]
# The format writes a space between what opens an answer and the answer; the model writes it, so it is trained on.
GAP = {"vicuna_v1": " ", "llava_llama_2": " "}
OPTIONS = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "padding": True}


@pytest.fixture(params=["transformers' own", "made here"])
def way(request: Any, monkeypatch: Any) -> None:
    """Both ways on new transformers; older ones have only the second."""
    if request.param == "made here":
        monkeypatch.setattr(processing_delta_llava, "MASKS_EXPANDED_PLACEHOLDERS", False)


def chats(make_image: Any, name: str) -> list[list[dict[str, Any]]]:
    """Two rows: one with images in two turns (one where the format has one turn only), a shorter one with one image."""
    image = {"type": "image", "image": make_image()}
    long = [
        {"role": "user", "content": [image, image, {"type": "text", "text": "Which one?"}]},
        {"role": "assistant", "content": "The first, naïvely."},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}, image]},
        {"role": "assistant", "content": [{"type": "text", "text": "Neither."}]},
    ]
    short = [{"role": "user", "content": [image]}, {"role": "assistant", "content": "A cat."}]
    return [long[:2] if name == "plain" else long, short]


def masked(processor: Any, batch: Any) -> list[str]:
    """The text of the tokens of each row that the mask holds."""
    rows = zip(batch["input_ids"], batch["assistant_masks"], strict=True)
    return [processor.decode([i for i, keep in zip(ids, mask, strict=True) if keep]) for ids, mask in rows]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("budgets", [None, 9, [1, 16, 4, 9], "auto"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_masked_tokens_are_the_answers_with_their_ends(
    make_processor: Any, make_tokenizer: Any, make_image: Any, name: str, side: str, budgets: Any
) -> None:
    tokenizer = make_tokenizer(padding_side=side)
    processor = make_processor(tokenizer=tokenizer, chat_template=load_chat_template(name))
    if isinstance(budgets, list) and name == "plain":
        budgets = budgets[:3]
    kwargs = {"num_visual_tokens": budgets, "return_tensors": "pt"}
    batch = processor.apply_chat_template(chats(make_image, name), **OPTIONS, **kwargs)
    gap, end = GAP.get(name, ""), ANSWER_ENDS[name]
    first = f"{gap}The first, naïvely.{end}" + ("" if name == "plain" else f"{gap}Neither.{end}")
    assert masked(processor, batch) == [first, f"{gap}A cat.{end}"]
    assert batch["assistant_masks"].shape == batch["input_ids"].shape
    assert batch["pixel_values"].dtype == torch.float32
    assert not {"offset_mapping", "text_replacement_offsets"} & set(batch)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("how", ["default", "by name", "given"])
def test_masks_know_which_template_is_meant(make_processor: Any, make_image: Any, how: str) -> None:
    templates = {"default": load_chat_template("vicuna_v1"), "other": load_chat_template("phi_3")}
    processor = make_processor(chat_template=templates)
    chat = chats(make_image, "vicuna_v1")[1]
    chosen = {"default": None, "by name": "other", "given": load_chat_template("chatml")}[how]
    batch = processor.apply_chat_template(chat, chat_template=chosen, **OPTIONS)
    end = {"default": "</s>", "by name": "<|end|>", "given": "<|im_end|>"}[how]
    assert masked(processor, batch) == [(" A cat." if how == "default" else "A cat.") + end]
    assert isinstance(batch["assistant_masks"][0], list)


@pytest.mark.usefixtures("way")
def test_masks_fit_chats_without_images_and_templates_with_bos(make_processor: Any) -> None:
    processor = make_processor(chat_template=load_chat_template("vicuna_v1", bos=True))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    processor_kwargs = {"padding": True, "return_tensors": "pt"}
    options = {key: value for key, value in OPTIONS.items() if key != "padding"}
    batch = processor.apply_chat_template([chat, chat], **options, processor_kwargs=processor_kwargs)
    assert masked(processor, batch) == [" Ho</s>", " Ho</s>"]


@pytest.mark.usefixtures("way")
def test_a_mask_cut_off_by_truncation_is_empty(make_processor: Any) -> None:
    processor = make_processor(chat_template=load_chat_template("phi_3"))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    batch = processor.apply_chat_template(chat, **OPTIONS, truncation=True, max_length=3)
    assert batch["assistant_masks"] == [[0, 0, 0]]


def test_without_a_mask_nothing_changes(make_processor: Any, make_image: Any) -> None:
    processor = make_processor(chat_template=load_chat_template("vicuna_v1"))
    chat = chats(make_image, "vicuna_v1")[1]
    batch = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert processor.apply_chat_template(chat, tokenize=True) == batch["input_ids"]
