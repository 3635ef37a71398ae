"""`delta-llava export`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import DeltaLlavaError
from .options import progress, quiet, say


class Format(str, Enum):
    """Layouts that can be written."""

    released = "released"
    onnx = "onnx"


def export(
    repo: Annotated[str, typer.Argument(help="Folder or Hub id of a Delta-LLaVA repo.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    layout: Annotated[
        Format,
        typer.Option(
            "--format", help="released: the authors' layout; onnx: graphs for Python without torch, Node, browsers."
        ),
    ] = Format.released,
    projector_only: Annotated[
        bool, typer.Option("--projector-only", help="released: write mm_projector.bin and config.json only.")
    ] = False,
    vocab_size: Annotated[
        int | None, typer.Option(help="released: rows of the vocabulary to keep; by default those that were trained.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="released: most bytes per weight file.")] = "2GB",
    num_visual_tokens: Annotated[
        list[int] | None, typer.Option(help="onnx: visual tokens of an image; may be repeated; by default all.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="onnx: fp32, fp16, q8 or q4; may be repeated; by default fp32.")
    ] = None,
    merge_deltas: Annotated[
        bool, typer.Option("--merge-deltas", help="onnx: fold the deltas into the projector's weights.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a repo in another layout, and print its path: the authors', bit for bit, or ONNX."""
    from ..conversion import export_checkpoint
    from ..onnx import export_onnx

    for_onnx = {"num_visual_tokens": num_visual_tokens, "dtype": dtype, "merge_deltas": merge_deltas}
    for_released = {"projector_only": projector_only, "vocab_size": vocab_size}
    others = for_released if layout is Format.onnx else for_onnx
    if given := [name for name, value in others.items() if value]:
        raise DeltaLlavaError(f"`{given[0]}=...` does not go with --format {layout.value}; leave it out.")
    quiet()
    if layout is Format.onnx:
        with progress("tracing") as update:
            exported = export_onnx(
                repo,
                output,
                num_visual_tokens=num_visual_tokens,
                dtypes=dtype or ["fp32"],
                merge_deltas=merge_deltas,
                overwrite=overwrite,
                progress=lambda done, total: update(completed=done, total=total),
            )
        typer.echo(exported)
        return
    with progress("writing", in_bytes=True) as update:
        report = export_checkpoint(
            repo,
            output,
            projector_only=projector_only,
            vocab_size=vocab_size,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            progress=lambda done, total: update(completed=done, total=total),
        )
    say(
        f"{report.tensors_written} tensors in {len(report.weight_files)} files, layout {layout.value}, "
        f"{report.vocab_size} rows of vocabulary"
    )
    if report.extra_keys:
        say(
            f"note: {', '.join(report.extra_keys)} in config.json tell `delta-llava convert` what the authors' code cannot be "
            "told; it would not run this model"
        )
    typer.echo(report.output)
