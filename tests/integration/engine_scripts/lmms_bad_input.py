"""What lmms-eval's `delta_llava` says to input that makes no sense. Prints one JSON object: by fault, the error's kind and message.

python lmms_bad_input.py REPO IMAGE
"""

import json
import sys

from bad_input import faults, refusal
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model


def main() -> None:
    """Ask each chat as a question of a task of its own, then one that makes sense."""
    repo, image = sys.argv[1:]
    make = get_model("delta_llava")
    said = {"unknown budget": refusal(make, pretrained=repo, num_visual_tokens=7, device="cpu")}
    model = make(pretrained=repo, device="cpu")

    def answer(chat: list[dict]) -> list[str]:
        model.task_dict["task"] = {"test": [chat]}
        messages = [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if isinstance(turn["content"], str)
            else turn
            for turn in chat
        ]
        arguments = ("context", lambda doc: messages, {"max_new_tokens": 2}, 0, "task", "test")
        return model.generate_until(
            [Instance("generate_until", arguments, 0, {"task": "task", "doc_id": 0, "repeats": 1})]
        )

    chats = {name: fault["chat"] for name, fault in faults(image).items() if "chat" in fault}
    good = chats.pop("unknown budget")
    said |= {name: refusal(answer, chat) for name, chat in chats.items()}
    print(json.dumps({"said": said, "after": refusal(answer, good)}))


if __name__ == "__main__":
    main()
