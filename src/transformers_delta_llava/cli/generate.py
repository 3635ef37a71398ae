"""`delta-llava generate`."""

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import DeltaLlavaError
from .options import (
    Device,
    Dtype,
    HubRevision,
    Json,
    MaxNewTokens,
    Model,
    number_or_word,
    print_json,
    progress,
    quiet,
    say,
)


def generate(
    model: Model,
    source: Annotated[
        str,
        typer.Argument(metavar="INPUT", help="Image, folder or glob of images, or JSONL file.", show_default=False),
    ],
    prompt: Annotated[str | None, typer.Option(help="Question about every image.", show_default=False)] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="JSONL file to write; a run that was stopped goes on.", show_default=False
        ),
    ] = None,
    num_visual_tokens: Annotated[
        list[str] | None,
        typer.Option(help="Per image, a number, auto, low or high; several are compared.", show_default="the repo's"),
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: Annotated[int, typer.Option(help="Questions at a time.")] = 16,
    num_workers: Annotated[int, typer.Option(help="Processes that read images ahead of the model.")] = 1,
    shard: Annotated[
        str | None, typer.Option(help="Part of the input, as 0/8, 1/8, ...; each with an output of its own.")
    ] = None,
    revision: HubRevision = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Answer a question about an image, a folder of images, or the questions of a JSONL file, greedily.

    A line of JSONL is `{"image" or "images", "prompt"}` with, optionally, `id`, `num_visual_tokens` and `answer`, or OpenAI's batch
    format. With several numbers of visual tokens every question is asked at each; where there are answers, a table compares them.
    """
    from ..generate import AnswerFile, at_budgets, compare, read_requests
    from ..generate import generate as answer_requests
    from ..loading import load_repo

    quiet()
    requests = read_requests(source, prompt, max_new_tokens)
    if shard is not None:
        index, count = map(int, shard.split("/"))
        requests = requests[index * len(requests) // count : (index + 1) * len(requests) // count]
    requests = at_budgets(requests, [number_or_word(word) for word in num_visual_tokens or []])
    if output is None and len(requests) > 1 and not any(request.answer for request in requests):
        raise DeltaLlavaError("name the JSONL file to write with --output")
    file = (
        AnswerFile(output, source.endswith(".jsonl") and '"custom_id"' in Path(source).read_text()) if output else None
    )
    answers = file.read() if file else {}
    loaded, processor = load_repo(model, device, dtype, revision)
    seconds: dict[str, float] = defaultdict(float)
    workers = num_workers if len(requests) > batch_size else 0
    with progress("answering", len(requests)) as update:
        update(completed=len(answers))
        for batch, time in answer_requests(loaded, processor, requests, batch_size, workers, set(answers)):
            if file:
                file.append(batch)
            for answer in batch:
                answers[answer.request.key] = answer
                seconds[str(answer.request.num_visual_tokens)] += time / len(batch)
            update(advance=len(batch))
    asked = [answers[request.key] for request in requests]
    failed = [answer for answer in asked if answer.error is not None]
    if output is not None:
        typer.echo(output)
    elif len(asked) == 1 and not failed:
        typer.echo(asked[0].text)
    if table := compare(requests, answers, seconds):
        print_json(table) if as_json else _print_table(table)
    if failed:
        for answer in failed[:10]:
            say(f"{answer.request.id}: {answer.error}")
        say(f"{len(failed)} of {len(asked)} requests have no answer")
        raise typer.Exit(1)


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table("visual tokens", "questions", "right, %", "95 % interval", "tokens per question", "seconds")
    for row in rows:
        low, high = row["interval_95"]
        cells = row["questions"], row["accuracy"], f"{low} to {high}", row["visual_tokens"], row.get("seconds", "")
        table.add_row("default" if row["num_visual_tokens"] == "None" else row["num_visual_tokens"], *map(str, cells))
    Console().print(table)
