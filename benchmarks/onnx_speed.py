"""Time, memory and disk of an ONNX export compared with PyTorch: onnxruntime in each precision, OpenVINO where it is installed.

    delta-llava export REPO EXPORT --format onnx --dtype fp32 --dtype q8 --dtype q4
    python -m benchmarks.onnx_speed REPO EXPORT

All answer the same question about the same image, in turns, in one process, greedily, and go on to the last token asked for. The time
to the first token begins with a decoded image. Memory is the peak of a process that imports what a side needs and answers once (Linux).
On a busy machine `--threads 1 --clock cpu` counts the processor's time instead of the clock's.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from benchmarks.harness import arguments_of, prepare, print_table, side_by_side, write_results
from transformers_delta_llava.loading import encode_question, load_repo
from transformers_delta_llava.onnx.export import bytes_on_disk
from transformers_delta_llava.onnx.run_onnx import OnnxModel


PHOTO = Path(__file__).parents[1] / "examples" / "images" / "chelsea.jpg"
QUESTION = "what color is the shape?"
PYTORCH, OPENVINO = "PyTorch", "OpenVINO"
# What a process of its own does for each side, as a user would: with the files of the folder and without this package.
PROCESSES = {
    PYTORCH: """
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(threads)
model = AutoModelForImageTextToText.from_pretrained(repo, dtype="float32", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
    return_dict=True, return_tensors="pt", processor_kwargs={"num_visual_tokens": number})
model.generate(**inputs, max_new_tokens=new_tokens)
""",
    "onnxruntime": """
sys.path.insert(0, export)
from run_onnx import OnnxModel
list(OnnxModel(export, dtype, threads).generate(question, image, number, new_tokens))
""",
}
PEAK = """
import json, sys
from PIL import Image
globals().update(json.loads(sys.argv[1]))
image = Image.open(photo)
{}
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def main() -> None:
    """Measure, print, write."""
    parser = arguments_of("An ONNX export compared with PyTorch.", seconds=20.0)
    parser.add_argument("repo", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--num-visual-tokens", type=int, nargs="+", help="by default all of the export")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--name", default="onnx_easy_vqa", help="of the JSON file")
    arguments = parser.parse_args()
    prepare(arguments)
    load = {"before": os.getloadavg()[0]}
    sides = load_sides(arguments)
    config = json.loads((arguments.export / "config.json").read_text(encoding="utf-8"))
    numbers = arguments.num_visual_tokens or sorted(map(int, config["onnx_export"]["vision_encoders"]), reverse=True)
    rows = [row for number in numbers for row in speed(sides, number, arguments)]
    print_table(f"Answers of {arguments.new_tokens} tokens", rows)
    costs = [
        {"": side, "disk_mb": disk(side, arguments) / 1e6, "memory_mb": memory(side, numbers[0], arguments)}
        for side in sides
    ]
    print_table("Disk, and memory of a process that answers once", costs)
    load["after"] = os.getloadavg()[0]
    arguments.repo, arguments.export = arguments.repo.name, arguments.export.name
    versions = {"onnxruntime": onnxruntime.__version__}
    write_results(arguments.name, arguments, load=load, cpus=os.cpu_count(), versions=versions, rows=rows, costs=costs)


def load_sides(arguments: Any) -> dict[str, Callable[[Image.Image, int, int], Any]]:
    """By name, what answers about an image with so many visual tokens and so many new tokens."""
    sides: dict[str, Any] = {PYTORCH: partial(answer_with_pytorch, *load_repo(str(arguments.repo)))}
    dtypes = json.loads((arguments.export / "config.json").read_text(encoding="utf-8"))["onnx_export"]["dtypes"]
    for dtype in dtypes:
        sides[f"onnxruntime {dtype}"] = partial(
            answer_with_graphs, OnnxModel(arguments.export, dtype, arguments.threads)
        )
    if importlib.util.find_spec("openvino") and "fp32" in dtypes:
        sides[OPENVINO] = partial(answer_with_graphs, OpenVinoModel(arguments.export, "fp32", arguments.threads))
    return sides


def answer_with_pytorch(model: Any, processor: Any, image: Image.Image, number: int, new_tokens: int) -> None:
    inputs = encode_question(processor, image, QUESTION, number)
    model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)


def answer_with_graphs(model: OnnxModel, image: Image.Image, number: int, new_tokens: int) -> None:
    model.generation["eos_token_id"] = []  # no token ends the answer
    tokens = list(model.generate(QUESTION, image, number, new_tokens))
    assert len(tokens) == new_tokens


class OpenVinoModel(OnnxModel):
    """The same graphs, run by OpenVINO in float32, which is not its default on every CPU; that is `precision` None."""

    precision: str | None = "f32"

    def session(self, name: str) -> Any:
        if name not in self.sessions:
            path = self.folder / "onnx" / f"{name}{self.suffix}.onnx"
            self.sessions[name] = OpenVinoGraph(path, self.threads, self.precision)
        return self.sessions[name]


class OpenVinoGraph:
    """A graph with those methods of an `onnxruntime.InferenceSession` that `OnnxModel` calls."""

    def __init__(self, path: Path, threads: int, precision: str | None):
        import openvino

        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if precision:
            properties["INFERENCE_PRECISION_HINT"] = precision
        self.request = openvino.compile_model(str(path), "CPU", properties).create_infer_request()
        shapes = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.get_inputs, self.get_outputs = shapes.get_inputs, shapes.get_outputs

    def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return list(self.request.infer(feeds).values())

    def run_with_ort_values(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        outputs = self.request.infer({name: value.numpy() for name, value in feeds.items()})
        return [onnxruntime.OrtValue.ortvalue_from_numpy(outputs[name].copy()) for name in names]


def speed(sides: dict[str, Any], number: int, arguments: Any) -> Iterator[dict[str, Any]]:
    """A row for each side: time to the first token, tokens a second after it, and both compared with PyTorch's."""
    image = Image.open(PHOTO).convert("RGB")
    calls = {
        (side, count): partial(answer, image, number, count)
        for (side, answer), count in product(sides.items(), (1, arguments.new_tokens))
    }
    times = side_by_side(calls, arguments)  # type: ignore[arg-type, type-var]
    first = {side: times[side, 1] for side in sides}  # type: ignore[index]
    rate = {side: (arguments.new_tokens - 1) / (times[side, arguments.new_tokens] - first[side]) for side in sides}  # type: ignore[index]
    for side in sides:
        yield {
            "visual tokens": number,
            "": side,
            "first token, ms": first[side] * 1000,
            "of PyTorch's": first[side] / first[PYTORCH],
            "tokens/s": rate[side],
            "times PyTorch's": rate[side] / rate[PYTORCH],
        }


def disk(side: str, arguments: Any) -> int:
    """Bytes of the files that a side reads: weights, and graphs for all numbers of visual tokens."""
    if side == PYTORCH:
        return sum(path.stat().st_size for path in arguments.repo.glob("*.safetensors"))
    config = json.loads((arguments.export / "config.json").read_text(encoding="utf-8"))
    encoders = config["onnx_export"]["vision_encoders"].values()
    return bytes_on_disk(arguments.export / "onnx", encoders, "fp32" if side == OPENVINO else side.split()[1])


def memory(side: str, number: int, arguments: Any) -> float | None:
    """Peak in MB of a process that answers once; None where no process is described."""
    program = PROCESSES.get(side.split()[0])
    if program is None:
        return None
    values = {
        "repo": str(arguments.repo),
        "export": str(arguments.export),
        "threads": arguments.threads,
        "number": number,
    }
    values |= {
        "dtype": side.split()[-1],
        "photo": str(PHOTO),
        "question": QUESTION,
        "new_tokens": arguments.new_tokens,
    }
    command = [sys.executable, "-c", PEAK.format(program), json.dumps(values)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ""})
    return int(result.stdout.split()[-1]) * 1024 / 1e6


if __name__ == "__main__":
    main()
