# /// script
# requires-python = ">=3.10"
# dependencies = ["vllm>=0.32", "datasets>=4", "pillow"]
# ///
"""Answer a question about every image of a folder or a data set with vLLM, on one machine or several.

    uv run examples/scale/answer_dataset.py ORG/MODEL photos/ answers --prompt "What is in this image?"
    uv run examples/scale/answer_dataset.py ORG/MODEL ORG/DATASET answers --prompt-column question --num-visual-tokens 64
    uv run examples/scale/answer_dataset.py ORG/MODEL ORG/DATASET answers --prompt-column question --shard 3/8

The output is a folder of Parquet files, the rows of the input with a column `answer`; `load_dataset("parquet", data_dir="answers")`
reads it. Each file appears whole: started again, a run that was stopped goes on with the files that are missing.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, load_dataset
from transformers import AutoProcessor
from vllm import LLM, SamplingParams


def main() -> None:
    """Answer part by part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a Delta-LLaVA repo")
    parser.add_argument("source", help="folder of images, or folder or Hub id of a data set")
    parser.add_argument("output", type=Path, help="folder of Parquet files")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--prompt", help="question about every image")
    parser.add_argument("--prompt-column", help="column of questions, instead")
    parser.add_argument("--tokens-column", help="column of numbers of visual tokens")
    parser.add_argument("--num-visual-tokens", type=int, help="of every image; by default the repo's")
    parser.add_argument("--max-tokens", type=int, default=128, help="length of the longest answer")
    parser.add_argument("--rows", type=int, default=1000, help="rows of one file")
    parser.add_argument("--shard", default="0/1", help="which files: 0/8, 1/8, ... on eight machines")
    parser.add_argument(
        "--engine", type=json.loads, default={}, help='JSON for vllm.LLM, such as {"dtype": "float32"}'
    )
    options = parser.parse_args()
    if not (options.prompt or options.prompt_column):
        parser.error("give --prompt or --prompt-column")

    data = load_dataset(options.source, split=options.split).cast_column(options.image_column, Image(mode="RGB"))
    index, count = map(int, options.shard.split("/"))
    starts = range(index * options.rows, len(data), count * options.rows)
    files = {start: options.output / f"{start:09}.parquet" for start in starts}
    missing = {start: file for start, file in files.items() if not file.exists()}
    if not missing:
        return
    options.output.mkdir(parents=True, exist_ok=True)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    engine = LLM(model=options.model, trust_remote_code=True, model_impl="transformers", **options.engine)
    sampling = SamplingParams(temperature=0, max_tokens=options.max_tokens)
    for start, file in missing.items():
        rows = data.select(range(start, min(start + options.rows, len(data))))
        outputs = engine.generate([request(row, processor, options) for row in rows], sampling)
        answers = [output.outputs[0].text.strip() for output in outputs]
        write(rows.add_column("answer", answers), file)


def request(row: dict, processor: Any, options: argparse.Namespace) -> dict:
    """A row as vLLM takes it, with its own number of visual tokens."""
    question = row[options.prompt_column] if options.prompt_column else options.prompt
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    number = row[options.tokens_column] if options.tokens_column else options.num_visual_tokens
    return {
        "prompt": prompt,
        "multi_modal_data": {"image": row[options.image_column]},
        "mm_processor_kwargs": {} if number is None else {"num_visual_tokens": number},
    }


def write(rows: Dataset, file: Path) -> None:
    """Whole, or not at all."""
    temporary = file.with_suffix(f".{os.getpid()}")
    rows.to_parquet(temporary)
    temporary.rename(file)


if __name__ == "__main__":
    main()
