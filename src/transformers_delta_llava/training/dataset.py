"""Rows that can be used, encoded; what cannot be used is named, and skipped or fatal."""

import json
import logging
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..utils.errors import one_line
from .data import Rows
from .encoding import ConversationEncoder
from .errors import DataError
from .sampler import Request


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
