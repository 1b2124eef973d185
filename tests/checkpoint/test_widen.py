"""A widened model computes what the ordinary one computes, wherever it came from."""

import json
import shutil
from pathlib import Path

import launch
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_vwn.checkpoint.arguments import backend_here
from megatron_vwn.checkpoint.folders import SafetensorsReader
from megatron_vwn.checkpoint.torch_dist import TorchDistReader
from megatron_vwn.checkpoint.widen import from_hugging_face, widen
from megatron_vwn.checkpoint.widen_cli import main as vwn_widen
from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.hf import VWNForCausalLM

HERE = Path(__file__).parent
TOLERANCE = 1e-5  # fp32; the stream's copies are exact, their mean is rounded
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
EXPERTS = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Every model once with the other value of what changes the conversion: tied head, normalised weights, dense layers.
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, theta": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "qwen3, tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True)),
    "qwen3 moe, dense layer": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=False, mlp_only_layers=[1])
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Every model saved, and its logits for some tokens."""
    torch.manual_seed(0)
    folder, tokens, made = tmp_path_factory.mktemp("ordinary"), torch.randint(0, 96, (2, 20)), {}
    for name, build in MODELS.items():
        model = build().eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms are ones at birth, and a swapped pair would not show
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        with torch.no_grad():
            made[name] = folder / name, model(tokens).logits
    return tokens, made


@pytest.mark.parametrize(("m", "n"), [(2, 3), (2, 8), (4, 32)])
@pytest.mark.parametrize("name", MODELS)
def test_a_hugging_face_model_keeps_its_function(name, m, n, sources):
    tokens, made = sources
    folder, expected = made[name]
    embedding = "tiled" if name == "qwen3, tied" else None
    width = VirtualWidthConfig(m=m, n=n, embedding=embedding, reduce_norm=False)
    config, tensors, read = widen(from_hugging_face(SafetensorsReader(folder)), width, fresh_predictions=False)
    model = VWNForCausalLM(config).eval()
    model.load_state_dict({key: read(key) for key in tensors}, strict=not config.tie_word_embeddings)
    model.tie_weights()
    with torch.no_grad():
        actual = model(tokens).logits
    assert (actual - expected).norm() / expected.norm() < TOLERANCE


def test_the_written_checkpoint_holds_the_model(sources, tmp_path, capsys):
    folder, _ = sources[1]["qwen3 moe"]
    argv = [str(folder), str(tmp_path / "wide"), "--vwn-m", "2", "--vwn-n", "8"]
    assert vwn_widen(argv) == 0
    said = capsys.readouterr().out
    assert "r = 4" in said and "--qk-layernorm" in said and "-epsilon 1e-06" in said
    # Named for the layers that a training chooses here, which is said, and which the checkpoint remembers.
    assert f"--transformer-impl {backend_here()}" in said
    written = TorchDistReader(tmp_path / "wide")
    assert written.arguments.transformer_impl == backend_here()
    assert ("decoder.layers.0.input_layernorm.weight" in written.tensors) == (backend_here() == "local")
    model = from_hugging_face(SafetensorsReader(folder))
    up = written.read("decoder.layers.1.mlp.experts.experts.linear_fc1.weight")
    assert torch.equal(up, model.read("model.layers.1.mlp.experts.gate_up_proj"))
    assert not written.read("decoder.layers.1.connection.routing").any()
    assert (written.read("decoder.layers.1.connection.norm") == 1).all()
    assert (written.arguments.vwn_m, written.arguments.vwn_reduce_norm) == (2, False)
    # Its 96 rows are tokens, and Megatron's ranks can share 128.
    assert (written.arguments.vwn_tokens, written.arguments.padded_vocab_size) == (96, 128)
    assert "--padded-vocab-size 128" in said
    assert vwn_widen(argv[:2]) == 2 and "add --vwn-m and --vwn-n" in capsys.readouterr().err
    assert vwn_widen(argv) == 2 and "--overwrite" in capsys.readouterr().err
    assert vwn_widen([*argv, "--overwrite"]) == 0


def test_a_head_of_its_own_is_taken_although_the_settings_tie_it(sources, tmp_path):
    tokens, made = sources
    folder, _ = made["qwen3, tied"]
    shutil.copytree(folder, tmp_path / "untied")
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn(96, 32, generator=torch.Generator().manual_seed(5))
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "untied" / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        expected = Qwen3ForCausalLM.from_pretrained(tmp_path / "untied")(tokens).logits
    model = from_hugging_face(SafetensorsReader(tmp_path / "untied"))
    width = VirtualWidthConfig(m=2, n=3, reduce_norm=False)
    config, names, read = widen(model, width, fresh_predictions=False)
    wide = VWNForCausalLM(config).eval()
    wide.load_state_dict({key: read(key) for key in names})
    with torch.no_grad():
        assert (wide(tokens).logits - expected).norm() / expected.norm() < TOLERANCE


def test_what_the_settings_do_not_describe_is_refused(sources, tmp_path, capsys):
    folder, _ = sources[1]["llama"]
    shutil.copytree(folder, tmp_path / "biased")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(tensors, tmp_path / "biased" / "model.safetensors", {"format": "pt"})
    assert vwn_widen([str(tmp_path / "biased"), str(tmp_path / "wide"), "--vwn-m", "1", "--vwn-n", "2"]) == 2
    assert "q_proj.bias" in capsys.readouterr().err and not (tmp_path / "wide").exists()


def test_the_source_survives_every_target(sources, tmp_path, capsys):
    folder = tmp_path / "models" / "llama"
    shutil.copytree(sources[1]["llama"][0], folder)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    for target in (folder, folder.parent, tmp_path / "notes"):
        assert vwn_widen([str(folder), str(target), "--vwn-m", "1", "--vwn-n", "2", "--overwrite"]) == 2
        said = capsys.readouterr().err
        assert "give another name" in said and said.count("\n") == 1
    assert (folder / "model.safetensors").exists() and (tmp_path / "notes" / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "flags", "says"),
    [
        ({"model_type": "gpt2"}, "", "is a gpt2 model"),
        ({"attention_bias": True}, "", "attention_bias = True"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "", "no linear rotary"),
        ({"num_hidden_layers": 4}, "", "lacks model.layers.3."),
        ({"num_hidden_layers": 2}, "", "model.layers.2."),
        ({"hidden_size": "wide"}, "", "describes no llama model"),
        ({"intermediate_size": 40}, "", "has shape"),
        ({}, "--vwn-reduce-norm", "would change the function"),
        ({}, "--vwn-carry doubly-stochastic", "only approximately"),
        ({}, "--vwn-ngrams 2 --vwn-ngram-vocab 8", "no tokenizer says"),
        ({}, "--vwn-gate relu", "tanh, sigmoid"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(change, flags, says, sources, tmp_path, capsys):
    folder, _ = sources[1]["llama"]
    source, target = tmp_path / "source", tmp_path / "out" / "wide"
    source.mkdir()
    (source / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    assert vwn_widen([str(source), str(target), "--vwn-m", "2", "--vwn-n", "4", *flags.split()]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and said.endswith(".") and "\n" not in said
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    """What the session on Megatron's side found, by check."""
    run = launch.session(1, HERE / "session_widen.py", tmp_path_factory.mktemp("widen"))
    lines = [line.removeprefix("CHECK ") for line in run.stdout.splitlines() if line.startswith("CHECK ")]
    return {found["name"]: found for found in map(json.loads, lines)}, run.stderr[-4000:]


@pytest.mark.parametrize("name", ["(2,3) wide", "(2,8) projected", "(4,32) tiled"])
def test_a_megatron_model_keeps_its_function_and_trains_on(name, megatron):
    found, log = megatron
    assert name in found, log
    assert found[name]["error"] < TOLERANCE
    assert found[name]["after"] < found[name]["before"] - 0.1


@pytest.mark.parametrize("choice", ["drop", "fresh"])
def test_further_predictions_are_dropped_or_begun_afresh(choice, megatron):
    found, log = megatron
    assert f"further predictions: {choice}" in found, log
    assert found[f"further predictions: {choice}"]["error"] < TOLERANCE
