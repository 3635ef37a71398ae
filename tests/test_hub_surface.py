"""The Hub files touch what the table in docs/decisions.md lists, and nothing else."""

import re
from pathlib import Path

import pytest
import transformers

from tests.conftest import OLDEST
from tests.hub_surface import surface
from tests.test_layout import HUB_FILES, ROOT


HEADING = "what the Hub files touch of transformers and torch"


def listed() -> set[str]:
    """The names in the first column of the table."""
    text = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    section = text.split(HEADING, 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def is_public_torch(name: str) -> bool:
    path = name.split("(")[0].split(".")
    return path[0] == "torch" and not any(part.startswith("_") and part != "__version__" for part in path)


@pytest.mark.skipif(transformers.__version__ == OLDEST, reason="what a class inherits differs; one version is enough")
def test_every_name_is_in_the_table_and_every_line_of_it_is_needed() -> None:
    touched = {name for name in surface(HUB_FILES) if not is_public_torch(name)}
    names = listed() - {"torch.*"}
    assert not sorted(touched - names), (
        "add them to the table with the reason why they can be trusted, or do without them"
    )
    assert not sorted(names - touched), "nothing touches these any more"


def test_a_new_name_is_noticed(tmp_path: Path) -> None:
    code = (
        "from transformers import AutoConfig, PreTrainedModel\n"
        "from transformers.utils import logging as log\n"
        "from torch import nn\n"
        "class Model(PreTrainedModel):\n"
        "    main_input_name = 'x'\n"
        "    def own(self, size=1): ...\n"
        "    def forward(self):\n"
        "        self.own(size=2)\n"
        "        self._not_ours()\n"
        "        log.get_logger(name='x')\n"
        "        nn.Linear(1, 1, bias=False)\n"
        "        return super().generate(beams=2), self.tower(depth=3), 'a'.encode(encoding='utf-8'), max(1, 2, key=abs)\n"
    )
    file = tmp_path / "model.py"
    file.write_text(code)
    assert surface([file]) == {
        "transformers.AutoConfig",
        "transformers.PreTrainedModel",
        "transformers.utils.logging",
        "transformers.utils.logging.get_logger",
        ["transformers", "utils", "logging", "get_logger(name=)"][-1],
        "torch.nn",
        "torch.nn.Linear",
        "torch.nn.Linear(bias=)",
        "PreTrainedModel.main_input_name",
        "PreTrainedModel.forward",
        "self._not_ours",
        "self.generate",
        "super().generate(beams=)",
        "self.tower",
        "tower(depth=)",
    }
