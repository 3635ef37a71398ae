"""What the visual tokens of held-out images are nearest to, of all words of the captions, before the language model reads them.

    python -m examples.smol.nearest_words REPO smol-data --output nearest-words.json

Right at k: all tokens of the answer are among the k nearest (at least as many as the answer has); by cosine with the input
embeddings, as stage 1 trains it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from examples.easy_vqa_questions import Score
from examples.smol.align import SHARPNESS, caption_targets
from examples.smol.test_set import load_test_set
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.loading import load_repo


@torch.inference_mode()
def nearest_words(
    model: DeltaLlavaForConditionalGeneration,
    processor: DeltaLlavaProcessor,
    data: Path,
    budget: int,
    tasks: tuple[str, ...] = ("naming", "flag"),
) -> dict[str, Any]:
    """Scores of each task at 1, 5 and 20 words."""
    captions = [row["conversations"][1]["value"] for row in json.loads((data / "pretrain.json").read_text())]
    vocabulary, _ = caption_targets(captions, processor.tokenizer)
    words = F.normalize(model.get_input_embeddings().weight[vocabulary].float(), dim=-1)
    right: dict[str, dict[int, list[bool]]] = {task: {1: [], 5: [], 20: []} for task in tasks}
    for question in load_test_set(data):
        if question.task in tasks and question.image is not None:
            with Image.open(question.image) as image:
                pixels = processor.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
            tokens = model.get_image_features(pixels.to(model.device, model.dtype), budget).pooler_output[0].float()
            scores = (SHARPNESS * F.normalize(tokens, dim=-1) @ words.T).logsumexp(0)
            wanted = set(caption_targets([question.answer], processor.tokenizer)[0])
            for k, hits in right[question.task].items():
                nearest = scores.topk(max(k, len(wanted))).indices.tolist()
                hits.append(wanted <= {vocabulary[index] for index in nearest})
    return {
        task: {f"right at {k}": Score(sum(hits), len(hits)).to_dict() for k, hits in rows.items()}
        for task, rows in right.items()
    } | {"words": len(vocabulary), "num_visual_tokens": budget}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repo")
    parser.add_argument("data", type=Path)
    parser.add_argument("--num-visual-tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    found = nearest_words(*load_repo(args.repo, "cpu", "bfloat16"), args.data, args.num_visual_tokens)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
