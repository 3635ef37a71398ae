"""A saved model is a Hub repo: other processes load it with `trust_remote_code`, with or without this package."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import transformers_delta_llava
from tests.tiny import prompt, tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.hub.repo_files import HUB_FILES


LOAD_ALL = """
import importlib.util, json, sys
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor, pipeline

folder, saved = sys.argv[1:]
inputs = torch.load(f"{folder}/inputs.pt")
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
any_to_any = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.save(model(**inputs).logits, f"{folder}/logits.pt")
    torch.save(base(**inputs).last_hidden_state, f"{folder}/states.pt")

chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (30, 20))}, {"type": "text", "text": "?"}]}]
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
answer = pipe(text=chat, max_new_tokens=3, return_full_text=False, processor_kwargs={"num_visual_tokens": 4})
model.load_deltas(f"{folder}/deltas", name="other")
with torch.no_grad():
    torch.save(model(**inputs).logits, f"{folder}/other.pt")
model.set_deltas("default")
base.load_deltas(f"{folder}/deltas", name="other")
chat[0]["content"][0] = {"type": "image", "path": f"{folder}/image.png"}
options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
batch = processor.apply_chat_template(chat, **options, processor_kwargs={"num_visual_tokens": 9})
torch.save(dict(batch), f"{folder}/batch.pt")
model.save_pretrained(saved)
processor.save_pretrained(saved)
again = AutoModelForImageTextToText.from_pretrained(saved, trust_remote_code=True)
with torch.no_grad():
    torch.save(again(**inputs).logits, f"{saved}/logits.pt")
print(json.dumps({
    "installed": importlib.util.find_spec("transformers_delta_llava") is not None,
    "modules": [type(part).__module__ for part in (config, processor, base, model, any_to_any, again)],
    "image_seq_length": config.image_seq_length,
    "answer": answer[0]["generated_text"],
    "deltas": [model.delta_names, base.delta_names],
}))
"""


def load_all(folder: Path, saved: Path, tmp_path: Path, installed: bool) -> dict:
    """Load `folder` through every Auto class in another process, which leaves its results in it.

    An editable install is a .pth file, which Python reads in its `site` module: `-S` leaves it out.
    """
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if installed:
        paths.insert(0, str(Path(transformers_delta_llava.__file__).parents[1]))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / f"modules-{folder.name}-{installed}"),
    }
    before = "import transformers_delta_llava\n" if installed else ""
    command = [sys.executable, "-S", "-c", before + LOAD_ALL, str(folder), str(saved)]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A folder written by `save_pretrained`, with other deltas, and what the model makes of one prompt with either."""
    folder = tmp_path_factory.mktemp("repo")
    torch.manual_seed(0)
    model = DeltaLlavaForConditionalGeneration(tiny_config()).eval()
    model.save_pretrained(folder)
    processor = tiny_processor(model.config)
    processor.save_pretrained(folder)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))
    image.save(folder / "image.png")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = processor.apply_chat_template(chat, **options, processor_kwargs={"num_visual_tokens": 9})
    inputs = {"input_ids": prompt([36])[None], "pixel_values": torch.randn(1, 3, 24, 24)}
    torch.save(inputs, folder / "inputs.pt")
    with torch.no_grad():
        logits, states = model(**inputs).logits, model.model(**inputs).last_hidden_state
        model.load_delta_state_dict({name: -tensor for name, tensor in model.delta_state_dict().items()})
        next(model.delta_parameters()).mul_(2)
        model.save_deltas(folder / "deltas")
        return folder, logits, states, model(**inputs).logits, batch


@pytest.mark.parametrize("installed", [False, True], ids=["package absent", "package installed"])
def test_fresh_process_gives_the_same_results_and_saves_a_repo_again(repo, tmp_path, installed):
    folder, logits, states, other, expected = repo
    assert set(HUB_FILES) <= {file.name for file in folder.iterdir()}

    report = load_all(folder, tmp_path / "saved", tmp_path, installed)
    assert report["installed"] is installed
    package = "transformers_delta_llava." if installed else "transformers_modules."
    assert all(module.startswith(package) for module in report["modules"]), report["modules"]
    assert report["image_seq_length"] == 36
    batch = torch.load(folder / "batch.pt")
    assert batch.keys() == expected.keys() and batch["num_visual_tokens"].tolist() == [9]
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert isinstance(report["answer"], str)
    assert torch.equal(torch.load(folder / "logits.pt"), logits)
    assert torch.equal(torch.load(folder / "states.pt"), states)
    assert torch.equal(torch.load(folder / "other.pt"), other) and not torch.equal(other, logits)
    assert report["deltas"] == [["default", "other"]] * 2

    saved = tmp_path / "saved"
    for name in HUB_FILES:
        assert (saved / name).read_text() == (folder / name).read_text()
    for name in ("config.json", "processor_config.json"):
        maps = [json.loads((path / name).read_text())["auto_map"] for path in (folder, saved)]
        assert maps[0] == maps[1]
    assert torch.equal(torch.load(saved / "logits.pt"), logits)


CONFIG_WITHOUT_TORCH = """
import importlib.util, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "torch" else find(name, *more)
from transformers import AutoConfig
print(AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).num_visual_tokens, "torch" in sys.modules)
"""


def test_the_config_needs_no_torch(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path / "repo")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CONFIG_WITHOUT_TORCH, str(tmp_path / "repo")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.stdout.split() == ["36", "False"], run.stderr
