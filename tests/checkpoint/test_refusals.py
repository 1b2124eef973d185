"""What vwn-convert refuses: one sentence, exit code 2, and nothing written."""

import argparse
import dataclasses
import io
import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.transformer.enums import AttnBackend
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.checkpoint import CheckpointException
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_vwn.checkpoint import convert_cli as convert
from megatron_vwn.checkpoint.torch_dist import TensorInfo, TorchDistReader, write_torch_dist
from megatron_vwn.megatron_fixes.pickles import refusal_in, unpickle_known_classes

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
    ".metadata cannot be read": lambda folder: truncate(folder / ".metadata"),
    "it is damaged": lambda folder: (folder / "metadata.json").write_text("{"),
    "not in the format torch_dist": lambda folder: (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
    "names no checkpoint but 'x'": lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text("x"),
    "iter_0000007 is no": lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text("7"),
}


@pytest.mark.parametrize("sentence", MEGATRON_DAMAGE)
def test_damaged_megatron_checkpoint(sentence, megatron, tmp_path, capsys):
    MEGATRON_DAMAGE[sentence](megatron)
    assert sentence in refused(["to-hf", megatron, tmp_path / "out" / "target"], capsys, tmp_path)


class Payload:
    """A pickle that makes a folder where it is read."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def change_metadata(megatron, change):
    path = megatron / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(metadata) or metadata))


def look_elsewhere(metadata):
    metadata.storage_data = {
        key: dataclasses.replace(info, relative_path=f"../{info.relative_path}")
        for key, info in metadata.storage_data.items()
    }


RUNS = {
    "whole": lambda folder, payload: change_metadata(folder, lambda metadata: payload),
    "inside": lambda folder, payload: change_metadata(
        folder, lambda metadata: setattr(metadata, "planner_data", payload)
    ),
    "object": lambda folder, payload: rewrite(folder, folder / "again", lambda tensors: None, further=payload),
}


@pytest.mark.parametrize("place", RUNS)
def test_a_checkpoint_runs_no_code(place, megatron, tmp_path, capsys):
    RUNS[place](megatron, Payload(tmp_path / "executed"))
    source = megatron / "again" if place == "object" else megatron
    said = refused(["to-hf", source, tmp_path / "out" / "target"], capsys, tmp_path)
    assert f"asks for {os.mkdir.__module__}.mkdir" in said and "nothing of it was run" in said
    assert not (tmp_path / "executed").exists()


def test_what_training_loads_runs_no_code(tmp_path):
    """As Megatron's --load does; its exception is torch's, of which the entry point makes the sentence."""
    write_torch_dist(
        tmp_path / "checkpoint", {}, lambda _: None, objects=(), common={"args": Payload(tmp_path / "executed")}
    )
    unpickle_known_classes()
    with pytest.raises(CheckpointException) as raised:
        load_common_state_dict(tmp_path / "checkpoint" / "release")
    assert "its common_state/shard_0_1 asks for" in str(refusal_in(raised.value))
    assert not (tmp_path / "executed").exists() and refusal_in(ValueError("x")) is None


def test_what_megatron_saves_of_a_run_is_read(tmp_path):
    """Random states, states of Transformer Engine and enumerations: the same comes back."""
    state = {
        "args": argparse.Namespace(attention_backend=AttnBackend.flash, dtype=torch.bfloat16, path=Path("x"), n=(2, 3)),
        "rng": {
            "numpy": np.random.RandomState(0).get_state(),
            "torch": torch.get_rng_state(),
            "states": [random.getstate()],
        },
        "extra": io.BytesIO(b"fp8"),
    }
    write_torch_dist(tmp_path / "checkpoint", {}, lambda _: None, objects=(), common=state)
    reader = TorchDistReader(tmp_path / "checkpoint")
    assert reader.arguments == state["args"]
    again = load_common_state_dict(reader.folder)
    assert (again["rng"]["numpy"][1] == state["rng"]["numpy"][1]).all()
    assert again["rng"]["states"] == state["rng"]["states"] and again["extra"].getvalue() == b"fp8"


def test_a_checkpoint_does_not_reach_out_of_its_folder(megatron, tmp_path, capsys):
    change_metadata(megatron, look_elsewhere)
    assert "outside of its folder" in refused(["to-hf", megatron, tmp_path / "out" / "target"], capsys, tmp_path)


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
    "which is no int": lambda folder: set_config(folder, hidden_size="wide"),
    "has vwn_twist, which this version does not know": lambda folder: set_config(folder, vwn_twist=1),
    "instead of": lambda folder: set_config(folder, vwn_n=8),
    f"lacks {NORM}:": lambda folder: change_tensors(folder, lambda tensors: tensors.pop(NORM)),
    "has, beside those of its model, model.extra:": lambda folder: change_tensors(
        folder, lambda tensors: tensors.update({"model.extra": torch.ones(2)})
    ),
    f"{NORM} in": lambda folder: change_tensors(folder, lambda tensors: tensors.update({NORM: torch.ones(31)})),
    "has the dtype int32": lambda folder: change_tensors(
        folder, lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int32)})
    ),
    "megatron_arguments.json is no JSON": lambda folder: (folder / "megatron_arguments.json").write_text("{"),
}


@pytest.mark.parametrize("sentence", HUGGING_FACE_DAMAGE)
def test_damaged_hugging_face_folder(sentence, hugging_face, tmp_path, capsys):
    HUGGING_FACE_DAMAGE[sentence](hugging_face)
    assert sentence in refused(["from-hf", hugging_face, tmp_path / "out" / "target"], capsys, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": -8},
        {"hidden_size": 10**15},
        {"hidden_size": True},
        {"vocab_size": -1},
        {"hybrid_pattern": 5},
        {"hybrid_pattern": "*E*Q"},
        {"rope_parameters": ["zzz"]},
        {"rope_parameters": {"rope_type": "zzz"}},
        {"rope_parameters": {"rope_theta": "x"}},
        {"hidden_act": "nope"},
        {"norm_eps": -1.0},
        {"rms_norm_eps": "x"},
        {"max_position_embeddings": -1},
        {"dtype": "int3"},
        {"dtype": 3},
        {"eos_token_id": "a"},
        {"eos_token_id": [10**6]},
        {"moe_router_topk_scaling_factor": "x"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"layer_types": [1, 2]},
    ],
    ids=str,
)
def test_wrong_values_of_settings(changes, hugging_face, tmp_path, capsys):
    set_config(hugging_face, **changes)
    said = refused(["from-hf", hugging_face, tmp_path / "out" / "target"], capsys, tmp_path)
    assert said.rstrip().endswith(".") and not re.search(
        r"'(int|str|list|NoneType)' object|not supported|operand", said
    )


@pytest.mark.parametrize(
    "changes", [{"seq_length": "abc"}, {"transformer_impl": 7}, {"swiglu": 1}, {"lr": "x"}], ids=str
)
def test_wrong_values_of_megatrons_arguments(changes, hugging_face, tmp_path, capsys):
    path = hugging_face / "megatron_arguments.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (name,) = changes
    assert f"has {name} = " in refused(["from-hf", hugging_face, tmp_path / "out" / "target"], capsys, tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "", 7, None])
def test_an_index_does_not_reach_out_of_its_folder(name, hugging_face, tmp_path, capsys):
    shutil.move(hugging_face / "model.safetensors", hugging_face.parent / "outside.safetensors")
    index = hugging_face / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert "is no file beside it" in refused(["from-hf", hugging_face, tmp_path / "out" / "target"], capsys, tmp_path)


def test_an_index_may_name_links(hugging_face, tmp_path):
    """Of which the hub's cache consists."""
    shutil.move(hugging_face / "model.safetensors", hugging_face.parent / "blob")
    (hugging_face / "model-1.safetensors").symlink_to("../blob")
    index = {"weight_map": {"lm_head.weight": "model-1.safetensors"}}
    (hugging_face / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert.main(["from-hf", str(hugging_face), str(tmp_path / "target")]) == 0


def rewrite(source, folder, change, **further):
    """A Megatron checkpoint with other tensors under the same arguments, and further objects beside those."""
    reader = TorchDistReader(source)
    tensors = {key: reader.read(key) for key in reader.tensors}
    change(tensors)
    infos = {key: TensorInfo(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    write_torch_dist(folder, infos, tensors.__getitem__, objects=(), common={"args": reader.arguments, **further})


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
    # Only what a conversion wrote is replaced, and nothing else that came into it.
    assert "is no converted checkpoint" in refused(["to-hf", saves / NAME, target, "--overwrite"], capsys, tmp_path)
    (target / "config.json").write_text("{}")
    assert "is no converted checkpoint" in refused(["to-hf", saves / NAME, target, "--overwrite"], capsys, tmp_path)
    shutil.rmtree(target)
    for argv in (["to-hf", saves / NAME], ["from-hf", saves / f"{NAME} in HF"], ["to-hf", saves / NAME]):
        argv = [str(word) for word in [*argv, target, "--overwrite"]]
        assert convert.main(argv) == 0
        (target / "mine.txt").write_text("mine")
        assert "holds mine.txt, which no conversion wrote" in refused(argv, capsys, tmp_path)
        (target / "mine.txt").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_checkpoints_of_a_run_are_not_replaced(saves, tmp_path, capsys):
    """Neither an iteration beside the release nor weights that were trained on in the exported folder."""
    for source, further in ((f"{NAME} and back", "iter_0000007"), (f"{NAME} in HF", "generation_config.json")):
        target = shutil.copytree(saves / source, tmp_path / further)
        (target / further).write_text("{}")
        argv = ["to-hf", saves / NAME, target, "--overwrite"]
        assert f"holds {further}, which" in refused(argv, capsys, tmp_path)


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


def test_tokenizer(saves, tokenizer, tmp_path, capsys, monkeypatch):
    argv = ["to-hf", saves / NAME, tmp_path / "target", "--tokenizer"]
    assert convert.main([str(word) for word in [*argv, tokenizer]]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "target")("It was")["input_ids"] == [1, 2]
    assert json.loads((tmp_path / "target" / "config.json").read_text())["eos_token_id"] == 0
    argv[2] = tmp_path / "other"
    # Nobody is asked whether code in a tokenizer's folder may run; it does not.
    path, settings = tokenizer / "tokenizer_config.json", (tokenizer / "tokenizer_config.json").read_text()
    foreign = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    path.write_text(json.dumps(json.loads(settings) | foreign))
    (tokenizer / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    refused([*argv, tokenizer], capsys, tmp_path)
    assert not asked and not (tmp_path / "executed").exists()
    path.write_text(settings)
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
