"""A whole checkpoint becomes a whole repo."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoTokenizer

from examples.make_checkpoint import Tensors, write_checkpoint, write_tokenizer, write_tower, write_weights
from tests.checkpoints import SHALLOW, hashes, read_tensors
from transformers_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from transformers_delta_llava.conversion import (
    convert_checkpoint,
    convert_state_dict,
    export_checkpoint,
    inspect_model,
)
from transformers_delta_llava.errors import DeltaLlavaError
from transformers_delta_llava.hub import HUB_FILES


def assert_holds(repo, source: Tensors, dtype: torch.dtype | None = None) -> None:
    """The repo has every tensor of the source, bit for bit, and nothing else; longer tables start with the source's rows."""
    tensors, expected = read_tensors(repo), convert_state_dict(source)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        value = tensors[name]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            value = value[: len(tensor)]
        assert torch.equal(value, tensor if dtype is None else tensor.to(dtype)), name
        assert value.dtype == (dtype or tensor.dtype)


@pytest.mark.parametrize(
    ("form", "shards", "tower"),
    [("safetensors", 1, False), ("safetensors", 3, True), ("bin", 1, True), ("bin", 2, False)],
)
def test_every_form_of_a_checkpoint(tmp_path, form, shards, tower):
    tensors = write_checkpoint(
        tmp_path / "source", form=form, shards=shards, tower=tower, text={"vocab_size": 299}, **SHALLOW
    )
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out", verify=True, max_shard_size="1MB")
    assert len(report.weight_files) > 2
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    if not tower:
        inner = read_tensors(tmp_path / "vision-tower")
        tensors |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in inner.items()}
    assert_holds(tmp_path / "out", tensors)
    assert len(read_tensors(tmp_path / "out")["lm_head.weight"]) == 320
    assert report.tensors_written == len(tensors)
    noted = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert bool(noted["vision_tower"]["sha256"]) is not tower


def test_a_siglip_tower_without_its_head(tmp_path):
    tensors = write_checkpoint(tmp_path / "source", tower_type="siglip", **SHALLOW)
    tensors = {name: tensor for name, tensor in tensors.items() if ".vision_model.head." not in name}
    write_weights(tmp_path / "source", tensors)
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert_holds(tmp_path / "out", tensors)
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert processor["image_processor"]["image_processor_type"] == "SiglipImageProcessor"
    _, info = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize(
    ("tower_type", "swiglu", "inside"),
    [("dinov2", False, True), ("dinov2_with_registers", False, False), ("dinov2", True, True)],
)
def test_a_dinov2_tower_there_and_back(tmp_path, tower_type, swiglu, inside):
    """In the checkpoint or in its own folder; with the SwiGLU that DINOv2-giant has."""
    fields = SHALLOW | {"tower_sizes": {**SHALLOW.get("tower_sizes", {}), "use_swiglu_ffn": swiglu}}
    tensors = write_checkpoint(tmp_path / "source", tower_type=tower_type, tower=inside, **fields)
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())["image_processor"]
    assert processor["image_mean"] == [0.485, 0.456, 0.406]
    assert not inspect_model(tmp_path / "source").problems
    assert not inspect_model(tmp_path / "out").problems
    model, info = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.get_image_features(torch.randn(1, 3, 32, 32)).pooler_output[0].isfinite().all()
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    back = read_tensors(tmp_path / "back")
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("given", "dtype"), [("bfloat16", torch.bfloat16), (torch.float16, torch.float16)])
def test_casting(pristine, tmp_path, given, dtype):
    convert_checkpoint(pristine / "llava-tiny", tmp_path / "out", dtype=given)
    assert_holds(tmp_path / "out", read_tensors(pristine / "llava-tiny"), dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert "cast to" in (tmp_path / "out" / "README.md").read_text()


def test_mixed_dtypes_and_unpadded_images_are_kept(source, edit_config, tmp_path):
    tensors = {n: t if "mm_projector" in n else t.bfloat16() for n, t in read_tensors(source).items()}
    write_weights(source, tensors)
    edit_config(image_aspect_ratio="square")
    convert_checkpoint(source, tmp_path / "out")
    assert_holds(tmp_path / "out", tensors)
    noted = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert noted["tensors"]["dtypes"] == {"float32": 45, "bfloat16": len(tensors) - 45}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text())["do_pad"] is False


def test_tiles_there_and_back(source, edit_config, tmp_path):
    """The authors' grids are (width, height)."""
    grids = [[64, 32], [32, 64], [64, 64], [96, 32]]
    edit_config(image_aspect_ratio="anyres", image_grid_pinpoints=grids, mm_patch_merge_type="flat")
    convert_checkpoint(source, tmp_path / "out")
    processor = DeltaLlavaProcessor.from_pretrained(tmp_path / "out")
    assert (processor.do_pad, processor.max_tiles) == (False, 4)
    inputs = processor(images=Image.new("RGB", (96, 32)), text="<image>", return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[4, 1, 1]]  # the whole image, and 1 x 3 tiles
    export_checkpoint(tmp_path / "out", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["image_aspect_ratio"], config["image_grid_pinpoints"]) == ("anyres", grids)


def test_the_files_of_a_repo(repo):
    others = "config.json generation_config.json processor_config.json tokenizer.json tokenizer_config.json README.md"
    others += " chat_template.jinja conversion.json model.safetensors"
    assert {path.name for path in repo.iterdir()} == set(HUB_FILES) | set(others.split())
    for name, file in HUB_FILES.items():
        assert (repo / name).read_bytes() == file.read_bytes()
    config = json.loads((repo / "config.json").read_text())
    assert config["model_type"] == "delta_llava"
    assert config["architectures"] == ["DeltaLlavaForConditionalGeneration"]
    head = "modeling_delta_llava.DeltaLlavaForConditionalGeneration"
    expected = {
        "AutoConfig": "configuration_delta_llava.DeltaLlavaConfig",
        "AutoModel": "modeling_delta_llava.DeltaLlavaModel",
        "AutoModelForImageTextToText": head,
        "AutoModelForMultimodalLM": head,
    }
    assert expected.items() <= config["auto_map"].items()
    processor = json.loads((repo / "processor_config.json").read_text())
    assert processor["processor_class"] == "DeltaLlavaProcessor"
    assert processor["auto_map"] == {"AutoProcessor": "processing_delta_llava.DeltaLlavaProcessor"}
    assert (processor["num_visual_tokens"], processor["visual_token_budgets"]) == (16, [64, 16, 4, 1])
    assert processor["do_pad"] is True


@pytest.mark.parametrize("resize", [False, True])
def test_tokens_that_a_user_adds_can_be_generated(repo, resize, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(repo)
    suppressed = tokenizer.convert_tokens_to_ids(["<image>", tokenizer.pad_token, "<video>"])
    tokenizer.add_tokens([f"<added{index}>" for index in range(3)])
    added = tokenizer.convert_tokens_to_ids("<added2>")
    model = DeltaLlavaForConditionalGeneration.from_pretrained(repo)
    if resize:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert model.generation_config.suppress_tokens == suppressed

    ids = torch.tensor([[1, 20, 30]])
    with torch.no_grad():  # stands in for training on the new token
        model.lm_head.weight[[*suppressed, added]] = 9 * model.model(ids).last_hidden_state[0, -1]
    assert model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1] == added


def test_the_report(source, edit_config, tmp_path):
    edit_config(mm_new_thing=1, _name_or_path="lmsys/vicuna-7b-v1.5")
    (source / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9}')
    tensors = read_tensors(source)
    write_weights(source, {**tensors, "model.mm_projector.pos_embed": torch.zeros(4, 4)}, shards=2)
    (source / "model.safetensors").unlink()
    progress = []
    report = convert_checkpoint(source, tmp_path / "out", progress=lambda done, total: progress.append(done / total))
    assert progress[-1] == 1
    assert (report.output, report.weight_files, report.num_visual_tokens) == (
        *(tmp_path / "out", ["model.safetensors"], 16),
    )
    assert len(report.warnings) == 2
    assert "temperature=0.9" in report.warnings[0] and "mm_new_thing" in report.warnings[1]
    assert (report.tensors_read, report.tensors_written) == (len(tensors), len(tensors))
    assert report.ignored.keys() == {"model.mm_projector.pos_embed"}
    written = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert written.keys() == {
        *(
            "source",
            "vision_tower",
            "base_model",
            "base_models",
            "trained_vocab_size",
            "tokens_added",
            "code",
            "versions",
        ),
        *("chat_template", "chat_template_reason", "tensors", "warnings"),
    }
    assert written["source"] == {"name": "llava-tiny", "model_type": "llava_llama", "sha256": hashes(source)}
    assert written["vision_tower"] == {"name": "vision-tower", "sha256": {}}
    assert written["base_models"] == ["lmsys/vicuna-7b-v1.5"]
    assert written["tensors"]["written"] == len(tensors)
    assert written["versions"]["torch"] == torch.__version__
    header = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert header["base_model"] == ["lmsys/vicuna-7b-v1.5"]


def test_no_path_of_this_machine_is_published(source, edit_config, tmp_path):
    tower = tmp_path / "towers" / "my-tower"
    write_tower(tower, **SHALLOW["tower_sizes"])
    write_tokenizer(tmp_path / "tokenizers" / "mine")
    template = "{% for m in messages %}{% for item in [m.content] if item is string %}{{ item }}{% else %}<image>\n"
    (tmp_path / "mine.jinja").write_text(template + "{{ m.content[1].text }}{% endfor %}{% endfor %}")
    edit_config(_name_or_path=str(tmp_path / "base"), mm_vision_tower=str(tower))
    paths = {"tokenizer": tmp_path / "tokenizers" / "mine", "chat_template": str(tmp_path / "mine.jinja")}
    report = convert_checkpoint(source, tmp_path / "out", **paths)
    noted = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert (report.chat_template.name, noted["vision_tower"]["name"]) == ("mine.jinja", "my-tower")
    assert noted["base_models"] == []
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_the_same_bytes_and_an_output_that_exists(pristine, repo, tmp_path):
    output = shutil.copytree(repo, tmp_path / repo.name)
    (output / "old-file").touch()
    with pytest.raises(DeltaLlavaError, match="overwrite=True"):
        convert_checkpoint(pristine / "llava-tiny", output)
    assert (output / "old-file").exists()
    convert_checkpoint(pristine / "llava-tiny", output, overwrite=True)
    assert hashes(output) == hashes(repo)


def fail(done, total):
    raise OSError("disk full")


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), {}, r"missing tensors: .*language_model\.norm\.weight"),
        (lambda tensors: tensors.pop("model.embed_tokens.weight"), {}, "no language model"),
        (None, {"progress": fail}, "disk full"),
        (None, {"dtype": "int8"}, "dtype=int8: choose from float32, bfloat16, float16"),
        (None, {"dtype": torch.int8}, "dtype=torch.int8: choose from"),
        (None, {"max_shard_size": "lots"}, "Got 'lots'"),
        (None, {"chat_template": "vicuna_v9"}, "vicuna_v9' is neither a file nor one of vicuna_v1"),
    ],
)
def test_a_failure_writes_nothing(source, tmp_path, damage, options, message):
    if damage:
        tensors = read_tensors(source)
        damage(tensors)
        write_weights(source, tensors)
    before = hashes(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        convert_checkpoint(source, tmp_path / "out", **options)
    assert hashes(tmp_path) == before


def test_verification_reads_the_checksums_of_the_source(source, tmp_path):
    tensors = read_tensors(source)
    (source / "model.safetensors").unlink()
    write_weights(source, tensors, "bin")
    file = source / "pytorch_model.bin"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(DeltaLlavaError, match="pytorch_model.bin is damaged"):
        convert_checkpoint(source, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_the_tower_and_the_tokenizer_may_be_given(pristine, source, edit_config, tmp_path):
    edit_config(mm_vision_tower="/no/such/folder")
    with pytest.raises(DeltaLlavaError, match="mm_vision_tower='/no/such/folder'"):
        convert_checkpoint(source, tmp_path / "out")
    tower = pristine / "vision-tower"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    with pytest.raises(DeltaLlavaError, match="has no tokenizer"):
        convert_checkpoint(source, tmp_path / "out", vision_tower=tower)
    write_tokenizer(tmp_path / "tokenizer")
    convert_checkpoint(source, tmp_path / "out", vision_tower=tower, tokenizer=str(tmp_path / "tokenizer"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"hidden_size": 256}, "this clip_vision_model of hidden_size=256"),
        ({"patch_size": 8}, "image_size=32, patch_size=8"),
        ({"image_size": 64}, "image_size=64, patch_size=4"),
        ({"num_hidden_layers": 2}, "vision_feature_levels"),
    ],
)
def test_a_tower_that_disagrees_is_refused(source, tmp_path, geometry, message):
    write_tower(tmp_path / "tower", **{**SHALLOW["tower_sizes"], **geometry})
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "out", vision_tower=tmp_path / "tower")


def test_a_checkpoint_with_another_projector(source, tmp_path):
    """Such as LLaVA's own MLP, whatever its config says."""
    tensors = {n: t for n, t in read_tensors(source).items() if "mm_projector" not in n}
    write_weights(source, {**tensors, "model.mm_projector.0.weight": torch.ones(32, 128)})
    with pytest.raises(DeltaLlavaError, match="llava-tiny has no delta projector"):
        convert_checkpoint(source, tmp_path / "out")
    assert "no delta projector" in inspect_model(source).problems[0]


def test_a_tokenizer_of_another_checkpoint(source, tmp_path):
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["word"] = 1_000_000
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DeltaLlavaError, match=r"ids up to 1,000,\d+, but the checkpoint was trained with 320 rows"):
        convert_checkpoint(source, tmp_path / "out")
