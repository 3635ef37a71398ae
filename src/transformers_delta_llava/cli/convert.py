"""`delta-llava convert`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import DeltaLlavaError
from .options import progress, say
from .push import BaseModels, CreatePr, DryRun, License, Private, Revision, push_and_tell


def convert(
    source: Annotated[
        str, typer.Argument(help="Folder or Hub id of a checkpoint in the authors' layout.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Argument(
            help="Folder to write the Hub repo to; with --push-to-hub by default ./NAME.", show_default=False
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the language model that a projector or a LoRA run was trained on."),
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the vision tower; by default what the config names.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the tokenizer; by default the source's own.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Cast weights to float32, bfloat16 or float16; by default each keeps its own.")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="Chat template by name, `tokenizer` for the tokenizer's own, or a Jinja file; by default what it was tuned with."
        ),
    ] = None,
    scale_factor: Annotated[
        int | None,
        typer.Option(
            help="The one the checkpoint was trained with, where its config does not say (2: 144 of 576 tokens)."
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes per weight file.")] = "2GB",
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the sums in .bin files, and every written tensor.")
    ] = False,
    license: License = None,
    card_base_models: BaseModels = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion's output.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Publish the result; see `delta-llava push`.")
    ] = None,
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePr = False,
    dry_run: DryRun = False,
) -> None:
    """Convert a trained checkpoint into a Hub repo, and print the repo's path.

    With --push-to-hub the repo is then published, and the commit's URL printed too; --dry-run converts and sends nothing.
    """
    from ..conversion import convert_checkpoint
    from ..hub import check_login, is_repo_id

    if push_to_hub is None:
        if private or revision is not None or create_pr or dry_run:
            raise DeltaLlavaError("--private, --revision, --create-pr and --dry-run belong to --push-to-hub")
        if output is None:
            raise DeltaLlavaError("name the folder to write the repo to, or publish it with --push-to-hub ORG/NAME")
    else:
        if not is_repo_id(push_to_hub):
            raise DeltaLlavaError(f"--push-to-hub {push_to_hub}: not a Hub id of the form owner/name")
        if not dry_run:
            check_login()  # not after an hour of conversion
    output = output or Path(str(push_to_hub).rpartition("/")[2])
    with progress("writing", in_bytes=True) as update:
        report = convert_checkpoint(
            source,
            output,
            base_model=base_model,
            vision_tower=vision_tower,
            tokenizer=tokenizer,
            dtype=dtype,
            chat_template=chat_template,
            scale_factor=scale_factor,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            verify=verify,
            repo_id=push_to_hub,
            license=license,
            base_models=card_base_models or [],
            progress=lambda done, total: update(completed=done, total=total),
            verify_progress=lambda done, total: update(description="verifying", completed=done, total=total),
        )
    for warning in report.warnings:
        say(f"warning: {warning}")
    for name, reason in report.ignored.items():
        say(f"left out {name}: {reason}")
    if report.license is None:
        say("warning: README.md names no licence; pass --license")
    if not report.base_models:
        say("warning: README.md names no base model; pass --card-base-model")
    say(
        f"{report.tensors_written} tensors{', verified' if verify else ''} ({report.tensors_read} from {source}), "
        f"{report.num_visual_tokens} visual tokens per image"
    )
    say(f"chat template: {report.chat_template.name} ({report.chat_template.reason})")
    typer.echo(report.output)
    if push_to_hub is not None:
        try:
            push_and_tell(
                output, push_to_hub, private=private, revision=revision, create_pr=create_pr, dry_run=dry_run
            )
        except Exception:
            say(f"the converted repo is in {output}; `delta-llava push {output} {push_to_hub}` publishes it")
            raise
