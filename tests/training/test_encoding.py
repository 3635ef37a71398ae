"""What is trained on, decoded, for every chat template; and how rows become a batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig

from tests.tiny import ANSWER_ENDS
from tests.training.tiny_run import BUDGETS, make_image, make_model, make_processor, write_data
from transformers_delta_llava.errors import DeltaLlavaError
from transformers_delta_llava.processing import CHAT_TEMPLATES
from transformers_delta_llava.training.data import (
    IGNORED,
    Collator,
    ConversationEncoder,
    Rows,
    TrainingDataset,
    pack_rows,
    to_messages,
)
from transformers_delta_llava.training.model import packs_for_flash
from transformers_delta_llava.training.sampler import Request
from transformers_delta_llava.training.trainer import COUNTS


def conversation(template: str) -> list[dict[str, Any]]:
    turns = [("human", "<image>\nWhich, <image> too?"), ("gpt", "The first, naïvely.")]
    if template != "plain":
        turns += [("human", "Sure?"), ("gpt", "Yes: 100 %.")]
    row = {"image": ["a", "b"], "conversations": [{"from": who, "value": value} for who, value in turns]}
    return to_messages({**row, "image": [make_image(0), make_image(1)]})


@pytest.mark.parametrize("budget", [1, 9])
@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_the_loss_is_on_answers_and_their_ends_alone(template: str, budget: int) -> None:
    processor = make_processor(template)
    sample = ConversationEncoder(processor, 2048)(conversation(template), budget)
    ids, labels = sample["input_ids"], sample["labels"]
    trained = processor.decode(labels[labels != IGNORED])
    answers = ["The first, naïvely."] if template == "plain" else ["The first, naïvely.", "Yes: 100 %."]
    # The space before an answer, where a format has one, is the model's to write.
    gap = " " if template in ("vicuna_v1", "llama_2", "llava_llama_2", "mistral_instruct") else ""
    assert trained == "".join(gap + answer + ANSWER_ENDS[template] for answer in answers)
    assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])
    assert (ids == processor.image_token_id).sum() == 2 * budget
    assert ids[0] == processor.tokenizer.bos_token_id and ids[1] != ids[0]
    assert sample["pixel_values"].shape == (2, 3, 24, 24)


def test_a_long_conversation_is_cut_but_never_within_an_image() -> None:
    processor = make_processor()
    whole = ConversationEncoder(processor, 2048)(conversation("vicuna_v1"), 9)
    places = (whole["input_ids"] == processor.image_token_id).nonzero().flatten()
    answers = (whole["labels"] != IGNORED).nonzero().flatten()
    inside = ConversationEncoder(processor, int(answers[0]) + 5)(conversation("vicuna_v1"), 9)
    assert len(inside["input_ids"]) == answers[0] + 5 and len(inside["pixel_values"]) == 2
    for length in (int(places[12]), int(places[3]), int(answers[0]) - 1):
        with pytest.raises(ValueError, match=str(length)):
            ConversationEncoder(processor, length)(conversation("vicuna_v1"), 9)


def test_an_image_after_the_cut_is_left_out() -> None:
    row = {"image": ["a", "b"], "conversations": []}
    for question, answer in (("<image>", "One."), ("<image>", "Two.")):
        row["conversations"] += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    messages = to_messages({**row, "image": [make_image(0), make_image(1)]})
    processor = make_processor()
    ids = ConversationEncoder(processor, 2048)(messages, 16)["input_ids"]
    second = int((ids == processor.image_token_id).nonzero()[16])
    cut = ConversationEncoder(processor, second + 7)(messages, 16)
    assert len(cut["input_ids"]) == second and len(cut["pixel_values"]) == 1
    assert processor.decode(cut["labels"][cut["labels"] != IGNORED]) == " One.</s>"


def samples(template: str = "vicuna_v1", budgets: tuple[int, ...] = (4, 4)) -> list[dict[str, Any]]:
    encoder = ConversationEncoder(make_processor(template), 2048)
    text = to_messages({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]})
    given = [conversation(template), text]
    return [{**encoder(m, b), "budget": b, "num_skipped": 0} for m, b in zip(given, budgets)]


def test_rows_become_a_batch() -> None:
    processor = make_processor()
    rows = samples()
    batch = Collator(256, processor.image_token_id)(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch["input_ids"].shape == (2, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["labels"][1, lengths[1] :] == IGNORED).all() and (batch["input_ids"][1, lengths[1] :] == 256).all()
    assert batch["num_visual_tokens"] == 4 and batch["pixel_values"].shape == (2, 3, 24, 24)
    assert (batch["num_tokens"], batch["num_images"], batch["num_skipped"]) == (sum(lengths), 2, 0)
    mixed = Collator(256, processor.image_token_id)([rows[0], samples(budgets=(1, 9))[0]])
    assert mixed["num_visual_tokens"].tolist() == [4, 4, 1, 1]


@pytest.mark.parametrize("extra", [0, 200])
def test_a_blank_image_changes_nothing_but_gives_every_parameter_a_gradient(extra: int) -> None:
    """`extra`: tokens of a second, longer row, so that the blank image fits into the padding or does not."""
    encoder = ConversationEncoder(make_processor(), 2048)
    turns = [[{"from": "human", "value": "Hi" + "!" * n}, {"from": "gpt", "value": "Ho"}] for n in (0, extra)]
    encoded = [encoder(to_messages({"conversations": conversation}), 4) for conversation in turns]
    rows = [{**sample, "budget": 4, "num_skipped": 0} for sample in encoded]
    plain = Collator(256, 259)(rows)
    with_blank = Collator(256, 259, encoder.blank_image(), min(BUDGETS))(rows)
    assert "pixel_values" not in plain and with_blank["pixel_values"].shape == (1, 3, 24, 24)
    model = make_model().eval()
    losses = {}
    for name, batch in (("plain", plain), ("blank", with_blank)):
        counts = {key: batch.pop(key) for key in ("num_tokens", "num_images", "num_skipped")}
        assert counts["num_images"] == 0
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses[name] = (loss.detach(), model.lm_head.weight.grad.clone())
    torch.testing.assert_close(losses["blank"], losses["plain"])
    gradients = [parameter.grad for parameter in model.model.multi_modal_projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


LANGUAGE_MODELS: list[dict[str, Any]] = [
    {"model_type": "llama"},
    {"model_type": "mistral", "sliding_window": 16},
    {"model_type": "qwen2"},
]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("text", LANGUAGE_MODELS, ids=lambda text: text["model_type"])
@pytest.mark.parametrize("with_images", [True, False], ids=["images", "text"])
def test_packed_rows_do_not_see_one_another(text: dict[str, Any], attention: str, with_images: bool) -> None:
    """Loss and gradients of five rows in float64 are the sums of those of each row."""
    encoder = ConversationEncoder(make_processor(), 2048)
    given = []
    for number in range(5):
        turns = [{"from": "human", "value": "Hi" * number}, {"from": "gpt", "value": "Ho" * (number % 3 + 1)}]
        messages = to_messages({"conversations": turns})
        if with_images and number % 2:
            messages[0]["content"].insert(0, {"type": "image", "image": make_image(number)})
        given.append({**encoder(messages, (4, 9)[number // 3]), "budget": (4, 9)[number // 3], "num_skipped": 0})
    total = sum(len(sample["input_ids"]) for sample in given)
    model = make_model(text={**text, "attn_implementation": attention}).double().eval()
    results, shapes = [], []
    for max_packed in (0, total, -(-total // 2)):
        collator = Collator(256, 259, encoder.blank_image(), 1, max_packed)
        loss = torch.zeros((), dtype=torch.float64)
        for rows in [[row] for row in given] if not max_packed else [given]:
            batch = {name: value for name, value in collator(rows).items() if name not in COUNTS}
            if "pixel_values" in batch:
                batch["pixel_values"] = batch["pixel_values"].double()
            del batch["labels"]
            wanted = batch.pop("shift_labels")
            loss += F.cross_entropy(model(**batch).logits.flatten(0, 1), wanted.flatten(), reduction="sum")
        shapes.append(tuple(batch["input_ids"].shape))
        names, parameters = zip(*((n, p) for n, p in model.named_parameters() if "vision_tower" not in n))
        results.append({"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters)))})
    assert shapes[1] == (1, total + (not with_images)) and shapes[2][0] == 2
    for packed in results[1:]:
        for name, value in results[0].items():  # norms and softmax are in float32
            torch.testing.assert_close(
                packed[name], value, atol=1e-8, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_rows_packed_for_flash_attention_are_one_sequence() -> None:
    rows = samples()
    lengths = [len(row["input_ids"]) for row in rows]
    batch = Collator(256, 259, max_packed=8, flash=True)(rows)
    assert batch["input_ids"].shape == (1, sum(lengths)) and "attention_mask" not in batch
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, lengths[0], sum(lengths)]
    assert batch["max_length_q"] == max(lengths)


def test_packed_sequences_are_few_and_of_similar_length() -> None:
    lengths = torch.randint(20, 500, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = pack_rows(lengths, 2048)
    assert sorted(row for sequence in sequences for row in sequence) == list(range(64))
    totals = [sum(lengths[row] for row in sequence) for sequence in sequences]
    assert len(totals) == -(-sum(lengths) // 2048) and max(totals) - min(totals) < 40


@pytest.mark.parametrize(
    ("text", "attention", "named"),
    [
        ({"model_type": "qwen3_next"}, "sdpa", "linear_attention"),
        ({"model_type": "llama"}, "another", "another"),
    ],
    ids=["layers with a state", "another attention"],
)
def test_packing_is_refused_where_rows_would_mix(text: dict[str, Any], attention: str, named: str) -> None:
    model = make_model()
    model.config.text_config = AutoConfig.for_model(**text)
    model.config.text_config._attn_implementation = attention
    with pytest.raises(DeltaLlavaError, match=f"pack: .*{named}"):
        packs_for_flash(model)


def test_large_jpegs_are_decoded_at_a_part_of_their_size(tmp_path: Path) -> None:
    image = make_image(0, 30, 24).resize((960, 768))
    for suffix in ("jpg", "png"):
        image.save(tmp_path / f"image.{suffix}", **({"quality": 95} if suffix == "jpg" else {}))
    encoder = ConversationEncoder(make_processor(), 2048)
    message = {"role": "user", "content": [{"type": "image", "image": str(tmp_path / "image.jpg")}]}
    assert encoder._open_images(message)["content"][0]["image"].size == (120, 96)
    row = {"image": ["x"], "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Ho"}]}
    small, full = (
        encoder(to_messages({**row, "image": str(tmp_path / f"image.{suffix}")}), 4)["pixel_values"]
        for suffix in ("jpg", "png")
    )
    assert (small - full).abs().mean() < 0.05 * full.std()


@pytest.fixture
def dataset(tmp_path: Path) -> TrainingDataset:
    """Six rows with images, of which number 1 is corrupt; rows 3 and 7 are text."""
    file = write_data(tmp_path, 8)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    encoder = ConversationEncoder(make_processor(), 2048)
    return TrainingDataset(Rows(json.loads(file.read_text()), tmp_path), encoder, "skip", tmp_path / "skipped.jsonl")


def test_a_corrupt_image_is_replaced_named_and_recorded(dataset: TrainingDataset, caplog: Any) -> None:
    assert dataset[Request(1, 4)]["num_skipped"] == 1
    assert torch.equal(dataset[Request(1, 4)]["input_ids"], dataset[Request(2, 4)]["input_ids"])
    assert caplog.text.count("Skipped row 1 (id r1)") == 1
    assert dataset.record is not None
    assert dataset.record.read_text().count("row 1 (id r1)") == 1


def test_a_row_is_replaced_by_one_of_its_kind(dataset: TrainingDataset) -> None:
    assert dataset.rows.images.tolist() == [1, 1, 1, 0, 1, 1, 1, 0]
    assert dataset._next(2) == 4 and dataset._next(3) == 7 and dataset._next(7) == 3


def test_a_corrupt_image_is_fatal_where_the_recipe_says_so(dataset: TrainingDataset) -> None:
    dataset.on_error = "fail"
    assert dataset[Request(0, 4)]["num_skipped"] == 0
    with pytest.raises(DeltaLlavaError, match=r"row 1 \(id r1\)"):
        dataset[Request(1, 4)]


def test_data_without_a_usable_image_ends(dataset: TrainingDataset, tmp_path: Path) -> None:
    for file in tmp_path.glob("*.png"):
        file.write_bytes(b"not an image")
    with pytest.raises(DeltaLlavaError, match=r"6 rows from row 2 \(id r2\)"):
        dataset[Request(2, 4)]
