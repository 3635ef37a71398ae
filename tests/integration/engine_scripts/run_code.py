"""Run code of the documentation. Prints one JSON object.

    python run_code.py < {"code": [...], "show": [...]}

The pieces of code share one namespace; `shown` are the values of the expressions in `show` after the last of them.
"""

import json
import sys


def main() -> None:
    """Run and show."""
    given = json.load(sys.stdin)
    names: dict = {}
    for code in given["code"]:
        exec(compile(code, "documentation", "exec"), names)
    print()  # the code may have printed half a line
    print(json.dumps({"shown": [eval(expression, names) for expression in given["show"]]}))


if __name__ == "__main__":
    main()
