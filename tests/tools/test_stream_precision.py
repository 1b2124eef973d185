"""Formats of the stream: what rounding may do to a value, what it costs, and that errors are those of the format."""

import json

import pytest
import torch
from megatron_vwn_tools.stream_precision import (
    FORMATS,
    RandomSublayers,
    bytes_per_element,
    floor_change,
    main,
    measure,
    scaled,
)


def stream(tokens=16, n=4, segment=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, n, segment, generator=generator, dtype=torch.float64), generator


@pytest.mark.parametrize("channels,size", [("token", 256), ("segment", 64), (32, 32)])
def test_int8_is_half_a_step_away_at_most(channels, size):
    h, generator = stream()
    groups, stored = (x.reshape(16, -1, size) for x in (h, scaled("int8", channels)(h, generator)))
    # One step is the largest value over 127, up to two roundings of the scale to bf16.
    step = groups.abs().amax(-1, keepdim=True) / 127 * (1 + 2.0**-7)
    assert ((groups - stored).abs() <= step / 2).all() and (groups - stored).abs().max() > step.min() / 4
    assert all(len(row.unique()) <= 255 for row in stored.reshape(-1, size))


def test_fp8_keeps_three_bits_of_the_mantissa():
    h, generator = stream()
    stored = scaled("fp8", "segment")(h, generator)
    normal = h.abs() > h.abs().amax(-1, keepdim=True) / 448 * 2.0**-6
    relative = ((h - stored).abs() / h.abs())[normal]
    assert relative.max() <= 2.0**-4 * 1.01 and relative.max() > 2.0**-5


def test_stochastic_rounding_has_the_right_mean():
    h, generator = stream(tokens=2)
    form = scaled("int8", "segment", stochastic=True)
    mean = torch.stack([form(h, generator) for _ in range(400)]).mean(0)
    step = h.abs().amax(-1, keepdim=True) / 127
    # Half a step of noise over the square root of 400, at four standard deviations.
    assert ((mean - h).abs() <= 4 * step / 2 / 20).all()


def test_a_scale_per_segment_saves_segments_from_their_neighbours():
    h, generator = stream()
    h[:, 0] *= 1000
    off = {c: (scaled("int8", c)(h, generator) - h)[:, 1:].norm() / h[:, 1:].norm() for c in ("token", "segment")}
    assert off["segment"] < 0.02 and off["token"] > 0.5


def test_zeros_stay_zeros():
    zero = torch.zeros(3, 4, 64, dtype=torch.float64)
    for form in FORMATS.values():
        assert torch.equal(form(zero, torch.Generator().manual_seed(0)), zero)


def test_bytes_and_floor():
    assert bytes_per_element("bf16", 256, 16384) == 2
    assert bytes_per_element("int8 / segment, stochastic", 256, 16384) == 1 + 2 / 256
    assert bytes_per_element("fp8 / token", 256, 16384) == 1 + 2 / 16384
    assert bytes_per_element("fp8 / 32 channels", 256, 16384) == 1.0625
    # r = 8 in bytes per D: 3 x 8 x 1 for H, 2 x 8 x 2 for its gradients, 5 x 2 for X, Y and theirs; of 45 x 2.
    assert floor_change(64, 8, 2.0, gradients_too=True) == 1
    assert floor_change(64, 8, 1.0, gradients_too=False) == (24 + 32 + 10) / 90
    assert floor_change(64, 8, 1.0, gradients_too=True) == (24 + 16 + 10) / 90


def test_errors_grow_with_depth_and_shrink_with_bits():
    found = measure(RandomSublayers(2, 8, 64, 4, 12, 0.1, 0))
    assert found["exact"]["errors"] == [0.0] * 12
    for name in FORMATS:
        errors = found[name]["errors"]
        assert 0 < errors[0] < errors[-1] < 1, name
    last = {name: row["errors"][-1] for name, row in found.items()}
    assert last["bf16"] < last["int8 / segment"] < last["int8 / segment, stochastic"] < last["fp8 / segment"]


def test_program(tmp_path, capsys):
    path = tmp_path / "errors.json"
    shape = ["--m", "2", "--n", "4", "--hidden-size", "64", "--tokens", "2", "--sublayers", "3"]
    assert main([*shape, "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("(m, n) = (2, 4), 3 sublayers") and len(lines) == 3 + len(FORMATS)
    content = json.loads(path.read_text())
    assert len(content["bf16"]["errors"]) == 3 and content["int8 / token"]["traffic"] < 1


@pytest.mark.parametrize(
    "arguments,said",
    [
        ("--model somewhere", "--model and --text belong together"),
        ("--m 3", "multiples of 32 channels"),
        ("--m 16 --n 32", "multiples of 32 channels"),
        ("--n 2", "n at least m"),
    ],
)
def test_refusals(arguments, said, capsys):
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_trained_model(tmp_path, capsys):
    """A model of the Hugging Face folder, with a byte tokenizer: every format has a loss near the exact one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from megatron_vwn.hf import VWNConfig, VWNForCausalLM

    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    config = VWNConfig(**sizes, num_key_value_heads=2, hybrid_pattern="*-", vwn_m=2, vwn_n=4)
    VWNForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("A text of some length. " * 4)
    arguments = ["--model", str(tmp_path), "--text", str(tmp_path / "text.txt"), "--tokens", "32"]
    assert main([*arguments, "--json", str(tmp_path / "errors.json")]) == 0
    content = json.loads((tmp_path / "errors.json").read_text())
    exact = content["exact"]["loss"]
    for name in FORMATS:
        row = content[name]
        assert len(row["errors"]) == 2 and row["errors"][-1] > 0 and row["loss"] != exact
        assert abs(row["loss"] - exact) < 0.02 * exact
    assert "(m, n) = (2, 4), 2 sublayers, 32 tokens" in capsys.readouterr().out
