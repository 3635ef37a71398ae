"""Usage: torchrun run_tensor_parallel.py REPO OUT: greedy tokens of a model whose matrices two processes share."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.tiny import noise


if __name__ == "__main__":
    repo, out = sys.argv[1:]
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, tp_plan="auto").eval()
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    inputs = processor(images=noise(), text="<image> what?", num_visual_tokens=4, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    weight = model.model.language_model.layers[0].mlp.gate_proj.weight
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps({"tokens": tokens.tolist(), "numbers": local.numel()}))
    dist.barrier()  # gloo aborts in a process whose partner has left
    dist.destroy_process_group()
