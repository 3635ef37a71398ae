"""What vLLM's `LLM` class answers to given requests. Prints one JSON object.

    python vllm_offline.py REPO < requests.json

The input is a list of {"messages": ..., "num_visual_tokens": null, an integer or one per image}, and the last one of them has a
budget that the model does not have. Faults of other kinds are made here of the first.
"""

import json
import sys

from bad_input import refusal
from PIL import Image
from vllm import LLM, SamplingParams

from answer import NEW_TOKENS


def main() -> None:
    """Ask each request alone, then all at once; then the bad one; then the first again."""
    *requests, bad = json.load(sys.stdin)
    llm = LLM(
        model=sys.argv[1],
        model_impl="transformers",
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=16,
        limit_mm_per_prompt={"image": 2},
    )
    sampling = SamplingParams(temperature=0, min_tokens=NEW_TOKENS, max_tokens=NEW_TOKENS)

    def ask(chosen: list[dict]) -> list[dict]:
        budgets = [request["num_visual_tokens"] for request in chosen]
        outputs = llm.chat(
            [request["messages"] for request in chosen],
            sampling,
            use_tqdm=False,
            mm_processor_kwargs=None if budgets[0] is None else {"num_visual_tokens": budgets[0]},
        )
        found = [(output.prompt_token_ids, output.outputs[0]) for output in outputs]
        return [{"prompt": list(ids), "tokens": list(said.token_ids), "text": said.text} for ids, said in found]

    report: dict = {"alone": [ask([request])[0] for request in requests]}
    usual = [request for request in requests if request["num_visual_tokens"] is None]
    report["together"] = ask(usual)
    (content,) = (message["content"] for message in requests[0]["messages"])
    chats = {
        "roles out of order": [{"role": "assistant", "content": "hi"}, *requests[0]["messages"]],
        "too many images": [{"role": "user", "content": content[:1] * 3}],
        "no image": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
        ],
    }
    report["refused"] = {"unknown budget": refusal(ask, [bad])}
    for name, messages in chats.items():
        report["refused"][name] = refusal(ask, [{"messages": messages, "num_visual_tokens": None}])
    image = {"image": Image.new("RGB", (32, 32))}
    prompts = {
        "image without a place": {"prompt": "USER: what is it? ASSISTANT:", "multi_modal_data": image},
        "images without a place": {
            "prompt": "USER: <image> ASSISTANT:",
            "multi_modal_data": {"image": [image["image"]] * 2},
        },
    }
    for name, prompt in prompts.items():
        report["refused"][name] = refusal(llm.generate, prompt, sampling, use_tqdm=False)
    report["after"] = ask(requests[:1])[0]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
