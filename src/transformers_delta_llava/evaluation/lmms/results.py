"""Results that lmms-eval wrote, as the `model-index` of a model card: what the Hub shows beside a model."""

import logging
import math
import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from pydantic import Field

from ...utils.errors import DeltaLlavaError, one_line
from ...utils.validation import FileModel, read_model


# Keys of a task's results that are not metrics.
NO_METRICS = ("alias", "samples", "submission")


class _Task(FileModel):
    """What a results file says of the data of a task."""

    dataset_path: str | None = None
    dataset_name: str | None = None
    test_split: str | None = None


class _Questions(FileModel):
    """Questions of a task, and those of them that were asked."""

    original: int | None = None
    effective: int | None = None


class _Run(FileModel):
    """How lmms-eval was called."""

    model_args: Any = None


class _Report(FileModel):
    """A `*_results.json` of lmms-eval."""

    results: dict[str, dict[str, Any]]
    configs: dict[str, _Task]
    questions: dict[str, _Questions] = Field(default={}, alias="n-samples")
    config: _Run = _Run()
    lmms_eval_version: str | None = None


def read_results(path: Path) -> list[EvalResult]:
    """
    The numbers in a `*_results.json` of lmms-eval, one for each task and metric. NaN and infinity are left out.

    A part of a data set has a name and a split of its own (`test[:200]`), and every task a configuration of its own: the
    card's `model-index` keeps one name for all metrics of the same data set, configuration and split.

    Raises:
        DeltaLlavaError: the file is not lmms-eval's, or holds no number.
        OSError: it cannot be read.
    """
    report = read_model(path, _Report)
    tokens = [
        part.partition("=")[2].strip()
        for part in str(report.config.model_args or "").split(",")
        if part.strip().startswith("num_visual_tokens=")
    ]
    at = f" at {tokens[0]} visual tokens" if tokens else ""
    version = report.lmms_eval_version
    entries = []
    for task, numbers in report.results.items():
        data = report.configs.get(task, _Task())
        asked = report.questions.get(task, _Questions())
        part = asked.effective if asked.effective != asked.original else None
        split = data.test_split if part is None else f"{data.test_split or ''}[:{part}]"
        configuration = task if data.dataset_name in (None, task) else f"{data.dataset_name}, {task}"
        for key, value in numbers.items():
            metric = key.split(",")[0]
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or "_stderr" in metric or metric in NO_METRICS:
                continue
            if not math.isfinite(value):
                logging.getLogger(__name__).warning("%s: %s is %s, and is left out", task, metric, value)
                continue
            entries.append(
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type=data.dataset_path or task,
                    dataset_name=task if part is None else f"{task} (first {part} questions)",
                    dataset_config=configuration,
                    dataset_split=split,
                    metric_type=metric,
                    metric_name=metric + at,
                    metric_value=value,
                    source_name=f"lmms-eval {version}" if version else "lmms-eval",
                    source_url="https://github.com/EvolvingLMMs-Lab/lmms-eval",
                )
            )
    if not entries:
        raise DeltaLlavaError(f"{path.name} holds no number.")
    return entries


def add_results(card: Path, results: list[EvalResult]) -> None:
    """
    Put `results` into the `model-index` of the card in file `card`; those of the same task, part and metric are replaced.

    Raises:
        DeltaLlavaError: the card's header cannot be read.
        OSError: there is no card, or it cannot be written; it is as it was then.
    """
    text = card.read_text(encoding="utf-8")
    try:
        loaded = ModelCard(text)
    except Exception as error:  # whatever YAML or huggingface_hub raises
        raise DeltaLlavaError(f"The header of {card.name} cannot be read: {one_line(error)}.") from error
    data: Any = loaded.data
    new = {_what(result): result for result in results}
    kept = [old for old in data.eval_results or [] if _what(old) not in new]
    data.eval_results = kept + list(new.values())
    if data.get("model_name") is None:
        data["model_name"] = card.resolve().parent.name
    draft = card.with_name(f".{os.getpid()}-{card.name}")
    try:
        loaded.save(draft)
        draft.replace(card)
    finally:
        draft.unlink(missing_ok=True)


def _what(result: EvalResult) -> tuple[str | None, ...]:
    """What a result measures: the task, with the part of it that was asked, and the metric, with its visual tokens."""
    return result.dataset_type, result.dataset_name, result.metric_name
