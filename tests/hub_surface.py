"""What the Hub files touch of transformers and torch, read from their syntax trees.

A published repo carries these files and nobody can mend it from afar, so each name stands in a table of `docs/decisions.md` with the
reason why it can be trusted (`torch.*` there: every public name of torch). Names have these forms:

- `transformers.utils.cached_file`, `torch.nn.Linear`: imported, or reached through an imported module;
- `PreTrainedModel._init_weights`: defined in a subclass, so transformers calls or reads ours;
- `self.loss_function`: inherited and used;
- `from_pretrained(dtype=)`, `super().validate_inputs(text=)`: a keyword that a call to something of theirs passes.
"""

import ast
import builtins
import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np


THEIRS = ("transformers", "torch", "huggingface_hub")
# The other packages that Hub files may import.
OTHERS = {*sys.stdlib_module_names, "numpy", "PIL", "safetensors"}
# Types whose methods take keywords too, and are no concern of this table.
PLAIN_TYPES = (str, bytes, dict, list, tuple, set, Path, np.ndarray)


def surface(files: list[Path]) -> set[str]:
    """Every name of transformers and torch that `files`, the flat modules of a repo, touch."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    own = {name for tree in trees for name in _defined(tree)}
    return set().union(*(_Module(tree, own).names() for tree in trees))


class _Module:
    """One file: its imports, and what it does with them."""

    def __init__(self, tree: ast.Module, own: set[str]):
        self.tree, self.own = tree, own
        self.imported: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.imported[alias.asname or alias.name.split(".")[0]] = alias.name
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def names(self) -> set[str]:
        found = {name for name in self.imported.values() if name.split(".")[0] in THEIRS and name not in THEIRS}
        inner = {node.value for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and node not in inner:
                found |= self._attribute(node)
            elif isinstance(node, ast.Call):
                found |= self._keywords(node)
            elif isinstance(node, ast.ClassDef):
                found |= self._overrides(node)
        return found

    def _path(self, node: ast.expr) -> list[str]:
        """`["torch", "nn", "Linear"]` of `nn.Linear`, `["super", "forward"]` of `super().forward`."""
        if isinstance(node, ast.Attribute):
            return [*self._path(node.value), node.attr]
        if isinstance(node, ast.Name):
            return self.imported.get(node.id, node.id).split(".")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super":
            return ["super"]
        return [""]

    def _attribute(self, node: ast.Attribute) -> set[str]:
        path = self._path(node)
        if path[0] in THEIRS:
            return {_public_part(path)}
        if path[0] == "super" or (path[0] == "self" and path[1] not in self.own):
            return {f"self.{path[1]}"} if path[1] != "__new__" else set()  # object's
        return {
            f".{name}"
            for name in path[1:]
            if name.startswith("_") and not name.endswith("__") and name not in self.own
        }

    def _keywords(self, node: ast.Call) -> set[str]:
        path = self._path(node.func)
        name = path[-1]
        theirs = path[0] in (*THEIRS, "super") or (
            name not in self.own
            and path[0] not in OTHERS
            and not (len(path) == 1 and hasattr(builtins, name))
            and not any(hasattr(kind, name) for kind in PLAIN_TYPES)
        )
        callee = {"super": f"super().{name}", "torch": ".".join(path)}.get(path[0], name)
        return {f"{callee}({keyword.arg}=)" for keyword in node.keywords if keyword.arg} if theirs else set()

    def _overrides(self, node: ast.ClassDef) -> set[str]:
        found = set()
        for base in node.bases:
            path = self._path(base)
            if path[0] in THEIRS:
                kind = _resolve(path)
                found |= {
                    f"{path[-1]}.{name}"
                    for name in _members(node)
                    if hasattr(kind, name) and not hasattr(object, name)
                }
        return found


def _public_part(path: list[str]) -> str:
    """Up to the first class or function: `torch.float32` of `torch.float32.itemsize`."""
    for length in range(1, len(path) + 1):
        if not isinstance(_resolve(path[:length]), ModuleType):
            return ".".join(path[:length])
    return ".".join(path)


def _resolve(path: list[str]) -> object:
    thing: object = importlib.import_module(path[0])
    for depth, name in enumerate(path[1:], start=1):
        thing = getattr(thing, name) if hasattr(thing, name) else importlib.import_module(".".join(path[: depth + 1]))
    return thing


def _members(node: ast.ClassDef) -> set[str]:
    names = set()
    for statement in node.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names.add(statement.target.id)
        elif isinstance(statement, ast.Assign):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return names


def _defined(tree: ast.Module) -> set[str]:
    """Functions, classes, members, and attributes of `self` that a file defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= _members(node) if isinstance(node, ast.ClassDef) else set()
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names
