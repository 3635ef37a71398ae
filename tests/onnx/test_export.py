"""What an export writes, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.checkpoints import edit_json
from transformers_delta_llava.errors import DeltaLlavaError
from transformers_delta_llava.hub import push_folder
from transformers_delta_llava.onnx import export_onnx
from transformers_delta_llava.onnx.files import WeightFiles
from transformers_delta_llava.onnx.settings import patch_size


OTHERS = {
    *("README.md", "chat_template.jinja", "config.json", "conversion.json", "generation_config.json", "run_onnx.py"),
    "manifest.json",
    *("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_a_repo_of_its_own(exported):
    graphs = {"vision_encoder.onnx", "vision_encoder_1.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"}
    weights = {f"{name}_data" for name in graphs - {"vision_encoder_1.onnx"}}
    assert names(exported) == OTHERS and names(exported / "onnx") == graphs | weights
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "llava" and config["image_token_index"] == 432
    assert config["transformers.js_config"] == {
        "dtype": "fp32",
        "use_external_data_format": dict.fromkeys(sorted(graphs - {"vision_encoder_1.onnx"}), 1),
    }
    assert config["onnx_export"]["num_visual_tokens"] == 16  # the repo's default, wherever it stands in the list
    assert config["onnx_export"]["vision_encoders"] == {"16": "vision_encoder", "1": "vision_encoder_1"}
    assert config["onnx_export"]["patch_sizes"] == {"16": 16, "1": 64}
    assert json.loads((exported / "processor_config.json").read_text())["patch_size"] == 16


def test_it_is_published_as_it_was_written(exported, tmp_path):
    report = push_folder(exported, "org/onnx", dry_run=True)
    assert report.files.keys() == OTHERS | {f"onnx/{name}" for name in names(exported / "onnx")}
    folder = shutil.copytree(exported, tmp_path / "cut")
    with next((folder / "onnx").glob("*_data")).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DeltaLlavaError, match="onnx/.*_data"):
        push_folder(folder, "org/onnx", dry_run=True)


def test_graphs_share_weights_and_tell_nothing_of_the_machine(exported):
    locations = {}
    for path in (exported / "onnx").glob("*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        entries = [entry for tensor in graph.initializer for entry in tensor.external_data]
        locations[path.name] = {entry.value for entry in entries if entry.key == "location"}
        assert b".py" not in path.read_bytes()  # lines of the code that was traced
        dims = [dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim if dim.dim_param]
        assert dims[0] == "batch_size"  # transformers.js makes the empty cache by this name
    assert locations["vision_encoder_1.onnx"] == locations["vision_encoder.onnx"] == {"vision_encoder.onnx_data"}
    weights = (exported / "onnx" / "vision_encoder.onnx_data").stat().st_size
    graph = onnx.load(exported / "onnx" / "vision_encoder.onnx")
    assert weights < 1.1 * sum(len(tensor.raw_data) for tensor in graph.graph.initializer)


def test_precisions_are_complete_sets_of_files(quantised):
    suffixes = ("_quantized.onnx", "_q4.onnx")
    graphs = {
        f"{name}{end}" for name in ("vision_encoder", "embed_tokens", "decoder_model_merged") for end in suffixes
    }
    assert names(quantised) == OTHERS and names(quantised / "onnx") == graphs | {f"{name}_data" for name in graphs}
    report = json.loads((quantised / "conversion.json").read_text())
    assert report["dtypes"] == ["q8", "q4"] and report["num_visual_tokens"] == [1]


def test_prompts_are_those_of_the_template(exported):
    prompts = json.loads((exported / "config.json").read_text())["onnx_export"]["prompts"]
    assert prompts["image"][0].endswith("USER: <image>\n") and prompts["text"][0].endswith("USER: ")
    assert prompts["image"][1] == prompts["text"][1] == " ASSISTANT:"
    assert json.loads((exported / "tokenizer.json").read_text())["post_processor"] is None


def test_llava_counts_the_right_number_of_placeholders():
    for image_size, sides in (
        (64, (8, 4, 2, 1)),
        (224, (16, 8, 4, 2, 1)),
        (336, (24, 12, 8, 6, 4, 3, 2, 1)),
        (384, (27, 9, 3, 1)),
    ):
        for side in sides:
            assert (image_size // patch_size(image_size, side**2)) ** 2 == side**2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_visual_tokens": [5]}, "num_visual_tokens=5"),
        ({"dtypes": ["fp32", "int2"]}, "dtype='int2'"),
        ({"model_type": "llava"}, "is a llava"),
        ({"text_config": {"model_type": "gpt2"}}, "model_type='gpt2'"),
        (
            {
                "text_config": {
                    "model_type": "llama",
                    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
                }
            },
            "rope_type='dynamic'",
        ),
    ],
)
def test_what_is_refused(options, message, easy_vqa_repo, tmp_path):
    repo = shutil.copytree(easy_vqa_repo, tmp_path / "repo")
    edit_json(
        repo / "config.json",
        **{name: options.pop(name) for name in list(options) if name.endswith(("_type", "_config"))},
    )
    with pytest.raises(ValueError, match=message):
        export_onnx(repo, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]


def test_weights_that_are_not_finite_are_refused(exported, tmp_path):
    model = ir.from_proto(onnx.load(exported / "onnx" / "vision_encoder_1.onnx"))
    value = next(v for v in model.graph.initializers.values() if v.const_value.dtype == ir.DataType.FLOAT)
    value.const_value = ir.tensor(np.full(value.const_value.shape, np.inf, np.float32), name=value.name)
    with pytest.raises(ValueError, match=f"{value.name} holds NaN or Inf"):
        WeightFiles(tmp_path, "vision_encoder.onnx").save(model, "vision_encoder.onnx")


def test_an_export_is_not_replaced_without_overwrite(easy_vqa_repo, exported):
    with pytest.raises(ValueError, match="overwrite=True"):
        export_onnx(easy_vqa_repo, exported)
