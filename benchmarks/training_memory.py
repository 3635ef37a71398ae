"""Memory that a device needs to train a Delta-LLaVA, computed, and the formula compared with what a small model takes.

    python -m benchmarks.training_memory

Weights that are trained are in float32 with AdamW's two moments and a gradient (16 bytes each); frozen ones in bfloat16. Under DeepSpeed all weights
are in bfloat16, with gradients in bfloat16 and three float32 copies of what is trained. What is kept of a step with gradient checkpointing: the
input of every layer, the inside of one, and the logits of labelled tokens. Not counted: what the allocator and the communication hold.
"""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import arguments_of, peak_bytes, prepare, print_table, write_results
from benchmarks.harness.models import build, make_inputs
from benchmarks.shapes import model_config
from benchmarks.training_step import make_optimizer, step
from transformers_delta_llava import DeltaLlavaForConditionalGeneration


STRATEGIES = ("DDP", "ZeRO-2", "ZeRO-3", "FSDP2")
# Seed-OSS-36B, whose fine-tuned checkpoint the authors link.
SHAPE_36B = {"model_type": "seed_oss", "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
SHAPE_36B |= {"num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 155136}


@dataclass(frozen=True)
class Sizes:
    """Parameters of a stage, by whether it trains them, and of the largest layer."""

    trained: int
    frozen: int
    layer: int


def main() -> None:
    """Compare, compute, print, write."""
    parser = arguments_of("Compute the memory of training.")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs=2, default=[32, 16], help="per device, of stage 1 and stage 2")
    parser.add_argument("--tokens", type=int, nargs=2, default=[200, 600], help="of a row, visual ones included")
    arguments = parser.parse_args()
    prepare(arguments)
    checks = [check(stage, layers, vocab) for stage in (1, 2) for layers, vocab in ((8, 2000), (16, 500))]
    print_table("The formula, and what a small model takes (bytes of a step beyond weights and moments)", checks)
    rows = []
    for name in ("7b", "13b", "36b"):
        config = model_config("7b", text=SHAPE_36B) if name == "36b" else model_config(name)
        for stage, count, tokens in zip((1, 2), arguments.rows, arguments.tokens):
            sizes = sizes_of(config, stage)
            # Half of the tokens of a conversation have labels; of a caption a fifth.
            kept = activations(config.text_config, count * tokens, count * tokens // (5 if stage == 1 else 2), 2)
            row: dict[str, Any] = {"model": name, "stage": stage, "rows x tokens": f"{count} x {tokens}"}
            rows.append(row | {s: (state(s, sizes, arguments.devices) + kept) / 2**30 for s in STRATEGIES})
    print_table(f"GiB on each of {arguments.devices} devices", rows)
    print(write_results("training_memory", arguments, checks=checks, rows=rows))


def sizes_of(config: Any, stage: int) -> Sizes:
    """Nothing is allocated."""
    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(config)
    total = sum(p.numel() for p in model.parameters())
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    projector = sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    trained = projector if stage == 1 else total - tower
    layer = sum(p.numel() for p in model.model.language_model.layers[0].parameters())
    return Sizes(trained, total - trained, layer)


def state(strategy: str, sizes: Sizes, devices: int) -> float:
    """Bytes of weights, gradients and moments on a device."""
    trained, frozen = sizes.trained, sizes.frozen
    if strategy == "DDP":
        return 16 * trained + 2 * frozen
    if strategy == "ZeRO-2":
        return 2 * (trained + frozen) + 14 * trained / devices
    return (16 * trained + 2 * frozen) / devices + 2 * 2 * sizes.layer  # two layers are gathered at a time


def activations(text: Any, tokens: int, labelled: int, bytes_each: int) -> int:
    """Bytes that a step with gradient checkpointing keeps at a time."""
    hidden, inner = text.hidden_size, text.intermediate_size
    cached = text.num_key_value_heads * (getattr(text, "head_dim", None) or hidden // text.num_attention_heads)
    inputs = text.num_hidden_layers * tokens * hidden * bytes_each
    # Norms, queries, keys and values with their rotations, attention and MLP, as they are kept for the way back.
    layer = tokens * (12 * hidden + 4 * cached + 5 * inner) * bytes_each
    logits = 12 * labelled * text.vocab_size  # in float32: logits, probabilities, gradient
    return inputs + max(layer, logits)


def check(stage: int, layers: int, vocab: int) -> dict[str, Any]:
    """The formula and a measured step, of a model of a few million parameters in float32."""
    text = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": layers}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": vocab}
    config = model_config("tiny", text=text, image_token_id=vocab - 1)
    model = build(lambda: DeltaLlavaForConditionalGeneration(config), "cpu", torch.float32)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.model.get_patch_features = torch.no_grad()(model.model.get_patch_features)
    batch, words, budget = 8, 368, 144
    inputs = make_inputs(model, budget, words, batch)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == config.image_token_id, -100)
    optimizer = make_optimizer(model, "AdamW")
    step(model, inputs, stage, optimizer)  # the moments exist
    measured = peak_bytes(lambda: step(model, inputs, stage, optimizer))
    tokens = batch * (words + budget)
    gradients, inputs_kept = 4 * sizes_of(config, stage).trained, layers * tokens * 256 * 4
    kept = activations(config.text_config, tokens, tokens, 4)
    # On the way back the inputs of layers leave as gradients come.
    predicted = max(kept, kept - inputs_kept + gradients)
    row = {"stage": stage, "layers": layers, "vocabulary": vocab, "formula, MB": predicted / 1e6}
    return row | {"measured, MB": measured / 1e6, "formula / measured": predicted / measured}


if __name__ == "__main__":
    main()
