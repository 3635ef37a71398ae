"""Memory that training data of stage 2's size costs: rows are read lazily, through an index.

    python benchmarks/memory_of_lazy_rows.py [--rows 665000]

Writes a file in LLaVA's format (about 1.6 kB a row, as in LLaVA's mixture), opens it as training does, reads 10,000 rows in
random order, and prints the peak of resident memory before and after.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from PIL import Image

from transformers_delta_llava.training.dataset import open_rows
from transformers_delta_llava.training.recipe import DataRecipe


def main() -> None:
    """Write, open, read, print."""
    parser = argparse.ArgumentParser(description="Measure the memory of lazily read training data.")
    parser.add_argument("--rows", type=int, default=665_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        write_rows(file, arguments.rows)
        Image.new("RGB", (8, 8)).save(Path(folder) / "image.png")
        before = peak_mebibytes()
        start = time.perf_counter()
        rows = open_rows(DataRecipe(path=str(file), images=folder, cache=str(Path(folder) / "cache")))
        opened = time.perf_counter() - start
        chance = random.Random(0)
        for _ in range(10_000):
            rows.messages(chance.randrange(len(rows)))
        print(
            f"{len(rows):,} rows, {file.stat().st_size / 2**20:,.0f} MiB: indexed in {opened:.0f} s; peak of resident "
            f"memory {before:.0f} MiB with the libraries alone, {peak_mebibytes():.0f} MiB after indexing and reading"
        )


def write_rows(file: Path, count: int) -> None:
    """Rows of five turns each, three of four with the image."""
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            first = "<image>\nWhat is this?" if number % 4 else "What is this?"
            turns = []
            for turn in range(5):
                turns.append({"from": "human", "value": first if turn == 0 else f"And number {turn}?"})
                turns.append(
                    {"from": "gpt", "value": f"Answer {turn} of row {number}. " + "It goes on a while. " * 10}
                )
            row = {"id": f"row-{number}", "conversations": turns, **({"image": "image.png"} if number % 4 else {})}
            out.write(("[" if number == 0 else ",\n") + json.dumps(row))
        out.write("]")


def peak_mebibytes() -> float:
    """Peak of resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
