"""What an OpenAI-compatible server says, through the `openai` client. Prints one JSON object.

    python chat.py URL MODEL [--together] < requests.json

The input is a list of arguments of `chat.completions.create`. `--together` sends all of them at once. An answer is its `text`,
its token ids where the server gives them, and with `stream` the number of `pieces` it came in; a refusal `status` and `error`.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

from openai import APIStatusError, OpenAI


def main() -> None:
    """Send the requests, in order or together."""
    client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=1, timeout=120)
    requests = json.load(sys.stdin)

    def ask(request: dict) -> dict:
        try:
            answer = client.chat.completions.create(model=sys.argv[2], temperature=0, **request)
            if not request.get("stream"):
                choice = answer.choices[0]
                return {"text": choice.message.content, "tokens": getattr(choice, "token_ids", None)}
            pieces = [chunk.choices[0].delta.content for chunk in answer if chunk.choices]
            return {"text": "".join(filter(None, pieces)), "pieces": len(list(filter(None, pieces)))}
        except APIStatusError as error:
            return {"status": error.status_code, "error": error.message}

    with ThreadPoolExecutor(len(requests) if "--together" in sys.argv else 1) as pool:
        print(json.dumps({"answers": list(pool.map(ask, requests))}))


if __name__ == "__main__":
    main()
