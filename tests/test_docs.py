"""The code of every page of the documentation runs as it stands, on small models under the names that the page uses."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM
from typer.main import get_command

from examples.make_checkpoint import DEMO, write_checkpoint
from tests.evaluation.test_lmms_results import REPORT
from tests.page_commands import check_script, run_delta_llava
from tests.pages import DOCS, ROOT, indented_code, path_of, read_blocks, run_page
from tests.tiny import tiny_config
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.cli.main import app
from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.training import load_recipe
from transformers_delta_llava.training.conversations import to_messages


PAGES = ["README.md", *sorted(path.name for path in DOCS.glob("*.md"))]
PHOTO = ROOT / "examples" / "images" / "chelsea.jpg"


@pytest.fixture(scope="module")
def easy_vqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, converted."""
    checkpoint, folder = ROOT / "examples" / "easy-vqa", tmp_path_factory.mktemp("repo") / "easy-vqa"
    convert_checkpoint(checkpoint, folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the pages run: an empty folder with examples/ and a photo."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    return tmp_path


def test_budgets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "runs").mkdir()
    run_page("budgets.md", monkeypatch)
    assert (folder / "runs" / "chelsea.png").is_file()


def test_conversion(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(folder / "llava-v1.5-7b-144")
    linked = {"mm_projector_type": "mlp2x_gelu", "_name_or_path": "NousResearch/Hermes-4.3-36B"}
    write_checkpoint(folder / "DeltaLLaVA-36B-144", model_type="llava_seed_oss", config=linked)
    run_page("conversion.md", monkeypatch)
    assert (folder / "llava-v1.5-7b-144-again" / "config.json").is_file()
    assert (folder / "projector-alone" / "mm_projector.bin").is_file()


def test_deltas(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = DeltaLlavaForConditionalGeneration(tiny_config()).eval()
    model.save_pretrained("delta-llava-7b")
    for name in ("charts", "maps"):
        model.load_delta_state_dict({n: torch.randn_like(t) / 8 for n, t in model.delta_state_dict().items()})
        model.save_deltas(f"deltas-{name}")
    model.save_pretrained("delta-llava-7b-tuned")
    capsys.readouterr()
    names = run_page("deltas.md", monkeypatch)
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "['deltas-charts', 'default', 'maps']"
    assert all(f"{folder}\n" in printed for folder in ("deltas-own", "deltas-small", "delta-llava-7b-merged"))
    assert (folder / "deltas.svg").is_file()
    trained = [name for name, p in names["model"].named_parameters() if p.requires_grad]
    assert trained and all(".delta_" in name for name in trained)


def test_explain(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs").mkdir()
    run_page("explain.md", monkeypatch)
    printed = capsys.readouterr().out
    assert printed.count("│ blue") == 2 * 3 and '"answer": "yes"' in printed
    shown, made = Image.open(ROOT / "docs" / "explain.png"), Image.open("runs/explain.png")
    assert made.size == shown.size  # pixels depend on the fonts of the machine
    assert Image.open("runs/heat.png").size == (336, 336) and (folder / "runs" / "tokens.png").is_file()


def test_app(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse_or_run(command: list[str], patch: pytest.MonkeyPatch) -> None:
        """The page is served until somebody stops it: tests/integration/test_app.py does that, here its options are read."""
        if command[1] != "app":
            return run_delta_llava(command, patch)
        known = get_command(app).commands["app"].make_context("app", command[2:]).params  # type: ignore[attr-defined]
        assert (known["model"], known["num_visual_tokens"], known["port"]) == ("./easy-vqa", 16, 7860)

    run_page("app.md", monkeypatch, handlers={"delta-llava": parse_or_run})
    assert (folder / "space" / "app.py").is_file()


def test_readme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(folder / "llava-v1.5-7b-144", DEMO)
    convert_checkpoint(folder / "llava-v1.5-7b-144", folder / "delta-llava-7b-144")

    def convert_again(command: list[str], patch: pytest.MonkeyPatch) -> None:
        """The page shows what a repo is for before it shows where it comes from."""
        run_delta_llava([*command, "--overwrite"], patch)

    run_page("README.md", monkeypatch, handlers={"delta-llava": convert_again})


def test_quickstart(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_page("quickstart.md", monkeypatch)
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    shown = re.findall(r"print\(.*\)  # (.*)", path_of("quickstart.md").read_text(encoding="utf-8"))
    assert len(shown) == 5
    assert [line for line in printed if line in shown] == shown
    assert "circle" in printed  # the streamed answer


def test_remote_code(easy_vqa: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(easy_vqa, folder / "REPO")
    names = run_page("remote-code.md", monkeypatch)
    assert names["pipe"].model.config.model_type == "delta_llava"


def test_coming_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(vision={"num_hidden_layers": 24})
    AutoModel.from_config(config.vision_config).save_pretrained("clip")
    AutoModelForCausalLM.from_config(config.text_config).save_pretrained("vicuna")
    names = run_page("coming-from.md", monkeypatch)
    assert names["model"].config.image_token_id == 7


def test_engines(
    easy_vqa: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page(
        "engines.md",
        monkeypatch,
        replace={"REPO": str(easy_vqa)},
        elsewhere={
            "accelerate": ("test_adaptations.py", 2),
            "torch.compile": ("test_adaptations.py", 1),
            "Quantised": ("test_adaptations.py", 2),
            "vLLM": ("test_vllm.py", 3),
            "transformers serve": ("test_transformers_serve.py", 2),
            "TRL and PEFT": ("test_trl.py", 1),
        },
    )


def test_evaluation(easy_vqa: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(easy_vqa, folder / "REPO")
    (folder / "results" / "144" / "model").mkdir(parents=True)
    (folder / "results" / "144" / "model" / "now_results.json").write_text(json.dumps(REPORT))

    def shortened(command: list[str], patch: pytest.MonkeyPatch) -> None:
        run_delta_llava([*command, "--limit", "20"] if command[2] == "easy-vqa" else command, patch)

    run_page(
        "evaluation.md",
        monkeypatch,
        handlers={"delta-llava": shortened},
        elsewhere={"lmms-eval": ("test_lmms_eval.py", 2), "The paper's tables": ("test_lmms_eval.py", 3)},
    )
    assert "model-index" in (folder / "REPO" / "README.md").read_text()


def test_performance(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DeltaLlavaForConditionalGeneration(tiny_config()).eval()
    text = torch.arange(5, 12)
    ids = torch.cat([torch.full((model.config.num_visual_tokens,), model.config.image_token_id), text])[None]
    names = {
        "model": model,
        "prompts": ["one", "two"],
        "pixel_values_of_one_image": torch.zeros(1, 3, *[model.config.vision_config.image_size] * 2),
        "tokens": {"input_ids": ids.repeat(2, 1), "attention_mask": torch.ones(2, ids.shape[1]), "max_new_tokens": 2},
    }
    run_page("performance.md", monkeypatch, names=names)


def test_training(easy_vqa: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Instruct/llava_v1_5_mix665k.json")
    for file in files:  # what the downloads would bring
        (folder / "data" / file).parent.joinpath("images").mkdir(parents=True)
        (folder / "data" / file).write_text("[]")
    (folder / "FOLDER").mkdir()
    (folder / "rows.json").write_text("[]")
    (folder / "runs").mkdir()
    shutil.copytree(easy_vqa, folder / "runs" / "pretrain-7b")
    shutil.copytree(easy_vqa, folder / "runs" / "finetune-7b")
    read: list[str] = []

    def recipe(text: str) -> None:
        Path("RECIPE.yaml").write_text(text)
        read.append(load_recipe("RECIPE.yaml").arguments["output_dir"])

    def row(text: str) -> None:
        turns = to_messages(json.loads(text))
        assert [turn["role"] for turn in turns] == ["user", "assistant"]
        read.append("row")

    Path("RECIPE.yaml").write_text((ROOT / "examples" / "recipes" / "finetune-7b.yaml").read_text())
    run_page(
        "training.md",
        monkeypatch,
        replace={"http://images.cocodataset.org/val2017/000000039769.jpg": "photo.jpg"},
        handlers={"delta-llava": train_or_push},
        readers={"yaml": recipe, "json": row},
    )
    assert read == ["runs/mine", "row"]


def train_or_push(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the recipe of `delta-llava train`, with its changes, and rehearse `delta-llava push`."""
    if command[1] == "push":
        return run_delta_llava([*command, "--dry-run"], monkeypatch)
    assert command[1] == "train", command
    changes, rest = [], command[3:]
    while rest:
        option = rest.pop(0)
        assert option in ("--set", "--resume"), command
        changes += [rest.pop(0)] if option == "--set" else []
    load_recipe(command[2], changes)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_run_by_a_test(page: str) -> None:
    assert not indented_code(page), f"{page}: put code between fences, with its language"
    if "```" not in path_of(page).read_text(encoding="utf-8"):
        return
    languages = {block.language for block in read_blocks(page)}
    assert languages <= {"python", "bash", "json", "yaml", "text"}, f"{page} has blocks of {languages}"
    run = set()
    for test in Path(__file__).parent.rglob("test_*.py"):
        for node in ast.walk(ast.parse(test.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run_page":
                run |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    assert page in run, f"no test runs {page}: add one with run_page"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_scripts_that_a_page_speaks_of_exist(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = re.sub(r"^```.*?^```$", "", path_of(page).read_text(encoding="utf-8"), flags=re.M | re.S)
    for script in re.findall(r"`(python (?:benchmarks|examples|tools)/[^`]+)`", text):
        check_script(script.split(), monkeypatch)
