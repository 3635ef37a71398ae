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
    "not of this grid": (
        100,
        r"num_visual_tokens=100: this model cannot give it; use one of 576, 144, 64, 36, 16, 9",
    ),
    "zero": (0, "num_visual_tokens=0: this model cannot give it"),
    "negative": (-4, "num_visual_tokens=-4: this model cannot give it"),
    "bool": (True, "must be an integer or 'auto', or one per image, not True"),
    "float": (4.0, "must be an integer or 'auto', or one per image, not 4.0"),
    "string": ("4", "must be an integer or 'auto', or one per image, not '4'"),
    "dict": ({"a": 4}, "must be an integer"),
    "too few": ([4], "has 1 entries for 2 images"),
    "too many": ([4, 4, 4], "has 3 entries for 2 images"),
    "none": ([], "has 0 entries for 2 images"),
    "bad entry": ([4, 5], "num_visual_tokens=5: this model cannot give it"),
    "missing entry": ([4, None], "must be an integer or 'auto', or one per image, not None"),
    "float tensor": (torch.tensor([4.0, 4.0]), "must be an integer"),
    "bool tensor": (torch.tensor([True, True]), "must be an integer"),
    "two dimensions": (torch.tensor([[4], [4]]), "must be an integer"),
    "one entry too deep": (torch.tensor([[4, 4]]), "has 1 entries for 2 images"),
    "numpy's float": (np.float32(4), "must be an integer"),
    "complex": (4 + 0j, "must be an integer"),
    "not a number": (float("nan"), "must be an integer"),
    "bytes": (b"4", "must be an integer"),
    "set": ({4}, "must be an integer"),
    "iterator": (iter([4, 4]), "must be an integer"),
    "generator": ((four for four in (4, 4)), "must be an integer"),
    "very large": (2**70, "this model cannot give it"),
    "empty array": (np.array([], np.int64), "has 0 entries for 2 images"),
}


@pytest.mark.parametrize("case", BAD_BUDGETS)
def test_a_bad_budget_is_refused_in_one_sentence(processor: Any, make_image: Any, case: str) -> None:
    budget, message = BAD_BUDGETS[case]
    images = [make_image()] * 2
    with pytest.raises(ValueError, match=message) as caught:
        processor(images=images, text="<image><image>", num_visual_tokens=budget)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        processor._get_num_multimodal_tokens(image_sizes=[(9, 9), (9, 9)], num_visual_tokens=budget)


@pytest.mark.parametrize("case", [case for case in BAD_BUDGETS if "entries" not in BAD_BUDGETS[case][1]])
def test_a_bad_budget_is_refused_without_images_too(processor: Any, case: str) -> None:
    budget, message = BAD_BUDGETS[case]
    for kwargs in ({"num_visual_tokens": budget}, {"images_kwargs": {"num_visual_tokens": budget}}):
        with pytest.raises(ValueError, match=message):
            processor(text="no image", **kwargs)
    # A batch's chats may have an image or none: a list is not counted there.
    assert "num_visual_tokens" not in processor(text="no image", num_visual_tokens=[4, 9])


@pytest.mark.parametrize("flag", ["False", "no", 0, 1, 3.5, [True]])
def test_do_pad_must_be_true_or_false(processor: Any, make_processor: Any, make_image: Any, flag: Any) -> None:
    for kwargs in ({"do_pad": flag}, {"images_kwargs": {"do_pad": flag}}):
        with pytest.raises(ValueError, match="^`do_pad` must be True or False, not "):
            processor(images=make_image(), text="<image>", **kwargs)
    with pytest.raises(ValueError, match="^`do_pad` must be True or False, not "):
        make_processor(do_pad=flag)


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
    assert processor.model_input_names == names


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
    ("texts", "rows", "message"),
    [
        ("<image>", None, "the text holds 1, but 0 images"),
        ("<image>", 0, "the text holds 1, but 0 images"),
        ("no image", 1, "the text holds 0, but 1 images"),
        ("<image><image>", 1, "the text holds 2, but 1 images"),
        (["<image>", "<image>"], 3, "the text holds 2, but 3 images"),
        (["<image>", "<image>"], [2, 0], "text 0 holds 1, but 2 images"),
        (["<image>", ""], [1, 1], "text 1 holds 0, but 1 images"),
    ],
)
def test_texts_and_images_that_do_not_fit_are_refused(
    processor: Any, make_image: Any, texts: Any, rows: Any, message: str
) -> None:
    image = make_image()
    images = None if rows is None else [[image] * n for n in rows] if isinstance(rows, list) else [image] * rows
    with pytest.raises(
        ValueError, match=f"tokens in the prompts should be the same as the number of images: {message}"
    ):
        processor(images=images, text=texts)


@pytest.mark.parametrize("text", [[["a", "list"]], [1], [None], 7, b"bytes", {"text": "a"}])
def test_text_must_be_strings(processor: Any, text: Any) -> None:
    with pytest.raises(ValueError, match="^(`text`|Text 0) must be a string"):
        processor(text=text)


@pytest.mark.parametrize("modality", ["videos", "audio"])
def test_other_modalities_are_refused(processor: Any, modality: str) -> None:
    with pytest.raises(ValueError, match="images and text, no videos and no audio"):
        processor(text="hi", **{modality: np.zeros((2, 8, 8, 3))})
    assert set(processor(text="hi", **{modality: []})) == {"input_ids", "attention_mask"}


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


@pytest.mark.parametrize("count", [5, 0, -4, True, 4.0, "4", "auto", [4]])
def test_the_models_own_count_must_be_a_square_number(make_processor: Any, count: Any) -> None:
    with pytest.raises(ValueError, match="^`image_seq_length` must be a square number, such as 144, not "):
        make_processor(image_seq_length=count)
    # Budgets may be those that are to be used, and the model's own not be among them.
    assert make_processor(image_seq_length=576, visual_token_budgets=[16, 4]).image_seq_length == 576


def test_the_image_token_must_be_a_token_of_its_own(make_processor: Any, make_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"does not take '<image>' as one token: add it with"):
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
    assert counts(processor, processor(images=[make_image()] * 2, text="<image><image>")) == [10]
