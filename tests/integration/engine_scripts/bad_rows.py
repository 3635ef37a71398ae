"""What TRL's SFTTrainer says to rows that make no sense. Prints one JSON object: by fault, the class of the error and its message.

python bad_rows.py REPO PICTURE
"""

import json
import sys

from bad_input import refusal
from datasets import Dataset
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer


def row(*pictures: str, places: int | None = None, roles: tuple[str, ...] = ("user", "assistant")) -> dict:
    """A row with these pictures, and as many places for them unless told otherwise."""
    count = len(pictures) if places is None else places
    asked = [{"type": "image", "text": None}] * count + [{"type": "text", "text": "what shape is it?"}]
    contents = {"user": asked, "assistant": [{"type": "text", "text": "circle"}]}
    return {"messages": [{"role": role, "content": contents[role]} for role in roles], "images": list(pictures)}


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
    repo, picture = sys.argv[1:]
    faults = {
        "no picture": row(__file__),
        "unreachable": row("http://127.0.0.1:9/a.png"),
        "roles out of order": row(picture, roles=("assistant", "user")),
        "picture without a place": row(picture, places=0),
        "place without a picture": row(places=1),
        "too many pictures": row(picture, picture, picture, places=1),
    }
    said = {name: refusal(first_batch, repo, fault) for name, fault in faults.items()}
    said["unknown budget"] = refusal(first_batch, repo, row(picture), num_visual_tokens=7)
    print(json.dumps({"said": said, "after": refusal(first_batch, repo, row(picture))}))


if __name__ == "__main__":
    main()
