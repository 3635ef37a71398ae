# /// script
# requires-python = ">=3.10"
# dependencies = ["ray[data]==2.60.0", "vllm>=0.32,<0.33", "pillow"]
# ///
"""Answer the rows of a JSONL file on a Ray cluster, with as many vLLM engines as asked for.

    uv run examples/scale/answer_on_ray.py ORG/MODEL rows.jsonl answers --engines 8

A row is what `delta-llava generate` reads: `{"image", "prompt"}` with, optionally, `id` and `num_visual_tokens`; paths of images are
those of the workers, absolute or relative to the file. The output is a folder of JSONL files. Ray Data's module for language models
changes with nearly every release of vLLM: the versions above are those that were tested.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import ray
from PIL import Image
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from transformers import AutoProcessor


def main() -> None:
    """Read, answer, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a Delta-LLaVA repo")
    parser.add_argument("source", type=Path, help="JSONL file")
    parser.add_argument("output", help="folder of JSON lines")
    parser.add_argument("--engines", type=int, default=1, help="replicas of the model")
    parser.add_argument("--max-tokens", type=int, default=128, help="length of the longest answer")
    parser.add_argument("--batch-size", type=int, default=64, help="rows that an engine is given at a time")
    parser.add_argument("--engine", type=json.loads, default={}, help='JSON for vLLM, such as {"dtype": "float32"}')
    parser.add_argument("--cpu", action="store_true", help="engines take a CPU instead of a GPU")
    options = parser.parse_args()

    config = vLLMEngineProcessorConfig(
        model_source=options.model,
        engine_kwargs={"trust_remote_code": True, "model_impl": "transformers", **options.engine},
        concurrency=options.engines,
        batch_size=options.batch_size,
        log_engine_metrics=False,
        placement_group_config={"bundles": [{"CPU": 1}]} if options.cpu else None,
        # Ours writes the prompt: Ray's own stages know neither the images nor their numbers of visual tokens.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    lines = [json.loads(line) for line in options.source.read_text().splitlines() if line.strip()]
    rows = ray.data.from_items([{"row": json.dumps({"id": str(i), **line})} for i, line in enumerate(lines)])
    folder = str(options.source.resolve().parent)
    before, after = split_prompt(options.model)
    ask = partial(to_request, folder, before, after, options.max_tokens)
    build_processor(config, preprocess=ask, postprocess=to_answer)(rows).write_json(options.output)


def split_prompt(model: str) -> list[str]:
    """What the chat template writes before and after a question about an image."""
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    content = [{"type": "image"}, {"type": "text", "text": "QUESTION"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt.rsplit("QUESTION", 1)


def to_request(folder: str, before: str, after: str, max_tokens: int, row: dict) -> dict:
    """A row as vLLM takes it, with its own number of visual tokens."""
    asked = json.loads(row["row"])
    number = {name: asked[name] for name in ("num_visual_tokens",) if asked.get(name) is not None}
    with Image.open(Path(folder, asked["image"])) as image:
        return {
            "row": row["row"],
            "prompt": before + asked["prompt"] + after,
            "multimodal_data": {"image": image.convert("RGB")},
            "mm_processor_kwargs": number,
            "sampling_params": {"temperature": 0, "max_tokens": max_tokens},
        }


def to_answer(row: dict) -> dict:
    """What is written: the row with its answer."""
    return {**json.loads(row["row"]), "answer": row["generated_text"].strip()}


if __name__ == "__main__":
    main()
