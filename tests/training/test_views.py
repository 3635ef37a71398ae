"""Training on tiles and videos: encoding, cutting, batches, and a run."""

from pathlib import Path

import pytest
import torch

from tests.test_views import make_processor, write_video
from tests.tiny import noise, tiny_config
from tests.training.tiny_run import losses, recipe_for, write_rows
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.training import train
from transformers_delta_llava.training.data import IGNORED, Collator, ConversationEncoder, Rows, to_messages
from transformers_delta_llava.training.trainer import COUNTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    processor = make_processor()
    config = tiny_config(
        text={"vocab_size": 320, "eos_token_id": 258, "pad_token_id": 256},
        num_visual_tokens=4,
        video_token_id=processor.video_token_id,
    )
    config.image_token_id = processor.image_token_id
    torch.manual_seed(0)
    DeltaLlavaForConditionalGeneration(config).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for name, size in (("wide", (96, 48)), ("small", (20, 20))):
        noise(*size).save(folder / "data" / f"{name}.png")
    write_video(folder / "data" / "clip.mp4", 6)
    write_rows(folder / "data" / "rows.json", rows())
    return folder


def rows() -> list[dict]:
    def row(value: str, **more) -> dict:
        return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "It is."}], **more}

    return [
        row("<image>\nWhat is it?", image="wide.png", max_tiles=2),
        row("<image>\nWhat is it?", image="small.png"),
        row("<video>\nWhat happens?", video="clip.mp4"),
        row("<image>\n<video>\nWhat?", image="wide.png", video="clip.mp4", max_tiles=2),
        row("What?"),
    ]


@pytest.fixture
def samples(folder) -> list[dict]:
    data = Rows(rows(), folder / "data", views=(1, 3))
    assert not data.bad and data.images.tolist() == [1, 1, 1, 2, 0]
    assert data.lengths.argsort().tolist() == [4, 1, 0, 2, 3]
    encoder = ConversationEncoder(make_processor(), 2048, num_frames=3)
    encoded = [encoder(data.messages(row), 4, data.max_tiles(row)) for row in range(len(data))]
    return [{**sample, "budget": 4, "num_skipped": 0} for sample in encoded]


def test_rows_are_encoded_with_their_views(samples):
    processor = make_processor()
    for sample, images, frames in zip(samples, (3, 1, 0, 3, 0), (0, 0, 3, 3, 0)):
        for token_id, views in ((processor.image_token_id, images), (processor.video_token_id, frames)):
            assert (sample["input_ids"] == token_id).sum() == 4 * views
        assert (0 if sample["pixel_values"] is None else len(sample["pixel_values"])) == images
        assert len(sample.get("pixel_values_videos", ())) == frames


@pytest.mark.parametrize("max_packed", [0, 300])
def test_a_batch_has_the_loss_of_its_rows(folder, samples, max_packed):
    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder / "model").eval()

    def total(rows: list[dict], packed: int) -> torch.Tensor:
        batch = Collator(256, model.config.image_token_id, max_packed=packed)(rows)
        inputs = {name: value for name, value in batch.items() if name not in (*COUNTS, "labels", "shift_labels")}
        logits, wanted = model(**inputs).logits, batch["shift_labels"]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=IGNORED
        )

    with torch.no_grad():
        single = sum(total([sample], 0) for sample in samples)
        torch.testing.assert_close(total(samples, max_packed), single, atol=1e-3, rtol=1e-4)


def test_a_row_is_cut_before_an_image_or_a_video(folder):
    data = Rows([rows()[3]], folder / "data")
    whole = ConversationEncoder(make_processor(), 2048, num_frames=3)(data.messages(0), 4, 2)
    ids = make_processor().video_token_id
    first = int((whole["input_ids"] == ids).nonzero()[0])
    with pytest.raises(ValueError, match="no answer"):  # only the image is left
        ConversationEncoder(make_processor(), first + 11, num_frames=3)(data.messages(0), 4, 2)


def test_a_run(folder, tmp_path):
    recipe = recipe_for(
        folder, tmp_path / "out", {"per_device_train_batch_size": 5, "max_steps": 4}, data={"num_frames": 3}
    )
    history = losses(train(recipe))
    assert len(history) == 4 and history[-1] < history[0]


@pytest.mark.parametrize("change", [{"video": ["clip.mp4", "clip.mp4"]}, {"video": "nothing.mp4"}])
def test_unusable_rows(folder, change):
    (bad,) = Rows([{**rows()[2], **change}], folder / "data").bad
    assert "video" in bad[1] or "nothing.mp4" in bad[1]


def test_the_order_of_images_and_videos_is_the_rows(folder):
    (turn, _) = to_messages(rows()[3])
    assert [part["type"] for part in turn["content"]] == ["image", "video", "text"]
