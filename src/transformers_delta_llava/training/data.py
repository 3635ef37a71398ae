"""Training data: rows in LLaVA's format or of a Hugging Face dataset, encoded with labels, and collated.

A row is `{"id", "image": name or list of names, "conversations": [{"from", "value"}, ...]}` with `<image>` in the human's
values, or `{"messages": [{"role", "content"}], "images"}`. Either may have a `system` text.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..errors import DeltaLlavaError, one_line
from ..processing import DeltaLlavaProcessor
from .recipe import DataRecipe
from .sampler import Request


logger = logging.getLogger(__name__)
IGNORED = -100  # label of a token without loss, as everywhere in transformers
IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Keys of other formats: a row that has one would be trained on only in part.
UNSUPPORTED = ("tools", "video", "videos", "audio", "audios")
WORD_MARK = "\u2581"
MAX_SKIPPED = 100  # in succession


def image_names(row: dict[str, Any]) -> list[Any]:
    """The images of a row: names, or PIL images."""
    images = row.get("images") or row.get("image") or []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def to_messages(row: dict[str, Any], images: Sequence[Any] | None = None) -> list[dict[str, Any]]:
    """
    The messages of a row, with images as `{"type": "image", "image": ...}` before the text of their turn.

    As in LLaVA, a first turn of the assistant is dropped.

    Args:
        row: in one of the two formats.
        images: replacements for the row's images, in order.

    Raises:
        ValueError: no answer, roles out of order, or another number of images than of placeholders.
        KeyError, TypeError: a row of another form.
    """
    if unsupported := [key for key in UNSUPPORTED if row.get(key)]:
        raise ValueError(f"{unsupported[0]} cannot be trained on")
    turns = [_parse_turn(turn) for turn in row.get("conversations") or row.get("messages") or []]
    if row.get("system"):
        turns.insert(0, ("system", row["system"], 0))
    opening = 1 if turns and turns[0][0] == "system" else 0
    if turns[opening:] and turns[opening][0] == "assistant":
        del turns[opening]
    roles = [role for role, _, _ in turns[opening:]]
    if len(roles) < 2 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise ValueError(f"turns of {', '.join(roles) or 'no one'}, not of user and assistant in turn")
    if any(role == "assistant" and not text.strip() for role, text, _ in turns):
        raise ValueError("an answer is empty")
    given = image_names(row) if images is None else list(images)
    wanted = sum(count for _, _, count in turns)
    if wanted != len(given) or any(count and role != "user" for role, _, count in turns):
        raise ValueError(f"{wanted} {IMAGE_TOKEN} in turns, and {len(given)} images")
    rest = iter(given)
    return [
        {
            "role": role,
            "content": [
                *({"type": "image", "image": next(rest)} for _ in range(count)),
                {"type": "text", "text": text},
            ],
        }
        for role, text, count in turns
    ]


def _parse_turn(turn: dict[str, Any]) -> tuple[str, str, int]:
    """Role, text without placeholders, and number of images."""
    role = ROLES[turn["from"] if "from" in turn else turn["role"]]
    content, count = turn["value"] if "value" in turn else turn["content"], 0
    if isinstance(content, list):
        count = sum(part["type"] == "image" for part in content)
        content = "\n".join(part["text"] for part in content if part["type"] == "text")
    placeholders = content.count(IMAGE_TOKEN)
    return role, content.replace(IMAGE_TOKEN, "").strip() if placeholders else content, count + placeholders


class Rows:
    """
    Rows of training data; the unusable ones are left out, in `bad` by name and reason.

    Args:
        source: the rows, as a list or a `datasets.Dataset`.
        images: folder that image names are relative to.
        captions: leave out rows that are not captions of images, as the `plain` template requires.

    Attributes:
        lengths: (rows,) characters of the text.
        images: (rows,) number of images.
    """

    def __init__(self, source: Any, images: str | Path | None = None, captions: bool = False):
        self.source, self.folder = source, images
        self.bad: list[tuple[str, str]] = []
        found = []
        for number, row in enumerate(_undecoded(source)):
            try:
                found.append((number, *self._measure(row, captions)))
            except (ValueError, KeyError, TypeError, AttributeError) as error:  # noqa: PERF203
                self.bad.append((row_name(number, row), f"{type(error).__name__}: {one_line(error, 300)}"))
        self.numbers, self.lengths, self.images = np.array(found, dtype=np.int64).reshape(-1, 3).T

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, row: int) -> str:
        """The name of a usable row in messages: its number in the source, and its id."""
        return row_name(int(self.numbers[row]), self.source[int(self.numbers[row])])

    def messages(self, row: int) -> list[dict[str, Any]]:
        """The conversation of a usable row, with paths of images or PIL images."""
        content = self.source[int(self.numbers[row])]
        return to_messages(content, [self._path(image) for image in image_names(content)])

    def _path(self, image: Any) -> Any:
        return os.path.join(self.folder, image) if self.folder and isinstance(image, str) else image

    def _measure(self, row: dict[str, Any], captions: bool) -> tuple[int, int]:
        messages, images = to_messages(row), image_names(row)
        if captions and (len([m for m in messages if m["role"] != "system"]) > 2 or not images):
            raise ValueError("not a caption of an image, as the plain template requires")
        for path in map(self._path, images):
            if isinstance(path, str) and not os.path.isfile(path):
                raise ValueError(f"there is no image {path}")
        parts = [part for message in messages for part in message["content"]]
        return sum(len(part["text"]) for part in parts if part["type"] == "text"), len(images)


def row_name(number: int, row: Any) -> str:
    """A row in messages."""
    return f"row {number} (id {row['id']})" if isinstance(row, dict) and row.get("id") is not None else f"row {number}"


def _undecoded(source: Any) -> Any:
    """A dataset whose images are bytes or paths, so that looking at all rows does not decode them."""
    if isinstance(source, list) or "images" not in source.column_names:
        return source
    import datasets

    def undecode(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        return type(feature)(undecode(feature.feature)) if hasattr(feature, "feature") else feature

    return source.cast_column("images", undecode(source.features["images"]))


def open_rows(recipe: DataRecipe, path: str | None = None) -> Rows:
    """
    The rows of a recipe, or of another file, `path`.

    Raises:
        DeltaLlavaError: no usable row, or an unusable one with `on_error: fail`.
        OSError: there is no such file.
    """
    path = path or recipe.path
    source: Any
    if path is None:
        source = _load_dataset(str(recipe.dataset), recipe.split)
    else:
        file = Path(path).expanduser()
        text = file.read_text(encoding="utf-8-sig")
        source = (
            list(map(json.loads, filter(str.strip, text.splitlines())))
            if file.suffix == ".jsonl"
            else json.loads(text)
        )
    rows = Rows(source, recipe.images and Path(recipe.images).expanduser(), recipe.chat_template == "plain")
    if rows.bad and (recipe.on_error == "fail" or not len(rows)):
        (name, reason), *more = rows.bad
        raise DeltaLlavaError(
            f"data: {name} cannot be used: {reason} (and {len(more)} more; on_error: skip leaves such rows out)"
        )
    return rows


def _load_dataset(model_id: str, split: str) -> Any:
    import datasets

    folder = Path(model_id).expanduser()
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(model_id, split=split)
    dataset = datasets.load_from_disk(str(folder))
    return dataset[split] if isinstance(dataset, dict) else dataset


class ConversationEncoder:
    """
    Turns messages into `input_ids`, `labels` and `pixel_values`.

    Labels follow the chat template's generation mask: the assistant's answers and the tokens that end them.

    Args:
        processor: its chat template must mark answers with `{% generation %}`.
        max_length: tokens to which a conversation is truncated, never within an image.
        pad_images: pad images to squares; by default as the processor does.
    """

    def __init__(self, processor: DeltaLlavaProcessor, max_length: int, pad_images: bool | None = None):
        self.processor = processor
        self.max_length = max_length
        image_processor = processor.image_processor
        self.image_side = max(dict(getattr(image_processor, "crop_size", None) or image_processor.size).values())
        self.options: dict[str, Any] = {} if pad_images is None else {"do_pad": pad_images}

    def __call__(self, messages: list[dict[str, Any]], budget: int) -> dict[str, Any]:
        """
        Encode a conversation at `budget` visual tokens per image.

        Returns:
            `input_ids` and `labels` (tokens,), int64; `pixel_values` (images, 3, height, width), float32, or None.

        Raises:
            ValueError: no answer within `max_length`, or what the processor refuses.
        """
        inputs = self.processor.apply_chat_template(
            [self._open_images(message) for message in messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            # No tensors yet: computing the assistant mask from one takes longer than everything else.
            processor_kwargs={"num_visual_tokens": budget, **self.options},
        )
        input_ids = torch.tensor(inputs["input_ids"][0])
        mask = torch.as_tensor(inputs["assistant_masks"]).reshape(-1).bool()
        labels = input_ids.masked_fill(~(mask | self._word_marks(input_ids, mask)), IGNORED)
        length, images = self._truncate(input_ids, budget)
        if not (labels[1:length] != IGNORED).any():
            raise ValueError(f"no answer is within its first {self.max_length} tokens")
        pixels = list(map(torch.as_tensor, inputs["pixel_values"][:images])) if images else None
        return {
            "input_ids": input_ids[:length],
            "labels": labels[:length],
            "pixel_values": None if pixels is None else torch.stack(pixels),
        }

    def _open_images(self, message: dict[str, Any]) -> dict[str, Any]:
        """JPEGs are decoded at half, a quarter or an eighth of their size while that is twice the tower's."""
        if isinstance(message["content"], str):
            return message
        parts = [dict(part) for part in message["content"]]
        for part in parts:
            if isinstance(part.get("image"), str):
                part["image"] = Image.open(part["image"])
                part["image"].draft(None, (2 * self.image_side, 2 * self.image_side))
        return {**message, "content": parts}

    def _word_marks(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Where SentencePiece's word mark is a token of its own between an image and an answer, as in captions."""
        marks = input_ids == self.processor.tokenizer.convert_tokens_to_ids(WORD_MARK)
        behind_image = (input_ids == self.processor.image_token_id).roll(1)
        return marks & behind_image & mask.roll(-1)

    def _truncate(self, input_ids: torch.Tensor, budget: int) -> tuple[int, int]:
        """How many tokens, and how many images, to keep."""
        starts = (input_ids == self.processor.image_token_id).nonzero().flatten()[::budget].tolist()
        length = min(len(input_ids), self.max_length)
        kept = [start for start in starts if start + budget <= length]
        if len(kept) < len(starts):
            length = min(length, starts[len(kept)])
        return length, len(kept)

    def blank_image(self) -> torch.Tensor:
        """(1, 3, height, width): a black image, preprocessed."""
        return self.processor.image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]


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
        budget: visual tokens per image of rows that are asked for by number only, as in evaluation.
    """

    def __init__(
        self,
        rows: Rows,
        encoder: ConversationEncoder,
        on_error: str = "fail",
        record: Path | None = None,
        budget: int = 1,
    ):
        self.rows, self.encoder, self.on_error, self.record = rows, encoder, on_error, record
        self.budget = budget
        self._skipped: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, request: Request | int) -> dict[str, Any]:
        """
        `input_ids`, `labels` and `pixel_values` of the row, its `budget`, and `num_skipped`, the rows that it replaces.

        Raises:
            DeltaLlavaError: an unusable row with `on_error="fail"`, or too many of them.
        """
        first, budget = request if isinstance(request, tuple) else (request, self.budget)
        row, num_skipped = first, 0
        while True:
            try:
                sample = self.encoder(self.rows.messages(row), budget)
                return {**sample, "budget": budget, "num_skipped": num_skipped}
            except Exception as error:  # of any type: whatever Pillow or the template raises
                self._skip(row, error)
            num_skipped += 1
            row = self._next(row)
            if num_skipped == MAX_SKIPPED or row == first:
                raise DeltaLlavaError(f"data: {num_skipped} rows from {self.rows.name(first)} on cannot be used")

    def _skip(self, row: int, error: Exception) -> None:
        name, reason = self.rows.name(row), f"{type(error).__name__}: {one_line(error, 300)}"
        if self.on_error == "fail":
            raise DeltaLlavaError(f"data: {name} cannot be used: {reason}") from error
        if row not in self._skipped:
            self._skipped.add(row)
            logger.warning("Skipped %s: %s", name, reason)
            record_skipped(self.record, [(name, reason)])

    def _next(self, row: int) -> int:
        """The next row with images or without, as `row`; after the last comes the first."""
        with_images = self.rows.images > 0
        same = np.flatnonzero(with_images == with_images[row])
        return int(same[np.searchsorted(same, row, side="right") % len(same)])


def some_images(dataset: TrainingDataset, budget: int, count: int = 32) -> torch.Tensor | None:
    """(images, 3, height, width) of rows from all over the data, always the same ones, or None if it has no images."""
    places = np.flatnonzero(dataset.rows.images)
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
    Makes a batch of rows, padded on the right or packed, and of their images.

    In addition to the model's inputs a batch has three numbers that the trainer counts and removes: `num_tokens` (without
    padding), `num_images` and `num_skipped` (unusable rows that were replaced).

    If parameters are trained that only images reach, a batch without images gets a blank one: after the text, masked,
    without labels. It changes no result, but gives every parameter a gradient (of zero) in every step on every process,
    which distributed training needs.

    With `max_packed` rows follow one another in sequences of about that length, kept apart by `position_ids`, which begin at 0
    with every row: transformers' attention masks separate what they separate. FlashAttention has no masks and gets one
    sequence, with the rows' ends in its own arguments. Padding and a blank image are one more such row.

    Args:
        pad_token_id, image_token_id: of the tokenizer.
        blank_image: (1, 3, height, width), added to batches without images.
        blank_budget: number of visual tokens of that image.
        max_packed: tokens of a packed sequence; 0 gives every row a sequence.
        flash: pack for FlashAttention.
    """

    def __init__(
        self,
        pad_token_id: int,
        image_token_id: int,
        blank_image: torch.Tensor | None = None,
        blank_budget: int = 1,
        max_packed: int = 0,
        flash: bool = False,
    ):
        self.pad_token_id, self.image_token_id = pad_token_id, image_token_id
        self.blank_image, self.blank_budget = blank_image, blank_budget
        self.max_packed, self.flash = max_packed, flash

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Collate samples of `TrainingDataset`.

        Returns:
            `input_ids` and `labels` (sequences, tokens), int64; `attention_mask`, or of packed rows `position_ids`, in the same
            shape; with images also `pixel_values` (images, 3, height, width), float32, and `num_visual_tokens`, one number for
            all images or (images,), int64; and what `keep_labelled_logits` returns.
        """
        lengths = [len(sample["input_ids"]) for sample in samples]
        if not self.max_packed:
            sequences = [[row] for row in range(len(samples))]
        else:
            sequences = pack_rows(lengths, sum(lengths) if self.flash else self.max_packed)
        in_order = [samples[row] for sequence in sequences for row in sequence]
        images = [sample["pixel_values"] for sample in in_order if sample["pixel_values"] is not None]
        budgets = [s["budget"] for s in in_order if s["pixel_values"] is not None for _ in s["pixel_values"]]
        counts = {
            "num_tokens": sum(lengths),
            "num_images": len(budgets),
            "num_skipped": sum(sample["num_skipped"] for sample in samples),
        }
        blank = self.blank_budget if self.blank_image is not None and not images else 0
        used = [sum(lengths[row] for row in sequence) for sequence in sequences]
        shape = (len(sequences), max(used[0] + blank, *used))
        batch = {"input_ids": torch.full(shape, self.pad_token_id), "labels": torch.full(shape, IGNORED)}
        positions = torch.arange(shape[1]).repeat(shape[0], 1)
        for index, sequence in enumerate(sequences):
            end = 0
            for row in sequence:
                start, end = end, end + lengths[row]
                batch["input_ids"][index, start:end] = samples[row]["input_ids"]
                batch["labels"][index, start:end] = samples[row]["labels"]
                batch["labels"][index, start] = IGNORED  # nothing of its row comes before it
                positions[index, start:] = torch.arange(shape[1] - start)
            positions[index, end:] = torch.arange(shape[1] - end)
        if self.max_packed:
            # Masks separate rows only where there is no other mask and no cache.
            batch |= {"position_ids": positions, "use_cache": False}
        else:
            batch["attention_mask"] = (torch.arange(shape[1]) < torch.tensor(used)[:, None]).long()
        if self.max_packed and self.flash:
            ends = (positions[0] == 0).nonzero().flatten().tolist() + [shape[1]]
            batch |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor(ends, dtype=torch.int32))
            batch |= dict.fromkeys(("max_length_q", "max_length_k"), int(positions.max()) + 1)
        if blank:
            batch["input_ids"][0, used[0] :][:blank] = self.image_token_id
            images, budgets = [self.blank_image], [blank]
        if images:
            batch["pixel_values"] = torch.cat(images)
            # One number where possible: the model need not copy a tensor from the device.
            same = len(set(budgets)) == 1
            batch["num_visual_tokens"] = budgets[0] if same else torch.tensor(budgets)
        return {**batch, **keep_labelled_logits(batch["labels"]), **counts}


def pack_rows(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """The rows of each of the fewest sequences of about `max_length` tokens: the longest row first, to the shortest sequence."""
    sequences: list[list[int]] = [[] for _ in range(-(-sum(lengths) // max_length))]
    totals = [0] * len(sequences)
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        shortest = totals.index(min(totals))
        sequences[shortest].append(row)
        totals[shortest] += lengths[row]
    return sequences


def keep_labelled_logits(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Arguments of `forward` that leave out the logits of positions where no row of the batch has a label.

    Most tokens of an image and a question have none, and full-vocabulary logits are expensive.

    Args:
        labels: (rows, tokens), -100 where there is no loss.

    Returns:
        `logits_to_keep` (kept,), at least one position, and `shift_labels` (rows, kept), the label of the next token.
    """
    shifted = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    kept = (shifted != IGNORED).any(0).nonzero().flatten()
    if not len(kept):
        kept = kept.new_zeros(1)
    return {"logits_to_keep": kept, "shift_labels": shifted[:, kept].contiguous()}
