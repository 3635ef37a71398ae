"""Results that lmms-eval wrote, as the `model-index` of a model card: what the Hub shows beside a model."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard


# Where lmms-eval is asked for none, it still writes these.
NO_METRICS = ("alias", "samples", "submission")


def read_results(path: Path) -> list[EvalResult]:
    """
    The numbers in a `*_results.json` of lmms-eval, one for each task and metric.

    Raises:
        ValueError: the file is none of lmms-eval's.
    """
    report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict) or not {"results", "configs"} <= report.keys():
        raise ValueError(f"{path.name} is not a results file of lmms-eval: it has no 'results' and 'configs'.")
    arguments = str((report.get("config") or {}).get("model_args") or "")
    tokens = [part.partition("=")[2] for part in arguments.split(",") if part.startswith("num_visual_tokens=")]
    at = f" at {tokens[0]} visual tokens" if tokens else ""
    version = report.get("lmms_eval_version")
    found = []
    for task, numbers in report["results"].items():
        config = report["configs"].get(task, {})
        counted = (report.get("n-samples") or {}).get(task, {})
        part = counted.get("effective") if counted.get("effective") != counted.get("original") else None
        for key, value in numbers.items():
            metric = key.split(",")[0]
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or "_stderr" in metric or metric in NO_METRICS:
                continue
            found.append(
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type=str(config.get("dataset_path") or task),
                    dataset_name=task if part is None else f"{task} (first {part} questions)",
                    dataset_config=config.get("dataset_name"),
                    dataset_split=config.get("test_split"),
                    metric_type=metric,
                    metric_name=metric + at,
                    metric_value=value,
                    source_name=f"lmms-eval {version}" if version else "lmms-eval",
                    source_url="https://github.com/EvolvingLMMs-Lab/lmms-eval",
                )
            )
    if not found:
        raise ValueError(f"{path.name} holds no number.")
    return found


def add_results(card: Path, results: list[EvalResult]) -> None:
    """
    Put `results` into the `model-index` of the card in file `card`; those of the same data set and metric are replaced.

    Raises:
        FileNotFoundError: there is no card.
    """
    loaded = ModelCard.load(card)
    kept = [old for old in loaded.data.eval_results or [] if not any(_same(old, new) for new in results)]
    loaded.data.eval_results = kept + results
    if loaded.data.get("model_name") is None:
        loaded.data["model_name"] = card.resolve().parent.name
    loaded.save(card)


def _same(one: EvalResult, other: EvalResult) -> bool:
    names = ("dataset_type", "dataset_name", "dataset_config", "dataset_split", "metric_name")
    return all(getattr(one, name) == getattr(other, name) for name in names)
