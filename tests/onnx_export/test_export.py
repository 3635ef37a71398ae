"""What an export writes, and what it refuses."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from tests.checkpoints import edit_json
from transformers_delta_llava.hub import repo_files
from transformers_delta_llava.onnx_export import export_onnx, settings
from transformers_delta_llava.onnx_export.settings import patch_size


BESIDE = {
    *("README.md", "chat_template.jinja", "config.json", "conversion.json", "generation_config.json", "run_onnx.py"),
    *("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_a_repo_of_its_own(exported):
    graphs = {"vision_encoder.onnx", "vision_encoder_1.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"}
    weights = {f"{name}_data" for name in graphs - {"vision_encoder_1.onnx"}}
    assert names(exported) == BESIDE and names(exported / "onnx") == graphs | weights
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


def test_a_folder_in_the_repo(quantised):
    suffixes = ("_quantized.onnx", "_q4.onnx")
    graphs = {
        f"{name}{end}" for name in ("vision_encoder", "embed_tokens", "decoder_model_merged") for end in suffixes
    }
    assert names(quantised) == (BESIDE - {"README.md"}) | graphs | {f"{name}_data" for name in graphs}
    report = json.loads((quantised / "conversion.json").read_text())
    assert report["dtypes"] == ["q8", "q4"] and report["num_visual_tokens"] == [1]
    files, left_out = repo_files(quantised.parent)
    assert {f"onnx/{name}" for name in names(quantised)} <= files.keys() and not left_out


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
        ({"dtypes": ["fp32", "int2"]}, "dtype='int2': use fp32, fp16, q8, q4."),
    ],
)
def test_settings_that_are_refused(options, message, easy_vqa_repo, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(easy_vqa_repo, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_repos_that_are_refused(easy_vqa_repo, tmp_path):
    repo = tmp_path / "repo"
    with pytest.raises(ValueError, match="is not a folder"):
        export_onnx(repo, tmp_path / "out")
    repo.mkdir()
    with pytest.raises(ValueError, match="is not a model: it has no config.json"):
        export_onnx(repo, tmp_path / "out")
    shutil.copy(easy_vqa_repo / "config.json", repo)
    edit_json(repo / "config.json", text_config={"model_type": "gpt2"})
    with pytest.raises(ValueError, match="of type gpt2, which cannot be exported to ONNX; those of type llama, "):
        export_onnx(repo, tmp_path / "out")
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    edit_json(repo / "config.json", text_config={"model_type": "llama", "rope_parameters": rope})
    with pytest.raises(ValueError, match="has rope_type='dynamic': its position embeddings change with the length"):
        export_onnx(repo, tmp_path / "out")
    edit_json(repo / "config.json", model_type="llava")
    with pytest.raises(ValueError, match="is a llava, not a delta_llava"):
        export_onnx(repo, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]


def test_outputs_that_are_refused(easy_vqa_repo, exported, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="exists; pass `overwrite=True`"):
        export_onnx(easy_vqa_repo, exported)
    with pytest.raises(ValueError, match="are one folder or lie inside each other"):
        export_onnx(easy_vqa_repo, easy_vqa_repo / "onnx")
    repo = shutil.copytree(easy_vqa_repo, tmp_path / "repo")
    (repo / "onnx").mkdir()
    (repo / "onnx" / "notes.txt").touch()
    with pytest.raises(ValueError, match="onnx was not written by this package"):
        export_onnx(repo, repo, overwrite=True)
    shutil.rmtree(repo)
    free = SimpleNamespace(free=10**6)
    monkeypatch.setattr("transformers_delta_llava.onnx_export.export.shutil.disk_usage", lambda path: free)
    with pytest.raises(ValueError, match="takes about 0.0 GB, and 0.0 GB are free on the output's disk"):
        export_onnx(easy_vqa_repo, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_not_installed_is_named(easy_vqa_repo, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"needs onnx, which is not installed: pip install 'transformers-delta-llava\[onnx\]'"
    ):
        export_onnx(easy_vqa_repo, tmp_path / "out")


def test_a_template_that_changes_the_question_is_refused():
    processor = SimpleNamespace(apply_chat_template=lambda messages, **options: "WHAT IS IT?")
    with pytest.raises(ValueError, match="does not write the question as it is"):
        settings.split_prompt(processor, True)


def test_command(call, easy_vqa_repo, tmp_path):
    code, out, err = call("export", easy_vqa_repo, tmp_path / "out", "--format", "onnx", "--num-visual-tokens", "5")
    assert (code, out) == (2, "") and "num_visual_tokens=5" in err and err.count("\n") == 1
    code, out, err = call("export", easy_vqa_repo, tmp_path / "out", "--dtype", "q4")
    assert code == 2 and "--dtype does not go with --format released" in err
    code, out, err = call("export", easy_vqa_repo, tmp_path / "out", "--format", "onnx", "--projector-only")
    assert code == 2 and "--projector-only does not go with --format onnx" in err
