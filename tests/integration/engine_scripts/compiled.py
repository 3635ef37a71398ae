"""What a compiled model answers, and how often it was compiled. Prints one JSON object.

    python compiled.py REPO < {"code": ..., "cases": [...]}

The code, from the documentation, gives `model`, `processor`, `compiled` (the model, compiled) and `static` (options of `generate`). A
case is {"content": content of a user message, "num_visual_tokens": null, an integer or one per image}.
"""

import copy
import importlib.util
import json
import sys

import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from answer import NEW_TOKENS


def graphs() -> int:
    """How many graphs there are so far."""
    return counters["stats"]["unique_graphs"]


def encode(processor, case: dict) -> dict:
    """The case for the model."""
    budget = case["num_visual_tokens"]
    return processor.apply_chat_template(
        [{"role": "user", "content": copy.deepcopy(case["content"])}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", **({} if budget is None else {"num_visual_tokens": budget})},
    )


@torch.no_grad()
def main() -> None:
    """Forward passes and generation, case by case."""
    # transformers compiles what it generates with on accelerators; this is its switch for tests on a CPU.
    CompileConfig._compile_all_devices = True
    given = json.load(sys.stdin)
    names: dict = {}
    exec(compile(given["code"], "documentation", "exec"), names)
    model, processor, compiled, static = (names[name] for name in ("model", "processor", "compiled", "static"))
    report: dict = {"package_importable": importlib.util.find_spec("transformers_delta_llava") is not None}

    torch.compiler.reset()
    counters.clear()
    report["differences"] = []
    for case in given["cases"]:
        inputs = dict(encode(processor, case))
        if "num_visual_tokens" in inputs:  # in a graph of its own the number must be known, so no tensor
            inputs["num_visual_tokens"] = inputs["num_visual_tokens"].tolist()
        difference = compiled(**inputs).logits - model(**inputs).logits
        report["differences"].append(difference.abs().max().item())
    report["forward_breaks"] = dict(counters["graph_break"])

    torch.compiler.reset()
    counters.clear()
    report["tokens"], report["graphs"] = [], []
    for case in given["cases"] + given["cases"][:1]:
        inputs = encode(processor, case)
        length = inputs["input_ids"].shape[1]
        output = model.generate(
            **inputs, **static, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
        )
        report["tokens"].append(output[0, length:].tolist())
        report["graphs"].append(graphs())
    report["generation_breaks"] = dict(counters["graph_break"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
