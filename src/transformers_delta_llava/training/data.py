"""Training data: rows in LLaVA's format or of a Hugging Face dataset, encoded with labels, and collated.

A row is `{"id", "image": name or list of names, "conversations": [{"from", "value"}, ...]}` with `<image>` in the human's
values, or `{"messages": [{"role", "content"}], "images"}`. Either may have a `system` text, videos (`video`, `videos`, with
`<video>` in the values) and `max_tiles`.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..errors import DeltaLlavaError, one_line
from ..modeling.modeling_delta_llava import MODALITIES
from ..processing import DeltaLlavaProcessor
from .recipe import DataRecipe
from .sampler import Request


logger = logging.getLogger(__name__)
IGNORED = -100  # label of a token without loss, as everywhere in transformers
KINDS = ("image", "video")
PLACEHOLDER = re.compile("<(image|video)>")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Keys of other formats: a row that has one would be trained on only in part.
UNSUPPORTED = ("tools", "audio", "audios")
WORD_MARK = "\u2581"
MAX_SKIPPED = 100  # in succession
# By which rows of similar length are found: a view beyond one per image has about as many tokens as this text.
CHARACTERS_PER_VIEW = 256


def names_of(row: dict[str, Any], kind: str = "image") -> list[Any]:
    """The images or videos of a row: names, PIL images, or lists of frames."""
    found = row.get(f"{kind}s") or row.get(kind) or []
    return list(found) if isinstance(found, (list, tuple)) else [found]


def to_messages(row: dict[str, Any], replace: Callable[[Any], Any] = lambda name: name) -> list[dict[str, Any]]:
    """
    The messages of a row, with images and videos as `{"type": "image", "image": ...}` before the text of their turn.

    As in LLaVA, a first turn of the assistant is dropped.

    Args:
        row: in one of the two formats.
        replace: applied to every name of an image or a video.

    Raises:
        ValueError: no answer, roles out of order, or other numbers of images or videos than of placeholders.
        KeyError, TypeError: a row of another form.
    """
    if unsupported := [key for key in UNSUPPORTED if row.get(key)]:
        raise ValueError(f"{unsupported[0]} cannot be trained on")
    turns = [_parse_turn(turn) for turn in row.get("conversations") or row.get("messages") or []]
    if row.get("system"):
        turns.insert(0, ("system", row["system"], []))
    opening = 1 if turns and turns[0][0] == "system" else 0
    if turns[opening:] and turns[opening][0] == "assistant":
        del turns[opening]
    roles = [role for role, _, _ in turns[opening:]]
    if len(roles) < 2 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise ValueError(f"turns of {', '.join(roles) or 'no one'}, not of user and assistant in turn")
    if any(role == "assistant" and not text.strip() for role, text, _ in turns):
        raise ValueError("an answer is empty")
    given = {kind: names_of(row, kind) for kind in KINDS}
    for kind, names in given.items():
        wanted = sum(kinds.count(kind) for _, _, kinds in turns)
        if wanted != len(names) or any(kinds and role != "user" for role, _, kinds in turns):
            raise ValueError(f"{wanted} <{kind}> in turns, and {len(names)} {kind}s")
    rest = {kind: iter(names) for kind, names in given.items()}
    return [
        {
            "role": role,
            "content": [
                *({"type": kind, kind: replace(next(rest[kind]))} for kind in kinds),
                {"type": "text", "text": text},
            ],
        }
        for role, text, kinds in turns
    ]


def _parse_turn(turn: dict[str, Any]) -> tuple[str, str, list[str]]:
    """Role, text without placeholders, and the kinds of the images and videos in their order."""
    role = ROLES[turn["from"] if "from" in turn else turn["role"]]
    content, kinds = turn["value"] if "value" in turn else turn["content"], []
    if isinstance(content, list):
        kinds = [part["type"] for part in content if part["type"] in KINDS]
        content = "\n".join(part["text"] for part in content if part["type"] == "text")
    placeholders = PLACEHOLDER.findall(content)
    return role, PLACEHOLDER.sub("", content).strip() if placeholders else content, kinds + placeholders


class Rows:
    """
    Rows of training data; the unusable ones are left out, in `bad` by name and reason.

    Args:
        source: the rows, as a list or a `datasets.Dataset`.
        images: folder that image names are relative to.
        captions: leave out rows that are not captions of images, as the `plain` template requires.
        views: of an image and of a video, at most, where a row has no `max_tiles`; for `lengths`.

    Attributes:
        lengths: (rows,) characters of the text, and as many for each view as `CHARACTERS_PER_VIEW`.
        images: (rows,) number of images and videos.
    """

    def __init__(
        self,
        source: Any,
        images: str | Path | None = None,
        captions: bool = False,
        views: tuple[int, int] = (1, 1),
    ):
        self.source, self.folder, self.views = source, images, views
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
        return to_messages(self.source[int(self.numbers[row])], self._path)

    def max_tiles(self, row: int) -> int | None:
        """What the row says about tiles."""
        return self.source[int(self.numbers[row])].get("max_tiles")

    def _path(self, image: Any) -> Any:
        return os.path.join(self.folder, image) if self.folder and isinstance(image, str) else image

    def _measure(self, row: dict[str, Any], captions: bool) -> tuple[int, int]:
        messages, images, videos = to_messages(row), names_of(row), names_of(row, "video")
        if captions and (len([m for m in messages if m["role"] != "system"]) > 2 or not images):
            raise ValueError("not a caption of an image, as the plain template requires")
        for path in map(self._path, images + videos):
            if isinstance(path, str) and not os.path.isfile(path):
                raise ValueError(f"there is no file {path}")
        parts = [part for message in messages for part in message["content"]]
        tiles, frames = row.get("max_tiles") or self.views[0], self.views[1]
        # The number of tiles depends on the image's size; the most is near enough for rows of similar length.
        views = len(images) * (tiles if tiles == 1 else tiles + 1) + len(videos) * frames
        extra = CHARACTERS_PER_VIEW * (views - len(images)) if views > len(images) else 0
        text = sum(len(part["text"]) for part in parts if part["type"] == "text")
        return text + extra, len(images) + len(videos)


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
    folder = recipe.images and Path(recipe.images).expanduser()
    rows = Rows(source, folder, recipe.chat_template == "plain", (recipe.max_tiles or 1, recipe.num_frames or 8))
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
        pad_images, max_tiles, num_frames: of images and videos; by default as the processor does.
    """

    def __init__(
        self,
        processor: DeltaLlavaProcessor,
        max_length: int,
        pad_images: bool | None = None,
        max_tiles: int | None = None,
        num_frames: int | None = None,
    ):
        self.processor = processor
        self.max_length = max_length
        options = {"do_pad": pad_images, "max_tiles": max_tiles, "num_frames": num_frames}
        self.options: dict[str, Any] = {name: value for name, value in options.items() if value is not None}

    def __call__(self, messages: list[dict[str, Any]], budget: int, max_tiles: int | None = None) -> dict[str, Any]:
        """
        Encode a conversation at `budget` visual tokens per view of an image or frame of a video.

        Returns:
            `input_ids` and `labels` (tokens,), int64; `pixel_values` (views, 3, height, width), float32, or None; and
            `image_grid_thw`, `pixel_values_videos`, `video_grid_thw` where there are such, see `DeltaLlavaProcessor`.

        Raises:
            ValueError: no answer within `max_length`, or what the processor refuses.
        """
        inputs = self.processor.apply_chat_template(
            [self._open_images(message, max_tiles) for message in messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            # No tensors yet: computing the assistant mask from one takes longer than everything else.
            processor_kwargs={
                "num_visual_tokens": budget,
                **self.options,
                **({} if max_tiles is None else {"max_tiles": max_tiles}),
            },
        )
        input_ids = torch.tensor(inputs["input_ids"][0])
        mask = torch.as_tensor(inputs["assistant_masks"]).reshape(-1).bool()
        labels = input_ids.masked_fill(~(mask | self._word_marks(input_ids, mask)), IGNORED)
        length = self._truncate(input_ids, budget, inputs)
        if not (labels[1:length] != IGNORED).any():
            raise ValueError(f"no answer is within its first {self.max_length} tokens")
        sample = {"input_ids": input_ids[:length], "labels": labels[:length], "pixel_values": None}
        for pixels, grid, token_id in self._kinds():
            views = int((sample["input_ids"] == token_id).sum()) // budget
            if views:
                sample[pixels] = torch.stack(list(map(torch.as_tensor, inputs[pixels][:views])))
                if grid in inputs:
                    ends = torch.as_tensor(inputs[grid]).prod(-1).cumsum(0)
                    sample[grid] = torch.as_tensor(inputs[grid])[ends <= views]
        return sample

    def _open_images(self, message: dict[str, Any], max_tiles: int | None = None) -> dict[str, Any]:
        """JPEGs without tiles are decoded at half, a quarter or an eighth of their size while that is twice the tower's."""
        most: Any = max_tiles or self.options.get("max_tiles") or self.processor.max_tiles
        if isinstance(message["content"], str):
            return message
        parts = [dict(part) for part in message["content"]]
        for part in parts:
            if isinstance(part.get("image"), str):
                part["image"] = Image.open(part["image"])
                if most == 1:
                    part["image"].draft(None, (2 * self.processor.image_side,) * 2)
        return {**message, "content": parts}

    def _word_marks(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Where SentencePiece's word mark is a token of its own between an image and an answer, as in captions."""
        marks = input_ids == self.processor.tokenizer.convert_tokens_to_ids(WORD_MARK)
        behind_image = (input_ids == self.processor.image_token_id).roll(1)
        return marks & behind_image & mask.roll(-1)

    def _kinds(self) -> list[tuple[str, str, int]]:
        """Of images, and of videos where the tokenizer knows them: pixels, views per item, and placeholder."""
        kinds = [("pixel_values", "image_grid_thw", self.processor.image_token_id)]
        if self.processor.video_token_id is not None:
            kinds.append(("pixel_values_videos", "video_grid_thw", self.processor.video_token_id))
        return kinds

    def _truncate(self, input_ids: torch.Tensor, budget: int, inputs: Any) -> int:
        """How many tokens to keep: never a part of an image or a video."""
        length = min(len(input_ids), self.max_length)
        for _, grid, token_id in self._kinds():
            places = (input_ids == token_id).nonzero().flatten().tolist()
            sizes = [1] * (len(places) // budget) if grid not in inputs else np.prod(inputs[grid], -1).tolist()
            start = 0
            for size in sizes:
                if places[start + size * budget - 1] >= length:
                    length = min(length, places[start])
                    break
                start += size * budget
        return length

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
                sample = self.encoder(self.rows.messages(row), budget, self.rows.max_tiles(row))
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
            shape; with images also `pixel_values` (views, 3, height, width), float32, and `num_visual_tokens`, one number for
            all views or (views,), int64, with tiles `image_grid_thw`; the same of videos; and what `keep_labelled_logits`
            returns.
        """
        lengths = [len(sample["input_ids"]) for sample in samples]
        if not self.max_packed:
            sequences = [[row] for row in range(len(samples))]
        else:
            sequences = pack_rows(lengths, sum(lengths) if self.flash else self.max_packed)
        in_order = [samples[row] for sequence in sequences for row in sequence]
        visual = self._visual(in_order)
        counts = {
            "num_tokens": sum(lengths),
            "num_images": sum(len(visual[name]) for name in ("pixel_values", "pixel_values_videos") if name in visual),
            "num_skipped": sum(sample["num_skipped"] for sample in samples),
        }
        blank = self.blank_budget if self.blank_image is not None and not visual else 0
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
            visual = {"pixel_values": self.blank_image, "num_visual_tokens": blank}
        return {**batch, **visual, **keep_labelled_logits(batch["labels"]), **counts}

    @staticmethod
    def _visual(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Images and videos of a batch."""
        batch: dict[str, Any] = {}
        for pixels, numbers, grid in MODALITIES.values():
            shown = [sample for sample in samples if sample.get(pixels) is not None]
            if not shown:
                continue
            batch[pixels] = torch.cat([sample[pixels] for sample in shown])
            budgets = [sample["budget"] for sample in shown for _ in sample[pixels]]
            # One number where possible: the model need not copy a tensor from the device.
            batch[numbers] = budgets[0] if len(set(budgets)) == 1 else torch.tensor(budgets)
            if any(grid in sample for sample in shown):
                one_view = torch.ones(1, 3, dtype=torch.long)
                batch[grid] = torch.cat(
                    [sample.get(grid, one_view.expand(len(sample[pixels]), 3)) for sample in shown]
                )
        return batch


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
