"""One `<image>` becomes exactly as many placeholders as the model fills, whatever budget is chosen and how."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline
from transformers.utils.chat_template_utils import Chat

from transformers_delta_llava.processing import load_chat_template


def counts(processor: Any, batch: Any) -> list[int]:
    """Placeholders per row."""
    return [list(row).count(processor.image_token_id) for row in batch["input_ids"]]


def test_the_default_budget_is_not_announced(processor: Any, make_image: Any) -> None:
    batch = processor(images=make_image(), text="a <image>\nb", return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert processor.decode(batch["input_ids"][0]) == "<s>a <image><image><image><image>\nb"
    for budget in (None, 4, [4]):
        assert "num_visual_tokens" not in processor(images=make_image(), text="<image>", num_visual_tokens=budget)


@pytest.mark.parametrize("budget", [576, 144, 64, 36, 16, 9, 1])
def test_every_other_budget_is_announced_per_image(processor: Any, make_image: Any, budget: int) -> None:
    images = [make_image(), make_image(9, 9)]
    batch = processor(images=images, text="<image> and <image>", num_visual_tokens=budget, return_tensors="pt")
    assert counts(processor, batch) == [2 * budget]
    assert batch["num_visual_tokens"].tolist() == [budget, budget]
    assert batch["num_visual_tokens"].dtype == torch.int64


@pytest.mark.parametrize(
    "budgets",
    [[1, 4, 9], (1, 4, 9), np.array([1, 4, 9]), torch.tensor([1, 4, 9]), [np.int64(1), 4, np.int32(9)]],
    ids=["list", "tuple", "array", "tensor", "numpy integers"],
)
def test_every_image_can_have_its_own_budget(processor: Any, make_image: Any, budgets: Any) -> None:
    texts = ["<image>", "none", "<image> <image>"]
    images = [make_image(seed=i) for i in range(3)]
    batch = processor(images=images, text=texts, num_visual_tokens=budgets, padding=True, return_tensors="pt")
    assert counts(processor, batch) == [1, 0, 13]
    assert batch["num_visual_tokens"].tolist() == [1, 4, 9]
    assert processor.decode(batch["input_ids"][2]) == "<s>" + "<image>" * 4 + " " + "<image>" * 9


@pytest.mark.parametrize("budget", [np.int64(9), torch.tensor(9), np.array(9)])
def test_a_number_may_be_numpys_or_torchs(processor: Any, make_image: Any, budget: Any) -> None:
    batch = processor(images=[make_image()] * 2, text="<image><image>", num_visual_tokens=budget)
    assert batch["num_visual_tokens"] == [9, 9]


BAD_BUDGETS = {
    "not of this grid": (100, "num_visual_tokens=100 .* 576, 144, 64, 36, 16, 9"),
    "zero": (0, "=0 "),
    "very large": (2**70, "not supported"),
    "bool": (True, "=True "),
    "float": (4.0, "=4.0 "),
    "word": ("4", "='4' "),
    "too few": ([4], "1 entries for 2 images"),
    "too many": ([4, 4, 4], "3 entries for 2 images"),
    "none": ([], "0 entries for 2 images"),
    "bad entry": ([4, 5], "=5 "),
    "missing entry": ([4, None], "=None "),
    "float tensor": (torch.tensor([4.0, 4.0]), "=4.0 "),
    "nested": (torch.tensor([[4], [4]]), r"=\[4\] "),
}


@pytest.mark.parametrize("case", BAD_BUDGETS)
def test_a_bad_budget_is_refused(processor: Any, make_image: Any, case: str) -> None:
    budget, message = BAD_BUDGETS[case]
    with pytest.raises(ValueError, match=message):
        processor(images=[make_image()] * 2, text="<image><image>", num_visual_tokens=budget)
    with pytest.raises(ValueError, match=message):
        processor._get_num_multimodal_tokens(image_sizes=[(9, 9), (9, 9)], num_visual_tokens=budget)


CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


def chat(image: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_visual_tokens": 9},
        {"num_visual_tokens": [9]},
        {"processor_kwargs": {"num_visual_tokens": 9}},
        {"processor_kwargs": {"num_visual_tokens": [9]}},
        {"processor_kwargs": {"images_kwargs": {"num_visual_tokens": 9}}},
    ],
)
def test_budgets_reach_the_processor_through_chat_templates_and_pipelines(
    make_processor: Any, make_image: Any, kwargs: dict[str, Any]
) -> None:
    processor = make_processor(chat_template=load_chat_template("vicuna_v1"))
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = processor.apply_chat_template(chat(make_image()), **options, **kwargs)
    assert counts(processor, batch) == [9]
    assert batch["num_visual_tokens"].tolist() == [9]

    pipeline = object.__new__(ImageTextToTextPipeline)  # its way to the processor needs no model
    pipeline.processor, pipeline.model = processor, SimpleNamespace(dtype=torch.float32)
    preprocess_kwargs, _, _ = pipeline._sanitize_parameters(**kwargs)
    inputs = pipeline.preprocess(Chat(chat(make_image())), **preprocess_kwargs)
    assert inputs["num_visual_tokens"].tolist() == [9]
    assert inputs["input_ids"].tolist() == batch["input_ids"].tolist()


@pytest.mark.parametrize("budget", [9, [9, 9]])
def test_budgets_may_come_among_the_images_arguments(processor: Any, make_image: Any, budget: Any) -> None:
    kwargs = {"images_kwargs": {"num_visual_tokens": budget, "do_pad": False}, "text_kwargs": {"padding": True}}
    images = [make_image(60, 20)] * 2
    batch = processor(images=images, text=["<image>", "<image>."], return_tensors="pt", **kwargs)
    assert counts(processor, batch) == [9, 9]
    unpadded = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], unpadded)


# What engines ask of a processor.


def test_engines_are_told_the_same_counts_as_callers(processor: Any, make_image: Any) -> None:
    sizes = [(30, 40), (9, 9)]
    for kwargs in ({}, {"num_visual_tokens": 16}, {"num_visual_tokens": [1, 9]}, {"images_kwargs": {"do_pad": False}}):
        told = processor._get_num_multimodal_tokens(image_sizes=sizes, **kwargs)
        images = [make_image(width, height) for height, width in sizes]
        batch = processor(images=images, text=["<image>", "<image>"], **kwargs)
        assert told["num_image_tokens"] == counts(processor, batch)
        assert told["num_image_patches"] == [1, 1]
    nested = processor._get_num_multimodal_tokens(image_sizes=sizes, images_kwargs={"num_visual_tokens": 9})
    assert nested["num_image_tokens"] == [9, 9]
    assert processor._get_num_multimodal_tokens()["num_image_tokens"] is None


def test_expansion_goes_through_get_text_with_replacements(processor: Any, make_image: Any, monkeypatch: Any) -> None:
    seen = []
    expand = processor.get_text_with_replacements

    def spy(text: Any, images_replacements: Any = (), *rest: Any) -> Any:
        seen.append(list(images_replacements))
        return expand(text, images_replacements, *rest)

    monkeypatch.setattr(processor, "get_text_with_replacements", spy)
    processor(images=[make_image()] * 2, text="<image><image>", num_visual_tokens=[1, 9])
    assert seen == [["<image>", "<image>" * 9]]


def test_mm_token_type_ids_mark_the_placeholders(processor: Any, make_image: Any) -> None:
    batch = processor(images=make_image(), text="a<image>b", return_mm_token_type_ids=True, return_tensors="pt")
    assert batch["mm_token_type_ids"].tolist() == [[0, 0, 1, 1, 1, 1, 0]]


def test_input_names_start_with_text_and_hold_all_that_the_model_may_get(processor: Any) -> None:
    names = ["input_ids", "attention_mask", "pixel_values", "num_visual_tokens"]
    videos = ["pixel_values_videos", "num_visual_tokens_videos", "video_grid_thw"]
    assert processor.model_input_names == [*names, *videos, "image_grid_thw"]


# Texts and images.


def test_rows_with_several_images_one_and_none(processor: Any, make_image: Any) -> None:
    three = [make_image(seed=i) for i in range(3)]
    texts = ["<image> to <image>", "no image", "<image>"]
    alone = torch.cat([processor(images=image, return_tensors="pt")["pixel_values"] for image in three])
    by_row = [three[:2], [], three[2:]]
    for images in (three, by_row, tuple(by_row), [three[:2], None, three[2]], [*three, None][:3]):
        batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
        assert counts(processor, batch) == [8, 0, 4]
        assert torch.equal(batch["pixel_values"], alone)
    batch = processor(images=[None, three[0]], text=("none", "<image>"), padding=True, return_tensors="pt")
    assert counts(processor, batch) == [0, 4]


def test_text_alone_and_images_alone(processor: Any, make_image: Any) -> None:
    assert set(processor(text="just words")) == {"input_ids", "attention_mask"}
    for nothing in (None, [], [[]], [None], [[], []]):
        assert "pixel_values" not in processor(text=["just", "words"], images=nothing)
    assert set(processor(images=[make_image()])) == {"pixel_values"}
    batch = processor(images=[make_image()] * 2, num_visual_tokens=[4, 9], return_tensors="pt")
    assert batch["num_visual_tokens"].tolist() == [4, 9]
    array = np.zeros((2, 8, 8, 3), np.uint8)
    assert processor(images=array, text="<image><image>", return_tensors="pt")["pixel_values"].shape[0] == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_side_the_tokenizer_says(
    make_processor: Any, make_tokenizer: Any, make_image: Any, side: str
) -> None:
    processor = make_processor(tokenizer=make_tokenizer(padding_side=side))
    batch = processor(images=make_image(), text=["<image>", "long text"], padding=True, return_tensors="pt")
    kept = 5  # BOS and four placeholders
    padding = [0] * (batch["attention_mask"].shape[1] - kept)
    assert batch["attention_mask"][0].tolist() == (padding + [1] * kept if side == "left" else [1] * kept + padding)


@pytest.mark.parametrize(
    ("texts", "images"), [("<image>", 0), ("no image", 1), ("<image><image>", 1), (["<image>", "<image>"], 3)]
)
def test_texts_and_images_that_do_not_fit_are_refused(
    processor: Any, make_image: Any, texts: Any, images: int
) -> None:
    with pytest.raises(ValueError, match="<image>"):
        processor(images=[make_image()] * images, text=texts)


def test_nothing_at_all_is_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="at least one input"):
        processor()


def test_truncation_through_the_placeholders_is_refused(processor: Any, make_image: Any) -> None:
    with pytest.raises(ValueError, match="truncation"):
        processor(images=make_image(), text="<image>", truncation=True, max_length=3)


# Construction.


@pytest.mark.parametrize("budget", [5, 0, True, 4.0, "4", None, [4, 5]])
def test_the_default_budget_must_be_one_of_the_grids(make_processor: Any, budget: Any) -> None:
    with pytest.raises(ValueError, match="num_visual_tokens"):
        make_processor(num_visual_tokens=budget)


def test_the_image_token_must_be_a_token_of_its_own(make_processor: Any, make_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"'<image>' is not one token; .*add_tokens"):
        make_processor(tokenizer=make_tokenizer(special=["<s>", "</s>", "<pad>"]))


def test_another_image_token(make_processor: Any, make_tokenizer: Any, make_image: Any) -> None:
    tokenizer = make_tokenizer(special=["<s>", "</s>", "<pad>", "<img>"])
    processor = make_processor(tokenizer=tokenizer, image_token="<img>")
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("<img>")
    batch = processor(images=make_image(), text="<img> <image>")
    assert counts(processor, batch) == [4]


def test_a_default_that_is_not_the_models_is_announced(make_processor: Any, make_image: Any) -> None:
    processor = make_processor(num_visual_tokens=9, image_seq_length=4)
    batch = processor(images=make_image(), text="<image>", return_tensors="pt")
    assert counts(processor, batch) == [9]
    assert batch["num_visual_tokens"].tolist() == [9]
    assert "num_visual_tokens" not in processor(images=make_image(), text="<image>", num_visual_tokens=4)
    # An engine loads the processor with what one request says.
    processor = make_processor(num_visual_tokens=[1, 9], image_seq_length=4)
    assert processor._get_num_multimodal_tokens(image_sizes=[(9, 9)] * 2)["num_image_tokens"] == [1, 9]
    images = {"images": [make_image()] * 2, "text": "<image><image>"}
    assert counts(processor, processor(**images, numbers_per_image=True)) == [10]
    with pytest.raises(ValueError, match=r"num_visual_tokens=\[1, 9\]: .* numbers_per_image=True"):
        processor(**images)
    assert counts(processor, make_processor(num_visual_tokens=[9, 9], image_seq_length=4)(**images)) == [18]
