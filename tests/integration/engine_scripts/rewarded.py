"""Train a Delta-LLaVA repo with TRL's GRPOTrainer at another number of visual tokens than its own, where the package is not installed.

    python rewarded.py REPO ROWS.json NUM_VISUAL_TOKENS

ROWS.json is a list of {"image": path, "question": ..., "answer": ...}; an answer is rewarded by how much of `answer` it begins with.
Prints one JSON object.
"""

import sys
from pathlib import Path

import torch
from finetune import LOADING, OPTIONS, load_rows, print_report
from transformers import AutoProcessor
from trl import GRPOConfig, GRPOTrainer


def reward(completions: list, answer: list[str], **kwargs: object) -> list[float]:
    """1 for the answer, 0 for any other."""
    return [float(chat[0]["content"].strip() == wanted) for chat, wanted in zip(completions, answer)]


def to_prompt(row: dict) -> dict:
    """A question, with its answer next to it for the reward."""
    prompt = [{"role": "user", "content": row["question"]}]
    return {"prompt": prompt, "images": [row["image"]], "answer": row["answer"]}


def main() -> None:
    """Train, and say how it went."""
    repo, rows, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    processor.num_visual_tokens = processor.image_seq_length = number
    trainer = GRPOTrainer(
        model=repo,
        reward_funcs=reward,
        processing_class=processor,
        train_dataset=load_rows(rows, to_prompt),
        args=GRPOConfig(
            output_dir=str(Path(rows).parent / "grpo"),
            model_init_kwargs={**LOADING, "num_visual_tokens": number},
            max_steps=12,
            num_generations=8,
            max_completion_length=4,
            temperature=2.0,
            learning_rate=1e-4,
            beta=0.01,
            **OPTIONS,
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
    print_report(trainer, {"rewards": "reward", "gradients": "grad_norm"}, placeholders=sorted(counts))


if __name__ == "__main__":
    main()
