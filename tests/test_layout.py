"""The layout: who imports whom, which files go into Hub repos, and what must not be in the repo."""

import ast
import graphlib
import importlib
import inspect
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import transformers_delta_llava
from transformers_delta_llava.hub import write_code


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "transformers_delta_llava"
# Each part may import from those in lines below its own.
LAYERS = (
    ("cli",),
    ("app", "generate", "explain", "lmms", "onnx", "training"),
    ("deltas",),
    ("conversion",),
    ("hub",),
    ("loading",),
    ("errors",),
    ("modeling", "processing"),
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Files that are copied into Hub repos, where only what transformers brings along is sure to be installed.
HUB_FILES = sorted([*PACKAGE.glob("modeling/[!_]*.py"), *PACKAGE.glob("processing/[!_]*.py")])
HUB_IMPORTS = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", "PIL"} | sys.stdlib_module_names
PUBLIC_MODULES = (
    "transformers_delta_llava",
    "transformers_delta_llava.conversion",
    "transformers_delta_llava.deltas",
    "transformers_delta_llava.hub",
    "transformers_delta_llava.onnx",
    "transformers_delta_llava.processing",
    "transformers_delta_llava.training",
)


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import statement in a file; level counts the leading dots."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is None:
            found += [(node.level, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def tracked_files() -> list[Path]:
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("**/[!_]*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_one_way(path: Path) -> None:
    depth = len(path.relative_to(PACKAGE).parts)
    for level, module in imports(path):
        assert not (level == 0 and module.startswith("transformers_delta_llava")), f"absolute import of {module}"
        assert level <= depth, f"{'.' * level}{module} leaves the package"
        if level == depth:  # from ..other import x, from a file in a part's folder
            other = module.split(".")[0]
            assert other == "__version__" or RANKS[other] > RANKS[part(path)], f"{part(path)} imports {module}"


def test_no_import_cycle() -> None:
    files = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    graph: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for name, path in files.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                module = (*name[: -node.level], *(node.module.split(".") if node.module else ()))
                for alias in node.names:
                    package = (*module, "__init__")
                    candidates = [(*module, alias.name), (*module, alias.name, "__init__"), module, package]
                    target = next(candidate for candidate in candidates if candidate in files)
                    graph[name].add(target)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_hub_files_stand_alone(path: Path) -> None:
    siblings = {file.stem for file in path.parent.glob("*.py")} - {"__init__"}
    for level, module in imports(path):
        if level == 0:
            assert module.split(".")[0] in HUB_IMPORTS, f"{module} may be missing where a repo is loaded"
        else:
            assert level == 1 and module in siblings, f"{'.' * level}{module} does not exist in a flat repo"


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_transformers_finds_only_real_relative_imports(path: Path) -> None:
    # transformers looks for a repo's files with regular expressions, which read docstrings too.
    from transformers.dynamic_module_utils import get_relative_imports

    assert set(get_relative_imports(path)) == {module for level, module in imports(path) if level == 1}


def test_a_repo_gets_every_hub_file_and_the_docs_name_it(tmp_path: Path) -> None:
    write_code(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in HUB_FILES
    }


def test_no_path_of_a_machine_is_in_the_repo() -> None:
    # Absolute folders of a developer's machine.
    pattern = re.compile(rb"(?<![\w.:/}~-])/(?:work|root|home|Users|opt|mnt|srv)/\w|file:///")
    this_file = Path(__file__).resolve()
    hits = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked_files()
        if path.resolve() != this_file and path.suffix not in {".jpg", ".png", ".safetensors"}
        for match in pattern.finditer(path.read_bytes())
    ]
    assert not hits


def test_versions_agree() -> None:
    version = metadata.version("transformers-delta-llava")
    assert transformers_delta_llava.__version__ == version
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_names_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    undocumented = [] if module.__doc__ else [name]
    for public in module.__all__:
        member = getattr(module, public)
        if inspect.isclass(member) or inspect.isroutine(member):
            undocumented += [f"{public}{suffix}" for suffix, text in documented_parts(member) if not text]
    assert module.__all__ and not undocumented


def documented_parts(member: object) -> list[tuple[str, str | None]]:
    """("", docstring) of a class or function, and (".method", docstring) of the public methods that a class adds."""
    parts = [("", member.__doc__)]
    if inspect.isclass(member):
        for name, attribute in vars(member).items():
            function = getattr(attribute, "__func__", attribute)
            adds = name == "forward" or not any(hasattr(base, name) for base in member.__mro__[1:])
            if adds and not name.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
                parts.append((f".{name}", function.__doc__))
    return parts
