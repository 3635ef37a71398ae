"""`inspect`: what a repo or a checkpoint holds, and what is wrong with it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import edit_json, read_tensors
from transformers_delta_llava.conversion import inspect_model
from transformers_delta_llava.errors import DeltaLlavaError
from transformers_delta_llava.processing import load_chat_template


QUERY = "model.multi_modal_projector.query."


@pytest.fixture
def changed(repo, tmp_path):
    return shutil.copytree(repo, tmp_path / "changed")


def test_a_repo_and_its_checkpoint_hold_the_same(repo, pristine):
    ours, theirs = inspect_model(repo), inspect_model(pristine / "llava-tiny")
    assert (ours.kind, theirs.kind) == ("repo", "checkpoint")
    assert ours.problems == theirs.problems == []
    assert ours.visual_token_budgets == theirs.visual_token_budgets == (64, 16, 4, 1)
    assert ours.num_visual_tokens == theirs.num_visual_tokens == 16
    assert ours.components["projector"] == theirs.components["projector"]
    assert ours.components["vision tower"] == theirs.components["vision tower"]
    weights = load_file(repo / "model.safetensors")
    projector = [t for name, t in weights.items() if "multi_modal_projector" in name]
    assert ours.components["projector"].parameters == sum(t.numel() for t in projector)
    assert ours.components["projector"].dtypes == {"float32": 45}
    assert ours.delta_rank == theirs.delta_rank == 16
    assert ours.chat_template.name == theirs.chat_template.name == "vicuna_v1"
    assert ours.chat_template.reason == theirs.chat_template.reason == "nothing in the checkpoint says which"
    assert ours.first_prompt == theirs.first_prompt
    assert ours.first_prompt.endswith("questions. USER: <image>\nWhat is in this image? ASSISTANT:")


def test_a_projector_alone(pristine, tmp_path):
    shutil.copy(pristine / "llava-tiny" / "config.json", tmp_path)
    tensors = {n: tensor for n, tensor in read_tensors(pristine / "llava-tiny").items() if "mm_projector" in n}
    torch.save(tensors, tmp_path / "mm_projector.bin")
    result = inspect_model(tmp_path)
    assert (result.kind, result.problems, list(result.components)) == ("projector", [], ["projector"])
    assert (result.num_visual_tokens, result.delta_rank) == (16, 16)


def test_wrong_tensors(changed):
    weights = load_file(changed / "model.safetensors")
    weights[QUERY + "norm.bias"][0] = float("nan")
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    del weights["model.language_model.norm.weight"]
    weights["model.extra"] = torch.ones(1)
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    text = "\n".join(inspect_model(changed).problems)
    assert "query.norm.bias holds NaN or Inf" in text
    assert "missing tensors: model.language_model.norm.weight" in text
    assert "does not have: model.extra" in text
    assert "lm_head.weight is (319, 32) instead of (320, 32)" in text


def test_missing_and_foreign_files(changed):
    for name in ("chat_template.jinja", "tokenizer.json", "projector_delta_llava.py"):
        (changed / name).unlink()
    (changed / "processing_delta_llava.py").write_text("")
    assert sorted(inspect_model(changed).problems) == [
        "processing_delta_llava.py was changed by hand",
        "there is no chat_template.jinja",
        "there is no projector_delta_llava.py, so the repo does not load without this package",
        "there is no tokenizer",
    ]


def test_the_prompt_of_a_repo_is_its_own(changed):
    (changed / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}Q: {{ m.content[1].text }} A:{% endfor %}"
    )
    result = inspect_model(changed)
    assert result.first_prompt == "<s>Q: What is in this image? A:"
    assert (result.chat_template.name, result.chat_template.reason) == ("its own", "what chat_template.jinja holds")
    (changed / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert inspect_model(changed).problems == ["the chat template does not render a question: no"]
    (changed / "chat_template.jinja").write_text(load_chat_template("phi_3", bos=True))
    result = inspect_model(changed)
    assert (result.chat_template.name, result.first_prompt) == (
        "phi_3",
        "<s><|user|>\n<image>\nWhat is in this image?<|end|>\n<|assistant|>\n",
    )


def test_a_config_that_is_wrong(changed, source, edit_config):
    edit_json(changed / "config.json", scale_factor=3)
    assert any("scale_factor=3" in problem for problem in inspect_model(changed).problems)
    edit_config(scale_factor=None, mm_new=1)
    assert any("no scale_factor" in problem for problem in inspect_model(source).problems)
    edit_config(scale_factor=2)
    assert inspect_model(source).problems == ["config.json has unknown keys: mm_new"]


def test_folders_that_are_not_a_model(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        inspect_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DeltaLlavaError, match="has no weights"):
        inspect_model(tmp_path)


def test_the_command(repo, changed, call):
    code, out, _ = call("inspect", repo)
    assert code == 0
    assert "16 by default, of 64, 16, 4, 1" in out
    assert "OK" in out
    assert "chat template: vicuna_v1 (nothing in the checkpoint says which), which asks\n    <s>A chat between" in out
    assert "    What is in this image? ASSISTANT:\n" in out
    (changed / "README.md").unlink()
    code, out, _ = call("inspect", changed)
    assert code == 1
    assert "problem: there is no README.md" in out
    _, out, _ = call("inspect", changed, "--json")
    assert json.loads(out)["problems"] == ["there is no README.md"]
