"""`num_visual_tokens="auto"`: the documented rule, and nothing but the image decides."""

from fractions import Fraction
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_delta_llava.processing import DeltaLlavaProcessor, load_chat_template
from transformers_delta_llava.processing.auto_budget_delta_llava import NOISE_LEVEL, budget_losses, pick_budget


BUDGETS = (576, 144, 64, 36, 16, 9, 4, 1)
SIDE = 48  # two pixels to a window of the largest budget


@pytest.fixture
def processor(make_processor: Any, make_image_processor: Any) -> DeltaLlavaProcessor:
    return make_processor(image_processor=make_image_processor(SIDE), chat_template=load_chat_template("vicuna_v1"))


def board(cells: int, low: int = 40, high: int = 200, side: int = SIDE) -> Image.Image:
    """A chessboard of cells x cells."""
    rows, columns = np.mgrid[:side, :side] * cells // side
    return Image.fromarray(np.where((rows + columns) % 2, low, high).astype(np.uint8)).convert("RGB")


def picks(processor: Any, images: list[Any], **kwargs: Any) -> list[int]:
    """What auto takes for each image, told by the placeholders."""
    kwargs = {"num_visual_tokens": "auto", **kwargs}
    batch = processor(images=images, text=["<image>"] * len(images), padding=True, **kwargs)
    counts = [list(row).count(processor.image_token_id) for row in batch["input_ids"]]
    announced = batch.get("num_visual_tokens")
    assert counts == ([processor.image_seq_length] * len(images) if announced is None else list(announced))
    return counts


def slow_losses(levels: np.ndarray, budgets: Any, box: tuple[int, int, int, int]) -> dict[int, Fraction]:
    """The formula, window by window, in fractions."""
    top, bottom, left, right = box
    channels, height, width = levels.shape
    size = (bottom - top) * (right - left)

    def variance(budget: int) -> Fraction:
        side, total = isqrt(budget), Fraction(0)
        for channel in levels:
            overall = Fraction(int(channel[top:bottom, left:right].sum()), size)
            for row in range(side):
                for column in range(side):
                    rows = slice(max(round(row * height / side), top), min(round((row + 1) * height / side), bottom))
                    columns = slice(
                        max(round(column * width / side), left), min(round((column + 1) * width / side), right)
                    )
                    window = channel[rows, columns]
                    if window.size:
                        total += window.size * (Fraction(int(window.sum()), window.size) - overall) ** 2
        return total / (size * channels)

    largest = variance(max(budgets))
    return {b: max(Fraction(0), (largest - variance(b)) / (largest + Fraction(NOISE_LEVEL) ** 2)) for b in budgets}


# The rule.


@pytest.mark.parametrize(
    ("shape", "box"), [((24, 24), (0, 24, 0, 24)), ((25, 31), (3, 20, 0, 30)), ((24, 24), (11, 12, 5, 19))]
)
def test_losses_are_those_of_the_formula(shape: Any, box: Any) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (3, *shape))
    budgets = (144, 36, 16, 9, 4, 1)
    slow = slow_losses(levels, budgets, box)
    assert budget_losses(levels, budgets, box) == pytest.approx(
        {b: float(loss) for b, loss in slow.items()}, abs=1e-12
    )
    whole = slow_losses(levels, budgets, (0, shape[0], 0, shape[1]))
    assert budget_losses(levels, budgets) == pytest.approx({b: float(loss) for b, loss in whole.items()}, abs=1e-12)


def test_the_smallest_budget_within_the_loss_is_picked() -> None:
    losses = {16: 0.0, 9: 0.3, 4: 0.2, 1: 0.9}
    picked = {share: pick_budget(losses, share) for share in (0, 0.19, 0.2, 0.3, 0.89, 1)}
    assert picked == {0: 16, 0.19: 16, 0.2: 4, 0.3: 4, 0.89: 4, 1: 1}


def test_finer_detail_gets_more_tokens(processor: Any) -> None:
    cells = {1: 1, 2: 4, 3: 9, 4: 16, 6: 36, 8: 64, 12: 144, 24: 576}
    assert picks(processor, [board(n) for n in cells]) == list(cells.values())
    # What no budget resolves asks for the largest, as long as it shows at all.
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    assert picks(processor, [noise]) == [576]


def test_a_blank_image_gets_one_token_even_with_noise(processor: Any) -> None:
    noise = np.random.default_rng(0).normal(128, 3, (200, 200, 3)).round().astype(np.uint8)
    assert picks(processor, [Image.new("RGB", (50, 50), "red"), Image.new("L", (5, 5)), noise]) == [1, 1, 1]


def test_a_slow_gradient_gets_few_tokens(processor: Any) -> None:
    ramp = np.repeat(np.linspace(0, 255, 100).astype(np.uint8)[None], 100, 0)
    assert picks(processor, [ramp]) == [4]


def test_contrast_and_brightness_hardly_count(processor: Any, make_image: Any) -> None:
    image = np.asarray(make_image(60, 60)).astype(np.float64)
    variants = [image, image / 2, image / 2 + 120, 255 - image]
    assert len(set(picks(processor, [variant.round().astype(np.uint8) for variant in variants]))) == 1


def test_a_larger_loss_never_takes_more_tokens(processor: Any, make_image: Any) -> None:
    images = [make_image(60, 40), board(6), Image.new("RGB", (9, 9), "blue")]
    shares = [0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1]
    rows = [picks(processor, images, auto_max_loss=share) for share in shares]
    assert all(more >= fewer for row, after in zip(rows, rows[1:]) for more, fewer in zip(row, after))
    assert rows[0][0] == 576 and rows[-1] == [1, 1, 1]
    assert len({row[0] for row in rows}) > 3


# The same image, the same pick.


def test_the_form_of_a_image_does_not_matter(processor: Any, make_image: Any, tmp_path: Path) -> None:
    image = make_image(70, 50)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    forms = [image, array, torch.from_numpy(array.transpose(2, 0, 1).copy()), array / 255, tmp_path / "a.png"]
    assert len(set(picks(processor, forms))) == 1
    losses = processor.image_losses(forms)
    assert losses == [losses[0]] * len(forms)


@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_the_form_of_the_result_does_not_matter(processor: Any, make_image: Any, return_tensors: Any) -> None:
    images = [make_image(60, 40), board(6)]
    batch = processor(images=images, num_visual_tokens="auto", return_tensors=return_tensors)
    assert list(batch["num_visual_tokens"]) == picks(processor, images)
    if return_tensors == "pt":
        assert batch["num_visual_tokens"].dtype == torch.int64


OTHER_NORMALISATIONS = [
    {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    {"do_normalize": False},
    {"do_rescale": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5},
]


@pytest.mark.parametrize("options", OTHER_NORMALISATIONS)
@pytest.mark.parametrize("where", ["own", "call"])
def test_normalisation_does_not_matter(
    make_processor: Any, make_image_processor: Any, make_image: Any, processor: Any, options: Any, where: str
) -> None:
    image = make_image(SIDE, SIDE)
    expected = processor.image_losses(image)
    if where == "own":
        other = make_processor(image_processor=make_image_processor(SIDE, **options))
        assert other.image_losses(image) == expected
        assert picks(other, [image], auto_max_loss=0.5) == picks(processor, [image], auto_max_loss=0.5)
    else:
        assert processor.image_losses(image, **options) == processor.image_losses(image, images_kwargs=options)
        assert processor.image_losses(image, **options) == expected


# Padding is not content.


@pytest.mark.parametrize("size", [(100, 10), (10, 100), (SIDE, 7), (5000, 2), (31, 30)])
def test_a_plain_image_is_plain_however_it_is_padded(processor: Any, size: tuple[int, int]) -> None:
    assert picks(processor, [Image.new("RGB", size, "white")]) == [1]
    assert processor.image_losses(Image.new("RGB", size, "white")) == [dict.fromkeys(BUDGETS, 0.0)]


@pytest.mark.parametrize("colour", [(0, 0, 0), (1, 1, 1)])
def test_the_colour_of_the_padding_does_not_matter(
    make_processor: Any, make_image_processor: Any, make_image: Any, processor: Any, colour: Any
) -> None:
    image = make_image(SIDE, 20)
    other = make_processor(image_processor=make_image_processor(SIDE, image_mean=colour))
    assert other.image_losses(image) == processor.image_losses(image)


@pytest.mark.parametrize("size", [(SIDE, 20), (20, SIDE), (100, 31), (31, 100)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_center_crop": False, "size": {"height": SIDE, "width": SIDE}},
        {"size": {"shortest_edge": 60}},  # more than the crop keeps
        {"size": {"shortest_edge": 40}},  # less: the image processor pads once more
        {"do_resize": False},
    ],
    ids=["plain", "no crop", "crop", "crop that pads", "crop alone"],
)
def test_the_content_is_where_the_image_is(
    make_processor: Any, make_image_processor: Any, size: tuple[int, int], options: Any
) -> None:
    # All that is white after the same steps on black is image; its edges may be grey where it was resized.
    processor = make_processor(image_processor=make_image_processor(SIDE, image_mean=[0] * 3, **options))
    pixels = processor(images=Image.new("RGB", size, "white"), return_tensors="pt")["pixel_values"][0]
    white = (levels := np.asarray(pixels * torch.tensor(processor.image_processor.image_std)[:, None, None])).min(
        0
    ) > 0.99
    some = levels.max(0) > 0.01
    seen = {}

    def spy(levels: Any, budgets: Any, content: Any) -> dict[int, float]:
        seen["box"] = content
        return dict.fromkeys(budgets, 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers_delta_llava.processing.processing_delta_llava.budget_losses", spy)
        processor.image_losses(Image.new("RGB", size, "white"))
    top, bottom, left, right = seen["box"]
    assert some[top:bottom, left:right].all()
    rows, columns = np.nonzero(white.any(1))[0], np.nonzero(white.any(0))[0]
    for (start, stop), found in (((top, bottom), rows), ((left, right), columns)):
        assert abs(start - found[0]) <= 2 and abs(stop - 1 - found[-1]) <= 2


def test_without_padding_all_that_the_model_sees_counts(processor: Any) -> None:
    # White left and right of a board: cut away by the crop to the middle, or part of a padded image.
    wide = Image.new("RGB", (3 * SIDE, SIDE), "white")
    wide.paste(board(6), (SIDE, 0))
    assert picks(processor, [wide], do_pad=False) == picks(processor, [board(6)]) == [36]
    assert processor.image_losses(wide, do_pad=False) == processor.image_losses(board(6))
    assert picks(processor, [wide]) != [36]


# The ways to say it.


def test_auto_mixes_with_numbers_and_rows_without_images(processor: Any) -> None:
    images = [[board(6)], [], [board(2), board(3)]]
    batch = processor(
        images=images,
        text=["<image>", "none", "<image> <image>"],
        num_visual_tokens=["auto", 144, "auto"],
        padding=True,
        return_tensors="pt",
    )
    assert batch["num_visual_tokens"].tolist() == [36, 144, 9]
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [36, 0, 153]
    assert "num_visual_tokens" not in processor(text="no image", num_visual_tokens="auto")


def test_a_pick_is_announced_even_if_it_is_the_default(processor: Any) -> None:
    # Else the inputs of two images would have different names, and pipelines could not put them in a batch.
    assert processor(images=board(2), text="<image>", num_visual_tokens="auto")["num_visual_tokens"] == [4]


def test_auto_goes_through_chat_templates(processor: Any) -> None:
    chat = [{"role": "user", "content": [{"type": "image", "image": board(6)}, {"type": "text", "text": "What?"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    picked = [
        processor.apply_chat_template(chat, **options, **kwargs)["num_visual_tokens"].tolist()
        for kwargs in (
            {"num_visual_tokens": "auto", "auto_max_loss": 1},
            {"processor_kwargs": {"num_visual_tokens": ["auto"], "auto_max_loss": 1}},
            {"processor_kwargs": {"images_kwargs": {"num_visual_tokens": "auto", "auto_max_loss": 1}}},
        )
    ]
    assert picked == [picks(processor, [board(6)], auto_max_loss=1)] * 3
    assert picked[0] != picks(processor, [board(6)])


def test_auto_can_be_the_default_of_a_processor(processor: Any, make_processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)  # whose model has 4
    loaded = DeltaLlavaProcessor.from_pretrained(
        tmp_path, num_visual_tokens="auto", auto_max_loss=0.5, visual_token_budgets=[64, 16, 1]
    )
    assert (loaded.image_seq_length, loaded.auto_max_loss, loaded.visual_token_budgets) == (4, 0.5, [64, 16, 1])
    images = [board(4), board(8), board(1)]
    expected = [16, 64, 1]
    assert picks(loaded, images, num_visual_tokens=None) == expected
    loaded.save_pretrained(tmp_path / "again")
    again = DeltaLlavaProcessor.from_pretrained(tmp_path / "again")
    assert (again.num_visual_tokens, again.auto_max_loss) == ("auto", 0.5)
    assert picks(again, images, num_visual_tokens=None) == expected


def test_only_the_budgets_of_the_processor_are_picked(make_processor: Any, make_image_processor: Any) -> None:
    image_processor = make_image_processor(SIDE)
    processor = make_processor(image_processor=image_processor, visual_token_budgets=[36, 9, 4], num_visual_tokens=9)
    shares = np.linspace(0, 1, 21)
    seen = {pick for share in shares for pick in picks(processor, [board(6), board(2), board(1)], auto_max_loss=share)}
    assert seen == {36, 4}
    assert processor.image_losses(board(6))[0].keys() == {36, 9, 4}


def test_engines_plan_with_the_most_that_auto_can_pick(processor: Any) -> None:
    told = processor._get_num_multimodal_tokens(image_sizes=[(9, 9)] * 2, num_visual_tokens=["auto", 9])
    assert told["num_image_tokens"] == [576, 9]
    assert told["num_image_patches"] == [1, 1]
    told = processor._get_num_multimodal_tokens(image_sizes=[(9, 9)], num_visual_tokens="auto", auto_max_loss=0.1)
    assert told["num_image_tokens"] == [576]


def test_losses_of_images_in_every_arrangement(processor: Any) -> None:
    one, two = processor.image_losses([board(2), board(3)])
    assert list(one) == list(BUDGETS) and one[576] == one[4] == 0.0 < one[1] and two[9] == 0.0 < two[4]
    assert processor.image_losses([[board(2)], [board(3)]]) == [one, two]
    assert processor.image_losses(board(2)) == [one]
    assert processor.image_losses([]) == []
    with pytest.raises(ValueError, match="Image 1 cannot be used"):
        processor.image_losses([board(2), "nowhere.png"])


# Errors.


@pytest.mark.parametrize("share", [-0.1, 1.1, True, "0.3", float("nan"), [0.3], {}])
def test_a_loss_must_be_a_share(processor: Any, make_processor: Any, share: Any) -> None:
    message = r"^`auto_max_loss` must be a number from 0 to 1, not "
    with pytest.raises(ValueError, match=message):
        processor(images=board(2), text="<image>", num_visual_tokens="auto", auto_max_loss=share)
    with pytest.raises(ValueError, match=message):
        make_processor(auto_max_loss=share)


@pytest.mark.parametrize("word", ["Auto", "automatic", "", ["auto", "max"], np.array("auto")])
def test_only_auto_is_a_word_for_it(processor: Any, word: Any) -> None:
    images = [board(2), board(3)]
    if isinstance(word, np.ndarray):
        assert picks(processor, images, num_visual_tokens=word) == [4, 9]
        return
    with pytest.raises(
        ValueError, match="must be an integer or 'auto', or one per image, not '(Auto|automatic|max|)'"
    ):
        processor(images=images, text="<image><image>", num_visual_tokens=word)


@pytest.mark.parametrize("budgets", ["auto", ["auto"], ["auto", 4]])
def test_auto_by_default_needs_the_models_count(make_processor: Any, budgets: Any) -> None:
    with pytest.raises(ValueError, match="`num_visual_tokens=.* needs `image_seq_length`"):
        make_processor(num_visual_tokens=budgets)
    assert make_processor(num_visual_tokens=budgets, image_seq_length=4).num_visual_tokens == budgets


@pytest.mark.parametrize("budgets", [[], [5], [4, 0], [-4], [4.0], ["4"], [True], "144", 144, None, {4: 1}, [[4]]])
def test_budgets_must_be_square_numbers(make_processor: Any, budgets: Any) -> None:
    with pytest.raises(ValueError, match="`visual_token_budgets` must be a list of square numbers"):
        make_processor(visual_token_budgets=budgets)
