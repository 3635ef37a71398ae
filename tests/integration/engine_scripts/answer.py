"""What transformers answers to given questions, in an environment that need not have the package. Prints one JSON object.

    python answer.py REPO CASES.json SAVED

CASES.json is a list of {"content": content of a user message, "num_visual_tokens": null, an integer or one per image}. Every
case is asked with `generate`, through the pipeline, and again after model and processor were saved to SAVED and loaded back.
"""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline


# The trained answers are one token and the end of the text; without an end there is more to compare.
NEW_TOKENS = 12


def encode(processor, case: dict) -> dict:
    """The case for the model."""
    budget = case["num_visual_tokens"]
    return processor.apply_chat_template(
        [{"role": "user", "content": copy.deepcopy(case["content"])}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", **({} if budget is None else {"num_visual_tokens": budget})},
    )


@torch.inference_mode()
def answer(model, processor, case: dict) -> dict:
    """`prompt` and `tokens`, as ids, and `text`: greedy, for one case, without stopping at the end of the text."""
    inputs = encode(processor, case)
    output = model.generate(**inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
    prompt = inputs["input_ids"][0].tolist()
    tokens = output[0, len(prompt) :].tolist()
    return {"prompt": prompt, "tokens": tokens, "text": processor.decode(tokens, skip_special_tokens=True)}


def ask_pipeline(pipe, case: dict, new_tokens: int = NEW_TOKENS) -> str:
    """The pipeline's text for one case, stopping where the model does."""
    budget = case["num_visual_tokens"]
    output = pipe(
        text=[{"role": "user", "content": copy.deepcopy(case["content"])}],
        return_full_text=False,
        processor_kwargs={} if budget is None else {"num_visual_tokens": budget},
        generate_kwargs={"do_sample": False, "max_new_tokens": new_tokens},
    )
    return output[0]["generated_text"].strip()


def load(folder: str) -> tuple:
    """Model and processor, with the code that the folder brings."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def main() -> None:
    """Answer in every way and print what came out."""
    repo, cases, saved = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3]
    model, processor = load(repo)
    answers = [answer(model, processor, case) for case in cases]
    pipe = pipeline("image-text-to-text", model=repo, trust_remote_code=True)
    texts = [ask_pipeline(pipe, case) for case in cases]
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    reloaded = load(saved)
    report = {
        "package_importable": importlib.util.find_spec("transformers_delta_llava") is not None,
        "transformers": transformers.__version__,
        "answers": answers,
        "pipeline": texts,
        "reloaded": [answer(*reloaded, case) for case in cases],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
