"""`delta-llava generate` compared with what users write: a loop over a pipeline, and a call for every question about one image.

    delta-llava convert examples/easy-vqa easy-vqa-repo
    python -m benchmarks.generate easy-vqa-repo

1,000 images are asked one question each, by `generate` (two workers read ahead) and by `pipeline(batch_size=8)`, in turns; then ten questions
are asked about one image at 16 visual tokens, together and one by one, by a model of the 0.5B shape with random weights. Last, a run of
`delta-llava generate` is killed again and again, and what it leaves is compared with that of an unbroken run.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

from benchmarks.harness import arguments_of, prepare, print_table, side_by_side, write_results
from benchmarks.harness.models import build
from benchmarks.shapes import model_config
from examples.easy_vqa_questions import draw_test_questions
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.generate import Request, ask, generate
from transformers_delta_llava.loading import load_repo


PHOTO = Path(__file__).parents[1] / "examples" / "images" / "chelsea.jpg"


def main() -> None:
    """Measure, kill, print, write."""
    parser = arguments_of("Time `generate` and compare killed runs.", seconds=60.0)
    parser.add_argument("repo", help="a converted examples/easy-vqa")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shape", default="0.5b", help="of the ten questions: 0.5b, or tiny to try the script")
    arguments = parser.parse_args()
    prepare(arguments)
    model, processor = load_repo(arguments.repo, arguments.device, arguments.dtype)
    asked = draw_test_questions(arguments.images)
    requests = [Request(str(i), ask(q.text, str(q.image)), max_new_tokens=8) for i, q in enumerate(asked)]

    def ours() -> None:
        for _ in generate(model, processor, requests, batch_size=16, num_workers=2):
            pass

    pipe = pipeline("image-text-to-text", model=model, processor=processor, device=arguments.device)

    def loop() -> None:
        for _ in pipe(chats(requests), batch_size=8, max_new_tokens=8, return_full_text=False):
            pass

    times = side_by_side({"generate": ours, "pipeline(batch_size=8)": loop}, arguments)
    rows = [{"way": name, "images/s": arguments.images / seconds} for name, seconds in times.items()]
    print_table(f"{arguments.images} images", rows)

    large = build(
        lambda: DeltaLlavaForConditionalGeneration(model_config(arguments.shape, num_visual_tokens=16)),
        arguments.device,
        getattr(torch, arguments.dtype),
    )
    photo = str(PHOTO)
    ten = [Request(str(i), ask(f"question {i}?", photo), max_new_tokens=16) for i in range(10)]
    stub = shaped_processor(processor, large)

    def together() -> None:
        for answers, _ in generate(large, stub, ten, batch_size=16):
            assert all(answer.error is None for answer in answers)

    def one_by_one() -> None:
        for request in ten:
            for _ in generate(large, stub, [request], batch_size=1):
                pass

    questions = side_by_side({"together": together, "ten calls": one_by_one}, arguments)
    print_table("Ten questions about one image, 16 tokens", [{"way": n, "seconds": s} for n, s in questions.items()])
    lost = kill(arguments.repo, asked, arguments.kills)
    print(lost)
    print(write_results("generate", arguments, images=rows, ten_questions=questions, kills=lost))


def chats(requests: list[Request]) -> Iterator[list[dict[str, Any]]]:
    """What a pipeline takes."""
    for request in requests:
        yield request.messages


def shaped_processor(processor: Any, model: Any) -> Any:
    """The small repo's processor for images of the large model's tower; its tokens are within the larger vocabulary."""
    import copy

    stub = copy.deepcopy(processor)
    side = model.config.vision_config.image_size
    stub.image_processor.size, stub.image_processor.crop_size = (
        {"shortest_edge": side},
        {"height": side, "width": side},
    )
    stub.visual_token_budgets = list(model.config.visual_token_budgets)
    stub.num_visual_tokens = stub.image_seq_length = model.config.num_visual_tokens
    model.config.image_token_id = model.model.config.image_token_id = stub.image_token_id
    return stub


def kill(repo: str, asked: list[Any], kills: int) -> dict[str, int]:
    """Kill the command at random moments and start it again; rows lost, doubled, and different from an unbroken run."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        lines = [json.dumps({"id": str(i), "image": str(q.image), "prompt": q.text}) for i, q in enumerate(asked)]
        rows.write_text("\n".join(lines) + "\n")

        def command(output: str) -> list[str]:
            words = [
                "-m",
                "transformers_delta_llava",
                "generate",
                repo,
                str(rows),
                "--output",
                str(Path(folder) / output),
            ]
            return [sys.executable, *words]

        subprocess.run(command("whole.jsonl"), check=True, capture_output=True)
        output, killed = Path(folder) / "killed.jsonl", 0
        while killed < kills:
            end = (output.stat().st_size if output.exists() else 0) + random.randrange(1500)
            process = subprocess.Popen(command(output.name), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            while process.poll() is None and (not output.exists() or output.stat().st_size <= end):
                time.sleep(0.001)
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            killed += 1
        subprocess.run(command("killed.jsonl"), check=True, capture_output=True)
        answers = [
            [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]
            for name in ("whole.jsonl", "killed.jsonl")
        ]
    ids = [row["id"] for row in answers[1]]
    texts = [{row["id"]: row["text"] for row in found} for found in answers]
    return {
        "kills": killed,
        "lost": len(asked) - len(set(ids)),
        "twice": len(ids) - len(set(ids)),
        "different": sum(texts[0][name] != texts[1].get(name) for name in texts[0]),
    }


if __name__ == "__main__":
    main()
