"""Training data in LLaVA's JSON format: rows, the dataset, and its collator."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from ..utils.errors import DataError, RowError, one_line, shorten
from .conversations import IGNORED, ConversationEncoder, check_caption, image_names, to_messages
from .recipe import DataRecipe
from .row_index import RowIndex, build_index, cached_index, iterate_json_rows
from .sampler import Request


class Rows(Protocol):
    """Rows of training data: an index of the usable ones, and their conversations."""

    index: RowIndex

    def __len__(self) -> int: ...
    def name(self, place: int) -> str:
        """What to call usable row number `place` in a message."""

    def messages(self, place: int) -> list[dict[str, Any]]:
        """Its conversation, with images (paths or pictures) in it. Raises ValueError and OSError."""


class JsonRows:
    """
    The rows of a JSON or JSONL file in LLaVA's format.

    Only the index is held (32 bytes a row); a row is read when it is asked for.

    Args:
        path: the file.
        images: folder that image names start from.
        cache: folder of the index.
        captions: leave out what is no caption of images, as the `plain` format must.
    """

    def __init__(self, path: Path, images: Path | None = None, cache: Path | None = None, captions: bool = False):
        self.path, self.images, self.captions = path, images, captions
        stat = path.stat()
        key = [str(path.resolve()), stat.st_size, stat.st_mtime_ns, str(images and images.resolve()), captions]
        self.index = cached_index(cache, key, self._build) if cache else self._build()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, place: int) -> dict[str, Any]:
        with self.path.open("rb") as file:  # opened anew: a handle does not survive the fork of a worker
            start, stop = int(self.index.starts[place]), int(self.index.stops[place])
            file.seek(start)
            return json.loads(file.read(stop - start))

    def name(self, place: int) -> str:
        """The row's number in the file, and its id."""
        return _row_name(int(self.index.numbers[place]), self[place])

    def messages(self, place: int) -> list[dict[str, Any]]:
        """The conversation, with paths of images."""
        row = self[place]
        return to_messages(row, [self._image_path(name) for name in image_names(row)])

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
        messages = to_messages(row)
        if self.captions:
            check_caption(messages)
        for name in image_names(row):
            path = self._image_path(name)
            if not os.path.isfile(path):
                raise RowError(f"its image {shorten(path)} does not exist")
        return sum(_text_length(message) for message in messages), len(image_names(row))


class DatasetRows:
    """
    The rows of a Hugging Face dataset with the columns `messages` and, for rows with images, `images`.

    Args:
        dataset: a `datasets.Dataset`.
        captions: leave out what is no caption of images, as the `plain` format must.
    """

    def __init__(self, dataset: Any, captions: bool = False):
        missing = {"messages"} - set(dataset.column_names)
        if missing:
            raise DataError(f"The dataset has no column messages; it has {', '.join(dataset.column_names)}.")
        self.dataset, self.captions = dataset, captions
        self.index = build_index(self._light_rows(), self._measure, _row_name)

    def __len__(self) -> int:
        return len(self.index)

    def name(self, place: int) -> str:
        """The row's number in the dataset, and its id."""
        number = int(self.index.numbers[place])
        columns = [name for name in ("id",) if name in self.dataset.column_names]
        return _row_name(number, self.dataset.select_columns(columns)[number] if columns else None)

    def messages(self, place: int) -> list[dict[str, Any]]:
        """The conversation, with its pictures."""
        row = self.dataset[int(self.index.numbers[place])]
        return self._read(row)

    def _light_rows(self) -> Iterator[tuple[int, int, Any]]:
        """Every row with its images undecoded."""
        columns = ("id", "system", "messages", "images")
        dataset = self.dataset.select_columns([name for name in columns if name in self.dataset.column_names])
        if "images" in dataset.column_names:
            dataset = dataset.cast_column("images", _undecoded(dataset.features["images"]))
        return ((0, 0, row) for row in dataset)

    def _measure(self, row: dict[str, Any]) -> tuple[int, int]:
        messages = self._read(row)
        if self.captions:
            check_caption(messages)
        return sum(_text_length(message) for message in messages), len(image_names({"images": row.get("images")}))

    def _read(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        known = {"system": row.get("system"), "messages": row["messages"]}
        return to_messages(known, image_names({"images": row.get("images")}))


def open_rows(recipe: DataRecipe) -> Rows:
    """
    The data that a recipe names.

    Raises:
        DataError: data that cannot be read, or (with `on_error: fail`) has a row that cannot be used.
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


def _load_dataset(source: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data.dataset needs `datasets`: pip install 'transformers-delta-llava[train]'.") from error
    folder = Path(source).expanduser()
    try:
        if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(source, split=split)
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # of every kind: the library does not check what it reads
        raise DataError(f"data.dataset={source} cannot be loaded: {one_line(error)}.") from error
    if isinstance(dataset, dict):
        if split not in dataset:
            raise DataError(f"data.split={split}: the dataset has {', '.join(dataset)}.")
        dataset = dataset[split]
    return dataset


def _undecoded(feature: Any) -> Any:
    """A dataset's feature with images left as bytes or paths."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    inner = getattr(feature, "feature", None)
    return type(feature)(_undecoded(inner)) if inner is not None else feature


def _text_length(message: dict[str, Any]) -> int:
    return sum(len(item["text"]) for item in message["content"] if item["type"] == "text")


def _row_name(number: int, row: Any) -> str:
    given = f" (id {shorten(row['id'], 100)})" if isinstance(row, dict) and row.get("id") is not None else ""
    return f"row {number}{given}"


def _json_row_name(number: int, data: bytes) -> str:
    try:
        return _row_name(number, json.loads(data))
    except (ValueError, RecursionError):
        return _row_name(number, None)


logger = logging.getLogger(__name__)
MOST_SKIPPED = 100  # rows one after the other


class TrainingDataset(Dataset):
    """
    Encoded rows, read when they are asked for.

    A row that turns out to be unusable only now (a corrupt image, say) is fatal, or, with `on_error="skip"`, named in a
    warning, recorded, and replaced by the next usable row of its kind (with images or without): a batch keeps its size
    and its modality, and a resumed run skips the same rows.

    Args:
        rows: the data.
        encoder: makes model inputs of a conversation.
        on_error: `fail` or `skip`.
        record: file that gets a line of JSON for every row skipped.
    """

    def __init__(self, rows: Rows, encoder: ConversationEncoder, on_error: str = "fail", record: Path | None = None):
        self.rows, self.encoder, self.on_error, self.record = rows, encoder, on_error, record
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, request: Request) -> dict[str, Any]:
        """
        `input_ids`, `labels`, `pixel_values` of the row, with its `budget` and the number of rows skipped for it.

        Raises:
            DataError: a row that cannot be used, with `on_error="fail"`, or too many of them.
        """
        place, budget = request
        skipped = 0
        while True:
            try:
                sample = self.encoder(self.rows.messages(place), budget)
                return {**sample, "budget": budget, "num_skipped": skipped}
            except Exception as error:  # of every kind: images and texts are strangers'
                self._skip(place, one_line(error), error)
            skipped += 1
            place = self._next(place)
            if skipped == MOST_SKIPPED or place == request[0]:
                raise DataError(
                    f"{skipped} rows from {self.rows.name(request[0])} on cannot be used; see the warnings."
                )

    def _skip(self, place: int, reason: str, error: Exception) -> None:
        name = self.rows.name(place)
        if self.on_error == "fail":
            raise DataError(f"{name} cannot be used: {reason} (data.on_error: skip leaves such rows out).") from error
        if place in self._named:
            return
        self._named.add(place)
        logger.warning("Skipped %s: %s", name, reason)
        record_skipped(self.record, [(name, reason)])

    def _next(self, place: int) -> int:
        images = self.rows.index.images
        kind = bool(images[place])
        for step in range(1, len(images)):
            other = (place + step) % len(images)
            if bool(images[other]) == kind:
                return other
        return place


def record_skipped(record: Path | None, skipped: list[tuple[str, str]]) -> None:
    """Append (name, reason) of rows to the record."""
    if record is not None and skipped:
        lines = [json.dumps({"row": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in skipped]
        with record.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


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
