"""`delta-llava evaluate`."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .options import Device, Dtype, Model, number_or_word, progress


if TYPE_CHECKING:
    from ..evaluation import Score


evaluate = typer.Typer(no_args_is_help=True, help="Measure a model on a benchmark.")


@evaluate.command("easy-vqa")
def easy_vqa(
    model: Model,
    num_visual_tokens: Annotated[
        list[str] | None,
        typer.Option(help="Visual tokens per image, or auto; may be given several times; by default the model's."),
    ] = None,
    auto_max_loss: Annotated[
        list[float] | None,
        typer.Option(
            help="What auto may lose of an image, 0 to 1; may be given several times; by default the model's."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask only so many test questions, always the same.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions per batch.")] = 64,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    output: Annotated[Path | None, typer.Option(help="JSON file to write the numbers to.")] = None,
) -> None:
    """Accuracy on easy-VQA's test questions, beside the accuracy of guessing from the question alone."""
    from ..analysis import load_repo  # takes seconds to import, which `--help` need not wait for
    from ..evaluation import draw_test_questions, evaluate_easy_vqa, expand_settings

    _check_report_path(output)
    questions = draw_test_questions(limit)
    loaded, processor = load_repo(model, device, dtype)
    budgets = [number_or_word(word) for word in num_visual_tokens or [str(loaded.config.num_visual_tokens)]]
    settings = expand_settings(processor, budgets, auto_max_loss)
    with progress("asking", len(questions) * len(settings)) as advance:
        results, question_alone = evaluate_easy_vqa(loaded, processor, questions, settings, batch_size, advance)
    title = f"easy-VQA, {len(questions)} test questions, percent"
    table = Table("", "tokens", "overall", "yes/no", "open", "seconds", title=title)
    for result in results:
        name = f"{result.num_visual_tokens} visual tokens"
        if result.auto_max_loss is not None:
            name = f"auto, loss up to {result.auto_max_loss:g}"
        table.add_row(name, f"{result.mean_visual_tokens:.4g}", *_cells(result.scores), f"{result.seconds:.0f}")
    table.add_row("question alone", "", *_cells(question_alone), "")
    Console().print(table)
    if output is not None:
        report = {"benchmark": "easy-vqa", "split": "test", "questions": len(questions), "model": Path(model).name}
        report |= {"dtype": dtype, "results": [result.to_dict() for result in results]}
        report["question_alone"] = {name: score.to_dict() for name, score in question_alone.items()}
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@evaluate.command("smol")
def smol(
    model: Model,
    data: Annotated[Path, typer.Option(help="What examples/smol/build_data.py wrote.")] = Path("smol-data"),
    num_visual_tokens: Annotated[
        list[str] | None,
        typer.Option(help="Visual tokens per image, or auto; may be given several times; by default all budgets."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask only so many questions of each task.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Questions per batch.")] = 32,
    device: Device = "cpu",
    dtype: Dtype = "bfloat16",
    output: Annotated[Path | None, typer.Option(help="JSON file to write numbers and answers to.")] = None,
) -> None:
    """Accuracy on each task of examples/smol, at every budget, beside the model asked without the image."""
    from ..analysis import load_repo
    from ..evaluation import evaluate_tasks, load_test_set, majority_of_training
    from ..training.frozen_features import FrozenFeatures

    _check_report_path(output)
    questions = load_test_set(data, limit)
    majority = majority_of_training(data, questions)
    loaded, processor = load_repo(model, device, dtype)
    budgets = [number_or_word(word) for word in num_visual_tokens or map(str, loaded.config.visual_token_budgets)]
    table = Table("", *dict.fromkeys(question.task for question in questions))
    report = {"benchmark": "smol", "questions": len(questions), "model": Path(model).name, "dtype": dtype}
    results = []
    asking = progress("asking", len(questions) * (len(budgets) + 1))
    with tempfile.TemporaryDirectory() as features, asking as advance:
        if dtype == "bfloat16":  # which float16 holds as it is: the tower runs once an image, not once a budget
            FrozenFeatures(loaded, features)
        for result in evaluate_tasks(loaded, processor, questions, budgets, majority, batch_size, advance):
            table.add_row(result["asked"], *_cells(result["scores"]))
            scores = {task: score.to_dict() for task, score in result["scores"].items()}
            results.append({**result, "scores": scores})
            if output is not None:  # after each setting: a run that is cut off keeps what it has
                output.write_text(
                    json.dumps({**report, "results": results}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
                )
    Console().print(table)


@evaluate.command("add-to-card")
def add_to_card(
    repo: Annotated[Path, typer.Argument(help="Folder of a Delta-LLaVA with a README.md.", show_default=False)],
    results: Annotated[list[Path], typer.Argument(help="*_results.json files of lmms-eval.", show_default=False)],
) -> None:
    """Put what lmms-eval measured into the model card, for the Hub to show."""
    from ..evaluation.lmms.results import add_results, read_results

    entries = [entry for path in results for entry in read_results(path)]
    add_results(repo / "README.md", entries)
    for entry in entries:
        typer.echo(f"{entry.dataset_name}: {entry.metric_name} = {entry.metric_value}")


def _check_report_path(output: Path | None) -> None:
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise ValueError(f"--output {output}: name a file in a folder that exists.")


def _cells(scores: "dict[str, Score]") -> list[str]:
    return [f"{s.accuracy:.2f} ({s.interval[0]:.2f} to {s.interval[1]:.2f})" for s in scores.values()]
