"""What `delta-llava serve` does before the server starts; tests/integration asks the server itself."""

import sys
from pathlib import Path

import pytest
from transformers.models.auto import modeling_auto
from transformers.utils.import_utils import is_serve_available

from tests.tiny import tiny_config
from transformers_delta_llava import serving
from transformers_delta_llava.cli.main import main
from transformers_delta_llava.serving import transformers_serve


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["delta-llava", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_other_options_go_to_transformers(monkeypatch):
    calls = []
    monkeypatch.setattr(serving, "serve", lambda *arguments: calls.append(arguments))
    assert run(monkeypatch, "serve", "org/model", "--port", "8001", "--num-visual-tokens", "4", "--compile") == 0
    assert calls == [("org/model", ["--port", "8001", "--compile"], 4)]


@pytest.mark.skipif(is_serve_available(), reason="the server's dependencies are installed")
def test_missing_dependencies_are_named(monkeypatch, capsys):
    assert run(monkeypatch, "serve", "org/model") == 2
    assert "pip install 'transformers-delta-llava[serve]'" in capsys.readouterr().err


def test_a_budget_that_the_model_does_not_have(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(transformers_serve, "is_serve_available", lambda: True)
    tiny_config().save_pretrained(tmp_path)
    names = dict(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    with pytest.raises(ValueError, match="num_visual_tokens=7: .* use one of 144, 36, 16, 9, 4, 1"):
        transformers_serve.serve(str(tmp_path), num_visual_tokens=7)
    assert dict(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) == names
