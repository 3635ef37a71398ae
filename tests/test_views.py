"""Several views of an image (tiles) and videos, from the processor to generated tokens."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tests.tiny import SPECIAL, make_image_processor, make_tokenizer, noise, tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.processing import load_chat_template


SIDE = 24
BUDGETS = [144, 36, 16, 9, 4, 1]


@pytest.fixture(scope="module")
def processor() -> DeltaLlavaProcessor:
    return make_processor()


def make_processor(**options) -> DeltaLlavaProcessor:
    tokenizer = make_tokenizer(special=[*SPECIAL, "<video>"])
    options = {"num_visual_tokens": 4, "visual_token_budgets": BUDGETS, **options}
    return DeltaLlavaProcessor(
        make_image_processor(SIDE), tokenizer, chat_template=load_chat_template("vicuna_v1"), **options
    )


@pytest.fixture(scope="module")
def model(processor) -> DeltaLlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = tiny_config(text={"vocab_size": 320}, num_visual_tokens=4, video_token_id=processor.video_token_id)
    config.image_token_id = processor.image_token_id
    return DeltaLlavaForConditionalGeneration(config).eval()


def counts(processor: DeltaLlavaProcessor, inputs, token: str = "image") -> list[int]:
    return (inputs["input_ids"] == getattr(processor, f"{token}_token_id")).sum(-1).tolist()


@pytest.mark.parametrize(
    ("size", "max_tiles", "grid"),
    [
        ((100, 100), 1, (1, 1)),
        ((20, 24), 9, (1, 1)),  # fits the tower's input
        ((96, 48), 2, (1, 2)),
        ((48, 96), 3, (2, 1)),
        ((72, 72), 9, (3, 3)),
        ((72, 72), 4, (2, 2)),
        ((200, 24), 4, (1, 4)),
    ],
)
@pytest.mark.parametrize("use_thumbnail", [True, False])
def test_the_grid_that_fits(size, max_tiles, grid, use_thumbnail):
    processor = make_processor(use_thumbnail=use_thumbnail)
    views = 1 if grid == (1, 1) else math.prod(grid) + use_thumbnail
    inputs = processor(images=noise(*size), text="<image>", max_tiles=max_tiles, return_tensors="pt")
    assert inputs["pixel_values"].shape == (views, 3, SIDE, SIDE)
    assert counts(processor, inputs) == [4 * views]
    if max_tiles > 1:
        assert inputs["image_grid_thw"].prod(-1).tolist() == [views]
    planned = processor._get_num_multimodal_tokens([(size[1], size[0])], max_tiles=max_tiles)
    assert (planned.num_image_tokens, planned.num_image_patches) == ([4 * views], [views])


def test_tiles_are_the_image_row_by_row(processor):
    image = noise(2 * SIDE, 3 * SIDE)
    parts = [
        image.crop((x, y, x + SIDE, y + SIDE)) for y in range(0, 3 * SIDE, SIDE) for x in range(0, 2 * SIDE, SIDE)
    ]
    expected = processor(images=[image, *parts], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=image, max_tiles=6, return_tensors="pt")["pixel_values"], expected)
    # "anyres" of the authors' code: the whole image squashed, its tiles in a black frame.
    wide, pinpoints = noise(3 * SIDE, SIDE), [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    anyres = make_processor(do_pad=False, max_tiles=4, image_grid_pinpoints=pinpoints)
    canvas = Image.new("RGB", (2 * SIDE, SIDE))
    canvas.paste(wide.resize((2 * SIDE, SIDE * 2 // 3)), (0, (SIDE - SIDE * 2 // 3) // 2))
    views = [wide.resize((SIDE, SIDE)), canvas.crop((0, 0, SIDE, SIDE)), canvas.crop((SIDE, 0, 2 * SIDE, SIDE))]
    expected = torch.cat([anyres.image_processor(view, return_tensors="pt")["pixel_values"] for view in views])
    assert torch.equal(anyres(images=wide, return_tensors="pt")["pixel_values"], expected)


def test_one_tile_changes_nothing(processor):
    images, text = [noise(90, 50), noise(30, 80, seed=1)], "<image> <image>"
    one, plain = (processor(images=images, text=text, return_tensors="pt", **kw) for kw in ({"max_tiles": 1}, {}))
    assert one.keys() == plain.keys() and all(torch.equal(one[name], plain[name]) for name in plain)


@pytest.mark.parametrize("max_tiles", [0, 17, [4], [4, 1, 1]])
def test_tiles_of_a_request_are_bounded(processor, max_tiles):
    with pytest.raises(ValueError, match="max_tiles=.*16"):
        processor(images=[noise(), noise()], text="<image><image>", max_tiles=max_tiles)


def test_budgets_and_tiles_per_image(processor, model):
    images = [noise(48, 48), noise(24, 72, seed=1)]
    inputs = processor(
        images=images,
        text=["<image> a", "<image> b"],
        max_tiles=[4, 1],
        num_visual_tokens=[9, 16],
        padding=True,
        return_tensors="pt",
    )
    assert counts(processor, inputs) == [45, 16]
    assert inputs["num_visual_tokens"].tolist() == [9] * 5 + [16]
    features = model.get_image_features(
        inputs["pixel_values"], inputs["num_visual_tokens"], inputs["image_grid_thw"], return_dict=True
    ).pooler_output
    assert [len(tokens) for tokens in features] == [45, 16]
    separate = model.get_image_features(inputs["pixel_values"][2:3], 9, return_dict=True).pooler_output[0]
    torch.testing.assert_close(features[0][18:27], separate)


def visual_inputs(processor, kind: str) -> list:
    """Arguments of calls with one row each."""
    clip = [noise(seed=seed) for seed in range(3)]
    tiles, video = {"images": [noise(48, 48)], "max_tiles": 4}, {"videos": [clip]}
    return {
        "tiles": [("<image> a?", tiles), ("<image> b", {**tiles, "num_visual_tokens": 1})],
        "video": [("<video> a?", video), ("<video> b", {"videos": [clip[:1]]})],
        "both": [("<image> <video> a", {**tiles, **video})],
    }[kind]


@pytest.mark.parametrize("kind", ["tiles", "video", "both"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_batches_give_the_tokens_of_single_runs(processor, model, kind, num_beams):
    rows = visual_inputs(processor, kind)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams}
    single = []
    for text, arguments in rows:
        inputs = processor(text=text, return_tensors="pt", **arguments)
        single.append(model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist())
    merged: dict = {"images": [], "videos": []}
    for _, arguments in rows:
        for name in merged:
            merged[name] += arguments.get(name, [])
    merged = {"max_tiles": 4, **{name: value for name, value in merged.items() if value}}
    if kind == "tiles":
        merged["num_visual_tokens"] = [4, 1]
    inputs = processor(text=[text for text, _ in rows], padding=True, return_tensors="pt", **merged)
    assert model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist() == single


def test_tiles_are_counted_in_the_text(processor, model):
    """For trainers that drop `num_visual_tokens`."""
    inputs = processor(
        images=[noise(48, 48), noise()],
        text="<image> <image>",
        max_tiles=4,
        num_visual_tokens=[9, 16],
        return_tensors="pt",
    )
    expected = model(**inputs).logits
    del inputs["num_visual_tokens"]
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_a_model_without_a_video_token_refuses_videos(processor, model):
    plain = DeltaLlavaProcessor(
        make_image_processor(SIDE), make_tokenizer(), num_visual_tokens=4, visual_token_budgets=BUDGETS
    )
    assert plain.video_token is None
    assert plain(text="a <video>", return_tensors="pt")["input_ids"].numel() > 5  # a word like others
    with pytest.raises(ValueError, match="0 None.* 1 "):
        plain(text="<video>", videos=[[noise()]])
    with pytest.raises(ValueError, match="video_token_id"):
        DeltaLlavaForConditionalGeneration(tiny_config()).get_input_embeddings()
        DeltaLlavaForConditionalGeneration(tiny_config())(
            input_ids=torch.ones(1, 4, dtype=torch.long), pixel_values_videos=torch.zeros(1, 3, 24, 24)
        )


def write_video(path, frames: int, size: tuple[int, int] = (64, 48), fps: int = 10):
    """Frames of growing brightness."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            array = np.full((size[1], size[0], 3), 10 + index * 200 // frames, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "frames"),
    [
        ({}, 8),
        ({"num_frames": 3}, 3),
        ({"num_frames": 100}, 20),
        ({"fps": 2}, 4),
    ],
)
def test_frames_of_a_file(processor, tmp_path, arguments, frames):
    path = write_video(tmp_path / "clip.mp4", 20)
    inputs = processor(text="<video>", videos=path, return_tensors="pt", **arguments)
    assert inputs["pixel_values_videos"].shape == (frames, 3, SIDE, SIDE)
    assert counts(processor, inputs, "video") == [4 * frames]
    brightness = inputs["pixel_values_videos"].mean((1, 2, 3))
    assert (brightness.diff() > 0).all()


def test_videos_in_chats(processor, model, tmp_path):
    path = write_video(tmp_path / "clip.mp4", 6)
    content = [
        {"type": "video", "path": path},
        {"type": "image", "image": noise()},
        {"type": "text", "text": "a <video>?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"num_frames": 2, "videos_kwargs": {"num_visual_tokens": 1}},
    )
    assert (counts(processor, inputs, "video"), counts(processor, inputs)) == ([2], [4])
    assert model.generate(**inputs, max_new_tokens=2).shape == (1, inputs["input_ids"].shape[1] + 2)


@pytest.mark.parametrize("arguments", [{"num_frames": 0}, {"num_frames": 5000}, {"fps": 1, "num_frames": 2}])
def test_frames_of_a_request_are_bounded(processor, tmp_path, arguments):
    path = write_video(tmp_path / "clip.mp4", 4)
    with pytest.raises(ValueError, match="frames"):
        processor(text="<video>", videos=path, **arguments)


def test_it_is_saved_and_loads_without_torchvision(processor, tmp_path):
    anyres = make_processor(max_tiles=2, max_tiles_limit=4, use_thumbnail=False)
    anyres.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert (loaded.max_tiles, loaded.max_tiles_limit, loaded.use_thumbnail) == (2, 4, False)
    assert not (tmp_path / "video_preprocessor_config.json").exists()


@pytest.mark.parametrize("number", BUDGETS)
def test_tools_count_placeholders_by_three_attributes(number):
    processor = make_processor(num_visual_tokens=number)
    pixels = processor(images=noise(), return_tensors="pt")["pixel_values"]
    height, width = pixels.shape[-2:]
    count = (height // processor.patch_size) * (width // processor.patch_size) + processor.num_additional_image_tokens
    assert count - (processor.vision_feature_select_strategy == "default") == number
