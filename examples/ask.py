"""Ask a Delta-LLaVA repo about an image. Only transformers is imported: the repo brings its own code.

    python examples/ask.py REPO IMAGE QUESTION [--num-visual-tokens 144 36 ...]

Prints one JSON object: where the model's code came from, the seconds for loading, and per token budget what was said.
"""

import argparse
import importlib.util
import json
import time


def main() -> None:
    """Load the repo once, ask once per budget."""
    parser = argparse.ArgumentParser(description="Ask a Delta-LLaVA repo about an image.")
    parser.add_argument("repo", help="folder or Hub id")
    parser.add_argument("image", help="path or URL")
    parser.add_argument("question")
    parser.add_argument("--num-visual-tokens", type=int, nargs="*", default=[None], help="default: the repo's own")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args()

    start = time.perf_counter()
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=arguments.repo, trust_remote_code=True)
    report = {
        "package_importable": importlib.util.find_spec("transformers_delta_llava") is not None,
        "model_code": type(pipe.model).__module__,
        "seconds_to_load": time.perf_counter() - start,
    }

    # The projector's output (images, visual tokens, hidden size) says what the language model really gets.
    shapes = []
    pipe.model.model.multi_modal_projector.register_forward_hook(lambda _, __, output: shapes.append(output.shape))
    content = [{"type": "image", "url": arguments.image}, {"type": "text", "text": arguments.question}]
    answers = []
    for budget in arguments.num_visual_tokens:
        start = time.perf_counter()
        (answer,) = pipe(
            text=[{"role": "user", "content": content}],
            processor_kwargs={} if budget is None else {"num_visual_tokens": budget},
            return_full_text=False,
            generate_kwargs={"max_new_tokens": arguments.max_new_tokens, "do_sample": False},
        )
        seconds = time.perf_counter() - start
        answers.append({"visual_tokens": shapes[-1][1], "seconds": seconds, "text": answer["generated_text"]})
    print(json.dumps({**report, "answers": answers}))


if __name__ == "__main__":
    main()
