"""transformers' own `Trainer` evaluates and predicts, with images and without."""

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainingArguments

from tests.tiny import IMAGE_TOKEN_ID, TEXT, VISION, prompt, tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration


VISUAL_TOKENS = 36
LENGTH = 3 + VISUAL_TOKENS + 4


def make_row(seed: int, image: bool) -> dict[str, torch.Tensor]:
    """One example, of the same length with an image and without."""
    ids = prompt([VISUAL_TOKENS], seed=seed) if image else prompt([], num_text_tokens=0, seed=seed).repeat(15)[:LENGTH]
    row = {"input_ids": ids, "labels": ids.where(ids != IMAGE_TOKEN_ID, -100)}
    if image:
        row["pixel_values"] = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(seed))
    return row


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: torch.stack([row[name] for row in rows if name in row]) for name in names}


ROWS = [make_row(seed, image) for seed, image in enumerate([True, True, False, False, True, False, True])]


def make_trainer(model, folder, **arguments) -> Trainer:
    settings = {"use_cpu": True, "report_to": "none", "remove_unused_columns": False, "logging_strategy": "no"}
    settings |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "disable_tqdm": True}
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**settings, **arguments}),
        data_collator=collate,
        train_dataset=ROWS,
        eval_dataset=ROWS,
    )


def make_llava() -> LlavaForConditionalGeneration:
    vision = {**VISION, "patch_size": 4}
    config = LlavaConfig(vision_config=vision, text_config=TEXT, image_token_index=IMAGE_TOKEN_ID, image_seq_length=36)
    return LlavaForConditionalGeneration(config)


def test_predictions_are_the_logits_of_every_row(tmp_path):
    model = DeltaLlavaForConditionalGeneration(tiny_config()).eval()
    result = make_trainer(model, tmp_path).predict(ROWS)
    expected = torch.cat([model(**collate([row])).logits for row in ROWS]).detach()
    torch.testing.assert_close(torch.from_numpy(result.predictions), expected, atol=1e-5, rtol=0)
    assert result.label_ids.shape == (len(ROWS), LENGTH)


def test_the_loss_of_images_and_text_as_in_llava(tmp_path):
    for model in (DeltaLlavaForConditionalGeneration(tiny_config()), make_llava()):
        model.eval()
        batches = [collate(ROWS[start : start + 2]) for start in range(0, len(ROWS), 2)]
        losses = torch.stack([model(**batch).loss for batch in batches for _ in batch["input_ids"]])
        metrics = make_trainer(model, tmp_path, prediction_loss_only=False).evaluate()
        assert metrics["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-3)
