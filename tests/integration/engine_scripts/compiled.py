"""What a compiled model answers, and how often it was compiled. Prints one JSON object.

    python compiled.py REPO < {"code": ..., "cases": [...]}

The code, from the documentation, compiles with the default backend: it gives `model`, `processor`, `inputs`, the `logits` of a compiled
forward pass, and the `output` of compiled generation. Cases are then traced by the same rules but not translated to C++, which
would take seconds for each. A case is {"content": content of a user message, "num_visual_tokens": null, an integer or one per image}.
"""

import importlib.util
import json
import sys

import torch
from answer import NEW_TOKENS, encode
from torch._dynamo.utils import counters
from transformers import CompileConfig


def graphs() -> int:
    """How many graphs there are so far."""
    return counters["stats"]["unique_graphs"]


@torch.no_grad()
def main() -> None:
    """Forward passes and generation, case by case."""
    # transformers compiles what it generates with on accelerators; this is its switch for tests on a CPU.
    CompileConfig._compile_all_devices = True
    given = json.load(sys.stdin)
    names: dict = {}
    exec(compile(given["code"], "documentation", "exec"), names)
    model, processor, inputs = (names[name] for name in ("model", "processor", "inputs"))
    report: dict = {"package_importable": importlib.util.find_spec("transformers_delta_llava") is not None}
    report["page_difference"] = (names["logits"] - model(**inputs).logits).abs().max().item()
    plain = model.generate(**inputs, max_new_tokens=64)
    report["page_output"], report["plain_output"] = names["output"].tolist(), plain.tolist()

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
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
    config = CompileConfig(fullgraph=True, backend="eager", mode="default")
    static = {"cache_implementation": "static", "compile_config": config}
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
