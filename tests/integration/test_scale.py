"""The scripts of `examples/scale`, on CPUs, where the package is not installed: the answers are those of `delta-llava generate`."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.engines import ROOT, Engine, needs
from transformers_delta_llava.generate import at_budgets, generate, read_requests
from transformers_delta_llava.loading import load_repo


pytestmark = needs("ray")

SCALE = ROOT / "examples" / "scale"
PROMPT = "what color is the shape?"
NUMBERS = (16, 4, 1, None, 64)
ENGINE = json.dumps({"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8})
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def ray(tmp_path_factory) -> Engine:
    return Engine("ray", tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module")
def rows(questions, tmp_path_factory) -> Path:
    """A question about each of five images, with a number of visual tokens of its own; the images in `photos`."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "photos").mkdir()
    lines = []
    for index, (question, number) in enumerate(zip(questions, NUMBERS)):
        with Image.open(question.image) as image:
            image.save(folder / "photos" / f"{index}.png")
        row = {"id": str(index), "image": f"photos/{index}.png", "prompt": PROMPT}
        lines.append(json.dumps({**row, "num_visual_tokens": number} if number else row))
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def expected(repo, rows) -> list[str]:
    requests = read_requests(str(rows), max_new_tokens=8)
    answers = [answer for batch, _ in generate(*load_repo(repo, "cpu"), requests) for answer in batch]
    return [answer.text for answer in sorted(answers, key=lambda answer: answer.request.id)]


def test_a_folder_part_by_part(ray, repo, rows, tmp_path):
    answers = tmp_path / "answers"
    arguments = ["--prompt", PROMPT, "--num-visual-tokens", 4, "--rows", 2, "--max-tokens", 8, "--engine", ENGINE]
    command = [SCALE / "answer_dataset.py", repo, rows.parent / "photos", answers, *arguments]
    ray.run_python(*command, "--shard", "0/2", **ENVIRONMENT)
    assert sorted(path.name for path in answers.iterdir()) == ["000000000.parquet", "000000004.parquet"]
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(answers.iterdir())]
    ray.run_python(*command, **ENVIRONMENT)  # only what is missing
    assert set(before) < {(path.name, path.stat().st_mtime_ns) for path in answers.iterdir()}
    code = f"from datasets import load_dataset; print(load_dataset('parquet', data_dir={str(answers)!r}, split='train')['answer'][:])"
    found = ray.run_python("-c", code).splitlines()[-1]
    requests = at_budgets(read_requests(str(rows.parent / "photos"), PROMPT, 8), [4])
    answered = [answer for batch, _ in generate(*load_repo(repo, "cpu"), requests) for answer in batch]
    assert found == str([answer.text for answer in sorted(answered, key=lambda answer: answer.request.id)])


def test_rows_on_ray(ray, repo, rows, expected, tmp_path):
    options = ["--cpu", "--max-tokens", 8, "--batch-size", 4, "--engine", ENGINE]
    ray.run_python(SCALE / "answer_on_ray.py", repo, rows, tmp_path / "answers", *options, **ENVIRONMENT)
    lines = [line for path in (tmp_path / "answers").iterdir() for line in path.read_text().splitlines()]
    answers = {row["id"]: row["answer"] for row in map(json.loads, lines)}
    assert [answers[str(index)] for index in range(len(NUMBERS))] == expected
