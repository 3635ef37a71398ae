"""Answer many questions about images with a Delta-LLaVA repo. Only transformers is imported: the repo brings its own code.

    python examples/answer.py REPO QUESTIONS.json [--num-visual-tokens 16]

QUESTIONS.json is a list of {"image": path or URL, "question": text}. Prints one JSON object: where the model's code came
from, the seconds for loading and for answering, and the answers in order.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path


def main() -> None:
    """Load the repo once, ask everything through the pipeline."""
    parser = argparse.ArgumentParser(description="Answer questions about images with a Delta-LLaVA repo.")
    parser.add_argument("repo", help="folder or Hub id")
    parser.add_argument("questions", type=Path, help="JSON file")
    parser.add_argument("--num-visual-tokens", type=int, help="default: the repo's own")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=50)
    arguments = parser.parse_args()

    start = time.perf_counter()
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=arguments.repo, trust_remote_code=True)
    loaded = time.perf_counter()
    budget = arguments.num_visual_tokens
    conversations = []
    for entry in json.loads(arguments.questions.read_text(encoding="utf-8")):
        content = [{"type": "image", "url": entry["image"]}, {"type": "text", "text": entry["question"]}]
        conversations.append([{"role": "user", "content": content}])
    outputs = pipe(
        text=conversations,
        batch_size=arguments.batch_size,
        processor_kwargs={} if budget is None else {"num_visual_tokens": budget},
        return_full_text=False,
        generate_kwargs={"max_new_tokens": arguments.max_new_tokens, "do_sample": False},
    )
    report = {
        "package_importable": importlib.util.find_spec("transformers_delta_llava") is not None,
        "model_code": type(pipe.model).__module__,
        "seconds_to_load": loaded - start,
        "seconds_to_answer": time.perf_counter() - loaded,
        "answers": [output[0]["generated_text"].strip() for output in outputs],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
