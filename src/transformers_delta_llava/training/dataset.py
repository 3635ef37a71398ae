"""Training data: rows of a file or a Hugging Face dataset, the dataset of encoded rows, and the collator."""

import json
import logging
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from ..utils.errors import DataError, RowError, one_line, shorten
from .conversations import IGNORED, ConversationEncoder, check_caption, image_names, to_messages
from .recipe import DataRecipe
from .row_index import RowIndex, build_index, cached_index, iterate_json_rows
from .sampler import Request


logger = logging.getLogger(__name__)
MAX_SKIPPED = 100  # in succession


class Rows(Protocol):
    """Rows of training data: an index of the usable ones, and their conversations."""

    index: RowIndex

    def __len__(self) -> int: ...
    def name(self, row: int) -> str:
        """The name of usable row number `row` in messages: its number in the source, and its id."""

    def messages(self, row: int) -> list[dict[str, Any]]:
        """Its conversation, with its images (paths or PIL images). Raises ValueError and OSError."""


class JsonRows:
    """
    The rows of a JSON or JSONL file in LLaVA's format.

    Only the index is in memory (32 bytes per row); a row is read when it is used.

    Args:
        path: the file.
        images: folder that image names are relative to.
        cache: folder of the index.
        captions: leave out rows that are not captions of images, as the `plain` template requires.
    """

    def __init__(self, path: Path, images: Path | None = None, cache: Path | None = None, captions: bool = False):
        self.path, self.images, self.captions = path, images, captions
        stat = path.stat()
        key = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, str(images and images.resolve()), captions]
        self.index = cached_index(cache, key, self._build) if cache else self._build()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> dict[str, Any]:
        entry = self.index.entries[row]
        with self.path.open("rb") as file:  # opened each time: a handle does not survive the fork of a worker
            file.seek(int(entry["start"]))
            return json.loads(file.read(int(entry["stop"] - entry["start"])))

    def name(self, row: int) -> str:
        """As in `Rows`."""
        return _row_name(int(self.index.entries["number"][row]), self[row])

    def messages(self, row: int) -> list[dict[str, Any]]:
        """As in `Rows`, with paths of images."""
        content = self[row]
        return to_messages(content, [self._image_path(name) for name in image_names(content)])

    def _image_path(self, name: Any) -> str:
        if not isinstance(name, str):
            raise RowError(f"its image is {shorten(name)}, not the name of a file")
        return os.path.join(self.images, name) if self.images else name

    def _build(self) -> RowIndex:
        return build_index(iterate_json_rows(self.path), self._measure, _json_row_name)

    def _measure(self, data: bytes) -> tuple[int, int]:
        try:
            row = json.loads(data)
        except RecursionError:
            raise RowError("it is nested too deep") from None
        except ValueError as error:
            raise RowError(f"it is not JSON ({one_line(error)})") from error
        length = _check_row(to_messages(row), self.captions)
        paths = [self._image_path(name) for name in image_names(row)]
        for path in paths:
            if not os.path.isfile(path):
                raise RowError(f"its image {shorten(path)} does not exist")
        return length, len(paths)


class DatasetRows:
    """
    The rows of a Hugging Face dataset with the columns `messages` and, for rows with images, `images`.

    Args:
        dataset: a `datasets.Dataset`.
        captions: leave out rows that are not captions of images, as the `plain` template requires.
    """

    def __init__(self, dataset: Any, captions: bool = False):
        if "messages" not in dataset.column_names:
            raise DataError(f"The dataset has no column messages; it has {', '.join(dataset.column_names)}.")
        columns = [name for name in ("id", "system", "messages", "images") if name in dataset.column_names]
        self.dataset, self.captions = dataset.select_columns(columns), captions
        undecoded = self.dataset
        if "images" in columns:
            undecoded = undecoded.cast_column("images", _undecoded(dataset.features["images"]))
        self.index = build_index(((0, 0, row) for row in undecoded), self._measure, _row_name)

    def __len__(self) -> int:
        return len(self.index)

    def name(self, row: int) -> str:
        """As in `Rows`."""
        number = int(self.index.entries["number"][row])
        has_ids = "id" in self.dataset.column_names
        return _row_name(number, self.dataset.select_columns(["id"])[number] if has_ids else None)

    def messages(self, row: int) -> list[dict[str, Any]]:
        """As in `Rows`, with PIL images."""
        return _dataset_messages(self.dataset[int(self.index.entries["number"][row])])

    def _measure(self, row: dict[str, Any]) -> tuple[int, int]:
        length = _check_row(_dataset_messages(row), self.captions)
        return length, len(image_names({"images": row.get("images")}))


def open_rows(recipe: DataRecipe) -> Rows:
    """
    Open the data of a recipe.

    Raises:
        DataError: data that cannot be read, or (with `on_error: fail`) has an unusable row.
    """
    rows: Rows
    captions = recipe.chat_template == "plain"
    if recipe.path is not None:
        images = Path(recipe.images).expanduser() if recipe.images else None
        rows = JsonRows(Path(recipe.path).expanduser(), images, Path(recipe.cache).expanduser(), captions)
    else:
        rows = DatasetRows(_load_dataset(str(recipe.dataset), recipe.split), captions)
    bad = rows.index.bad
    if bad and recipe.on_error == "fail":
        count = "the only one" if len(bad) == 1 else f"the first of {len(bad)}"
        raise DataError(f"{bad[0][0]} cannot be used: {bad[0][1]} ({count}; data.on_error: skip leaves them out).")
    if not len(rows):
        raise DataError("The data has no usable row." + (f" {bad[0][0]}: {bad[0][1]}." if bad else ""))
    return rows


def _load_dataset(model_id: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data.dataset needs `datasets`: pip install 'transformers-delta-llava[train]'.") from error
    folder = Path(model_id).expanduser()
    try:
        if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(model_id, split=split)
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # of any type: the library does not check what it reads
        raise DataError(f"data.dataset={model_id} cannot be loaded: {one_line(error)}.") from error
    if isinstance(dataset, dict):
        if split not in dataset:
            raise DataError(f"data.split={split}: the dataset has {', '.join(dataset)}.")
        dataset = dataset[split]
    return dataset


def _undecoded(feature: Any) -> Any:
    """A feature of a dataset with images as bytes or paths."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    inner = getattr(feature, "feature", None)
    return type(feature)(_undecoded(inner)) if inner is not None else feature


def _dataset_messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    content = {"system": row.get("system"), "messages": row["messages"]}
    return to_messages(content, image_names({"images": row.get("images")}))


def _check_row(messages: list[dict[str, Any]], captions: bool) -> int:
    """The number of characters of a conversation. With `captions` raises RowError if it is not a caption."""
    if captions:
        check_caption(messages)
    return sum(len(item["text"]) for message in messages for item in message["content"] if item["type"] == "text")


def _row_name(number: int, row: Any) -> str:
    has_id = isinstance(row, dict) and row.get("id") is not None
    return f"row {number} (id {shorten(row['id'], 100)})" if has_id else f"row {number}"


def _json_row_name(number: int, data: bytes) -> str:
    try:
        return _row_name(number, json.loads(data))
    except (ValueError, RecursionError):
        return _row_name(number, None)


class TrainingDataset(Dataset):
    """
    Encoded rows, each read when it is used.

    A row that turns out to be unusable only then (a corrupt image, for example) is fatal, or, with `on_error="skip"`,
    logged, recorded, and replaced by the next usable row of its kind (with images or without): a batch keeps its size
    and modality, and a resumed run skips the same rows.

    Args:
        rows: the data.
        encoder: turns conversations into model inputs.
        on_error: `fail` or `skip`.
        record: file that gets one line of JSON for every skipped row.
    """

    def __init__(self, rows: Rows, encoder: ConversationEncoder, on_error: str = "fail", record: Path | None = None):
        self.rows, self.encoder, self.on_error, self.record = rows, encoder, on_error, record
        self._skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, request: Request) -> dict[str, Any]:
        """
        `input_ids`, `labels` and `pixel_values` of the row, its `budget`, and `num_skipped`, the rows that it replaces.

        Raises:
            DataError: an unusable row with `on_error="fail"`, or too many of them.
        """
        row, budget = request
        num_skipped = 0
        while True:
            try:
                sample = self.encoder(self.rows.messages(row), budget)
                return {**sample, "budget": budget, "num_skipped": num_skipped}
            except Exception as error:  # of any type: images and texts are untrusted
                self._skip(row, error)
            num_skipped += 1
            row = self._next(row)
            if num_skipped == MAX_SKIPPED or row == request[0]:
                raise DataError(
                    f"{num_skipped} rows from {self.rows.name(request[0])} on cannot be used; see the warnings."
                )

    def _skip(self, row: int, error: Exception) -> None:
        name, reason = self.rows.name(row), one_line(error)
        if self.on_error == "fail":
            raise DataError(f"{name} cannot be used: {reason} (data.on_error: skip leaves such rows out).") from error
        if row not in self._skipped:
            self._skipped.add(row)
            logger.warning("Skipped %s: %s", name, reason)
            record_skipped(self.record, [(name, reason)])

    def _next(self, row: int) -> int:
        """The next row with images or without, as `row`; after the last comes the first."""
        with_images = self.rows.index.images > 0
        same = np.flatnonzero(with_images == with_images[row])
        return int(same[np.searchsorted(same, row, side="right") % len(same)])


def some_images(dataset: TrainingDataset, budget: int, count: int = 32) -> torch.Tensor | None:
    """(images, 3, height, width) of rows from all over the data, always the same ones, or None if it has no images."""
    places = np.flatnonzero(dataset.rows.index.images)
    if not len(places):
        return None
    chosen = places[np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)]
    return torch.cat([dataset[Request(int(place), budget)]["pixel_values"] for place in chosen])


def record_skipped(record: Path | None, skipped: list[tuple[str, str]]) -> None:
    """Append (name, reason) of rows to the record."""
    if record is not None and skipped:
        lines = [json.dumps({"row": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in skipped]
        with record.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


class Collator:
    """
    Pads rows on the right and concatenates their images.

    Besides the model's inputs a batch has three numbers that the trainer counts and removes: `num_tokens` (without
    padding), `num_images` and `num_skipped` (unusable rows that were replaced).

    If parameters are trained that only images reach, a batch without images gets a blank one: after the text, masked,
    without labels. It changes no result, but gives every parameter a gradient (of zero) in every step on every process,
    which distributed training needs.

    Args:
        pad_token_id, image_token_id: of the tokenizer.
        blank_image: (1, 3, height, width), added to batches without images.
        blank_budget: number of visual tokens of that image.
    """

    def __init__(
        self, pad_token_id: int, image_token_id: int, blank_image: torch.Tensor | None = None, blank_budget: int = 1
    ):
        self.pad_token_id, self.image_token_id = pad_token_id, image_token_id
        self.blank_image, self.blank_budget = blank_image, blank_budget

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Collate samples of `TrainingDataset`.

        Returns:
            `input_ids`, `labels`, `attention_mask` (rows, tokens), int64; with images also `pixel_values` (images, 3,
            height, width), float32, and `num_visual_tokens`, one number for all images or (images,), int64.
        """
        rows = [(sample["input_ids"], sample["labels"]) for sample in samples]
        with_images = [sample for sample in samples if sample["pixel_values"] is not None]
        images = [sample["pixel_values"] for sample in with_images]
        budgets = [sample["budget"] for sample in with_images for _ in sample["pixel_values"]]
        counts = {
            "num_tokens": sum(len(ids) for ids, _ in rows),
            "num_images": len(budgets),
            "num_skipped": sum(sample["num_skipped"] for sample in samples),
        }
        blank = self.blank_budget if self.blank_image is not None and not images else 0
        shape = (len(rows), max(len(rows[0][0]) + blank, *(len(ids) for ids, _ in rows)))
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
            # One number where possible: the model need not copy a tensor from the device.
            same = len(set(budgets)) == 1
            batch["num_visual_tokens"] = budgets[0] if same else torch.tensor(budgets)
        return {**batch, **counts}
