"""A saved model and a converted checkpoint are Hub repos: they load with `trust_remote_code`, with or without this package."""

import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.hub_server import TOKEN, HubServer
from tests.tiny import noise, prompt, tiny_config, tiny_processor
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.hub import HUB_FILES


def load_all(folder: str, saved: str) -> None:
    """Load `folder` through every Auto class, save it again in `saved`, and leave the results there.

    It also runs in a process without this package, so it imports what it needs.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
        pipeline,
    )

    classes = (AutoConfig, AutoProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    parts = [auto.from_pretrained(folder, trust_remote_code=True) for auto in classes]
    config, processor, base, model, _ = parts
    inputs, results = torch.load(f"{folder}/inputs.pt"), {}
    content = [{"type": "image", "path": f"{folder}/image.png"}, {"type": "text", "text": "?"}]
    chat = [{"role": "user", "content": content}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    results["batch"] = dict(processor.apply_chat_template(chat, **options, processor_kwargs={"num_visual_tokens": 9}))
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    answer = pipe(text=chat, max_new_tokens=3, return_full_text=False, processor_kwargs={"num_visual_tokens": 4})
    with torch.no_grad():
        results |= {"logits": model(**inputs).logits, "states": base(**inputs).last_hidden_state}
        for one in (model, base):
            one.load_deltas(f"{folder}/deltas", name="other")
        results["other"] = model(**inputs).logits
        model.set_deltas("default")
        model.save_pretrained(saved)
        processor.save_pretrained(saved)
        again = AutoModelForImageTextToText.from_pretrained(saved, trust_remote_code=True)
        results["logits again"] = again(**inputs).logits
    results["modules"] = [type(part).__module__ for part in (*parts, again)]
    results |= {"image_seq_length": config.image_seq_length, "answer": answer[0]["generated_text"]}
    torch.save({**results, "deltas": [model.delta_names, base.delta_names]}, f"{saved}/results.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder written by `save_pretrained`, with other deltas, and what model and processor make of one image."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = DeltaLlavaForConditionalGeneration(tiny_config()).eval()
    model.save_pretrained(folder)
    processor = tiny_processor(model.config)
    processor.save_pretrained(folder)
    image = noise(50, 30)
    image.save(folder / "image.png")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    batch = processor.apply_chat_template(chat, **options, processor_kwargs={"num_visual_tokens": 9})
    inputs = {"input_ids": prompt([36])[None], "pixel_values": torch.randn(1, 3, 24, 24)}
    torch.save(inputs, folder / "inputs.pt")
    with torch.no_grad():
        expected = {"logits": model(**inputs).logits, "states": model.model(**inputs).last_hidden_state, **batch}
        for tensor in model.delta_state_dict().values():
            tensor.mul_(-2)
        model.save_deltas(folder / "deltas")
        return folder, {**expected, "other": model(**inputs).logits, "logits again": expected["logits"]}


def ask_on_the_hub(repo: str) -> None:
    """Load a repo of the Hub and ask it, with what the card's readers use; leaves the results in the working directory."""
    import json

    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

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
        torch.save({**inputs, "logits": model(**inputs).logits}, "result.pt")
    pipe = pipeline("image-text-to-text", model=repo, trust_remote_code=True)
    results = {
        "classes": [
            f"{type(p).__module__.split('.')[0]}.{type(p).__name__}" for p in (config, processor, base, model)
        ],
        "loading": {name: sorted(map(str, value)) for name, value in info.items()},
        "placeholders": int((inputs["input_ids"] == config.image_token_id).sum()),
        "padding_side": processor.tokenizer.padding_side,
        "answer": pipe(text=messages, max_new_tokens=4, return_full_text=False)[0]["generated_text"],
        "has_lm_head": hasattr(base, "lm_head"),
    }
    with open("result.json", "w") as file:
        json.dump(results, file)


@pytest.fixture(scope="module")
def fresh(saved: tuple[Path, dict], repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a process without the package left its results: of both functions, then of the code in the card of `repo`.

    An editable install is a .pth file, which Python reads in its `site` module: `-S` leaves it out.
    """
    folder = tmp_path_factory.mktemp("fresh")
    (folder / repo.name).symlink_to(repo)
    Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 20).convert("RGB").save(folder / "photo.jpg")
    snippets = re.findall(r"```python\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    absent = "import importlib.util, sys\nassert importlib.util.find_spec('transformers_delta_llava') is None"
    calls = "load_all(*sys.argv[1:])\nask_on_the_hub('org/tiny')\nprint('the card:')"
    parts = [absent, inspect.getsource(load_all), inspect.getsource(ask_on_the_hub), calls, *snippets]
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    with HubServer() as server:
        server.repos["org/tiny"] = repo
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        environment["HF_HOME"] = str(folder / "home")
        command = [sys.executable, "-S", "-c", "\n".join(parts), str(saved[0]), str(folder / "saved")]
        run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (folder / "stdout").write_text(run.stdout.partition("the card:\n")[2])
    return folder


@pytest.mark.parametrize("installed", [False, True], ids=["package absent", "package installed"])
def test_a_repo_gives_the_same_results_and_is_saved_as_a_repo_again(saved, request, tmp_path, installed):
    (folder, expected), again = saved, tmp_path / "saved"
    assert set(HUB_FILES) <= {file.name for file in folder.iterdir()}
    if installed:
        load_all(str(folder), str(again))
    else:
        again = request.getfixturevalue("fresh") / "saved"
    results = torch.load(again / "results.pt")
    results |= results.pop("batch")
    package = "transformers_delta_llava." if installed else "transformers_modules."
    assert all(module.startswith(package) for module in results.pop("modules"))
    assert (results.pop("image_seq_length"), results.pop("deltas")) == (
        36,
        [["default", "other"], ["other", "default"]],
    )
    assert isinstance(results.pop("answer"), str)
    assert results.keys() == expected.keys() and results["num_visual_tokens"].tolist() == [9]
    assert not [name for name, tensor in results.items() if not torch.equal(tensor, expected[name])]
    assert not torch.equal(results["other"], results["logits"])
    for name in HUB_FILES:
        assert (again / name).read_text() == (folder / name).read_text()
    for name in ("config.json", "processor_config.json"):
        maps = [json.loads((path / name).read_text())["auto_map"] for path in (folder, again)]
        assert maps[0] == maps[1]


def test_a_converted_repo_loads_from_the_hub_and_answers(fresh):
    result = json.loads((fresh / "result.json").read_text())
    names = ["Config", "Processor", "Model", "ForConditionalGeneration"]
    assert result["classes"] == [f"transformers_modules.DeltaLlava{name}" for name in names]
    assert not any(result["loading"].values())
    assert (result["placeholders"], result["padding_side"]) == (16, "left")
    assert isinstance(result["answer"], str) and not result["has_lm_head"]


def test_its_logits_are_those_of_the_package(repo, fresh):
    inputs = torch.load(fresh / "result.pt")
    logits = inputs.pop("logits")
    here = DeltaLlavaForConditionalGeneration.from_pretrained(repo)
    with torch.no_grad():
        assert torch.equal(here(**inputs).logits, logits)


def test_the_code_in_the_model_card_runs(fresh):
    assert len((fresh / "stdout").read_text().splitlines()) >= 2
