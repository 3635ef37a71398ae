"""What TRL's SFTTrainer says to rows that make no sense. Prints one JSON object: by fault, the class of the error and its message.

python bad_rows.py REPO IMAGE
"""

import json
import sys

from bad_input import refusal
from datasets import Dataset
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer


def row(*images: str, places: int | None = None, roles: tuple[str, ...] = ("user", "assistant")) -> dict:
    """A row with these images, and as many places for them unless told otherwise."""
    count = len(images) if places is None else places
    asked = [{"type": "image", "text": None}] * count + [{"type": "text", "text": "what shape is it?"}]
    contents = {"user": asked, "assistant": [{"type": "text", "text": "circle"}]}
    return {"messages": [{"role": role, "content": contents[role]} for role in roles], "images": list(images)}


def first_batch(repo: str, row: dict, **options: int) -> dict:
    """The first batch of a run on this row."""
    trainer = SFTTrainer(
        model=repo,
        args=SFTConfig(
            output_dir="run",
            model_init_kwargs={"trust_remote_code": True, "dtype": "float32"},
            max_length=None,
            per_device_train_batch_size=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list([row]),
        processing_class=AutoProcessor.from_pretrained(repo, trust_remote_code=True, **options),
    )
    return next(iter(trainer.get_train_dataloader()))


def main() -> None:
    """Try every fault, then a row that makes sense."""
    repo, image = sys.argv[1:]
    faults = {
        "no image": row(__file__),
        "unreachable": row("http://127.0.0.1:9/a.png"),
        "roles out of order": row(image, roles=("assistant", "user")),
        "image without a place": row(image, places=0),
        "place without an image": row(places=1),
        "too many images": row(image, image, image, places=1),
    }
    said = {name: refusal(first_batch, repo, fault) for name, fault in faults.items()}
    said["unknown budget"] = refusal(first_batch, repo, row(image), num_visual_tokens=7)
    print(json.dumps({"said": said, "after": refusal(first_batch, repo, row(image))}))


if __name__ == "__main__":
    main()
