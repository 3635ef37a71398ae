"""transformers' own `Trainer` resumes every weight; logits without labels are left out."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from tests.training.tiny_run import assert_same_weights, make_model
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.training.data import keep_labelled_logits


def rows(count: int = 4) -> list[dict[str, Any]]:
    """Rows of one image each; the labels are the last four tokens."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (count, 10), generator=rng)
    tokens[:, :4] = 259
    images = torch.randn(count, 3, 24, 24, generator=rng)
    labels = tokens.masked_fill(torch.arange(10) < 6, -100)
    return [{"input_ids": t, "labels": wanted, "pixel_values": p} for t, wanted, p in zip(tokens, labels, images)]


def trainer(model: torch.nn.Module, folder: Path, **arguments: Any) -> Trainer:
    arguments = {"save_strategy": "no", "per_device_train_batch_size": 2, "learning_rate": 1e-2, **arguments}
    settings = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False, **arguments
    )
    return Trainer(model, settings, train_dataset=rows())


@pytest.mark.parametrize("max_shard_size", ["5GB", "500KB"])
def test_a_resumed_run_has_every_weight_of_the_checkpoint(
    tmp_path: Path, monkeypatch: Any, max_shard_size: str
) -> None:
    """A tower loaded under the names of transformers 4 (`vision_model.`) is saved under them."""
    make_model().save_pretrained(tmp_path / "repo")
    file = tmp_path / "repo" / "model.safetensors"
    renamed = {n.replace(".vision_tower.", ".vision_tower.vision_model."): t for n, t in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    load = DeltaLlavaForConditionalGeneration.from_pretrained
    trained = load(tmp_path / "repo")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    save = trained.save_pretrained
    monkeypatch.setattr(trained, "save_pretrained", partial(save, max_shard_size=max_shard_size))
    trainer(trained, tmp_path, max_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.0).train()
    again = trainer(load(tmp_path / "repo"), tmp_path, max_steps=1, learning_rate=0.0)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_weights(trained.state_dict(), again.model.state_dict(), atol=0)


def test_logits_without_labels_are_left_out_and_change_nothing() -> None:
    model = make_model().eval()
    batch = {name: torch.stack([row[name] for row in rows(2)]) for name in rows(1)[0]}
    batch["labels"][0, -2:] = -100  # positions that only the other row has a label for are kept
    outputs, gradients = [], []
    for kept in ({}, keep_labelled_logits(batch["labels"])):
        outputs.append(model(**batch, **kept, num_items_in_batch=3))
        gradients.append(torch.autograd.grad(outputs[-1].loss, model.lm_head.weight)[0])
    assert outputs[1].logits.shape[1] == 4 < outputs[0].logits.shape[1]
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert keep_labelled_logits(torch.full((2, 5), -100))["shift_labels"].tolist() == [[-100], [-100]]
