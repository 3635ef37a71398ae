"""`delta-llava update` prints the files that change."""

import hashlib
import json
import shutil


def test_files_on_stdout_and_sentences_on_stderr(call, repo, tmp_path):
    folder, old = shutil.copytree(repo, tmp_path / "repo"), b"# older code\n"
    (folder / "projector_delta_llava.py").write_bytes(old)
    report = json.loads((folder / "conversion.json").read_text())
    report["code"]["sha256"]["projector_delta_llava.py"] = hashlib.sha256(old).hexdigest()
    (folder / "conversion.json").write_text(json.dumps(report))

    changed = "projector_delta_llava.py\nconversion.json\n"
    assert call("update", folder, "--dry-run") == (0, changed, "Nothing was changed.\n")
    assert call("update", folder) == (0, changed, "")
    code, out, err = call("update", folder)
    assert (code, out) == (0, "") and err.endswith("is up to date.\n")

    (folder / "modeling_delta_llava.py").write_text("# by hand\n")
    code, out, err = call("update", folder)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "--force" in err
    assert call("update", folder, "--force")[:2] == (0, "modeling_delta_llava.py\n")
