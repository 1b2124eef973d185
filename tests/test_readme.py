"""What the support matrix says about Megatron's flags is what happens, and what the Markdown files name exists."""

import json
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import launch
import pytest
from parallel.cases import CHECKS
from training.test_refusals import MOCK, MODEL, WIDE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MATRIX = (ROOT / "megatron_vwn" / "training" / "refusals" / "SUPPORT.md").read_text()
VERDICTS = {"works", "not touched", "refused", "refused by Megatron", "untested on GPU", "other models"}
OURS = {"refused", "other models"}

# Flags whose meaning needs more than their own value: the command line that stands for each.
TYPED = {
    "--hybrid-layer-pattern": "--hybrid-layer-pattern *-*-*-",
    "--hybrid-override-pattern": "--hybrid-override-pattern *-*-",
    "--num-layers": "--num-layers 4",
    "--mtp-num-layers": "--hybrid-layer-pattern *-*-/*- --mtp-num-layers 1",
    "--mtp-hybrid-override-pattern": "--hybrid-layer-pattern *-*-/*- --mtp-hybrid-override-pattern *-",
    "--num-experts": "--hybrid-layer-pattern *E*E --num-experts 4",
    "--multi-latent-attention": "--hybrid-layer-pattern +-+- --multi-latent-attention",
    "--tensor-model-parallel-size": "--tensor-model-parallel-size 2",
    "--context-parallel-size": "--hybrid-layer-pattern=---- --context-parallel-size 2",
    "--window-size": "--window-size 4,0 --no-masked-softmax-fusion",
    "--group-query-attention": "--group-query-attention --num-query-groups 2",
    "--no-overlap-p2p-communication": "--pipeline-model-parallel-size 2 --hybrid-layer-pattern *|-|*|- "
    "--no-overlap-p2p-communication",
    "--reset-position-ids": "--position-embedding-type learned_absolute --reset-position-ids",
    "--use-checkpoint-args": "--use-checkpoint-args --load somewhere",
    "--mtp-detach-heads": "--mtp-detach-heads --vwn-embedding wide",
    "--recompute-modules": "--recompute-modules core_attn",
    "--reset-attention-mask": "--reset-attention-mask --no-masked-softmax-fusion",
    "--full-validation": "--full-validation --multiple-validation-sets --eval-micro-batch-size 1",
    "--multiple-validation-sets": "--full-validation --multiple-validation-sets --eval-micro-batch-size 1",
    "--transformer-impl": "--transformer-impl local",
    "--optimizer": "--optimizer sgd",
    "--muon-coefficient-type": "--optimizer muon --muon-coefficient-type polar_express",
    "--no-use-layer-wise-param-layout": "--optimizer dist_muon --bf16 --no-use-layer-wise-param-layout",
    "--position-embedding-type": "--position-embedding-type yarn",
    "--ckpt-format": "--ckpt-format torch_dist",
    "--non-persistent-ckpt-type": "--non-persistent-ckpt-type global",
    "--attention-backend": "--attention-backend unfused",
    "--dataloader-type": "--dataloader-type cyclic",
    "--spec": "--spec a.module layers",
    "--hidden-size": "--hidden-size 128",
    "--cuda-graph-impl": "--cuda-graph-impl local",
}
# Where data come from; none of them goes together with --mock-data.
SOURCES = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path")
SOURCES += ("per_split_data_args_path", "mock_data")


def rows():
    """(patterns, verdict, reason) of every row of the support matrix."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in MATRIX.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in cells]
    return [(re.findall(r"`(--[^`]+)`", row[0]), row[1], row[2]) for row in cells if row[1] in VERDICTS]


def patterns():
    """Every pattern of the matrix with its verdict; a pattern with a value is `--flag value`."""
    return {pattern: verdict for names, verdict, _ in rows() for pattern in names}


def decided(flag):
    """The verdict on a flag without a value: that of the most specific pattern, the longest."""
    fitting = [pattern for pattern in patterns() if " " not in pattern and fnmatchcase(flag, pattern)]
    return patterns()[max(fitting, key=lambda each: ("*" not in each, len(each)))] if fitting else None


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """What Megatron's parser has and what our entry point refuses, from one process that may import Megatron."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "valued.json").write_text(json.dumps([pattern for pattern in patterns() if " " in pattern]))
    done = launch.session(0, __file__, folder / "valued.json", folder / "answers.json", env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "answers.json").read_text())


def test_every_flag_is_decided(session):
    names = [flag for flag in session if " " not in flag]
    assert len(names) > 700
    undecided = [flag for flag in names if decided(flag) is None]
    assert not undecided, f"{len(undecided)} flags are in no row of the support matrix: {' '.join(undecided)}"


def test_the_flags_that_are_known_at_run_time_are_those_of_the_parser(session):
    known = (ROOT / "megatron_vwn" / "training" / "refusals" / "known_flags.txt").read_text().split()
    where_kitchen_is_installed = {"--kitchen-config-file", "--kitchen-recipe-number"}
    assert known == sorted({flag for flag in session if " " not in flag} | where_kitchen_is_installed)


def test_no_pattern_is_idle(session):
    listed = [pattern for names, _, _ in rows() for pattern in names]
    assert len(listed) == len(set(listed)), sorted({each for each in listed if listed.count(each) > 1})
    idle = [each for each in listed if not any(fnmatchcase(flag, each.split(" ")[0]) for flag in session)]
    assert not idle, f"no flag of Megatron has these names: {idle}"


def test_refused_is_what_the_matrix_says_is_refused(session):
    wrong = []
    for flag, sentence in session.items():
        verdict = patterns()[flag] if " " in flag else decided(flag)
        if verdict in OURS and (sentence is None or not sentence.endswith(".") or "\n" in sentence):
            wrong.append(f"{flag} should be refused: {sentence}")
        if verdict in VERDICTS - OURS - {"refused by Megatron"} and verdict != "untested on GPU" and sentence:
            wrong.append(f"{flag} should work: {sentence}")
    assert not wrong, "\n".join(wrong)


def test_what_works_names_its_tests():
    for names, verdict, reason in rows():
        cited = re.findall(r"`([^`]+)`", reason)
        tests = [name for name in cited if name in CHECKS or (name.startswith("tests/") and (ROOT / name).exists())]
        assert verdict != "works" or tests, f"no test for {names}"
        unknown = [name for name in cited if re.match(r"[A-Za-z -]+: |tests/", name) and name not in tests]
        assert not unknown, f"no such test: {unknown}"


def test_every_verdict_is_known():
    lines = [line for line in MATRIX.splitlines() if line.startswith("| `--")]
    assert len(lines) == len(rows()), [line for line in lines if line.split("|")[2].strip() not in VERDICTS]


def documents():
    """The committed Markdown files and those that git does not ignore, reports of studies apart."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in listed if "results/" not in name and (ROOT / name).exists()]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170
    assert len(README.encode()) <= 12 * 1024


def test_links_lead_somewhere():
    links = [(path, link) for path in documents() for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text())]
    links = [(path, link.split("#")[0]) for path, link in links if not re.match(r"\w+:", link)]
    assert len(links) > 30
    broken = [f"{path.relative_to(ROOT)}: {link}" for path, link in links if link and not (path.parent / link).exists()]
    assert not broken, "\n".join(broken)


def test_files_exist():
    named, missing = 0, []
    for path in documents():
        if path.name == "CHANGES.md":
            continue  # names what is gone
        text = path.read_text()
        files = re.findall(r"`((?:megatron_vwn|tests|tools|examples)/[\w./-]*\w)`", text)
        inside = re.findall(r"`((?:ops|modules|parallel|training)/[\w/]+\.py)", text)
        files = [name for name in files if "/out/" not in name] + [f"megatron_vwn/{name}" for name in inside]
        named += len(files)
        missing += [f"{path.relative_to(ROOT)}: {name}" for name in files if not (ROOT / name).exists()]
    assert named > 60
    assert not missing, "\n".join(missing)


def test_commands_are_of_this_parser(session):
    """Every flag of the training command is Megatron's and works with a virtual width, or is in training/README.md."""
    ours = (ROOT / "megatron_vwn" / "training" / "README.md").read_text()
    command = next(part for part in README.split("\n\n") if "-m megatron_vwn.training.pretrain" in part)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", command)) - {"--nproc-per-node"}
    assert len(flags) > 35
    assert {flag for flag in flags if flag.startswith("--vwn-")} <= set(re.findall(r"`(--vwn-[a-z-]+)`", ours))
    verdicts = {flag: decided(flag) for flag in flags if not flag.startswith("--vwn-") and flag in session}
    assert {flag for flag in flags if not flag.startswith("--vwn-")} == set(verdicts)
    assert set(verdicts.values()) <= {"works", "not touched"}, verdicts


def answers(valued_file, answers_file):
    """Write {flag or "flag value": the sentence that refuses it, or null}; runs in a process of its own."""
    import argparse
    import copy

    import megatron_vwn.cpu

    megatron_vwn.cpu.install()

    from megatron.training.arguments import add_megatron_arguments, parse_args

    from megatron_vwn.config import VirtualWidthError
    from megatron_vwn.training.flags.vwn import add_arguments, record_virtual_width, virtual_width_from_args
    from megatron_vwn.training.refusals.data import check_data
    from megatron_vwn.training.refusals.flags import refuse_unsupported, refuse_yaml

    base = [*MODEL, *MOCK, *WIDE, "--transformer-impl", "local", "--no-masked-softmax-fusion"]

    def parsed(words):
        sys.argv[1:] = [*base, *words]
        return parse_args(add_arguments)

    def sentence(args):
        try:
            virtual_width = virtual_width_from_args(args)
            record_virtual_width(args, virtual_width)
            refuse_unsupported(args, virtual_width)
            check_data(args)
        except VirtualWidthError as refusal:
            return str(refusal)

    def changed(action, args):
        args = copy.copy(args)
        if action.const is not None:
            value = action.const
        elif isinstance(action, argparse.BooleanOptionalAction):
            value = not action.default
        elif action.choices:
            value = next(choice for choice in action.choices if choice != action.default)
        else:
            kind = action.type if action.type in (int, float) else str
            value = kind("7")
        if action.nargs in ("+", "*"):
            value = [value]
        setattr(args, action.dest, value)
        return args

    plain, muon = parsed([]), parsed(["--optimizer", "muon", "--muon-scalar-optimizer", "lion"])
    assert sentence(copy.copy(plain)) is None
    result = {}
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for action in add_megatron_arguments(parser)._actions:
        for flag in action.option_strings:
            if flag == "--yaml-cfg":
                try:
                    result[flag] = refuse_yaml([flag, "file"])
                except VirtualWidthError as refusal:
                    result[flag] = str(refusal)
            elif action.dest in SOURCES:
                result[flag] = None  # test_data.py has them, with files
            elif flag in TYPED:
                result[flag] = sentence(parsed(TYPED[flag].split()))
            else:
                belongs_to_muon = action.dest.startswith(("muon_", "lion_"))
                result[flag] = sentence(changed(action, muon if belongs_to_muon else plain))
    result |= {words: sentence(parsed(words.split())) for words in json.loads(Path(valued_file).read_text())}
    Path(answers_file).write_text(json.dumps(result))


if __name__ == "__main__":
    answers(*sys.argv[1:])
