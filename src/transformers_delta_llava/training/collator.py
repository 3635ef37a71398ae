"""Rows as a batch."""

from typing import Any

import torch

from .encoding import IGNORED


class Collator:
    """
    Pads rows on the right, and puts their images one after the other.

    A batch holds, besides the model's inputs, three whole numbers that the trainer counts and takes out: `num_tokens`
    (without padding), `num_images` and `num_skipped` (rows that could not be used, and were replaced).

    Where something is trained that only images reach, a batch without any gets a blank one: behind the text, masked,
    without labels. It changes no number, but every parameter has a gradient (of zero) on every process in every step,
    which distributed training needs.

    Args:
        pad_token_id, image_token_id: of the tokenizer.
        blank_image: (1, 3, height, width), if a batch must never be without an image.
        blank_budget: visual tokens of that image.
    """

    def __init__(
        self, pad_token_id: int, image_token_id: int, blank_image: torch.Tensor | None = None, blank_budget: int = 1
    ):
        self.pad_token_id, self.image_token_id = pad_token_id, image_token_id
        self.blank_image, self.blank_budget = blank_image, blank_budget

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """
        A batch of what `TrainingDataset` gives.

        Returns:
            `input_ids`, `labels`, `attention_mask` (rows, tokens), int64; with images `pixel_values` (images, 3,
            height, width), float32, and `num_visual_tokens`, one number for all of them or (images,), int64.
        """
        rows = [(sample["input_ids"], sample["labels"]) for sample in samples]
        images = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
        budgets = [
            sample["budget"]
            for sample in samples
            if sample["pixel_values"] is not None
            for _ in sample["pixel_values"]
        ]
        counts = {
            "num_tokens": sum(len(ids) for ids, _ in rows),
            "num_images": len(budgets),
            "num_skipped": sum(sample["num_skipped"] for sample in samples),
        }
        blank = self.blank_budget if self.blank_image is not None and not images else 0
        longest = max(len(ids) for ids, _ in rows)
        shape = (len(rows), max(longest, len(rows[0][0]) + blank))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORED),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for index, (ids, labels) in enumerate(rows):
            batch["input_ids"][index, : len(ids)] = ids
            batch["labels"][index, : len(ids)] = labels
            batch["attention_mask"][index, : len(ids)] = 1
        if blank:
            batch["input_ids"][0, len(rows[0][0]) :][:blank] = self.image_token_id
            images, budgets = [self.blank_image], [blank]
        if images:
            batch["pixel_values"] = torch.cat(images)
            # One number where it can be: the model need not read a tensor back from the device.
            same = len(set(budgets)) == 1
            batch["num_visual_tokens"] = budgets[0] if same else torch.tensor(budgets)
        return {**batch, **counts}
