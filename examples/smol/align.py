"""Stage 1 of delta-llava-160m: visual tokens learn to look like the words of their image, without the language model.

    python -m examples.smol.align examples/smol/align.yaml      # writes the recipe's output_dir, a Delta-LLaVA

A visual token enters the language model where a word's embedding would, so before the two meet a cheap loss can put it
there: the words of the caption must be those, among the words of all captions, whose input embeddings have the largest
cosine with some visual token of the image. That costs a tenth of a step through the language model, which two CPU cores
can afford. Stage 2 (`delta-llava train examples/smol/finetune.yaml`) then trains the projector and a LoRA of the
language model together, on answers.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, TrainingArguments

from examples.smol.frozen_features import FrozenFeatures
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.training import Recipe, load_recipe
from transformers_delta_llava.training.data import ConversationEncoder, TrainingDataset, open_rows
from transformers_delta_llava.training.model import build_model
from transformers_delta_llava.training.train import calibrate_new_projector
from transformers_delta_llava.training.trainer import save_hub_folder


SHARPNESS = 20.0  # of cosines, as they become logits
SILENT = {"a", "an", "the", "of", "with", "and", "in", "on", "is", "are", "to", "it"}


def word_loss(
    tokens: torch.Tensor, words: torch.Tensor, targets: torch.Tensor, text_rms: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How far visual tokens are from the words of their images.

    Args:
        tokens: (images, V, hidden) visual tokens.
        words: (vocabulary, hidden) input embeddings of the words of all captions, of length 1.
        targets: (images, vocabulary) share of each word in the caption of its image; a row sums to 1.
        text_rms: root mean square that the tokens should have.

    Returns:
        The loss, and the part of it that words make up: cross-entropy of the captions' words under each image's best
        cosines.
    """
    logits = SHARPNESS * F.normalize(tokens.float(), dim=-1) @ words.T
    logits = logits.logsumexp(1) - math.log(tokens.shape[1])
    entropy = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    ratio = tokens.float().square().mean(-1).sqrt() / text_rms
    return entropy + (ratio - 1).square().mean(), entropy


def caption_targets(captions: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], torch.Tensor]:
    """Ids of the tokens of all captions, and each caption's shares of them."""
    ids = []
    for caption in captions:
        spaced: list[int] = tokenizer.encode(" " + caption.strip(" ."), add_special_tokens=False)
        said = [
            i for i in spaced if (word := str(tokenizer.decode([i])).strip(" .,'\"").lower()) and word not in SILENT
        ]
        ids.append(said or spaced)
    vocabulary = sorted({token for said in ids for token in said})
    index_of = {token: index for index, token in enumerate(vocabulary)}
    targets = torch.zeros(len(captions), len(vocabulary))
    for row, said in enumerate(ids):
        for token in said:
            targets[row, index_of[token]] += 1 / len(said)
    return vocabulary, targets


class Captions(NamedTuple):
    """Images with captions: files of the tower's features, and what reads them."""

    files: list[Path]
    texts: list[str]
    features: FrozenFeatures

    @classmethod
    def read(
        cls,
        model: DeltaLlavaForConditionalGeneration,
        processor: DeltaLlavaProcessor,
        recipe: Recipe,
        folder: str | Path,
    ) -> "Captions":
        """The rows of a recipe; runs the tower on the images that are not in `folder` yet."""
        rows, encode = open_rows(recipe.data), ConversationEncoder(processor, recipe.data.max_length)
        features = FrozenFeatures(model, folder)
        files: list[Path] = []
        texts, images, started = [], [], time.time()
        for index in range(len(rows)):
            messages = rows.messages(index)
            texts.append(messages[-1]["content"][0]["text"])
            images.append(encode(messages, min(recipe.budgets or (1,)))["pixel_values"])
            if len(images) == 16 or index == len(rows) - 1:
                files += features.keep(torch.cat(images).to(model.device))
                images = []
                if index % 320 == 319:
                    print(f"{index + 1} of {len(rows)} images seen, {time.time() - started:.0f} s", flush=True)
        return cls(files, texts, features)


def start(
    recipe: Recipe, arguments: TrainingArguments
) -> tuple[DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor]:
    """The recipe's model; a new projector starts with visual tokens like text, that of `model.path` as it was saved."""
    torch.manual_seed(arguments.seed)
    model, processor = build_model(recipe, arguments)
    model.to(arguments.device)
    encoder = ConversationEncoder(processor, recipe.data.max_length)
    dataset = TrainingDataset(open_rows(recipe.data), encoder, budget=model.config.num_visual_tokens)
    calibrate_new_projector(model, recipe, dataset)
    return model, processor


def train(
    model: DeltaLlavaForConditionalGeneration,
    captions: Captions,
    tokenizer: PreTrainedTokenizerBase,
    budgets: tuple[int, ...],
    arguments: TrainingArguments,
) -> list[dict[str, float]]:
    """The loop: AdamW with a cosine, budgets drawn by the step; returns its log."""
    rng, config, device = random.Random(arguments.seed), model.config, arguments.device
    projector = model.model.multi_modal_projector.float().train()
    embeddings = model.get_input_embeddings().weight.detach().float()
    vocabulary, targets = caption_targets(captions.texts, tokenizer)
    words, targets = F.normalize(embeddings[vocabulary], dim=-1), targets.to(device)
    text_rms = embeddings.square().mean().sqrt().item()
    optimizer = torch.optim.AdamW(projector.parameters(), arguments.learning_rate, weight_decay=arguments.weight_decay)
    size, order = arguments.per_device_train_batch_size, list(range(len(captions.files)))
    steps = math.ceil(arguments.num_train_epochs * (len(order) // size))
    if arguments.max_steps > 0:
        steps = arguments.max_steps
    warm = max(1, steps // 30)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    log: list[dict[str, float]] = []
    entropies, started, features = [], time.time(), captions.features
    for step in range(steps):
        start = step % (len(order) // size) * size
        if start == 0:
            rng.shuffle(order)
        batch, budget = order[start : start + size], rng.choice(budgets)
        stream, *levels = features.split(features.load([captions.files[index] for index in batch]).to(device).float())
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            tokens = projector(stream, levels, config.scale_factor_for(budget))
        loss, entropy = word_loss(tokens, words, targets[batch], text_rms)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        entropies.append(entropy.item())
        if step % arguments.logging_steps == arguments.logging_steps - 1:
            log.append(
                {"step": step + 1, "of": steps, "entropy": float(np.mean(entropies)), "seconds": time.time() - started}
            )
            print(json.dumps(log[-1]), flush=True)
            entropies = []
    projector.eval()
    return log


def align(recipe: Recipe, features: str | Path = "smol-features") -> Path:
    """Train what the recipe says (of its `arguments`: rate, decay, batch, epochs or steps, seed), and write its `output_dir`.

    `features` is the folder that keeps what the tower computes of each image.
    """
    arguments = recipe.training_arguments()
    model, processor = start(recipe, arguments)
    captions = Captions.read(model, processor, recipe, features)
    log = train(model, captions, processor.tokenizer, recipe.budgets or (1,), arguments)
    output = Path(str(arguments.output_dir))
    save_hub_folder(model.config, model.generation_config, model.state_dict(), processor, output, torch.bfloat16)
    (output / "align_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    args = parser.parse_args()
    print(f"wrote {align(load_recipe(args.recipe, args.set))}")
