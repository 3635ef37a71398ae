"""A converted repo on the Hub, loaded in a process of its own where the package cannot be imported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.hub_server import TOKEN, HubServer, Repo
from transformers_delta_llava import DeltaLlavaForConditionalGeneration


SCRIPT = """
import json, sys
sys.modules["transformers_delta_llava"] = None  # an import of the package fails
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

repo = sys.argv[1]
config = AutoConfig.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
base = AutoModel.from_pretrained(repo, trust_remote_code=True)
model, info = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, output_loading_info=True)

image = Image.open("photo.jpg")
content = [{"type": "image", "image": image}, {"type": "text", "text": "What is it?"}]
messages = [{"role": "user", "content": content}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = processor(images=image, text=prompt, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
torch.save({**inputs, "logits": logits}, "result.pt")
pipe = pipeline("image-text-to-text", model=repo, trust_remote_code=True)
answer = pipe(text=messages, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
with open("result.json", "w") as file:
    json.dump({
        "classes": [type(value).__name__ for value in (config, processor, base, model)],
        "modules": [type(value).__module__.split(".")[0] for value in (config, processor, base, model)],
        "loading": {name: sorted(map(str, value)) for name, value in info.items()},
        "placeholders": int((inputs["input_ids"] == config.image_token_id).sum()),
        "padding_side": processor.tokenizer.padding_side,
        "answer": answer,
        "has_lm_head": hasattr(base, "lm_head"),
    }, file)
"""


@pytest.fixture(scope="module")
def folder(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a fresh process left its results: SCRIPT with the repo on a Hub, then the code of the card, as it stands."""
    folder = tmp_path_factory.mktemp("fresh")
    (folder / repo.name).symlink_to(repo)
    Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 20).convert("RGB").save(folder / "photo.jpg")
    snippets = re.findall(r"```python\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    with HubServer() as server:
        server.repos["org/tiny"] = Repo(private=False)
        server.repos["org/tiny"].commit("main", {file.name: file.read_bytes() for file in repo.iterdir()})
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        environment |= {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "\n".join([SCRIPT, *snippets]), "org/tiny"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_it_loads_and_answers_without_the_package(folder):
    result = json.loads((folder / "result.json").read_text())
    names = ["Config", "Processor", "Model", "ForConditionalGeneration"]
    assert result["classes"] == [f"DeltaLlava{name}" for name in names]
    assert set(result["modules"]) == {"transformers_modules"}
    assert not any(result["loading"].values())
    assert result["placeholders"] == 16
    assert result["padding_side"] == "left"
    assert isinstance(result["answer"], str)
    assert not result["has_lm_head"]


def test_its_logits_are_those_of_the_package(repo, folder):
    inputs = torch.load(folder / "result.pt")
    logits = inputs.pop("logits")
    here = DeltaLlavaForConditionalGeneration.from_pretrained(repo)
    with torch.no_grad():
        assert torch.equal(here(**inputs).logits, logits)


def test_the_code_in_the_model_card_runs(folder):
    assert len((folder / "stdout").read_text().splitlines()) >= 2
