"""A large checkpoint against `cp -r` of the same files with fsync: memory and time of a conversion, side by side.

    python -m benchmarks.large_conversion [--sizes 1b 7b] [--folder FOLDER] [--shard-gb 2] [--json FILE]

Writes a checkpoint of random bf16 values in `.bin` shards of about 5 GB, shaped as LLaVA-1.5 with Vicuna (7b) or as a small
Llama of 22 layers (1b), CLIP-L/336 inside; then copies it, and converts it in a process of its own. The peak of anonymous
memory (what the kernel cannot drop, unlike mapped files) is read from /proc every 20 ms. Before both the page cache is
asked to forget the source. Needs about three times the checkpoint's size on disk, and Linux.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from examples.make_checkpoint import LLAVA_KEYS, TEXT, projector_shapes, write_tokenizer, write_tower


TEXT_SIZES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
SHARD = 5 * 10**9  # as transformers saved Vicuna's


def write_large(folder: Path, size: str, shard_size: int = SHARD) -> int:
    """Write a checkpoint shard by shard; returns the bytes of its tensors."""
    text = {**TEXT, **TEXT_SIZES[size], "vocab_size": 32000, "max_position_embeddings": 4096}
    text |= {"num_key_value_heads": text["num_attention_heads"]}
    text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **text))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    projector = projector_shapes(TOWER["hidden_size"], text["hidden_size"])
    shapes |= {f"model.mm_projector.{name}": shape for name, shape in projector.items()}
    folder.mkdir(parents=True)
    tower = write_tower(folder.parent / "vision-tower", **TOWER)
    shapes |= {f"model.vision_tower.vision_tower.vision_model.{n}": tuple(t.shape) for n, t in tower.items()}
    shards: list[list[str]] = [[]]
    room = shard_size
    for name, shape in shapes.items():
        num_bytes = 2 * torch.Size(shape).numel()
        if num_bytes > room and shards[-1]:
            shards.append([])
            room = shard_size
        shards[-1].append(name)
        room -= num_bytes
    # One block of random values, read from another place for each tensor: as good as fresh ones here, and much faster.
    block = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) / 8).bfloat16()
    weight_map, start = {}, 0
    for number, names in enumerate(shards, 1):
        file = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        contents = {}
        for name in names:
            start = (start + 7919) % len(block)
            count = torch.Size(shapes[name]).numel()
            contents[name] = block.roll(start).repeat(-(-count // len(block)))[:count].reshape(shapes[name]).clone()
            weight_map[name] = file
        torch.save(contents, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    keys = {**text, **LLAVA_KEYS, "model_type": "llava_llama", "mm_hidden_size": TOWER["hidden_size"]}
    keys["mm_vision_tower"] = str(folder.parent / "vision-tower")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in keys.items() if v is not None}))
    write_tokenizer(folder)
    return sum(2 * torch.Size(shape).numel() for shape in shapes.values())


def copy(source: Path, output: Path) -> float:
    """Seconds of `cp -r` and of fsync of every file."""
    begun = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(output)], check=True)
    for path in output.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    return time.monotonic() - begun


def convert(source: Path, output: Path, shard_gb: float) -> tuple[float, int]:
    """Seconds of a conversion from start to exit of its process, and its peak of anonymous memory in bytes."""
    command = [sys.executable, "-m", "transformers_delta_llava", "convert", str(source), str(output)]
    begun, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as talk:
        process = subprocess.Popen([*command, "--max-shard-size", f"{shard_gb}GB"], stdout=talk, stderr=talk)
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.02)
        seconds = time.monotonic() - begun
        if process.returncode:
            talk.seek(0)
            raise SystemExit(talk.read())
    return seconds, peak


def _anonymous(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon")), 0)


def forget(source: Path) -> None:
    """Ask the page cache to drop a folder's files."""
    for path in source.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure(size: str, folder: Path, shard_gb: float) -> dict:
    """Write, copy, convert, delete; returns the figures."""
    source = folder / size / "source"
    num_bytes = write_large(source, size)
    try:
        forget(source)
        copied = copy(source, folder / size / "copy")
        shutil.rmtree(folder / size / "copy")
        forget(source)
        converted, peak = convert(source, folder / size / "out", shard_gb)
        largest = max(file.stat().st_size for file in (folder / size / "out").glob("*.safetensors"))
    finally:
        shutil.rmtree(folder / size)
    return {
        "size": size,
        "gigabytes": round(num_bytes / 1e9, 2),
        "copy_seconds": round(copied, 2),
        "convert_seconds": round(converted, 2),
        "ratio": round(converted / copied, 3),
        "largest_shard_gb": round(largest / 1e9, 3),
        "peak_anonymous_gb": round(peak / 1e9, 3),
        "allowed_gb": round(2 * shard_gb + 0.5, 3),
    }


def main() -> None:
    """Measure every size, print a table, exit with code 1 where memory passes what is allowed."""
    parser = argparse.ArgumentParser(description="Measure conversions of large checkpoints.")
    parser.add_argument("--sizes", nargs="+", choices=list(TEXT_SIZES), default=["1b"])
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's temporary folder")
    parser.add_argument("--shard-gb", type=float, default=2, help="most bytes per weight file, in GB")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = [measure(size, Path(folder), arguments.shard_gb) for size in arguments.sizes]
    print(" | ".join(results[0]))
    for result in results:
        print(" | ".join(str(value) for value in result.values()))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    sys.exit(int(any(result["peak_anonymous_gb"] > result["allowed_gb"] for result in results)))


if __name__ == "__main__":
    main()
