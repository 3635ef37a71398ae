"""An export where nothing but onnxruntime is installed, and in OpenVINO."""

from pathlib import Path

import pytest

from tests.integration.engines import Engine, needs
from transformers_delta_llava.onnx import export_onnx


@pytest.fixture(scope="module")
def export(repo, tmp_path_factory) -> Path:
    """The trained repo, in float32, with 4 visual tokens."""
    folder = tmp_path_factory.mktemp("export") / "easy-vqa"
    export_onnx(repo, folder, num_visual_tokens=[4])
    return folder


@needs("onnxruntime")
def test_onnxruntime_tokenizers_pillow_and_numpy_are_enough(export, questions, tmp_path):
    engine = Engine("onnxruntime", tmp_path)
    absent = (
        "from importlib.util import find_spec; print([n for n in ('torch', 'transformers', 'onnx') if find_spec(n)])"
    )
    assert engine.run_python("-c", absent).strip() == "[]"
    for question in questions[:3]:
        assert engine.run_python(export / "run_onnx.py", question.text, question.image).strip() == question.answer


@needs("openvino")
def test_openvino(export, questions, tmp_path):
    engine = Engine("openvino", tmp_path)
    for question in questions[:3]:
        report = engine.run("openvino_parity.py", export, question.image, question.text, 4)
        assert report["f32"]["same_token"] and max(report["f32"]["visual_tokens"], report["f32"]["logits"]) < 1e-4
        assert report["default"]["same_token"] and report["default"]["logits"] < 0.05  # bfloat16 where the CPU has it
