"""What vLLM's `LLM` class answers to given requests. Prints one JSON object.

    python vllm_offline.py REPO [--numbers-per-image] < requests.json

The input is a list of {"messages": ..., "num_visual_tokens": null, an integer or one per image}, and the last one of them has a
budget that the model does not have.
"""

import json
import sys

from answer import NEW_TOKENS
from vllm import LLM, SamplingParams


# What docs/engines.md says an engine needs whose requests have different numbers for their images.
UNCACHED = {
    "mm_processor_cache_gb": 0,
    "enable_prefix_caching": False,
    "mm_processor_kwargs": {"numbers_per_image": True},
}


def main() -> None:
    """Ask each request by itself, then all at once; then the bad one; then the first again."""
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
        **(UNCACHED if "--numbers-per-image" in sys.argv else {}),
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
    report["together"] = ask(usual) if usual else []
    try:
        ask([bad])
    except Exception as error:
        report["refused"] = f"{type(error).__name__}: {error}; {error.__cause__}"
    report["after"] = ask(requests[:1])[0]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
