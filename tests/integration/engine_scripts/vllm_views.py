"""What vLLM's `LLM` class generates for images in tiles and for videos. Prints one JSON object.

    python vllm_views.py REPO < requests.json

The input is a list of {"prompt", "images": paths, "videos": lists of paths of frames, "options" of the processor}. Each is asked
alone, then again after the others.
"""

import json
import sys

import numpy as np
from answer import NEW_TOKENS
from PIL import Image
from vllm import LLM, SamplingParams


def open_image(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


def main() -> None:
    """Ask all requests twice."""
    requests = json.load(sys.stdin)
    llm = LLM(
        model=sys.argv[1],
        model_impl="transformers",
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 2, "video": 1},
    )
    sampling = SamplingParams(temperature=0, min_tokens=NEW_TOKENS, max_tokens=NEW_TOKENS)

    def ask(request: dict) -> dict:
        data: dict = {"image": [open_image(path) for path in request["images"]]}
        data["video"] = [np.stack([np.asarray(open_image(path)) for path in clip]) for clip in request["videos"]]
        prompt = {
            "prompt": request["prompt"],
            "multi_modal_data": {modality: items for modality, items in data.items() if items},
            "mm_processor_kwargs": request["options"],
        }
        try:
            (output,) = llm.generate([prompt], sampling, use_tqdm=False)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {"prompt": list(output.prompt_token_ids), "tokens": list(output.outputs[0].token_ids)}

    answers = [ask(request) for request in [*requests, *requests]]
    print(json.dumps({"answers": answers}))


if __name__ == "__main__":
    main()
