"""`delta-llava update`."""

from typing import Annotated

import typer

from .options import say
from .push import CreatePr, Revision


def update(
    repo: Annotated[str, typer.Argument(help="Folder or Hub id of a repo.", show_default=False)],
    num_visual_tokens: Annotated[
        list[int] | None,
        typer.Option(help="Another default number; of several the first is the default, and only these are offered."),
    ] = None,
    revision: Revision = None,
    create_pr: CreatePr = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files that would change, no more.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace changed code, too.")] = False,
) -> None:
    """Give a repo today's model code, and print the files that change; weights and tokenizer stay as they are.

    With --num-visual-tokens config, processor and card get another default number of visual tokens, too. Repos carry the code that was current when they were written, and a later transformers may need newer code. On the Hub the
    files change in one commit.
    """
    from ..hub import update_code

    result = update_code(
        repo,
        num_visual_tokens=num_visual_tokens or (),
        revision=revision,
        create_pr=create_pr,
        dry_run=dry_run,
        force=force,
    )
    for name in result.changed:
        typer.echo(name)
    for name in result.deleted:
        typer.echo(f"{name} (deleted)")
    if not (result.changed or result.deleted):
        say(f"{repo} is up to date.")
    elif dry_run:
        say("Nothing was changed.")
    elif result.url:
        say(f"Updated: {result.url}")
