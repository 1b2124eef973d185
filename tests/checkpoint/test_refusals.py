"""What vwn-convert refuses: one sentence, exit code 2, and nothing written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_vwn.checkpoint import convert_cli as convert
from megatron_vwn.checkpoint.torch_dist import TensorInfo, TorchDistReader, write_torch_dist

NAME = "experts, MTP"


def refused(argv, capsys, parent, code=2):
    """The one line that is said; what stood in the folder of the target stands there still, and nothing else."""
    before = sorted(parent.rglob("*"))
    capsys.readouterr()
    assert convert.main([str(word) for word in argv]) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("vwn-convert: ") and "Traceback" not in said
    assert sorted(parent.rglob("*")) == before
    return said


@pytest.fixture
def megatron(saves, tmp_path):
    """A copy to be damaged, and its path."""
    return shutil.copytree(saves / NAME, tmp_path / "source" / "megatron")


@pytest.fixture
def hugging_face(saves, tmp_path):
    return shutil.copytree(saves / f"{NAME} in HF", tmp_path / "source" / "folder")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


MEGATRON_DAMAGE = {
    "is no folder": shutil.rmtree,
    "cannot be read": lambda folder: truncate(folder / "__1_0.distcp"),
    "No such file": lambda folder: (folder / "__2_0.distcp").unlink(),
    "half a checkpoint": lambda folder: (folder / ".metadata").unlink(),
    "no complete torch_dist checkpoint": lambda folder: (folder / "metadata.json").unlink(),
    "cannot be read (": lambda folder: truncate(folder / ".metadata"),
    "it is damaged": lambda folder: (folder / "metadata.json").write_text("{"),
    "not in the format torch_dist": lambda folder: (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
    "names no checkpoint but 'x'": lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text("x"),
    "iter_0000007 is no": lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text("7"),
}


@pytest.mark.parametrize("sentence", MEGATRON_DAMAGE)
def test_damaged_megatron_checkpoint(sentence, megatron, tmp_path, capsys):
    MEGATRON_DAMAGE[sentence](megatron)
    assert sentence in refused(["to-hf", megatron, tmp_path / "out" / "target"], capsys, tmp_path)


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"
HUGGING_FACE_DAMAGE = {
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "it is damaged": lambda folder: (folder / "config.json").write_text("[1"),
    "cannot be read": lambda folder: truncate(folder / "model.safetensors"),
    "model.safetensors is missing": lambda folder: (folder / "model.safetensors").unlink(),
    "is a llama model, not vwn": lambda folder: set_config(folder, model_type="llama"),
    "vwn_n = 1 must be at least vwn_m": lambda folder: set_config(folder, vwn_n=1),
    "describes no model": lambda folder: set_config(folder, hidden_size="wide"),
    "has vwn_twist, which this version does not know": lambda folder: set_config(folder, vwn_twist=1),
    "instead of": lambda folder: set_config(folder, vwn_n=8),
    f"lacks {NORM}:": lambda folder: change_tensors(folder, lambda tensors: tensors.pop(NORM)),
    "has, beside those of its model, model.extra:": lambda folder: change_tensors(
        folder, lambda tensors: tensors.update({"model.extra": torch.ones(2)})
    ),
    f"{NORM} in": lambda folder: change_tensors(folder, lambda tensors: tensors.update({NORM: torch.ones(31)})),
    "megatron_arguments.json is damaged": lambda folder: (folder / "megatron_arguments.json").write_text("{"),
}


@pytest.mark.parametrize("sentence", HUGGING_FACE_DAMAGE)
def test_damaged_hugging_face_folder(sentence, hugging_face, tmp_path, capsys):
    HUGGING_FACE_DAMAGE[sentence](hugging_face)
    assert sentence in refused(["from-hf", hugging_face, tmp_path / "out" / "target"], capsys, tmp_path)


def rewrite(source, folder, change):
    """A Megatron checkpoint with other tensors under the same arguments."""
    reader = TorchDistReader(source)
    tensors = {key: reader.read(key) for key in reader.tensors}
    change(tensors)
    infos = {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    write_torch_dist(folder, infos, tensors.__getitem__, objects=(), common={"args": reader.arguments})


PROJECTION = "decoder.layers.0.self_attention.linear_proj.weight"
OTHER_TENSORS = {
    "lacks model.layers.0.self_attn.o_proj.weight:": lambda tensors: tensors.pop(PROJECTION),
    "has, beside those of its model, decoder.layers.9.wing:": lambda tensors: tensors.update(
        {"decoder.layers.9.wing": torch.ones(2)}
    ),
    "o_proj.weight in": lambda tensors: tensors.update({PROJECTION: torch.ones(32, 31)}),
}


@pytest.mark.parametrize("sentence", OTHER_TENSORS)
def test_other_tensors_than_the_models(sentence, saves, tmp_path, capsys):
    rewrite(saves / NAME, tmp_path / "source", OTHER_TENSORS[sentence])
    assert sentence in refused(["to-hf", tmp_path / "source", tmp_path / "target"], capsys, tmp_path)


def test_a_run_without_arguments(saves, tmp_path, capsys):
    tensors = {"x": TensorInfo((1,), torch.float32)}
    write_torch_dist(tmp_path / "source", tensors, lambda _: torch.ones(1), objects=(), common={"iteration": 0})
    assert "has no arguments of its run" in refused(["to-hf", tmp_path / "source", tmp_path / "t"], capsys, tmp_path)


def test_an_existing_target(saves, tmp_path, capsys):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    assert "--overwrite" in refused(["to-hf", saves / NAME, target], capsys, tmp_path)
    # Another failure leaves what would have been replaced.
    assert "is no folder" in refused(["to-hf", tmp_path / "none", target, "--overwrite"], capsys, tmp_path)
    assert (target / "mine.txt").read_text() == "mine"
    # Only what a conversion wrote is replaced.
    assert "is no converted checkpoint" in refused(["to-hf", saves / NAME, target, "--overwrite"], capsys, tmp_path)
    (target / "config.json").write_text("{}")
    assert convert.main(["to-hf", str(saves / NAME), str(target), "--overwrite"]) == 0
    assert (target / "config.json").exists() and not (target / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_target_that_cannot_be_made(saves, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(["to-hf", saves / NAME, tmp_path / "file" / "target"], capsys, tmp_path)


def test_interrupted(saves, tmp_path, capsys, monkeypatch):
    def bar(keys, description):
        yield from list(keys)[:20]
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "progress_bar", bar)
    said = refused(["to-hf", saves / NAME, tmp_path / "target"], capsys, tmp_path, code=130)
    assert said == "vwn-convert: interrupted; nothing was written.\n"
    refused(["from-hf", saves / f"{NAME} in HF", tmp_path / "target"], capsys, tmp_path, code=130)


@pytest.fixture
def tokenizer(tmp_path):
    words = {word: number for number, word in enumerate(["<|endoftext|>", "It", "was", "the"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_tokenizer(saves, tokenizer, tmp_path, capsys):
    argv = ["to-hf", saves / NAME, tmp_path / "target", "--tokenizer"]
    assert convert.main([str(word) for word in [*argv, tokenizer]]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "target")("It was")["input_ids"] == [1, 2]
    assert json.loads((tmp_path / "target" / "config.json").read_text())["eos_token_id"] == 0
    argv[2] = tmp_path / "other"
    truncate(tokenizer / "tokenizer.json")
    assert "cannot be read: give another" in refused([*argv, tokenizer], capsys, tmp_path)
    (tmp_path / "none").mkdir()
    assert "holds no tokenizer" in refused([*argv, tmp_path / "none"], capsys, tmp_path)


def test_newer_fields_of_transformers_are_let_through(hugging_face, tmp_path):
    set_config(hugging_face, a_field_of_tomorrow=1, transformers_version="9.9")
    assert convert.main(["from-hf", str(hugging_face), str(tmp_path / "target")]) == 0


def test_a_folder_without_the_runs_arguments_goes_both_ways(hugging_face, tmp_path):
    (hugging_face / "megatron_arguments.json").unlink()
    paths = [str(tmp_path / name) for name in ("megatron", "again")]
    assert convert.main(["from-hf", str(hugging_face), paths[0]]) == 0
    assert convert.main(["to-hf", *paths]) == 0
    first, again = (load_file(f"{folder}/model.safetensors") for folder in (hugging_face, paths[1]))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


def test_twice_there_and_back(saves, tmp_path):
    """What is remembered of a run survives its second conversion."""
    paths = [str(tmp_path / name) for name in ("folder", "megatron")]
    assert convert.main(["to-hf", str(saves / f"{NAME} and back"), paths[0]]) == 0
    assert convert.main(["from-hf", *paths]) == 0
    assert TorchDistReader(tmp_path / "megatron").arguments.vwn_ngrams == ()
