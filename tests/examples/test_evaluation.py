"""The end of the quickstart, with stand-ins for what exports and scores."""

import sys
from pathlib import Path

import launch
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

import evaluation
import progress

QUICKSTART = Path(evaluation.__file__).parent

STAND_IN = """
import json, pathlib, sys
runs = sys.argv[-2:]
for run in map(pathlib.Path, runs):
    {make}
with open("calls", "a") as file:
    print({name!r}, *sys.argv[1:], file=file)
"""
EXPORT = STAND_IN.format(name="export", make="(run / 'huggingface').mkdir()")
SCORE = STAND_IN.format(
    name="score", make="(run / 'heldout.json').write_text(json.dumps({'bits_per_byte': len(run.name), 'prompt': 'p'}))"
)


@pytest.fixture
def end(tmp_path, monkeypatch):
    """The end of two runs, one and three: call it with the programs that stand in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "PROGRAMS", tmp_path)
    for name in ("one", "three"):
        (tmp_path / name).mkdir()

    def call(export=EXPORT, score=SCORE):
        (tmp_path / "export.py").write_text(export)
        (tmp_path / "score.py").write_text(score)
        return evaluation.evaluate(Path("one"), Path("three"), "text", Path("log"), progress.Clock(0))

    return call


def test_both_runs_are_exported_and_scored_once(end, capsys):
    assert [result["bits_per_byte"] for result in end()] == [3, 5]
    assert Path("calls").read_text().splitlines() == ["export one three", "score text one three"]
    shown = capsys.readouterr().out
    assert "three         held-out text: 5.0000 bits per byte" in shown
    assert [result["bits_per_byte"] for result in end()] == [3, 5]
    assert len(Path("calls").read_text().splitlines()) == 2
    assert "heldout.json of both runs was written earlier" in capsys.readouterr().out


def test_what_was_exported_is_scored_after_a_failure(end):
    with pytest.raises(progress.RunFailedError, match=r"(?s)exit code 3; the end of log.*line 59"):
        end(score="for i in range(60): print('line', i)\nraise SystemExit(3)")
    assert len(end()) == 2
    assert Path("calls").read_text().splitlines() == ["export one three", "score text one three"]


def test_a_failed_export_is_the_end(end):
    with pytest.raises(progress.RunFailedError, match=r"(?s)exit code 2.*no room"):
        end(export="print('no room')\nraise SystemExit(2)")
    assert not Path("calls").exists()


TOOL = """
import pathlib, sys
def main(arguments):
    print({name!r}, *arguments)
    if pathlib.Path("no-" + {name!r}).exists():
        return 2
    pathlib.Path(arguments[{target}]).mkdir(parents=True)
    return 0
"""


def test_an_export_writes_what_is_not_there_and_stops_at_a_failure(tmp_path):
    # In a process with other tools of the same names; the real ones would turn this one's torch into an emulated GPU's.
    package = tmp_path / "megatron_vwn" / "checkpoint"
    package.mkdir(parents=True)
    for name, target in (("convert", 2), ("widen", 1)):
        (package / f"{name}_cli.py").write_text(TOOL.format(name=name, target=target))
    stand_ins = {"PYTHONPATH": str(tmp_path)}

    def call():
        done = launch.real(0, QUICKSTART / "export.py", "baseline", "wide", env=stand_ins, cwd=tmp_path)
        return done.returncode, done.stdout.splitlines()

    widen = "widen baseline/checkpoints baseline/one-segment --vwn-m 1 --vwn-n 1"
    (tmp_path / "no-widen").touch()
    code, (first, second) = call()
    assert code == 2
    assert first == "convert to-hf wide/checkpoints wide/huggingface"
    assert second.startswith(widen)
    (tmp_path / "no-widen").unlink()
    code, (first, second) = call()
    assert code == 0
    assert first.startswith(widen)
    assert second == "convert to-hf baseline/one-segment baseline/huggingface"
    assert call() == (0, [])


def test_paragraphs_are_quoted_under_their_titles():
    results = [{"prompt": "It was", "paragraph": "a " * 100}, {"prompt": "It was", "paragraph": "not so."}]
    shown = evaluation.quote(["baseline", "wide"], results).splitlines()
    assert shown[0] == 'Asked to go on after "It was ...":'
    assert shown[2].startswith("baseline")
    assert max(map(len, shown)) <= 100
    assert shown[-2:] == ["wide", "    ... not so. ..."]
