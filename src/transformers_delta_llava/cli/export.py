"""`delta-llava export`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..conversion import export_checkpoint
from ..errors import DeltaLlavaError
from ..onnx_export import export_onnx
from .options import say


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
        bool, typer.Option("--projector-only", help="released: write mm_projector.bin and config.json alone.")
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
    verify: Annotated[
        bool, typer.Option("--verify", help="onnx: compare logits and tokens with PyTorch's, on an image.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a repo in another layout, and print its path: the authors', bit for bit, or ONNX."""
    for_onnx = {"num_visual_tokens": num_visual_tokens, "dtype": dtype, "merge_deltas": merge_deltas, "verify": verify}
    for_released = {"projector_only": projector_only, "vocab_size": vocab_size}
    others = for_released if layout is Format.onnx else for_onnx
    if given := [name for name, value in others.items() if value]:
        raise DeltaLlavaError(f"`{given[0]}=...` does not go with --format {layout.value}; leave it out.")
    if layout is Format.onnx:
        exported = export_onnx(
            repo,
            output,
            num_visual_tokens=num_visual_tokens,
            dtypes=dtype or ["fp32"],
            merge_deltas=merge_deltas,
            verify=verify,
            overwrite=overwrite,
            on_message=say,
        )
        for row in exported.compared:
            image = f"{row.num_visual_tokens} visual tokens" if row.num_visual_tokens else "no image"
            say(
                f"{row.dtype}, {image}: {row.equal_tokens} of {row.num_tokens} tokens as in PyTorch, logits within "
                f"{row.max_difference:.1e} of the largest"
            )
        sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in exported.bytes_by_dtype.items())
        say(f"{', '.join(map(str, exported.num_visual_tokens))} visual tokens per image; {sizes}")
        typer.echo(exported.output)
        return
    report = export_checkpoint(
        repo,
        output,
        projector_only=projector_only,
        vocab_size=vocab_size,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
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
