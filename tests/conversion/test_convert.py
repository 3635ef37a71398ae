"""A whole checkpoint becomes a whole repo."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from examples.make_checkpoint import (
    TEXT_TYPES,
    Recipe,
    write_checkpoint,
    write_tokenizer,
    write_tower,
    write_weights,
)
from transformers_delta_llava import DeltaLlavaForConditionalGeneration
from transformers_delta_llava.conversion import convert_checkpoint, convert_state_dict
from transformers_delta_llava.conversion.checkpoint import read_checkpoint
from transformers_delta_llava.hub.repo_files import HUB_FILES
from transformers_delta_llava.utils.errors import DeltaLlavaError
from transformers_delta_llava.utils.files import hub_id_of


def stored(repo: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.load() for name, tensor in read_checkpoint(repo).tensors.items()}


def assert_holds(repo: Path, source: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> None:
    """Every tensor of the source is in the repo, bit for bit, and nothing else; grown tables start with the source's rows."""
    tensors, expected = stored(repo), convert_state_dict(source)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        value = tensors[name]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            value = value[: len(tensor)]
        assert torch.equal(value, tensor if dtype is None else tensor.to(dtype)), name
        assert value.dtype == (dtype or tensor.dtype)


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("tower", [True, False])
@pytest.mark.parametrize(("form", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 2)])
def test_every_form_of_a_checkpoint(tmp_path, form, shards, tower):
    tensors = write_checkpoint(tmp_path / "source", form=form, shards=shards, tower=tower)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "out")
    if not tower:
        inner = read_checkpoint(tmp_path / "vision-tower").tensors
        tensors |= {f"model.vision_tower.vision_tower.{name}": tensor.load() for name, tensor in inner.items()}
    assert_holds(tmp_path / "out", tensors)
    assert report.tensors_written == len(tensors)
    assert bool(report.vision_tower_files) is not tower


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_every_language_model(tmp_path, model_type):
    dtype = torch.bfloat16
    tensors = write_checkpoint(tmp_path / "source", model_type=model_type, dtype=dtype, text={"vocab_size": 299})
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert_holds(tmp_path / "out", tensors)
    model, info = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype is dtype
    assert model.config.text_config.model_type == TEXT_TYPES[model_type]
    assert model.get_input_embeddings().weight.shape[0] == 320
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied is (model_type == "llava_gemma")
    pixels = torch.randn(1, 3, 32, 32, dtype=dtype)
    ids = torch.tensor([[1, *[model.config.image_token_id] * 16, 5, 6]])
    answer = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.shape == (1, 22)
    assert answer[0, 19:].max() < 299


def test_a_siglip_tower_without_its_head(tmp_path):
    tensors = write_checkpoint(tmp_path / "source", tower_type="siglip")
    tensors = {name: tensor for name, tensor in tensors.items() if ".vision_model.head." not in name}
    write_weights(tmp_path / "source", tensors)
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert_holds(tmp_path / "out", tensors)
    processor = json.loads((tmp_path / "out" / "processor_config.json").read_text())
    assert processor["image_processor"]["image_processor_type"] == "SiglipImageProcessor"
    _, info = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize(("given", "dtype"), [("bfloat16", torch.bfloat16), (torch.float16, torch.float16)])
def test_casting(pristine, tmp_path, given, dtype):
    report = convert_checkpoint(pristine / "llava-tiny", tmp_path / "out", dtype=given)
    source = {name: tensor.load() for name, tensor in read_checkpoint(pristine / "llava-tiny").tensors.items()}
    assert_holds(tmp_path / "out", source, dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert list(report.dtypes) == [str(dtype).removeprefix("torch.")]
    assert "cast to" in (tmp_path / "out" / "README.md").read_text()


def test_mixed_dtypes_are_kept(source, tmp_path):
    tensors = {name: tensor.load() for name, tensor in read_checkpoint(source).tensors.items()}
    tensors = {name: t if "mm_projector" in name else t.bfloat16() for name, t in tensors.items()}
    write_weights(source, tensors)
    report = convert_checkpoint(source, tmp_path / "out")
    assert_holds(tmp_path / "out", tensors)
    assert report.dtypes == {"float32": 45, "bfloat16": len(tensors) - 45}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards(pristine, tmp_path):
    report = convert_checkpoint(pristine / "llava-tiny", tmp_path / "out", max_shard_size="4MB")
    assert len(report.weight_files) > 2
    source = {name: tensor.load() for name, tensor in read_checkpoint(pristine / "llava-tiny").tensors.items()}
    assert_holds(tmp_path / "out", source)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_verify_reads_the_checksums_of_the_source(source, tmp_path):
    tensors = {name: tensor.load().clone() for name, tensor in read_checkpoint(source).tensors.items()}
    for path in (*source.glob("*.bin"), *source.glob("*.safetensors"), *source.glob("*.index.json")):
        path.unlink()
    file = source / "pytorch_model.bin"
    torch.save(tensors, file)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(DeltaLlavaError, match="pytorch_model.bin is damaged: Bad CRC-32"):
        convert_checkpoint(source, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()


def test_the_files_of_a_repo(repo):
    others = "config.json generation_config.json processor_config.json tokenizer.json tokenizer_config.json README.md"
    others += " chat_template.jinja conversion.json model.safetensors"
    assert set(files(repo)) == set(HUB_FILES) | set(others.split())
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
    image, pad = tokenizer.convert_tokens_to_ids(["<image>", tokenizer.pad_token])
    tokenizer.add_tokens([f"<added{index}>" for index in range(3)])
    added = tokenizer.convert_tokens_to_ids("<added2>")
    model = DeltaLlavaForConditionalGeneration.from_pretrained(repo)
    if resize:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path)
    model = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert model.generation_config.suppress_tokens == sorted({image, pad})

    ids = torch.tensor([[1, 20, 30]])
    with torch.no_grad():  # what training on the new token would come to
        model.lm_head.weight[[image, pad, added]] = 9 * model.model(ids).last_hidden_state[0, -1]
    assert model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1] == added


def test_pictures_are_padded_as_the_checkpoint_was_trained(source, edit_config, tmp_path):
    edit_config(image_aspect_ratio="square")
    convert_checkpoint(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text())["do_pad"] is False


def test_the_report(pristine, source, edit_config, tmp_path):
    edit_config(mm_new_thing=1, _name_or_path="lmsys/vicuna-7b-v1.5")
    (source / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.9}')
    tensors = {name: tensor.load() for name, tensor in read_checkpoint(source).tensors.items()}
    write_weights(source, {**tensors, "model.mm_projector.pos_embed": torch.zeros(4, 4)}, shards=2)
    (source / "model.safetensors").unlink()
    seen = []
    report = convert_checkpoint(source, tmp_path / "out", progress=lambda done, total: seen.append(done / total))
    assert seen[-1] == 1
    assert report.source == "llava-tiny"
    assert report.vision_tower == "vision-tower"
    assert report.base_models == ["lmsys/vicuna-7b-v1.5"]
    assert report.tensors_used == len(tensors) == report.tensors_written
    assert list(report.tensors_ignored) == ["model.mm_projector.pos_embed"]
    assert report.config_keys_unknown == ["mm_new_thing"]
    assert len(report.warnings) == 2
    assert "mm_new_thing" in report.warnings[1]
    assert report.source_files == files(source)

    written = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert written["source"] == {"name": "llava-tiny", "model_type": "llava_llama", "sha256": files(source)}
    assert written["tensors"]["used"] == len(tensors)
    assert written["tensors"]["ignored"].keys() == {"model.mm_projector.pos_embed"}
    assert written["versions"]["torch"] == torch.__version__
    card = (tmp_path / "out" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == ["lmsys/vicuna-7b-v1.5"]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("lmsys/vicuna-7b-v1.5", "lmsys/vicuna-7b-v1.5"),
        ("/data/hub/models--lmsys--vicuna-7b-v1.5/snapshots/" + 40 * "a", "lmsys/vicuna-7b-v1.5"),
        ("checkpoints/vicuna-7b", None),
        ("./checkpoints/vicuna-7b", None),
        ("pretrained_models/vicuna-7b", None),
        ("llava-tiny/checkpoint-5000", None),
        ("someone/checkpoint-5000", None),
        ("someone/" + 40 * "a", None),
        ("someone/two--dashes", None),
        ("vicuna-7b", None),
        ("a/b/c", None),
        (["lmsys/vicuna-7b-v1.5"], None),
    ],
)
def test_only_a_hub_id_is_published_as_base_model(name, published, tmp_path):
    (tmp_path / "llava-tiny" / "checkpoint-5000").mkdir(parents=True)
    assert hub_id_of(name, tmp_path) == published


def test_no_path_of_this_machine_is_published(source, edit_config, tmp_path):
    tower = tmp_path / "towers" / "my-tower" / (40 * "c")  # as the Hub's client names a download
    write_tower(tower)
    write_tokenizer(tmp_path / "tokenizers" / "mine")
    template = "{% for m in messages %}{% for item in [m.content] if item is string %}{{ item }}{% else %}<image>\n"
    (tmp_path / "mine.jinja").write_text(template + "{{ m.content[1].text }}{% endfor %}{% endfor %}")
    edit_config(_name_or_path=str(tmp_path / "base"), mm_vision_tower=str(tower))
    paths = {"tokenizer": tmp_path / "tokenizers" / "mine", "chat_template": str(tmp_path / "mine.jinja")}
    report = convert_checkpoint(source, tmp_path / "out", **paths)
    assert report.chat_template == "mine.jinja"
    assert report.vision_tower == "my-tower"
    assert report.base_models == []
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_the_same_checkpoint_gives_the_same_bytes(pristine, repo, tmp_path):
    convert_checkpoint(pristine / "llava-tiny", tmp_path / repo.name)
    assert files(tmp_path / repo.name) == files(repo)


def test_overwriting(repo, source, tmp_path):
    output = shutil.copytree(repo, tmp_path / "out")
    (output / "old-file").touch()
    with pytest.raises(DeltaLlavaError, match="pass `overwrite=True`"):
        convert_checkpoint(source, output)
    assert (output / "old-file").exists()
    convert_checkpoint(source, output, overwrite=True)
    assert files(output).keys() == files(repo).keys()


@pytest.mark.parametrize("place", ["", "inside"])
def test_the_source_is_no_place_for_the_output(source, place):
    before = files(source)
    with pytest.raises(DeltaLlavaError, match="one folder or lie inside each other"):
        convert_checkpoint(source, source / place, overwrite=True)
    assert files(source) == before


def test_the_towers_folder_is_no_place_for_the_output(source, edit_config, tmp_path):
    write_tower(tmp_path / "tower")
    (tmp_path / "tower" / "conversion.json").touch()
    edit_config(mm_vision_tower=str(tmp_path / "tower"))
    with pytest.raises(DeltaLlavaError, match="input tower are one folder"):
        convert_checkpoint(source, tmp_path / "tower", overwrite=True)


def test_a_failure_publishes_nothing_and_leaves_the_source_alone(source, tmp_path):
    tensors = {name: tensor.load() for name, tensor in read_checkpoint(source).tensors.items()}
    del tensors["model.norm.weight"]
    write_weights(source, tensors)
    before = files(source)
    with pytest.raises(DeltaLlavaError, match=r"lacks.*language_model\.norm\.weight"):
        convert_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llava-tiny"]
    assert files(source) == before


def test_a_failure_while_writing_publishes_nothing(source, tmp_path):
    def fail(done, total):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        convert_checkpoint(source, tmp_path / "out", progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["llava-tiny"]


def test_the_tower_may_be_given(pristine, source, edit_config, tmp_path):
    edit_config(mm_vision_tower="/no/such/folder")
    with pytest.raises(DeltaLlavaError, match="vision tower /no/such/folder is not a folder"):
        convert_checkpoint(source, tmp_path / "out")
    convert_checkpoint(source, tmp_path / "out", vision_tower=pristine / "vision-tower")
    edit_config(mm_vision_tower=None)
    with pytest.raises(DeltaLlavaError, match="--vision-tower"):
        convert_checkpoint(source, tmp_path / "out2")


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"hidden_size": 256}, "mm_hidden_size=128, but the vision tower is 256 wide"),
        ({"patch_size": 8}, r"patch_embedding\.weight is \(128, 3, 4, 4\) instead of \(128, 3, 8, 8\)"),
        ({"image_size": 64}, "position_embedding.weight is"),
        ({"num_hidden_layers": 12}, "vision_feature_levels"),
    ],
)
def test_a_tower_that_disagrees_is_refused(source, tmp_path, geometry, message):
    write_tower(tmp_path / "tower", **geometry)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source, tmp_path / "out", vision_tower=tmp_path / "tower")


def test_the_tokenizer_may_be_given(source, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    with pytest.raises(DeltaLlavaError, match="brings no tokenizer.*--tokenizer"):
        convert_checkpoint(source, tmp_path / "out")
    write_tokenizer(tmp_path / "tokenizer")
    convert_checkpoint(source, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8': use one of float32, bfloat16, float16"),
        ({"dtype": torch.int8}, "dtype=.torch.int8.: use one of"),
        ({"max_shard_size": "lots"}, "max_shard_size='lots'"),
        ({"chat_template": "vicuna_v9"}, "vicuna_v9 is neither a file nor one of vicuna_v1"),
    ],
)
def test_options_are_checked(source, tmp_path, options, message):
    with pytest.raises(DeltaLlavaError, match=message):
        convert_checkpoint(source, tmp_path / "out", **options)


def test_prompt_formats(source, tmp_path):
    assert convert_checkpoint(source, tmp_path / "a").chat_template == "vicuna_v1"
    convert_checkpoint(source, tmp_path / "b", chat_template="chatml")
    assert "<|im_start|>" in (tmp_path / "b" / "chat_template.jinja").read_text()
    own = tmp_path / "own.jinja"
    own.write_text("{% for message in messages %}{{ raise_exception('no') }}{% endfor %}")
    with pytest.raises(DeltaLlavaError, match="own.jinja does not render a conversation: no"):
        convert_checkpoint(source, tmp_path / "c", chat_template=str(own))


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(DeltaLlavaError, match="is not a folder with a config.json"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    folder = tmp_path / "projector-only"
    write_checkpoint(folder, Recipe(tower=False))
    tensors = {name: tensor.load() for name, tensor in read_checkpoint(folder).tensors.items()}
    write_weights(folder, {name: tensor for name, tensor in tensors.items() if "mm_projector" in name})
    with pytest.raises(DeltaLlavaError, match="no language model"):
        convert_checkpoint(folder, tmp_path / "out")
    write_weights(folder, {**tensors, "model.embed_tokens.weight": torch.ones(4)})
    with pytest.raises(DeltaLlavaError, match="should be a matrix"):
        convert_checkpoint(folder, tmp_path / "out")
