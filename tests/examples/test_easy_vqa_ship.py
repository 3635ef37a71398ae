"""A model in the authors' layout, and back through conversion: it must compute the same."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from examples.easy_vqa_data import write_captions, write_rows, write_tokenizer
from examples.easy_vqa_questions import load_questions
from examples.easy_vqa_ship import card, write_checkpoint, write_log
from tests.reference.names import parameter_shapes
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.conversion import convert_checkpoint
from transformers_delta_llava.training import load_recipe, train


RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
PROJECTOR = "model.mm_projector."


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Training data of ten images."""
    folder = tmp_path_factory.mktemp("easy-vqa-data")
    questions = load_questions("train")
    write_tokenizer(folder / "tokenizer", list({(q.text, q.answer): q for q in questions}.values()))
    few = [question for question in questions if question.image_id < 10]
    write_rows(folder, few, versions=1, per_row=3, rng=random.Random(0))
    write_captions(folder, few, versions=1)
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory) -> dict[str, Path]:
    """What the recipes leave behind after two steps each."""
    output = tmp_path_factory.mktemp("runs")
    changes = {
        "data.images": data / "images",
        "arguments.max_steps": 2,
        "arguments.logging_steps": 1,
        "arguments.per_device_train_batch_size": 4,
        "arguments.dataloader_num_workers": 0,
        "arguments.disable_tqdm": True,
    }
    stages = {
        "pretrain": ("easy-vqa-pretrain.yaml", "captions.json", {"model.tokenizer": data / "tokenizer"}),
        "finetune": ("easy-vqa.yaml", "train.json", {"model.path": output / "pretrain"}),
    }
    for stage, (recipe, rows, model) in stages.items():
        own = {**model, "data.path": data / rows, "arguments.output_dir": output / stage}
        train(load_recipe(RECIPES / recipe, [f"{key}={value}" for key, value in {**changes, **own}.items()]))
    return {stage: output / stage for stage in stages}


@pytest.fixture(scope="module")
def run(runs: dict[str, Path]) -> Path:
    return runs["finetune"]


@pytest.fixture(scope="module")
def shipped(run: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shipped") / "easy-vqa"
    write_checkpoint(run, folder)
    return folder


def test_the_recipe_offers_the_budgets_that_it_promises(run: Path):
    model = DeltaLlavaForConditionalGeneration.from_pretrained(run)
    assert model.config.visual_token_budgets == (64, 16, 4, 1)
    assert (model.config.num_visual_tokens, model.config.image_token_id) == (16, 432)


def test_visual_tokens_start_as_loud_as_text(run: Path):
    """What `initializer_range` in the recipe is for; at 0.02 the ratio is below 0.1."""
    model = DeltaLlavaForConditionalGeneration.from_pretrained(run)
    pixels = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        visual = torch.stack(list(model.get_image_features(pixels, return_dict=True).pooler_output))
    assert 0.5 < visual.std() / model.get_input_embeddings().weight.std() < 5


def test_names_and_shapes_of_the_projector_are_the_authors(shipped: Path, data: Path):
    tensors = load_file(shipped / "model.safetensors")
    shapes = {
        name.removeprefix(PROJECTOR): tuple(t.shape) for name, t in tensors.items() if name.startswith(PROJECTOR)
    }
    assert shapes == parameter_shapes(
        width=64, levels=4, rank=16, attention_width=32, head_dim=32, mlp_ratio=2, hidden=128
    )
    rest = {name.split(".")[1] for name in tensors if not name.startswith(PROJECTOR)}
    assert rest == {"vision_tower", "embed_tokens", "layers", "norm", "weight"}
    assert all(
        name.startswith("model.vision_tower.vision_tower.vision_model.")
        for name in tensors
        if ".vision_tower." in name
    )
    assert len(tensors["model.embed_tokens.weight"]) == len(tensors["lm_head.weight"]) == 432  # no image token
    trained_on = PreTrainedTokenizerFast.from_pretrained(data / "tokenizer")
    assert PreTrainedTokenizerFast.from_pretrained(shipped).get_vocab() == trained_on.get_vocab()
    assert "<image>" not in trained_on.get_vocab()


@torch.no_grad()
def test_converted_back_it_computes_what_was_trained(run: Path, shipped: Path, tmp_path: Path):
    convert_checkpoint(shipped, tmp_path / "repo")
    question = load_questions("test")[0]
    content = [{"type": "image", "url": question.image}, {"type": "text", "text": question.text}]
    logits = []
    for folder in (run, tmp_path / "repo"):
        model = DeltaLlavaForConditionalGeneration.from_pretrained(folder).eval()
        inputs = DeltaLlavaProcessor.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"num_visual_tokens": 4, "return_tensors": "pt"},
        )
        logits.append(model(**inputs).logits[..., :432])
    torch.testing.assert_close(logits[0], logits[1])


def test_the_card_says_what_the_files_say(runs: dict[str, Path], shipped: Path, tmp_path: Path):
    folder = shutil.copytree(shipped, tmp_path / "easy-vqa")
    write_log(runs, folder)
    log = json.loads((folder / "training_log.json").read_text())
    for stage in runs:
        assert [entry["step"] for entry in log[stage]["history"]] == [1, 2]
        assert yaml.safe_load((folder / f"recipe-{stage}.yaml").read_text())["num_visual_tokens"] == [16, 4, 1]
    score = {"correct": 9600, "total": 9673, "accuracy": 99.25, "interval_95": [99.05, 99.4]}
    scores = {"overall": score, "yes/no": score, "open": score}
    results = {"questions": 9673, "dtype": "float32", "results": [{"num_visual_tokens": 16, "scores": scores}]}
    (folder / "results.json").write_text(json.dumps({**results, "question_alone": scores}))
    text = card(DeltaLlavaForConditionalGeneration.from_pretrained(runs["finetune"]), folder)
    last = f"and {log['finetune']['history'][1]['loss']:.4f}"
    for part in ("| 16 | 99.25 (99.05 to 99.40) |", "all 9,673 test questions", "(2 + 2 steps", last):
        assert part in text
    assert "easy-vqa-repo --num-visual-tokens 16" in text
