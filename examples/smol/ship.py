"""A finished run of stage 2 as a LoRA run in the authors' layout: what `examples/smol/checkpoint/` is.

    python -m examples.smol.ship runs/smol examples/smol/checkpoint

Writes only projector and LoRA, in bfloat16; the base weights come from `build_parts`. The folder converts with

    delta-llava convert examples/smol/checkpoint OUT --base-model smol-parts/language-model \
        --vision-tower smol-parts/vision-tower --chat-template examples/smol/chat_template.jinja
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from transformers_delta_llava.conversion import export_checkpoint


MOST_BYTES = 12_000_000
VOCABULARY = 49_152  # of the language model; in the released code the image is no token
PEFT_PREFIX = "base_model.model."
OF_THE_GGUF_FILE = ("_model_name_or_path", "unk_token_id")
# Settings of PEFT's that say how the adapter is merged; its target is named as the authors' code names the modules.
ADAPTER_SETTINGS = ("peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "bias", "task_type")


def ship(run: Path, output: Path, vocabulary: int = VOCABULARY) -> int:
    """
    Write a run's projector and adapter.

    Args:
        run: a folder of `delta-llava train` with LoRA: the finished model, with `adapter/` in it.
        output: the folder to make.
        vocabulary: rows of the base model's embeddings.

    Returns:
        Bytes of all weights.

    Raises:
        SystemExit: they are more than the repository takes.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        export_checkpoint(run, Path(scratch) / "projector", projector_only=True, vocab_size=vocabulary)
        config = json.loads((Path(scratch) / "projector" / "config.json").read_text(encoding="utf-8"))
        projector = torch.load(Path(scratch) / "projector" / "mm_projector.bin", weights_only=True)
    config = {name: value for name, value in config.items() if name not in OF_THE_GGUF_FILE}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    factors = {name.replace(".language_model.", "."): value for name, value in adapter.items() if ".lora_" in name}
    kept = {
        "adapter_model.safetensors": factors,
        "non_lora_trainables.safetensors": {PEFT_PREFIX + name: value for name, value in projector.items()},
    }
    for file, tensors in kept.items():
        save_file({name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}, output / file)
    modules = sorted({name.removeprefix(PEFT_PREFIX).split(".lora_")[0].rpartition(".")[2] for name in factors})
    lora = {name: settings[name] for name in ADAPTER_SETTINGS if name in settings} | {"target_modules": modules}
    (output / "adapter_config.json").write_text(json.dumps(lora, indent=2) + "\n", encoding="utf-8")
    size = sum((output / file).stat().st_size for file in kept)
    if size > MOST_BYTES:
        sys.exit(f"{output}: {size:,} bytes of weights are more than {MOST_BYTES:,}.")
    return size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="what delta-llava train wrote")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    print(f"{arguments.output}: {ship(arguments.run, arguments.output):,} bytes of weights")
