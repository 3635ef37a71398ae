"""`delta-llava update` prints the files that change."""

import hashlib
import json

import pytest

from tests.tiny import tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.hub.repo_files import describe_code


@pytest.fixture
def repo(tmp_path, capsys):
    """A saved model with a note on its code."""
    folder = tmp_path / "repo"
    config = tiny_config()
    DeltaLlavaForConditionalGeneration(config).save_pretrained(folder)
    tiny_processor(config).save_pretrained(folder)
    (folder / "conversion.json").write_text(json.dumps({"code": describe_code()}))
    capsys.readouterr()  # progress bars
    return folder


def test_files_on_stdout_and_sentences_on_stderr(call, repo):
    old = b"# older code\n"
    (repo / "projector_delta_llava.py").write_bytes(old)
    path = repo / "conversion.json"
    report = json.loads(path.read_text())
    report["code"]["sha256"]["projector_delta_llava.py"] = hashlib.sha256(old).hexdigest()
    path.write_text(json.dumps(report))

    changed = "projector_delta_llava.py\nconversion.json\n"
    assert call("update", repo, "--dry-run") == (0, changed, "Nothing was changed.\n")
    assert call("update", repo) == (0, changed, "")
    code, out, err = call("update", repo)
    assert (code, out) == (0, "") and err.endswith("is up to date.\n")

    (repo / "modeling_delta_llava.py").write_text("# by hand\n")
    code, out, err = call("update", repo)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "somebody changed it" in err
    assert call("update", repo, "--force")[:2] == (0, "modeling_delta_llava.py\n")
