"""Every block of docs/deltas.md runs, in order, on tiny models under the names that it uses."""

import re
import shlex
import sys
from pathlib import Path

import torch

from tests.tiny import tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.cli.main import main


GUIDE = Path(__file__).parents[1] / "docs" / "deltas.md"


def test_every_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DeltaLlavaForConditionalGeneration(tiny_config()).eval()
    model.save_pretrained("delta-llava-7b")
    for name in ("charts", "maps"):
        model.load_delta_state_dict({n: torch.randn_like(t) / 8 for n, t in model.delta_state_dict().items()})
        model.save_deltas(f"deltas-{name}")
    model.save_pretrained("delta-llava-7b-tuned")

    blocks = re.findall(r"```(python|bash)\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "python", "bash", "python"]
    capsys.readouterr()
    names: dict = {}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, "docs/deltas.md", "exec"), names)
            continue
        for command in block.splitlines():
            monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
            try:
                main()
            except SystemExit as stopped:
                assert not stopped.code, (command, capsys.readouterr().err)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "['deltas-charts', 'default', 'maps']"
    assert all(f"{folder}\n" in printed for folder in ("deltas-own", "deltas-small", "delta-llava-7b-merged"))
    assert (tmp_path / "deltas.svg").is_file()
    trained = [name for name, p in names["model"].named_parameters() if p.requires_grad]
    assert trained and all(".delta_" in name for name in trained)
