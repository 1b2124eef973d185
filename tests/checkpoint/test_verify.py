"""--verify runs both checkpoints and notices one changed tensor."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from megatron_vwn.checkpoint import convert_cli as convert
from megatron_vwn.checkpoint.convert import to_hf
from megatron_vwn.checkpoint.torch_dist import TorchDistReader


@pytest.mark.parametrize("name", ["experts, MTP", "experts, MTP, bf16", "padded vocabulary, MTP"])
def test_same(name, saves, tmp_path, capfd):
    assert convert.main(["to-hf", str(saves / name), str(tmp_path / "target"), "--verify"]) == 0
    said = capfd.readouterr().out
    assert said.count("(within 1e-05)") == 2 and "further token 1" in said and "BEYOND" not in said
    assert said.count("bfloat16") == (2 if "bf16" in name else 0)


def test_other(saves, tmp_path, capfd):
    """A folder whose MTP norm was changed behind the converter's back, against the save it came from."""
    folder = shutil.copytree(saves / "experts, MTP in HF", tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.mtp.0.norm.weight"] *= 1.001
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(convert._Difference):
        convert._verify(saves / "experts, MTP", folder)
    said = capfd.readouterr().out
    assert said.count("within") == 1 and said.count("BEYOND") == 1


def test_rows_that_pad_are_no_tokens(saves, tmp_path, capfd):
    """A folder with all rows of a padded vocabulary, as it was exported before runs recorded their tokens."""
    source = TorchDistReader(saves / "padded vocabulary, MTP")
    del source.arguments.vwn_tokens
    assert to_hf(source, tmp_path, tokenizer=None).vocab_size == 128
    with pytest.raises(convert._Difference):
        convert._verify(source.folder, tmp_path)
    assert "the folder has 128 tokens, the checkpoint 96 (BEYOND" in capfd.readouterr().out
