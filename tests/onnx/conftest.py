"""Two exports of the shipped checkpoint. Tracing takes seconds, so all tests share them."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from transformers_delta_llava.onnx import export_onnx


if find_spec("onnxscript"):
    import onnx
    import onnx_ir as ir

    from transformers_delta_llava.onnx import graphs
else:  # the environment of the oldest transformers
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def exported(easy_vqa_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, 16 and 1 visual tokens. Only to be read."""
    folder = tmp_path_factory.mktemp("onnx") / "easy-vqa-onnx"
    return export_onnx(easy_vqa_repo, folder, num_visual_tokens=[1, 16])


@pytest.fixture(scope="session")
def quantised(exported: Path, easy_vqa_repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """q8 and q4, 1 visual token, of the graphs of the other export, which are not traced again. Only to be read."""
    traced = {"vision_encoder": "vision_encoder_1", "embed_tokens": "embed_tokens", "decoder": "decoder_model_merged"}
    with pytest.MonkeyPatch.context() as patch:
        for name, graph in traced.items():
            path = exported / "onnx" / f"{graph}.onnx"
            patch.setattr(graphs, f"trace_{name}", lambda *arguments, path=path: ir.from_proto(onnx.load(path)))
        folder = tmp_path_factory.mktemp("onnx") / "easy-vqa-q"
        return export_onnx(easy_vqa_repo, folder, num_visual_tokens=[1], dtypes=["q8", "q4"])
