"""Train delta-llava-160m on a GPU that is at hand for ten minutes, on a machine without network that takes 64 MB at a time.

    python -m examples.smol.on_gpu pack smol-pieces         # here: parts and data, in files of at most 60 MB
    python -m examples.smol.on_gpu train smol-pieces OUT    # there, once all files have arrived

`train` runs both stages (of 192,000 and 128,000 rows unless `--steps` says otherwise) and leaves a checkpoint such as
`examples/smol/checkpoint`, and its scores, in OUT.
"""

import argparse
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from examples.demo import run_command
from examples.smol.align import align
from examples.smol.ship import ship
from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.training import load_recipe, train


FOLDER = Path(__file__).resolve().parent
PARTS, DATA = Path("smol-parts"), Path("smol-data")
PIECE_BYTES = 60_000_000


def pack(folders: Sequence[Path], pieces: Path, size: int = PIECE_BYTES) -> None:
    """Write folders, by their relative paths, as one tar in files of `size` bytes."""
    pieces.mkdir(parents=True)
    with tempfile.TemporaryFile(dir=pieces) as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for folder in folders:
                archive.add(folder)
        file.seek(0)
        for index, piece in enumerate(iter(lambda: file.read(size), b"")):
            (pieces / f"{index:03}").write_bytes(piece)


def unpack(pieces: Path, output: Path) -> None:
    """What `pack` wrote, as folders in `output`."""
    with tempfile.TemporaryFile(dir=output) as file:
        for piece in sorted(pieces.iterdir()):
            file.write(piece.read_bytes())
        file.seek(0)
        with tarfile.open(fileobj=file) as archive:
            archive.extractall(output, filter="data")


def run(output: Path, steps: Sequence[int], batch: int, device: str) -> None:
    """Both stages, in `runs/`; the checkpoint in `output/checkpoint`, and its scores next to it."""
    start = time.perf_counter()
    options = [f"arguments.use_cpu={device == 'cpu'}", f"arguments.per_device_train_batch_size={batch}"]
    template = FOLDER / "chat_template.jinja"
    first = [*options, f"data.chat_template={template}", f"arguments.max_steps={steps[0]}"]
    align(load_recipe(FOLDER / "align.yaml", first))
    print(f"stage 1: {time.perf_counter() - start:.0f} s", flush=True)
    # The tower takes less time than reading from the disk what it computed.
    options += ["arguments.dataloader_num_workers=8", "arguments.save_strategy='no'"]
    trained = train(load_recipe(FOLDER / "finetune.yaml", [*options, f"arguments.max_steps={steps[1]}"]))
    checkpoint, repo = output / "checkpoint", Path("runs/delta-llava-160m")
    ship(trained, checkpoint)
    print(f"stage 2: {time.perf_counter() - start:.0f} s", flush=True)
    tower, language = PARTS / "vision-tower", PARTS / "language-model"
    convert_checkpoint(checkpoint, repo, base_model=language, vision_tower=tower, chat_template=str(template))
    evaluate = [sys.executable, "-m", "examples.smol.test_set", str(repo), "--data", str(DATA)]
    run_command([*evaluate, "--num-visual-tokens", "16", "64", "4", "1", "--output", str(output / "results.json")])
    print(f"scores: {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Pack here, or train there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("pieces", type=Path)
    training = commands.add_parser("train")
    training.add_argument("pieces", type=Path)
    training.add_argument("output", type=Path)
    training.add_argument("--steps", type=int, nargs=2, default=[1500, 1000], help="of the two stages")
    training.add_argument("--batch-size", type=int, default=128)
    training.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    arguments = parser.parse_args()
    if arguments.command == "pack":
        from examples.smol.build_data import build_data  # with its libraries, which the other machine does not have
        from examples.smol.build_parts import build_parts

        build_parts(PARTS)
        build_data(DATA, size=4)
        return pack([PARTS, DATA], arguments.pieces)
    unpack(arguments.pieces, Path())
    run(arguments.output, arguments.steps, arguments.batch_size, arguments.device)


if __name__ == "__main__":
    main()
