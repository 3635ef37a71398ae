"""Do the graphs of an ONNX export answer as PyTorch does? Each precision, each number of visual tokens, question by question.

    delta-llava export REPO EXPORT --format onnx --dtype fp32 --dtype q8 --dtype q4
    python -m benchmarks.onnx_accuracy REPO EXPORT [--questions FOLDER] [--limit 500] [--num-visual-tokens 16 4 1]

Asks easy-VQA's 9,673 test questions, or those of a test set of several tasks (FOLDER, of `examples/smol/build_data.py`). onnxruntime
answers one question at a time, greedily, on one thread. PyTorch reads the prompt with that answer and says whether it would have chosen
each token, its end included: that is to answer the same, token by token. In prompts of one length several are read at once, so the sums
have another order than in `generate`. Nothing is drawn by chance.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.onnx_speed import OpenVinoModel
from examples.easy_vqa_questions import draw_test_questions
from examples.smol.test_set import MAX_NEW_TOKENS, load_test_set
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.loading import load_repo
from transformers_delta_llava.onnx.run_onnx import OnnxModel


BATCH = 64


Features = dict[tuple[str, int], torch.Tensor]


class CachedModel(OnnxModel):
    """Encodes an image once for all questions about it."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.encoded: dict[tuple[str, int], np.ndarray] = {}

    def encode_image(self, image: Any, num_visual_tokens: int) -> np.ndarray:
        key = str(image), num_visual_tokens
        if key not in self.encoded:
            with Image.open(image) as file:
                self.encoded[key] = super().encode_image(file, num_visual_tokens)
        return self.encoded[key]


class CachedOpenVinoModel(CachedModel, OpenVinoModel):
    """The same by OpenVINO."""


def main() -> None:
    """Answer, compare, print, write."""
    parser = argparse.ArgumentParser(description="Answers of an ONNX export compared with PyTorch's.")
    parser.add_argument("repo")
    parser.add_argument("export", type=Path)
    parser.add_argument("--questions", type=Path, help="folder of a test set; by default easy-VQA's")
    parser.add_argument("--limit", type=int, help="ask only so many questions, of a test set so many of each task")
    parser.add_argument(
        "--num-visual-tokens", type=int, nargs="+", help="0: without the image; by default all of the export"
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=["fp32", "q8", "q4"], help="also fp32-openvino-f32 and fp32-openvino-default"
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_repo(arguments.repo)
    questions: Sequence[Any] = (
        load_test_set(arguments.questions, arguments.limit)
        if arguments.questions
        else draw_test_questions(arguments.limit)
    )
    numbers = arguments.num_visual_tokens or [
        int(number) for number in CachedModel(arguments.export).export["vision_encoders"]
    ]
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/onnx_accuracy.py", *map(public, sys.argv[1:])]),
        "weights_sha256": _sha256(Path(arguments.repo) / "model.safetensors"),
        "versions": {module.__name__: module.__version__ for module in (onnxruntime, torch, transformers)},
        "rows": [],
    }
    rows, features = report["rows"], {}
    for dtype in arguments.dtypes:
        graphs = load_graphs(arguments.export, dtype)
        for number in numbers:
            row = measure(model, processor, graphs, questions, number, features)
            rows.append({"dtype": dtype, "num_visual_tokens": number, **row})
            print(json.dumps(rows[-1]), flush=True)
            if arguments.output:  # row by row: all of them take a while
                arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    table = Table("precision", "visual tokens", "right", "answers as in PyTorch", title=f"{len(questions)} questions")
    for row in rows:
        same = f"{row['same_answers']} of {row['questions']}"
        table.add_row(row["dtype"], str(row["num_visual_tokens"]), f"{row['right_percent']:.2f} %", same)
    Console().print(table)


def load_graphs(export: Path, dtype: str) -> CachedModel:
    """The graphs of `dtype`, which OpenVINO runs in one of its precisions where that is named: `fp32-openvino-f32`."""
    dtype, _, precision = dtype.partition("-openvino-")
    if not precision:
        return CachedModel(export, dtype, threads=1)
    model = CachedOpenVinoModel(export, dtype, threads=1)
    model.precision = None if precision == "default" else precision
    return model


def public(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if argument.startswith("/") else argument


def measure(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    graphs: CachedModel,
    questions: Sequence[Any],
    number: int,
    features: Features,
) -> dict[str, Any]:
    """Right answers in percent, in all and by task, and how many answers PyTorch would give too."""
    prompts, answers, images = [], [], []
    for question in questions:
        image: Any = question.image if number else None
        answer = list(graphs.generate(question.text, image, number or None, max_new_tokens=MAX_NEW_TOKENS))
        prompts.append(graphs.encode(question.text, number)[0].tolist())
        answers.append(answer)
        images.append(graphs.encode_image(image, number) if number else None)
    texts = [graphs.tokenizer.decode(answer).strip() for answer in answers]
    right = [is_right(question, text) for question, text in zip(questions, texts)]
    tasks: dict[str, list[bool]] = {}
    for question, correct in zip(questions, right):
        tasks.setdefault(getattr(question, "task", "easy-vqa"), []).append(correct)
    return {
        "questions": len(questions),
        "right_percent": 100 * float(np.mean(right)),
        "right_percent_by_task": {task: 100 * float(np.mean(correct)) for task, correct in tasks.items()},
        "same_answers": sum(same_answers(model, processor, prompts, answers, questions, number, features)),
    }


def is_right(question: Any, text: str) -> bool:
    """Whether an answer is right, as the evaluation of its test set says."""
    return question.is_right(text) if hasattr(question, "is_right") else text == question.answer


@torch.no_grad()
def same_answers(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    prompts: list[list[int]],
    answers: list[list[int]],
    questions: Sequence[Any],
    number: int,
    features: Features,
) -> Iterator[bool]:
    """For each question, in no order, whether PyTorch takes each token of the answer, and its end."""
    generation: Any = model.generation_config
    ends = set(np.atleast_1d(generation.eos_token_id).tolist())
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), len(answers[index])))
    for _, same_length in groupby(order, key=lambda index: (len(prompts[index]), len(answers[index]))):
        group = list(same_length)
        for start in range(0, len(group), BATCH):
            batch = group[start : start + BATCH]
            ids = torch.tensor([prompts[index] + answers[index] for index in batch])
            length = len(answers[batch[0]])
            images = {}
            if number:
                paths = [str(questions[index].image) for index in batch]
                encode(model, processor, paths, number, features)
                outputs = BaseModelOutputWithPooling(pooler_output=[features[path, number] for path in paths])
                images = {"mm_encoder_outputs": {"image": outputs}}
            logits = model(input_ids=ids, **images, logits_to_keep=length + 1).logits
            logits[..., generation.suppress_tokens or []] = -torch.inf
            for index, chosen in zip(batch, logits.argmax(-1).tolist()):
                finished = length == MAX_NEW_TOKENS or chosen[-1] in ends
                yield finished and chosen[:length] == answers[index]


def encode(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    paths: list[str],
    number: int,
    features: Features,
) -> None:
    """Visual tokens of images that have none in `features` yet, one image at a time."""
    for path in dict.fromkeys(paths):
        if (path, number) not in features:
            with Image.open(path) as image:
                inputs = processor(images=[image], text=processor.image_token, return_tensors="pt")
            features[path, number] = model.get_image_features(inputs["pixel_values"], number).pooler_output[0]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
