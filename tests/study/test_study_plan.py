"""vwn-study's YAML: how a grid is expanded, and what is refused in one sentence."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.indexed import IndexedDatasetSize
from megatron_vwn.recipes.flags import EachKeyOnce
from megatron_vwn.study import __main__ as program
from megatron_vwn.study import plan
from megatron_vwn.study.plan import load_study

EXAMPLES = Path(__file__).parents[2] / "examples" / "study"
FLAGS = {"train-iters": 8, "global-batch-size": 4, "seq-length": 16, "lr": 1e-3}


def write(tmp_path, **content) -> Path:
    """A study that is right but for ``content``."""
    whole = {"baseline": "base", "seeds": [1, 2], "flags": FLAGS, "variants": {"base": None}} | content
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


def test_a_grid_is_every_combination_with_a_name_of_what_differs(tmp_path):
    grid = {"r": [1.5, "8"], "vwn-m": 2, "vwn-embedding": ["tiled", "projected"], "vwn-reduce-norm": [None, False]}
    study = load_study(write(tmp_path, grid=grid))
    named = {variant.name: variant for variant in study.variants}
    assert len(named) == 1 + 2 * 2 * 2
    words = named["r8-tiled-no-reduce-norm"].arguments()
    assert words[:8] == ["--train-iters", "8", "--global-batch-size", "4", "--seq-length", "16", "--lr", "0.001"]
    assert sorted(words[8:]) == sorted(
        ["--vwn-m", "2", "--vwn-n", "16", "--vwn-embedding", "tiled", "--no-vwn-reduce-norm"]
    )
    assert named["r1.5-projected-reduce-norm-default"].flags["vwn-n"] == 3
    assert "vwn-reduce-norm" not in named["r1.5-projected-reduce-norm-default"].flags
    assert named["base"].arguments() == words[:8]


def test_null_in_a_grid_removes_a_shared_flag(tmp_path):
    study = load_study(write(tmp_path, grid={"lr": [None, 3e-3], "vwn-m": 1, "vwn-n": 4}))
    assert [(each.name, each.flags.get("lr")) for each in study.variants[1:]] == [
        ("lr-default", None),
        ("lr-0.003", 3e-3),
    ]


def test_megatron_flags_and_widths_by_m_and_n_make_a_grid_too(tmp_path):
    grids = [{"vwn-m": [1, 4], "vwn-n": 8}, {"lr": [1e-3, 3e-3], "vwn-m": 2, "vwn-n": 4}]
    study = load_study(write(tmp_path, grid=grids))
    assert [variant.name for variant in study.variants] == ["base", "m1", "m4", "lr-0.001", "lr-0.003"]
    assert study.variants[4].flags["lr"] == 3e-3


def test_runs_are_variants_times_seeds_and_all_first_seeds_come_first(tmp_path):
    study = load_study(write(tmp_path, grid={"r": [2, 4], "vwn-m": 2}))
    assert [run.name for run in study.runs()] == [
        f"{name}/seed-{seed}" for seed in (1, 2) for name in ("base", "r2", "r4")
    ]
    assert [run.name for run in study.runs(["r4", "base/seed-2"])] == ["r4/seed-1", "base/seed-2", "r4/seed-2"]
    assert study.runs()[1].arguments()[-2:] == ["--seed", "1"]


def test_the_studies_of_the_checkout_are_what_they_say():
    tiny = load_study(EXAMPLES / "tiny.yaml", "data/austen")
    assert [(each.name, each.flags.get("vwn-n")) for each in tiny.variants] == [
        ("baseline", None), ("r1.5", 3), ("r2", 4), ("r4", 8), ("r8", 16),
    ]  # fmt: skip
    assert {each.flags.get("vwn-m") for each in tiny.variants[1:]} == {2}
    assert tiny.variants[0].flags["train-data-path"] == "data/austen_train"
    assert tiny.variants[0].tokens_per_step == 1024 and len(tiny.runs()) == 15
    ablation = load_study(EXAMPLES / "ablation.yaml")
    assert "mtp-num-layers" not in ablation.variants[0].flags and len(ablation.runs()) == 20
    for name, runs, tried, lr in (("small", 18, 4, 7.5e-4), ("gpu", 15, 3, 1e-3)):
        study, rates = load_study(EXAMPLES / f"{name}.yaml"), load_study(EXAMPLES / f"{name}-lr.yaml")
        assert [len(study.runs()), len(rates.runs())] == [runs, tried]
        assert rates.variants[0].flags == study.variants[0].flags | {"lr": lr, "min-lr": pytest.approx(lr / 10)}


def test_a_base_gives_what_a_study_does_not_say(tmp_path):
    write(tmp_path, data="d", grid={"r": [2, 4], "vwn-m": 2}).rename(tmp_path / "base.yaml")
    path = tmp_path / "study.yaml"
    path.write_text("base: base.yaml\nseeds: [7]\nflags: {lr: 5.0, seq-length: 32}\n")
    study = load_study(path)
    assert [each.name for each in study.variants] == ["base", "r2", "r4"] and study.seeds == (7,)
    assert study.variants[0].flags == FLAGS | {"lr": 5.0, "seq-length": 32} and study.title == "study"
    path.write_text("base: base.yaml\nbaseline: plain\nvariants: {plain: {}}\n")
    assert [(each.name, each.flags) for each in load_study(path).variants] == [("plain", FLAGS)]


@pytest.mark.parametrize(("base", "said"), [("none.yaml", "which is no file beside it"), ("study.yaml", "has a base:")])
def test_a_base_that_cannot_be_one_is_refused(tmp_path, base, said):
    with pytest.raises(VirtualWidthError, match=said):
        load_study(write(tmp_path, base=base))


def test_data_that_a_run_sees_twice_is_said(tmp_path, monkeypatch):
    study = load_study(write(tmp_path, flags=FLAGS | {"train-data-path": "text"}))  # 8 steps of 4 sequences of 16
    for tokens, said in ((512, []), (100, ["text has 100 tokens and a run reads 512: it sees each 5.1 times."])):
        size = IndexedDatasetSize(1, tokens, np.dtype(np.uint16))
        monkeypatch.setattr(plan, "check_indexed_dataset", lambda prefix, size=size: size)
        assert plan.repeated_data(study) == said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"grids": {}}, "did you mean grid?"),
        ({"baseline": None}, "names no baseline"),
        ({"baseline": "r4"}, "has the baseline 'r4', which is no variant"),
        ({"variants": {"base": {"vwn-m": 2, "vwn-n": 4}}}, "a baseline has no virtual width"),
        ({"variants": {"base": None, "r4": {}}, "grid": {"r": [4, 8], "vwn-m": 2}}, "two variants called r4"),
        ({"grid": {"r": [1.3, 2], "vwn-m": 2}}, "gives 2.6 segments"),
        ({"grid": {"r": [2, 4]}}, "give numbers to both"),
        ({"grid": {"r": ["two", 4], "vwn-m": 2}}, "give numbers to both"),
        ({"grid": {"r": [], "vwn-m": 2}}, "r has no values"),
        ({"grid": {"r": ["1e99999"], "vwn-m": 2}}, "r = 1e99999 with vwn-m = 2 is no width"),
        ({"grid": {"r": 2, "vwn-m": 2, "vwn-n": 8}}, "has both r and vwn-n"),
        ({"grid": {"n": [2, 4]}}, "write vwn-m and vwn-n, or r in a grid"),
        ({"flags": FLAGS | {"seed": 3}}, "has seed, which vwn-study gives to every run"),
        ({"flags": {"lr": 1.0}}, "train-iters of base"),
        ({"flags": FLAGS | {"lr": {"max": 1}}}, "lr in flags"),
        ({"variants": {"base": None, "a/b": None}}, "names are folders"),
        ({"variants": {"base": None, "r4-s2": None}}, "would be read as a seed"),
        ({"flags": FLAGS | {"tokenizer-model": "{data}_tokenizer"}}, "without saying what it is"),
        ({"seeds": [1, 1]}, "none or repeat"),
        ({"ranks": 0}, "whole number of at least 1"),
        ({"keep-checkpoints": "yes"}, "write true or false"),
        ({"grid": {"r": [-2, 2], "vwn-m": 2}}, "r-2 of"),
        ({"grid": {"r": [-2, 2], "vwn-m": 2}}, "--vwn-n is -4: give a whole number of at least 1"),
        ({"grid": {"r": 2, "vwn-m": [0, 2]}}, "--vwn-m is 0: give a whole number"),
        ({"variants": {"base": None, "wide": {"vwn-m": "two", "vwn-n": 4}}}, "argument --vwn-m: invalid int value"),
        ({"variants": {"base": None, "wide": {"vwn-m": 4}}}, "--vwn-m says nothing without --vwn-n"),
        ({"variants": {"base": None, "wide": {"vwn-m": 4, "vwn-n": 8, "vwn-gate": "relu"}}}, "choose one of tanh"),
        (
            {"flags": FLAGS | {"hidden-size": 32}, "variants": {"base": None, "wide": {"vwn-m": 3, "vwn-n": 6}}},
            "--hidden-size 32 is not divisible by --vwn-m 3",
        ),
        ({"flags": FLAGS | {"hybrid-layer-pattern": "*-Q"}}, "'*-Q' has 'Q', which is no sublayer"),
        ({"flags": FLAGS | {"hybrid-layer-pattern": "*-/"}}, "has a part without sublayers"),
        ({"flags": FLAGS | {"hybrid-layer-pattern": "*E"}}, "needs --num-experts"),
        ({"seeds": [1, 12345678901234567890]}, "at least 1 and at most 4000000000"),
        ({"title": ["a", "list"]}, "title of"),
        ({"made-by": ["a", "list"]}, "write text"),
        ({"data": {"a": 1}}, "data of"),
        ({"flags": FLAGS | {"train_iters": 9}}, "train-iters with a dash and with an underscore"),
    ],
)
def test_a_wrong_study_is_refused_in_one_sentence(tmp_path, capsys, content, said):
    words = ["run", str(write(tmp_path, **content)), "--output", str(tmp_path / "out"), "--dry-run"]
    assert program.main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("vwn-study: ") and said in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flags: {}\nbaseline: a\nflags: {lr: 1}\n", "the key 'flags' stands in line 1 and again in line 3"),
        ("flags:\n  lr: 1\n  lr: 1\n", "the key 'lr' stands in line 2 and again in line 3"),
        ("grid: [{r: 1, vwn-m: 2, r: 2}]\n", "the key 'r' stands in line 1 and again in line 1"),
        ("title: 2024-13-45\n", "cannot be read as YAML (month must be"),
        (f"ranks: {'9' * 5000}\n", "cannot be read as YAML (Exceeds the limit"),
        (f"title: {'[' * 5000}\n", "cannot be read as YAML"),
        ("{1: 2}\n", "is no list of keys with values"),
    ],
)
def test_text_that_no_study_can_have_is_refused(tmp_path, capsys, text, said):
    (tmp_path / "study.yaml").write_text(text)
    assert program.main(["run", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "out"), "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


def test_keys_that_a_merge_adds_may_be_written_again(tmp_path):
    text = "a: &a {lr: 1, seed: 2}\nb: &b {<<: *a, lr: 3}\nc: {<<: *b, lr: 4}\n"
    assert yaml.load(text, EachKeyOnce)["c"] == {"lr": 4, "seed": 2}


def test_what_is_no_yaml_or_an_unknown_name_is_refused(tmp_path, capsys):
    broken = tmp_path / "broken.yaml"
    broken.write_text("flags: [1,")
    assert program.main(["run", str(broken), "--output", str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    path = write(tmp_path, grid={"r": [2, 4], "vwn-m": 2})
    assert program.main(["run", str(path), "--output", str(tmp_path / "out"), "--only", "r44"]) == 2
    assert "no variant or run r44: did you mean r4?" in capsys.readouterr().err


def test_missing_data_is_refused_with_the_command_that_makes_it(tmp_path, capsys):
    flags = FLAGS | {"train-data-path": "{data}_train"}
    path = write(tmp_path, flags=flags, data=str(tmp_path / "words"), **{"made-by": "vwn-prepare-data\n words"})
    assert program.main(["run", str(path), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path}/words_train.idx is not there: make it with `vwn-prepare-data words`" in message
    assert program.main(["run", str(path), "--output", str(tmp_path / "out"), "--data", "other"]) == 2
    assert "other_train.idx is not there" in capsys.readouterr().err
