"""Which of the given tasks lmms-eval has, their metrics, and what the model takes. Prints one JSON object.

python lmms_tasks.py TASK ...
"""

import inspect
import json
import sys

from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager


def main() -> None:
    """Read the tasks' settings; nothing is downloaded."""
    manager = TaskManager()
    found = {
        name: manager._get_config(name).get("metric_list", []) for name in sys.argv[1:] if name in manager.all_tasks
    }
    metrics = {name: [metric["metric"] for metric in listed] for name, listed in found.items()}
    model = get_model("delta_llava")
    arguments = list(inspect.signature(model.__init__).parameters)
    print(json.dumps({"model": model.__module__, "arguments": arguments, "metrics": metrics}))


if __name__ == "__main__":
    main()
