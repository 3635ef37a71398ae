"""`delta-llava push`, and the options that `delta-llava convert --push-to-hub` shares with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import say


if TYPE_CHECKING:
    from ..hub import PushReport


Private = Annotated[bool, typer.Option("--private", help="Create the repo private.")]
Revision = Annotated[
    str | None, typer.Option(help="Branch to commit to, created if it does not exist; by default main.")
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Shell pattern of files to publish, too, such as 'images/*.png'; may be given several times."),
]
License = Annotated[str | None, typer.Option(help="Licence for the card, as the Hub names it, such as apache-2.0.")]
BaseModels = Annotated[
    list[str] | None,
    typer.Option("--card-base-model", help="Hub id of a base model for the card; several times for several."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the folder and list what would be uploaded, no more.")]


def push(
    folder: Annotated[Path, typer.Argument(help="Repo folder that convert or train wrote.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Hub repo.", show_default=False)],
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePr = False,
    dry_run: DryRun = False,
    include: Include = None,
    license: License = None,
    card_base_models: BaseModels = None,
) -> None:
    """Publish a repo folder on the Hub in one commit, and print the commit's URL.

    Only what a model repo has is published: weights, settings, the model's code, README.md and licences.
    The login is that of `hf auth login` or of HF_TOKEN. After a broken connection, run it again: files that arrived are not sent twice.
    """
    push_and_tell(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        dry_run=dry_run,
        include=include or [],
        license=license,
        base_models=card_base_models or [],
    )


def push_and_tell(
    folder: Path,
    repo_id: str,
    *,
    private: bool,
    revision: str | None,
    create_pr: bool,
    dry_run: bool,
    include: Sequence[str] = (),
    license: str | None = None,
    base_models: Sequence[str] = (),
) -> None:
    """Push, with warnings on stderr and the URL on stdout; after a dry run the list of files there."""
    from ..hub import push_folder

    report = push_folder(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        dry_run=dry_run,
        include=include,
        license=license,
        base_models=base_models,
    )
    for warning in report.warnings:
        say(f"warning: {warning}")
    if not dry_run:
        typer.echo(report.url)
        return
    for name, size in report.files.items():
        typer.echo(f"{size:>14,} {name}")
    say(_plan(report, private, revision, create_pr))


def _plan(report: "PushReport", private: bool, revision: str | None, create_pr: bool) -> str:
    size = f"{len(report.files)} files, {sum(report.files.values()) / 1e6:,.1f} MB"
    how = "a pull request against" if create_pr else "one commit to"
    visibility = " (private, if it is new)" if private else ""
    return f"Would upload {size}, in {how} {revision or 'main'} of {report.repo_id}{visibility}; nothing was sent."
