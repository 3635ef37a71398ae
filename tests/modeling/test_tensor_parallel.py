"""`tp_plan="auto"` in two processes gives the tokens of one."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.tiny import noise
from tests.training.two_processes import launch


def test_two_processes_generate_the_tokens_of_one(easy_vqa_repo, tmp_path):
    torchrun = ["torch.distributed.run", "--nproc_per_node", 2]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    script = Path(__file__).with_name("run_tensor_parallel.py")
    launch("-m", *torchrun, script, easy_vqa_repo, tmp_path / "out.json", HF_MODULES_CACHE=str(tmp_path / "modules"))
    found = json.loads((tmp_path / "out.json").read_text())

    model = AutoModelForImageTextToText.from_pretrained(easy_vqa_repo, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(easy_vqa_repo, trust_remote_code=True)
    inputs = processor(images=noise(), text="<image> what?", num_visual_tokens=4, return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert found["tokens"] == tokens.tolist()
    assert found["numbers"] * 2 == model.model.language_model.layers[0].mlp.gate_proj.weight.numel()
