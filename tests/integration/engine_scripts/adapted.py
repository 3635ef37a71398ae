"""What a model answers that code from the documentation has loaded. Prints one JSON object.

    python adapted.py REPO < {"code": ..., "cases": [...], "questions": [...]}

The code gives `model`. Cases are answered as by answer.py, token by token; questions, {"image": path, "text": ...}, in batches.
`parts` says of which kind the parameters of each part are, and `stored` how many bytes of them were not left in memory.
"""

import importlib.util
import json
import sys
from collections import defaultdict

import torch
from answer import answer
from transformers import AutoProcessor


PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
BATCH_SIZE = 50


@torch.inference_mode()
def answer_questions(model, processor, questions: list[dict]) -> list[str]:
    """Greedy answers, stripped of blanks."""
    texts: list[str] = []
    for start in range(0, len(questions), BATCH_SIZE):
        conversations = []
        for question in questions[start : start + BATCH_SIZE]:
            content = [{"type": "image", "url": question["image"]}, {"type": "text", "text": question["text"]}]
            conversations.append([{"role": "user", "content": content}])
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "pt", "padding": True, "padding_side": "left"},
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def main() -> None:
    """Run the code, then ask."""
    given = json.load(sys.stdin)
    names: dict = {}
    exec(compile(given["code"], "documentation", "exec"), names)
    model = names["model"].eval()
    processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
    kinds, stored = defaultdict(set), defaultdict(int)
    for name, parameter in model.named_parameters():
        part = next(part for part in PARTS if name.startswith(f"{part}."))
        kinds[part].add(f"{type(parameter).__name__} {str(parameter.dtype).removeprefix('torch.')}")
        stored[part] += parameter.nbytes if parameter.device.type == "meta" else 0
    report = {
        "package_importable": importlib.util.find_spec("transformers_delta_llava") is not None,
        "parts": {part: sorted(found) for part, found in kinds.items()},
        "stored": stored,
        "answers": [answer(model, processor, case) for case in given.get("cases", [])],
        "texts": answer_questions(model, processor, given.get("questions", [])),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
