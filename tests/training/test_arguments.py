"""From --vwn-* flags to a VirtualWidthConfig, and the flags that a machine without GPU or Transformer Engine gets."""

import argparse

import pytest

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.training.flags import machine
from megatron_vwn.training.flags.machine import complete_command_line, describe, needed_flags
from megatron_vwn.training.flags.vwn import add_arguments, record_virtual_width, typed, virtual_width_from_args


def parse(*argv):
    return add_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(argv)


def config(*argv):
    return virtual_width_from_args(parse(*argv))


def test_no_flag_is_the_ordinary_model():
    assert config() is None


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", {}),
        ("--vwn-connection static", {"connection": "static"}),
        ("--vwn-gate sigmoid", {"gate": "sigmoid"}),
        ("--vwn-carry identity", {"carry": "identity"}),
        ("--vwn-embedding tiled", {"embedding": "tiled"}),
        ("--vwn-embedding wide", {"embedding": "wide"}),
        ("--vwn-reduce-norm", {"reduce_norm": True}),
        ("--no-vwn-reduce-norm", {"reduce_norm": False}),
        ("--vwn-linear plain", {"linear": "plain"}),
        ("--vwn-partition replicated", {"partition": "replicated"}),
        ("--vwn-recompute-block 10", {"recompute_block": 10}),
        ("--vwn-ngrams 2,3 --vwn-ngram-vocab 1000", {"ngrams": (2, 3), "ngram_vocab": 1000}),
    ],
)
def test_each_flag_sets_its_field_and_no_other(argv, expected):
    assert config("--vwn-m", "2", "--vwn-n", "8", *argv.split()) == VirtualWidthConfig(m=2, n=8, **expected)


@pytest.mark.parametrize(
    ("argv", "m", "n"),
    [
        ("--vwn-preset hyper-connections --vwn-n 4", 1, 4),
        ("--vwn-preset frac-connections --vwn-m 4", 4, 4),
        ("--vwn-preset vwn --vwn-m 2 --vwn-n 3", 2, 3),
    ],
)
def test_presets_name_special_cases(argv, m, n):
    assert config(*argv.split()) == VirtualWidthConfig(m=m, n=n)


def test_help_states_every_default():
    text = " ".join(add_arguments(argparse.ArgumentParser()).format_help().split())
    for name in ("connection", "gate", "carry", "linear"):
        assert f"(default: {getattr(VirtualWidthConfig, name)})" in text
    for default in ("projected if N > 2M, else wide", "on if N > 2M and N is a multiple of M, else off"):
        assert f"(default: {default})" in text
    assert "(default: sequence with --sequence-parallel, else width)" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--vwn-m 2", ["--vwn-m", "add --vwn-n"]),
        ("--vwn-n 4", ["--vwn-n", "add --vwn-m"]),
        ("--vwn-gate sigmoid --vwn-carry full", ["--vwn-gate and --vwn-carry", "add --vwn-m and --vwn-n"]),
        ("--no-vwn-reduce-norm", ["--vwn-reduce-norm", "add --vwn-m and --vwn-n"]),
        ("--vwn-preset vwn", ["--vwn-preset says nothing", "add --vwn-m and --vwn-n"]),
        ("--vwn-preset hyper-connections", ["add --vwn-n"]),
        ("--vwn-preset frac-connections --vwn-gate tanh", ["add --vwn-m and --vwn-n"]),
        ("--vwn-preset hyper-connections --vwn-m 2 --vwn-n 4", ["--vwn-m 1, not 2", "drop --vwn-m"]),
        ("--vwn-preset frac-connections --vwn-m 2 --vwn-n 4", ["--vwn-m 2, not 4", "drop --vwn-n"]),
        ("--vwn-preset mhc --vwn-n 4", ["--vwn-preset is 'mhc'", "hyper-connections"]),
        ("--vwn-m 4 --vwn-n 2", ["--vwn-n 2 is smaller than --vwn-m 4"]),
        ("--vwn-m 0 --vwn-n 2", ["--vwn-m is 0"]),
        ("--vwn-m two --vwn-n 2", ["--vwn-m", "'two'"]),
        ("--vwn-m 2 --vwn-n 3 --vwn-reduce-norm", ["n = 3 is no multiple of m"]),
        ("--vwn-m 2 --vwn-n 4 --vwn-gate relu", ["--vwn-gate is 'relu'", "tanh, sigmoid"]),
        ("--vwn-m 2 --vwn-n 4 --vwn-connection none", ["--vwn-connection is 'none'", "dynamic, static"]),
        ("--vwn-m 2 --vwn-n 4 --vwn-ngrams 2,x", ["--vwn-ngrams", "'2,x' is no list of whole numbers"]),
        ("--vwn-m 2 --vwn-n 4 --vwn-ngrams 2", ["--vwn-ngram-vocab", "belong together"]),
        ("--vwn-m 2 --vwn-n 4 --vwn-ngram-vocab 9", ["--vwn-ngrams", "belong together"]),
        ("--vwn-m 2 --vwn-n 4 --vwn-ngrams 1,2 --vwn-ngram-vocab 9", ["--vwn-ngrams is 1,2", "at least 2"]),
        ("--vwn-m 2 --vwn-n 4 --vwn-ngrams 2,2 --vwn-ngram-vocab 9", ["different lengths"]),
        ("--vwn-m 2 --vwn-n 4 --vwn-recompute-block 0", ["--vwn-recompute-block is 0", "at least 1"]),
        ("--vwn-recompute-block 4", ["--vwn-recompute-block says nothing", "add --vwn-m and --vwn-n"]),
        ("--vwn-m 2 --vwn-n 4 --vwn-width 3", ["unrecognized arguments: --vwn-width 3"]),
    ],
)
def test_refusals_name_the_flag(argv, said):
    with pytest.raises(VirtualWidthError) as refusal:
        config(*argv.split())
    for words in said:
        assert words in str(refusal.value)
    assert str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


def test_recorded_arguments_state_resolved_defaults_and_mean_the_same_again():
    args = parse("--vwn-m", "2", "--vwn-n", "8")
    virtual_width = virtual_width_from_args(args)
    record_virtual_width(args, virtual_width)
    assert (args.vwn_embedding, args.vwn_reduce_norm, args.vwn_gate) == ("projected", True, "tanh")
    assert virtual_width_from_args(args) == virtual_width


def test_settings_are_described_as_they_are_typed():
    for name, value in (
        ("gate", "sigmoid"),
        ("reduce_norm", False),
        ("reduce_norm", True),
        ("n", 8),
        ("ngrams", (2, 3)),
    ):
        rest = ["--vwn-ngram-vocab", "9"] if name == "ngrams" else []
        argv = ["--vwn-m", "2", "--vwn-n", "8", *rest, *typed(name, value).split()]
        assert getattr(config(*argv), name) == value
    assert typed("ngrams", ()) == "no --vwn-ngrams" and typed("ngram_vocab", None) == "no --vwn-ngram-vocab"


@pytest.mark.parametrize("apex", [True, False])
def test_a_gpu_with_transformer_engine_needs_only_what_the_head_lacks_without_apex(monkeypatch, apex):
    monkeypatch.setattr(machine, "find_spec", lambda name: apex or None)
    needed = needed_flags(gpu=True, transformer_engine=True)
    assert [need.text for need in needed] == ([] if apex else ["--no-gradient-accumulation-fusion"])
    assert complete_command_line(["--lr", "1"], []) == (["--lr", "1"], [])


def test_without_a_gpu_transformer_engine_is_not_used():
    flags = {need.flag: need.value for need in needed_flags(gpu=False, transformer_engine=True)}
    assert flags["--transformer-impl"] == "local" and flags["--distributed-backend"] == "gloo"


def test_a_gpu_without_transformer_engine_keeps_nccl():
    flags = {need.flag for need in needed_flags(gpu=True, transformer_engine=False)}
    assert "--transformer-impl" in flags and "--no-rope-fusion" in flags
    assert "--distributed-backend" not in flags and "--use-cpu-initialization" not in flags


def test_added_flags_are_described_with_their_reason():
    needed = needed_flags(gpu=False, transformer_engine=False)
    argv, added = complete_command_line(["--lr", "1"], needed)
    assert argv[:2] == ["--lr", "1"] and added == needed
    for need in needed:
        assert need.text in " ".join(argv) and need.text in describe(added) and need.reason in describe(added)


@pytest.mark.parametrize("typed_flags", ["--distributed-backend gloo", "--distributed-backend=gloo"])
def test_what_was_typed_is_not_added_again(typed_flags):
    argv, added = complete_command_line(typed_flags.split(), needed_flags(gpu=False, transformer_engine=False))
    assert "--distributed-backend" not in [need.flag for need in added]
    assert " ".join(argv).count("--distributed-backend") == 1


@pytest.mark.parametrize("typed_flags", ["--distributed-backend nccl", "--transformer-impl=transformer_engine"])
def test_what_was_typed_is_not_overridden_but_refused(typed_flags):
    flag, value = typed_flags.replace("=", " ").split()
    with pytest.raises(VirtualWidthError, match=f"{flag} {value} cannot run here"):
        complete_command_line(typed_flags.split(), needed_flags(gpu=False, transformer_engine=False))
