"""Delta repos: the low-rank deltas of a projector in a folder of their own, tied to their base by a hash.

`deltas.safetensors` has `delta_u` and `delta_v` of every DeltaProjection, named as in the projector (`query.delta_u`), in
one dtype; `delta_config.json` says which base and layout they fit; `README.md` is the card.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import __version__ as transformers_version


DELTA_WEIGHTS = "deltas.safetensors"
DELTA_CONFIG = "delta_config.json"
FORMAT_VERSION = 1
MAX_CONFIG_BYTES = 2**20
# The same base has other bytes in every dtype, so it is hashed as rounded to each of these. float32 and bfloat16 copies
# of a base agree in the first, float16 copies with the one they were rounded from in the second.
HASH_DTYPES = (torch.bfloat16, torch.float16)

CARD = """---
library_name: transformers
{base_model}tags:
- delta-llava
- delta-llava-deltas
---

# {title}

Low-rank deltas of a [Delta-LLaVA](https://arxiv.org/abs/2512.18910) projector: {parameters:,} numbers of rank {rank} in
{dtype}, for {base}. Layout `{layout}`. Source: {source}.

```python
model.load_deltas("{title}")  # a Delta-LLaVA with that base; another one is refused
```
"""


def hash_base(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> str:
    """SHA-256 of base weights rounded to `dtype`.

    For each name, sorted, the line `name (out, in)` and the values, row by row, little-endian.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        values = weight.detach().to(device="cpu", dtype=dtype).contiguous()
        digest.update(values.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def hashes_of_base(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """`hash_base` in each of `HASH_DTYPES`, by the dtype's name."""
    return {dtype_name(dtype): hash_base(weights, dtype) for dtype in HASH_DTYPES}


def is_base(weights: Mapping[str, torch.Tensor], hashes: Any) -> bool:
    """Whether `hashes`, a result of `hashes_of_base`, belong to `weights`, in whichever dtype."""
    return isinstance(hashes, dict) and any(
        hashes.get(dtype_name(dtype)) == hash_base(weights, dtype) for dtype in HASH_DTYPES
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def describe_deltas(
    tensors: Mapping[str, torch.Tensor],
    rank: int,
    layout: str,
    sharing: str,
    base_sha256: dict[str, str],
    base_name: str | None,
    source: str,
) -> dict[str, Any]:
    """The contents of `delta_config.json`.

    Args:
        tensors: the deltas, by name.
        rank, layout, sharing: `delta_rank`, `projector_layout`, `delta_sharing` of the config they fit.
        base_sha256: of `hashes_of_base`.
        base_name: Hub id or path of the base; of a path only the last part is written.
        source: where the deltas come from, in words.
    """
    name = None
    if base_name:
        name = Path(base_name).resolve().name if Path(base_name).exists() else base_name
    return {
        "format_version": FORMAT_VERSION,
        "delta_rank": rank,
        "projector_layout": layout,
        "delta_sharing": sharing,
        "base_model_name_or_path": name,
        "base_sha256": base_sha256,
        "dtype": dtype_name(next(iter(tensors.values())).dtype),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "source": source,
        "versions": {"torch": str(torch.__version__), "transformers": transformers_version},
    }


def write_delta_repo(
    folder: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Write a delta repo; the folder appears when it is complete.

    Args:
        folder: must not exist, or be empty.
        tensors: the deltas, by name, of one dtype.
        config: of `describe_deltas`.
        overwrite: replace a delta repo that is there.

    Raises:
        ValueError: if a value is not finite.
        FileExistsError: if the folder exists and may not be replaced.
        OSError: if it cannot be written.
    """
    folder = Path(folder).resolve()
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or Inf, so the deltas are not written to {folder.name}.")
    _check_replaceable(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
    ) as temporary:
        new, previous = Path(temporary) / "new", Path(temporary) / "previous"
        new.mkdir()
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_tensors(contiguous, new / DELTA_WEIGHTS, f"{folder.name}/{DELTA_WEIGHTS}")
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (new / DELTA_CONFIG).write_text(text, encoding="utf-8")
        (new / "README.md").write_text(_card(folder.name, config), encoding="utf-8")
        _check_replaceable(folder, overwrite)  # it may have appeared in the meantime
        if folder.exists():
            folder.rename(previous)
        try:
            new.rename(folder)
        except BaseException:
            if previous.exists():
                previous.rename(folder)
            raise


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, name: str) -> None:
    """Write a safetensors file with the permissions of any new file.

    Args:
        tensors: contiguous, without shared memory.
        path: file to write.
        name: of the file, for the message.

    Raises:
        OSError: if it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps errors of the file system
        raise OSError(f"{name} cannot be written: {error}") from error
    path.chmod(mode)  # some safetensors versions let only the owner read


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{folder.name} exists; choose another folder, or pass overwrite=True.")
    if not (folder / DELTA_CONFIG).is_file():
        raise FileExistsError(f"{folder.name} is not a delta repo, so it is not replaced; choose another folder.")


def _card(title: str, config: dict[str, Any]) -> str:
    base = config["base_model_name_or_path"]
    header = f"base_model: {base}\nbase_model_relation: adapter\n" if base and "/" in base else ""
    return CARD.format(
        base_model=header,
        title=title,
        parameters=config["parameters"],
        rank=config["delta_rank"],
        dtype=config["dtype"],
        base=base or "the base that the hash in `delta_config.json` names",
        layout=config["projector_layout"],
        source=config["source"],
    )


def _find_file(folder_or_repo: str | os.PathLike, name: str, **hub_kwargs: Any) -> Any:
    """The path of a file in a folder or, downloaded, of a Hub repo."""
    from transformers.utils import cached_file  # here, so that models load without it

    return cached_file(str(folder_or_repo), name, **hub_kwargs)


def read_delta_config(folder_or_repo: str | os.PathLike, **hub_kwargs: Any) -> dict[str, Any]:
    """`delta_config.json` of a folder or Hub repo.

    Raises:
        ValueError: it is broken, or of a newer format.
        OSError: there is none.
    """
    path = Path(str(_find_file(folder_or_repo, DELTA_CONFIG, **hub_kwargs)))
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{folder_or_repo}: {DELTA_CONFIG} has more than {MAX_CONFIG_BYTES:,} bytes.")
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder_or_repo}: {DELTA_CONFIG} is not valid JSON: {error}.") from error
    if not isinstance(config, dict) or not {"delta_rank", "projector_layout", "base_sha256"} <= config.keys():
        raise ValueError(f"{folder_or_repo}: {DELTA_CONFIG} does not describe deltas.")
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder_or_repo}: format_version={ascii(config.get('format_version'))[:100]} of {DELTA_CONFIG} is not "
            f"{FORMAT_VERSION}, the one this code reads."
        )
    hashes, base = config["base_sha256"], config.get("base_model_name_or_path")
    fits = {
        "delta_rank": type(config["delta_rank"]) is int and 0 < config["delta_rank"] < 2**31,
        "projector_layout": config["projector_layout"] in ("released", "paper"),
        "delta_sharing": config.get("delta_sharing", "levels") in ("levels", "all"),
        "base_sha256": isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values()),
        "base_model_name_or_path": base is None or (isinstance(base, str) and len(base) < 500),
    }
    for name, right in fits.items():
        if not right:
            raise ValueError(f"{folder_or_repo}: {DELTA_CONFIG} has {name}={ascii(config.get(name))[:100]}.")
    return config


def read_delta_tensors(folder_or_repo: str | os.PathLike, **hub_kwargs: Any) -> dict[str, torch.Tensor]:
    """The tensors of a folder or Hub repo, by name, in the file's dtype; their names and shapes are not checked.

    Raises:
        ValueError: the file is broken.
        OSError: there is none.
    """
    from safetensors import SafetensorError, safe_open

    path = _find_file(folder_or_repo, DELTA_WEIGHTS, **hub_kwargs)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{folder_or_repo}: {DELTA_WEIGHTS} cannot be read: {error}.") from error
