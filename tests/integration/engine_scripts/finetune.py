"""Fine-tune a Delta-LLaVA repo with TRL's SFTTrainer, where the package is not installed. Prints one JSON object.

    python finetune.py REPO ROWS.json OUTPUT [--lora]

ROWS.json is a list of {"images": [path, ...], "question": ..., "answer": ...}; rows may have no image, or several. The loss is on
the answers only. With `--lora` the language model gets LoRA, the projector is trained with it, the adapter is saved, loaded
onto the untouched repo again and merged. OUTPUT is then a repo like the first.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer


# Of every trainer here: a short run on CPUs in float32 that saves nothing by itself.
OPTIONS = {
    "per_device_train_batch_size": 16,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
LOADING = {"trust_remote_code": True, "dtype": "float32"}


def load_rows(path: str, convert: Callable[[dict], dict]) -> Dataset:
    """Rows of a file as TRL wants them, with `images`."""
    rows = [convert(row) for row in json.loads(Path(path).read_text())]
    return Dataset.from_list(rows).cast_column("images", List(Image()))


def print_report(trainer: Any, logged: dict[str, str], **report: object) -> None:
    """Print one JSON object: the `report`, and of the trainer's log what is `logged` under each name."""
    for name, key in logged.items():
        report[name] = [entry[key] for entry in trainer.state.log_history if key in entry]
    report["package_importable"] = importlib.util.find_spec("transformers_delta_llava") is not None
    print(json.dumps(report))


def to_messages(row: dict) -> dict:
    """A question and its answer."""
    turns = zip(("user", "assistant"), (row["question"], row["answer"]))
    return {"messages": [{"role": role, "content": text} for role, text in turns], "images": row["images"]}


def main() -> None:
    """Train, save, and say how it went."""
    repo, rows, output, *flags = sys.argv[1:]
    torch.manual_seed(0)
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=r".*language_model.*\.(q_proj|v_proj|gate_proj|down_proj)",
        modules_to_save=["multi_modal_projector"],
    )
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    trainer = SFTTrainer(
        model=repo,
        args=SFTConfig(
            output_dir=f"{output}-run",
            model_init_kwargs=LOADING,
            assistant_only_loss=True,
            max_length=None,
            max_steps=100,
            learning_rate=7e-4 if "--lora" in flags else 3e-4,
            **OPTIONS,
        ),
        train_dataset=load_rows(rows, to_messages),
        processing_class=processor,
        peft_config=lora if "--lora" in flags else None,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    trainer.train()
    model = trainer.model
    if "--lora" in flags:
        model.save_pretrained(f"{output}-adapter")
        with torch.no_grad():
            model.eval()
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            base = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, dtype=torch.float32)
            model = PeftModel.from_pretrained(base, f"{output}-adapter").merge_and_unload().eval()
            merged = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        # Where the text is padded, the logits mean nothing.
        kept = batch["attention_mask"].bool()
        difference = (logits[kept] - merged[kept]).abs().max().item()
    model.save_pretrained(output)
    processor.save_pretrained(output)
    labels = [processor.decode(row[row != -100]) for row in batch["labels"]]
    report = {"labels": labels, "trainable": trainable, "difference": difference if "--lora" in flags else None}
    print_report(trainer, {"losses": "loss"}, **report)


if __name__ == "__main__":
    main()
