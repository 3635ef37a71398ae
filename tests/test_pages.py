"""The runner of the documentation's code: what it reads, and that it fails where nothing runs what is written."""

from pathlib import Path

import pytest

from tests import page_commands, pages
from tests.pages import Block, commands_of, filled, indented_code, read_blocks, run_page


PAGE = """# Page

```bash
for k in 4 1; do
    delta-llava budget "a b" --k $k
done
```

## Python

    hidden = code

```python
count = start + 1  # see STEP
```
"""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "page.md").write_text(PAGE)
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    return "page.md"


def test_blocks_and_what_stands_outside_of_them(page: str) -> None:
    assert [(block.section, block.language) for block in read_blocks(page)] == [("Page", "bash"), ("Python", "python")]
    assert read_blocks(page, "Python") == [Block("Python", "python", "count = start + 1  # see STEP\n")]
    assert indented_code(page) == ["hidden = code"]
    with pytest.raises(AssertionError, match="has no code under Elsewhere"):
        read_blocks(page, "Elsewhere")


def test_everything_is_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    handlers = {"delta-llava": lambda command, patch: asked.append(command)}
    names = run_page(page, monkeypatch, names={"start": 1}, replace={"+ 1": "+ 2"}, handlers=handlers)
    assert names["count"] == 3
    assert asked == [["delta-llava", "budget", "a b", "--k", k] for k in "41"]


@pytest.mark.parametrize(("section", "count"), [("Page", 2), ("Page", 1)])
def test_a_section_of_another_test_is_read_by_it(
    page: str, section: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="runs 2 blocks" if count == 2 else "does not read"):
        run_page(page, monkeypatch, names={"start": 1}, elsewhere={section: ("test_pages.py", count)})


def test_bash_reads_the_commands() -> None:
    text = 'X=$(python -c "print(1 + 1)")  # a comment\nmake test \\\n    TESTS="a $X"\npython script.py'
    assert commands_of(text) == [["make", "test", "TESTS=a 2"], ["python", "script.py"]]
    with pytest.raises(AssertionError, match="frobnicate"):
        commands_of("frobnicate --fast")


@pytest.mark.parametrize(
    ("check", "command"),
    [
        ("check_pip", "pip install .[nothing]"),
        ("check_pip", "pip install left-pad"),
        ("check_make", "make nothing"),
        ("check_make", "make test NOTHING=1"),
        ("check_make", "make test-engines ENGINES=nothing"),
        ("check_script", "python benchmarks/nothing.py"),
        ("check_script", "python benchmarks/projector.py --nothing"),
        (
            "check_torchrun",
            "torchrun --nproc_per_node 2 -m transformers_delta_llava train examples/recipes/nothing.yaml",
        ),
        ("check_tested", "vllm serve REPO --nothing"),
    ],
)
def test_commands_of_nothing_are_found(check: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        getattr(page_commands, check)(command.split(), monkeypatch)


def test_what_is_filled_in_must_be_there() -> None:
    assert filled("load REPO", {"REPO": "here"}) == "load here"
    with pytest.raises(AssertionError, match="REPO"):
        filled("load it", {"REPO": "here"})
