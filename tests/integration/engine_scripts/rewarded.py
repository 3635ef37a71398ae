"""Train a Delta-LLaVA repo with TRL's GRPOTrainer at another number of visual tokens than its own, where the package is not installed.

    python rewarded.py REPO ROWS.json NUM_VISUAL_TOKENS

ROWS.json is a list of {"image": path, "question": ..., "answer": ...}; an answer is rewarded by how much of `answer` it begins with.
Prints one JSON object.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from datasets import Dataset, Image, List
from transformers import AutoProcessor
from trl import GRPOConfig, GRPOTrainer


def reward(completions: list, answer: list[str], **kwargs: object) -> list[float]:
    """1 for the answer, 0 for any other."""
    return [float(chat[0]["content"].strip() == wanted) for chat, wanted in zip(completions, answer)]


def main() -> None:
    """Train, and say how it went."""
    repo, rows, number = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    processor.num_visual_tokens = processor.image_seq_length = number
    table = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "images": [row["image"]],
            "answer": row["answer"],
        }
        for row in rows
    ]
    trainer = GRPOTrainer(
        model=repo,
        reward_funcs=reward,
        processing_class=processor,
        train_dataset=Dataset.from_list(table).cast_column("images", List(Image())),
        args=GRPOConfig(
            output_dir=str(Path(sys.argv[2]).parent / "grpo"),
            model_init_kwargs={"trust_remote_code": True, "dtype": "float32", "num_visual_tokens": number},
            max_steps=12,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=4,
            temperature=2.0,
            learning_rate=1e-4,
            beta=0.01,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
    )
    prompts = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: prompts.append(kwargs.get("input_ids")), with_kwargs=True
    )
    trainer.train()
    counts = {
        int(count)
        for ids in prompts
        if ids is not None and ids.shape[1] > number
        for count in (ids == trainer.model.config.image_token_id).sum(-1)
    }
    report = {
        "package_importable": importlib.util.find_spec("transformers_delta_llava") is not None,
        "rewards": [entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
        "gradients": [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry],
        "placeholders": sorted(counts),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
