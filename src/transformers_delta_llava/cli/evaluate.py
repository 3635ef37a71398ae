"""`delta-llava evaluate`."""

import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


if TYPE_CHECKING:
    from ..evaluation import Score
    from ..processing import DeltaLlavaProcessor


evaluate = typer.Typer(no_args_is_help=True, help="Measure a model on a benchmark.")


@evaluate.command("easy-vqa")
def easy_vqa(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a Delta-LLaVA.", show_default=False)],
    num_visual_tokens: Annotated[
        list[str] | None,
        typer.Option(help="Visual tokens per image, or auto; may be given several times; by default the model's."),
    ] = None,
    auto_max_loss: Annotated[
        list[float] | None,
        typer.Option(
            help="What auto may lose of a picture, 0 to 1; may be given several times; by default the model's."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Ask only so many test questions, always the same.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 64,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Precision to run in: float32, bfloat16 or float16.")] = "float32",
    output: Annotated[Path | None, typer.Option(help="JSON file to write the numbers to.")] = None,
) -> None:
    """Accuracy on easy-VQA's test questions, beside what one gets from the question alone."""
    from ..analysis import load_repo  # takes seconds to import, which `--help` need not wait for
    from ..evaluation import answer_questions, draw_test_questions, load_questions, majority_answers, score_answers

    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: ask at least one question at a time.")
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise ValueError(f"--output {output}: name a file in a folder that exists.")
    console = Console()
    questions = draw_test_questions(limit)
    truths = [question.answer for question in questions]
    blind = score_answers(truths, majority_answers(load_questions("train"), questions))
    loaded, processor = load_repo(model, device, dtype)

    table = Table(
        "",
        "tokens",
        "overall",
        "yes/no",
        "open",
        "seconds",
        title=f"easy-VQA, {len(questions)} test questions, percent",
    )
    results = []
    for budget, loss in _choices(
        num_visual_tokens or [str(loaded.config.num_visual_tokens)], auto_max_loss, processor
    ):
        name = f"{budget} visual tokens" if loss is None else f"auto, loss up to {loss:g}"
        spent: list[int] = []
        start = time.perf_counter()
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(name, total=len(questions))
            answers = answer_questions(
                loaded, processor, questions, budget, batch_size, partial(bar.advance, task), loss, spent.extend
            )
        seconds = time.perf_counter() - start
        scores = score_answers(truths, answers)
        table.add_row(name, f"{statistics.fmean(spent):.4g}", *_cells(scores), f"{seconds:.0f}")
        result: dict[str, Any] = {
            "num_visual_tokens": budget,
            "seconds": round(seconds, 1),
            "scores": _numbers(scores),
        }
        if loss is not None:
            picked = {str(tokens): spent.count(tokens) for tokens in sorted(set(spent), reverse=True)}
            result |= {"auto_max_loss": loss, "mean_visual_tokens": statistics.fmean(spent), "picked": picked}
        results.append(result)
    table.add_row("question alone", "", *_cells(blind), "")
    console.print(table)
    if output is not None:
        report = {"benchmark": "easy-vqa", "split": "test", "questions": len(questions), "model": Path(model).name}
        report |= {"dtype": dtype, "results": results, "question_alone": _numbers(blind)}
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@evaluate.command("add-to-card")
def add_to_card(
    repo: Annotated[Path, typer.Argument(help="Folder of a Delta-LLaVA with a README.md.", show_default=False)],
    results: Annotated[list[Path], typer.Argument(help="*_results.json files of lmms-eval.", show_default=False)],
) -> None:
    """Put what lmms-eval measured into the model card, for the Hub to show."""
    from ..evaluation.lmms.results import add_results, read_results

    found = [result for path in results for result in read_results(path)]
    add_results(repo / "README.md", found)
    for result in found:
        print(f"{result.dataset_name}: {result.metric_name} = {result.metric_value}")


def _choices(
    budgets: list[str], losses: list[float] | None, processor: "DeltaLlavaProcessor"
) -> list[tuple[int | str, float | None]]:
    """(budget, loss) of every row, all checked before the first is measured."""
    rows: list[tuple[int | str, float | None]] = []
    for budget in budgets:
        if budget == "auto":
            rows += [(budget, loss) for loss in losses or [processor.auto_max_loss]]
        elif budget.isdecimal() and int(budget) in processor.visual_token_budgets:
            rows.append((int(budget), None))
        else:
            there = ", ".join(map(str, processor.visual_token_budgets))
            raise ValueError(f"--num-visual-tokens {budget}: the model has {there}, or say auto.")
    for loss in losses or []:
        if not 0 <= loss <= 1:
            raise ValueError(f"--auto-max-loss {loss}: give a share from 0 to 1.")
    if losses and "auto" not in budgets:
        raise ValueError("--auto-max-loss goes with --num-visual-tokens auto.")
    return rows


def _cells(scores: dict[str, "Score"]) -> list[str]:
    return [f"{s.accuracy:.2f} ({s.interval[0]:.2f} to {s.interval[1]:.2f})" for s in scores.values()]


def _numbers(scores: dict[str, "Score"]) -> dict[str, dict]:
    return {name: score.to_dict() for name, score in scores.items()}
