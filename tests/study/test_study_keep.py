"""What vwn-study keep writes: runs as small files that give the same report."""

import json
import re
import shlex
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from study.event_files import SEEDS, TOKENS, falling, write_run

from megatron_vwn.study import __main__ as program
from megatron_vwn.study.report import write as _study_report
from megatron_vwn.study.report.events import find_runs

KEPT = sorted(path.parent for path in Path(__file__).parents[2].glob("examples/study/results/*/study.json"))


def test_runs_that_are_kept_give_the_same_report(known, tmp_path, capsys):
    for place, path in enumerate(sorted(known.glob("*/seed-*"))):
        record = {"state": "running" if place == 0 else "done", "tokens_per_step": TOKENS}
        (path / "run.json").write_text(json.dumps(record))
    (known / "wide2" / "timing.json").write_text(json.dumps({"seconds_per_step": 0.5}))
    routing = {
        f"vwn/independent_segments/{what}": {100: 2.0, 400: value}
        for what, value in (("mean", 5.5), ("min", 3.0), ("max", 9.0), ("birth", 2.0), ("n", 16.0))
    }
    routing |= {"vwn/effective_segments/mean": {100: 16.0, 400: 12.25}}
    routing |= {f"vwn_layers/depth_window/layer_00{place}": {400: 1.5 * place} for place in (2, 3)}
    for seed in SEEDS:
        write_run(known / "wide8" / f"seed-{seed}" / "events" / "more", routing, samples=False).rename(
            known / "wide8" / f"seed-{seed}" / "events" / "events.out.tfevents.9.more"
        )
        (known / "wide8" / f"seed-{seed}" / "events" / "more").rmdir()
    kept = tmp_path / "kept"
    for _ in range(2):  # again, over what is there
        assert program.main(["keep", str(known), "--output", str(kept)]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "base/seed-1 is running, so its curves are left out." and said[1].startswith(
            "11 runs are in "
        )
    (known / "base" / "seed-1").rename(tmp_path / "running")
    for folder in (known, kept):
        assert program.main(["report", str(folder), "--output", str(tmp_path / f"of-{folder.name}")]) == 0
    text = (tmp_path / "of-runs" / "report.md").read_text()
    for name in ("results.csv", "curves.csv", "routing.svg", "validation-growth.svg"):
        assert (tmp_path / "of-runs" / name).read_bytes() == (tmp_path / "of-kept" / name).read_bytes(), name
    other = (tmp_path / "of-kept" / "report.md").read_text()
    assert other == text.replace(str(known), str(kept)).replace("of-runs", "of-kept")
    assert "- wide8: 5.5 of 16 segments are independent at the end, mean over the layers (3.0 to 9.0; 2.0 in a" in text
    assert "12.2 carry energy, copies included. A sublayer reads 3.8 sublayers back on average, 1.2 in a fresh" in text
    assert "wide4: " in text and "- wide4: 5.5" not in text

    (kept / "wide8" / "seed-2" / "scalars.csv").write_text("tag,step,value\nlm loss,one,2\n")
    assert program.main(["report", str(kept)]) == 2
    assert "holds no run as vwn-study keep writes it (ValueError" in capsys.readouterr().err
    assert program.main(["keep", str(known), "--output", str(known / "kept")]) == 2
    assert "is where the runs are" in capsys.readouterr().err
    # Nothing but what was kept before is replaced.
    mine = tmp_path / "mine" / "wide4" / "seed-2" / "thesis.txt"
    live = write_run(tmp_path / "live" / "wide4" / "seed-2" / "events", {"lm loss": falling(1.0)})
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for folder, said in (
        (tmp_path / "mine", "is nothing that vwn-study keep wrote"),
        (tmp_path / "live", "holds runs"),
    ):
        assert program.main(["keep", str(known), "--output", str(folder)]) == 2
        assert said in capsys.readouterr().err
    assert mine.read_text() == "mine" and live.exists()


def test_what_is_kept_says_how_runs_failed_and_names_no_folder_of_the_machine(known, tmp_path, capsys):
    study = {"baseline": "base", "seeds": [1], "command": "vwn-study run /home/me/t.yaml --output=/mnt/a/b,/home/b/d"}
    study["variants"] = {"base": ["--train-data-path", "/data/of/me/prose"]} | dict.fromkeys(
        ("wide2", "wide4", "wide9")
    )
    records = {
        "base": {"state": "done", "command": "torchrun --save /scratch/x/y --lr 1/2"},
        "wide2": {"state": "failed", "said": 'File "/opt/secret/x.py"\nLossIsNaN: and/or'},
        "wide4": {"state": "running"},
        "wide9": {"state": "refused", "said": "megatron_vwn: no"},  # before it wrote any events
    }
    (known / "study.json").write_text(json.dumps(study))
    (known / "wide9" / "seed-1").mkdir(parents=True)
    for name, record in records.items():
        (known / name / "seed-1" / "run.json").write_text(json.dumps(record))
    kept = tmp_path / "kept"
    write_run(tmp_path / "once" / "wide4" / "seed-1" / "events", {"lm loss": falling(1.0)})
    for folder in (tmp_path / "once", known):
        assert program.main(["keep", str(folder), "--output", str(kept)]) == 0
    said = capsys.readouterr().out
    assert "wide4/seed-1 is running, so what was kept of it before stays." in said
    text = "".join(path.read_text() for path in kept.rglob("*.json"))
    for hidden in ("/home", "/mnt", "/data", "/scratch", "/opt", "secret"):
        assert hidden not in text
    for there in (".../t.yaml --output=.../d", ".../prose", "--save .../y --lr 1/2", ".../x.py", "and/or"):
        assert there in text
    assert program.main(["report", str(kept)]) == 0
    said = capsys.readouterr().out
    assert "wide2/seed-1 failed: LossIsNaN: and/or" in said and "wide9/seed-1 was refused: megatron_vwn: no" in said


def test_the_clock_of_a_deeper_folder_is_kept(known, tmp_path):
    (known / "base" / "timing.json").write_text(json.dumps({"seconds_per_step": 0.5, "flags": ["/a/b/c"]}))
    for folder in (known.parent, known / "base"):
        kept = tmp_path.parent / f"{tmp_path.name}-kept-{folder.name}"
        assert program.main(["keep", str(folder), "--output", str(kept)]) == 0
        timings = {run.variant: run.timing for run in find_runs([kept]) if run.timing}
        assert list(timings.values()) == [{"seconds_per_step": 0.5, "flags": [".../c"]}], folder


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_committed_curves_give_the_committed_reports(folder, tmp_path, monkeypatch):
    """Every figure of every report there; pictures depend on fonts."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).touch())
    reports = sorted(path.parent for path in folder.rglob("report.md"))
    assert reports
    for report in reports:
        text = (report / "report.md").read_text()
        command = shlex.split(re.search("^vwn-study report .*$", text, re.MULTILINE)[0])
        baseline = command[command.index("--baseline") + 1] if "--baseline" in command else None
        _study_report.write_report([folder], tmp_path / report.name, baseline, shlex.join(command))
        for name in ("report.md", "results.csv"):
            assert (tmp_path / report.name / name).read_text() == (report / name).read_text(), report / name
