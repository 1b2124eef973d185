"""vwn-study report on event files whose speed-ups, slopes and losses at equal budgets are known in closed form."""

import csv
import html
import json
import math
import re

import launch
import numpy as np
import pytest
from study.event_files import SEEDS, STEPS, TOKENS, WIDTHS, falling, megatron_arguments, pace, write_run

from megatron_vwn.study import __main__ as program
from megatron_vwn.study.report import write as _study_report
from megatron_vwn.study.report.compare import Variant, compare
from megatron_vwn.study.report.curves import Curve, estimate, spread
from megatron_vwn.study.report.events import LoggedRun, find_runs, split_seed
from megatron_vwn.study.report.families import families, fit_families
from megatron_vwn.study.report.fit import fit_widths
from megatron_vwn.study.report.growth import SHARES, at_shares, change, constant_until
from megatron_vwn.study.report.routing import routings

# 0.975 quantile of Student's t with two degrees of freedom, in closed form.
T2 = math.sqrt(2 * 0.95**2 / (1 - 0.95**2))


def results(folder) -> dict[str, dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_known_speedups_slopes_and_r_squared(known):
    comparison = compare(find_runs([known]), None)
    assert comparison.baseline == "base" and comparison.unit == "tokens" and not comparison.notes
    validation, further = comparison.results
    assert (validation.metric.key, further.metric.key) == ("validation", "next2")
    for r in WIDTHS[1:]:
        paces = [pace(r, seed) for seed in SEEDS]
        here = validation.compared[f"wide{r}"]
        assert here.speedup.mean == pytest.approx(np.mean(paces), rel=1e-6)
        assert here.speedup.half == pytest.approx(T2 * np.std(paces, ddof=1) / math.sqrt(3), rel=1e-4)
        assert here.gaps["tokens"].mean == pytest.approx(-0.25 * math.log2(r), abs=1e-6)
        half = T2 * 0.02 * math.log2(r) / math.sqrt(3)
        assert here.gaps["tokens"].half == pytest.approx(half, rel=1e-4)
        # Twenty steps are averaged, 9.5 steps behind on a line.
        steps = [(STEPS - 9.5) / each + 9.5 for each in paces]
        assert further.compared[f"wide{r}"].speedup.mean == pytest.approx(
            np.mean([STEPS / each for each in steps]), rel=1e-5
        )
        # Straight lines: the advantage is the same all along.
        for seed, curve in here.growth.items():
            assert curve.y == pytest.approx(pace(r, seed), rel=1e-5)  # fp32 in the files
        assert here.constant_gap is None and validation.constant_until is None
    (fit,) = validation.fits["tokens"]
    assert fit.slope == pytest.approx(-0.25, abs=1e-6) and fit.r_squared == pytest.approx(1, abs=1e-9)
    assert fit.seed_slopes.half == pytest.approx(T2 * 0.02 / math.sqrt(3), rel=1e-4)
    low, high = fit.band(np.array([1.0, 8.0]))
    assert (high - low)[0] == pytest.approx(0, abs=1e-6)
    assert (high - low)[1] == pytest.approx(2 * 3 * T2 * 0.02 / math.sqrt(3), rel=1e-4)


def test_losses_at_equal_seconds_are_read_where_the_baselines_time_is_spent(known):
    validation = compare(find_runs([known]), None).results[0]
    for r in WIDTHS[1:]:
        losses = validation.compared[f"wide{r}"].losses["seconds"]
        expected = {seed: 5 + offset - pace(r, seed) / r for seed, (offset, _) in SEEDS.items()}
        assert losses == pytest.approx(expected, abs=1e-6)
    assert validation.compared["wide8"].losses.get("FLOPs") is None


def test_records_of_a_study_give_flops_and_the_time_measured_alone(known):
    for r in WIDTHS:
        name = "base" if r == 1 else f"wide{r}"
        (known / name / "timing.json").write_text(json.dumps({"seconds_per_step": 1 + 0.25 * (r > 1)}))
        for seed in SEEDS:
            counted = {"flops_per_token": 1e6 if r == 1 else 1.6e6, "parameters": 1000}
            record = {"tokens_per_step": TOKENS, "counted": counted, "state": "done"}
            record |= {} if r == 1 else {"m": 2, "n": 2 * r}
            (known / name / f"seed-{seed}" / "run.json").write_text(json.dumps(record))
    validation = compare(find_runs([known]), None).results[0]
    losses = validation.compared["wide4"].losses
    assert losses["seconds"][2] == pytest.approx(5 - 1.5 / 1.25, abs=1e-6)
    assert losses["FLOPs"][2] == pytest.approx(5 - 1.5 / 1.6, abs=1e-6)


def test_a_budget_that_is_not_reached_is_said(tmp_path):
    quick, slow = ({"lm loss validation": falling(1.0)} | {"iteration-time": {8: each}} for each in (0.1, 0.2))
    write_run(tmp_path / "runs" / "base-s1", slow, megatron_arguments(1))
    write_run(tmp_path / "runs" / "wide-s1", quick, megatron_arguments(2))
    compared = compare(find_runs([tmp_path / "runs"]), None).results[0].compared["wide"]
    assert compared.losses["seconds"] == {1: None} and compared.gaps["seconds"] is None
    assert program.main(["report", str(tmp_path / "runs")]) == 0
    assert "| not reached | - |" in (tmp_path / "runs" / "report" / "report.md").read_text()


def test_a_fit_of_points_beside_the_line():
    losses = {"a": {1: 4.0}, "b": {1: 3.7}, "c": {1: 3.6}}
    fit = fit_widths("", losses, {"a": 1, "b": 2, "c": 4})
    assert (fit.slope, fit.intercept) == pytest.approx((-0.2, 3.9 + 0.2 / 3))
    assert fit.r_squared == pytest.approx(12 / 13)
    assert fit.band(np.array([2.0])) is None and fit.seed_slopes.half is None
    assert fit_widths("", {"a": {1: 4.0}, "b": {1: 3.7}}, {"a": 1, "b": 2}) is None


def test_a_line_is_made_of_variants_that_differ_in_the_width_alone():
    def variant(name, r, **arguments):
        return Variant(
            name, {1: LoggedRun(name, name, 1, {}, {f"vwn_{key}": value for key, value in arguments.items()})}, r
        )

    projected = [variant(f"r{r}", r, embedding="projected", reduce_norm=r > 2) for r in (2, 4, 8)]
    tiled = [variant(f"t{r}", r, embedding="tiled") for r in (2, 4)]
    assert families([*tiled, *projected]) == [["t2", "t4"], ["r2", "r4", "r8"]]
    bare = variant("r8-bare", 8, embedding="projected", reduce_norm=False)
    assert families([*projected[1:], bare]) == [["r4", "r8"], ["r8-bare"]]
    # The same settings twice, from another version of the code, say: names are all that is left.
    again = [variant(f"r{r}-new", r, embedding="projected", reduce_norm=True) for r in (4, 8)]
    assert families([*projected[1:], *again]) == [["r4", "r8"], ["r4-new", "r8-new"]]
    assert families([again[0], variant("other-new", 4, embedding="projected", reduce_norm=True)]) == [
        ["r4-new"],
        ["other-new"],
    ]
    # Of a study all flags are known: those that every one of these has, in any order.
    for number, each in enumerate(projected):
        flags = [["--lr", "0.1"], ["--vwn-n", str(2 * each.r)], ["--seed", str(number)], ["--swiglu"]]
        each.first.record["flags"] = [word for group in flags[:: (-1) ** number] for word in group]
    assert families(projected) == [["r2", "r4", "r8"]]
    projected[1].first.record["flags"].remove("0.1")
    assert families(projected) == [["r2", "r8"], ["r4"]]
    for each in projected:
        each.first.record.clear()
    plain = variant("r8-plain", 8, embedding="projected", linear="plain")
    assert families([*projected[:1], plain]) == [["r2"], ["r8-plain"]]
    # Routing at r = 1 is where the line of its family begins, not the baseline, which has none.
    variants = {each.name: each for each in (variant("base", 1), variant("r1", 1, embedding="projected"), *projected)}
    (fit,) = fit_families(
        {name: {1: 9.0 if name == "base" else 4 - each.r} for name, each in variants.items()}, variants, "base"
    )
    assert fit.names == ("r1", "r2", "r4", "r8") and fit.losses.tolist() == [3, 2, 0, -4]


def test_reading_off_curves():
    curve = Curve(np.array([10.0, 20.0, 30.0]), np.array([5.0, 4.0, 4.5]))
    assert curve.at(15) == pytest.approx(4.5) and curve.at(31) is None and curve.at(9) is None
    assert curve.reach(4.25) == pytest.approx(17.5) and curve.reach(3.9) is None and curve.reach(6) == 10
    assert estimate([1.0]).half is None and not estimate([1.0]).clear
    assert estimate([1.0, 1.2, 1.1]).half == pytest.approx(T2 * 0.1 / math.sqrt(3))
    assert [split_seed(name) for name in ("a/seed-2", "a-s3", "a_seed4", "a/s5", "r8", "tests2")] == [
        ("a", 2), ("a", 3), ("a", 4), ("a", 5), ("r8", None), ("tests2", None),
    ]  # fmt: skip


def test_the_report_is_complete_and_needs_no_network(known, tmp_path, capsys):
    assert program.main(["report", str(known), "--output", str(tmp_path / "out")]) == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    plots = {
        f"{key}-{kind}" for key in ("validation", "next2") for kind in ("loss", "gap", "growth", "width", "budgets")
    }
    assert files == {"report.md", "report.html", "results.csv", "curves.csv"} | {
        f"{plot}.{end}" for plot in (*plots, "speedup") for end in ("png", "svg")
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('src="data:image/svg+xml;base64,') == 11
    assert "http:" not in page and "https:" not in page
    rows = results(tmp_path / "out")
    assert len(rows) == 12
    reached = float(rows["wide4/seed-2"]["validation_tokens_to_baseline_loss"])
    assert reached == pytest.approx(STEPS * TOKENS / 1.5, rel=1e-6)
    text = (tmp_path / "out" / "report.md").read_text()
    # At equal seconds wide2 is at 5 - 1.25/2 where the baseline is at 4.
    assert "Validation loss at equal seconds: not lower with wide2 (+0.3750" in text
    # One kind of spread, of differences; losses are means.
    mean, half = 5 + np.mean([offset for offset, _ in SEEDS.values()]) - 1.25, T2 * 0.02 / math.sqrt(3)
    assert "± and every band is a 95 % interval of Student's t over seeds" in text
    assert f"| wide2 | 2 | 3 | {mean:.4f} | -0.2500 ± {half:.4f} | 1.25 |" in text
    assert f"after 1.25 times fewer tokens (speed-up 1.25 ± {half:.2f})." in text
    assert "the regular validation of the last step counts" in text
    assert "Equal FLOPs is left out" in text
    with (tmp_path / "out" / "curves.csv").open() as file:
        points = [row for row in csv.DictReader(file) if row["run"] == "wide8/seed-2" and row["metric"] == "validation"]
    assert float(points[-1]["loss"]) == pytest.approx(3.25) and float(points[-1]["tokens"]) == STEPS * TOKENS
    # Again: the old report is replaced, and nothing else is left.
    assert program.main(["report", str(known), "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", "runs"}


def test_a_step_that_was_logged_twice_counts_once_with_its_last_value(tmp_path):
    folder = tmp_path / "runs" / "base" / "seed-1" / "events"
    write_run(folder, {"lm loss validation": falling(3.0, steps=200)}, megatron_arguments(1))
    later = tmp_path / "later"
    again = {s: v for s, v in falling(1.0).items() if s > 160}
    resumed = write_run(later, {"lm loss": again, "lm loss validation": again})
    resumed.rename(folder / resumed.name.replace("tfevents.", "tfevents.9"))
    (run,) = find_runs([tmp_path / "runs"])
    assert run.scalars["lm loss validation"] == pytest.approx(
        {step: 5 - (3 if step <= 160 else 1) * step / STEPS for step in range(40, 401, 40)}
    )


@pytest.mark.parametrize("steps", [STEPS, 2 * STEPS])
def test_a_finished_run_that_was_started_again_keeps_its_regular_validation(tmp_path, steps):
    """Every start ends with a validation on further samples; the second start here makes no step, or 400 more."""
    folder, tag = tmp_path / "base", "lm loss validation"
    first = write_run(folder, {"lm loss": falling(1.0), tag: falling(1.0)}, megatron_arguments(1))
    on = {step: loss for step, loss in falling(1.0, steps=steps).items() if step > STEPS}
    parts = [{tag: {STEPS: 4.7}}, {"lm loss": on, tag: on}, {tag: {steps: 4.9}}]
    for number, scalars in enumerate(parts):
        write_run(tmp_path / str(number), scalars, samples=False).rename(first.with_name(f"{first.name}.{number}"))
    (run,) = find_runs([folder])
    assert run.scalars[tag] == pytest.approx(falling(1.0, steps=steps))


def test_a_noisy_baseline_is_no_faster_than_itself(tmp_path):
    """It has its last loss, 4.0, after 320 of 400 steps; so has the same curve as a variant."""
    losses = falling(1.0) | {320: 4.0, 360: 4.3}
    for name, r in (("base-s1", 1), ("wide-s1", 2)):
        write_run(tmp_path / "runs" / name, {"lm loss validation": losses, "lm loss": losses}, megatron_arguments(r))
    here = compare(find_runs([tmp_path / "runs"]), None).results[0].compared["wide"]
    assert here.reached == {1: 320 * TOKENS} and here.speedup.mean == 1


def test_seeds_without_a_pair_are_left_out_and_fewer_seeds_are_said(known, tmp_path, capsys):
    for seed in (1, 2):
        (known / "base" / f"seed-{seed}").rename(tmp_path / f"base-{seed}")
    (known / "wide8" / "seed-3").rename(tmp_path / "wide8-3")
    (known / "wide4" / "seed-1").rename(tmp_path / "wide4-1")
    comparison = compare(find_runs([known]), None)
    here = comparison.results[0].compared
    assert here["wide2"].speedup.count == 1 and here["wide2"].speedup.mean == pytest.approx(pace(2, 3), rel=1e-6)
    assert here["wide8"].speedup is None and here["wide8"].gaps["tokens"] is None
    assert program.main(["report", str(known)]) == 0
    said = capsys.readouterr().out
    assert "wide2/seed-1, wide2/seed-2, wide4/seed-2, wide8/seed-1, wide8/seed-2: base has no run of that seed" in said
    text = (known / "report" / "report.md").read_text()
    assert "wide8: no run has a seed of the baseline's, so that nothing is compared." in text
    assert "of base 3, but of wide2 1 and 2 and 3, wide4 2 and 3, wide8 1 and 2; differences are of equal" in text

    # A seed that never gets there is missing in a mean of ratios.
    for seed in (1, 2):
        (tmp_path / f"base-{seed}").rename(known / "base" / f"seed-{seed}")
    slow = tmp_path / "runs" / "slow"
    for seed, fall in ((1, 2.0), (2, 2.0), (3, 0.5)):
        losses = falling(fall, 5 + SEEDS[seed][0])
        write_run(slow / f"seed-{seed}", {"lm loss": losses, "lm loss validation": losses}, megatron_arguments(2))
    assert program.main(["report", str(known)]) == 0
    (row,) = re.findall(r"^\| slow \| 2 \| .*$", (known / "report" / "report.md").read_text(), re.MULTILINE)[:1]
    assert row.startswith("| slow | 2 | 2.00 ± 0.00 (2 of 3 seeds) | - | ") and row.endswith(
        " 2.00 ± 0.00 (2 of 3 seeds) |"
    )


def test_steps_behind_the_last_one_that_was_logged_have_their_tokens(tmp_path):
    """With --tensorboard-log-interval 100 the last of 250 steps is behind the last count of samples."""
    losses = falling(1.0, every=50, steps=250)
    write_run(tmp_path / "base", {"lm loss": {100: 5.0, 200: 4.0}, "lm loss validation": losses}, megatron_arguments(1))
    (run,) = find_runs([tmp_path / "base"])
    assert run.tokens(np.array([50.0, 200.0, 250.0])).tolist() == [50 * TOKENS, 200 * TOKENS, 250 * TOKENS]


def test_the_validation_set_that_was_validated_first_is_compared(tmp_path):
    tags = {f"lm loss validation-{name}": falling(fall) for name, fall in (("wiki", 1.0), ("code", 2.0))}
    write_run(tmp_path / "base", {"lm loss": falling(1.0)} | tags, megatron_arguments(1))
    (run,) = find_runs([tmp_path / "base"])
    assert run.scalars["lm loss validation"] == pytest.approx(falling(1.0))
    assert run.notes == ["base: several validation sets; the first, wiki, is compared."]


def test_times_of_other_flags_or_hardware_are_not_compared(known):
    def time(name, flags, hardware="A"):
        content = {"seconds_per_step": 9.0, "flags": flags, "hardware": {"name": hardware}}
        (known / name / "timing.json").write_text(json.dumps(content))

    for r in WIDTHS:
        name = "base" if r == 1 else f"wide{r}"
        time(name, ["--lr", "1"])
        for seed in SEEDS:
            record = {"flags": ["--lr", "1", "--seed", str(seed)]} | ({} if r == 1 else {"m": 2, "n": 2 * r})
            (known / name / f"seed-{seed}" / "run.json").write_text(json.dumps(record))
    clocks = lambda: {each.clock for each in compare(find_runs([known]), None).variants.values()}  # noqa: E731
    assert clocks() == {"measured alone"}
    time("wide4", ["--lr", "1"], "B")
    assert clocks() == {"the runs' own clocks"}
    assert "Variants were timed on different hardware" in compare(find_runs([known]), None).notes[0]
    time("wide4", ["--lr", "2"])
    assert clocks() == {"the runs' own clocks"}
    assert compare(find_runs([known]), None).notes[0].startswith("wide4: timing.json is of other flags and not used")


def test_what_is_wrong_with_training_losses_is_said_where_nothing_was_validated(tmp_path):
    for name, r, losses in (
        ("base-s1", 1, falling(1.0, every=1)),
        ("wide-s1", 2, falling(2.0, every=1, steps=200) | {300: math.nan, 310: math.nan}),
    ):
        write_run(tmp_path / "runs" / name, {"lm loss": losses}, megatron_arguments(r))
    notes = compare(find_runs([tmp_path / "runs"]), None).notes
    assert notes[0] == "wide-s1: 'lm loss' is not finite at 2 points, first at step 300; left out."
    assert notes[1].startswith("wide-s1: shorter than the baseline")


def test_routing_at_the_end_is_that_of_runs_at_their_end(known):
    for seed, end in ((1, STEPS), (2, 40)):
        values = {step: 10.0 if step == STEPS else 1.0 for step in (20, 40, STEPS) if step <= end}
        tags = {f"vwn/independent_segments/{what}": values for what in ("mean", "min", "max")}
        tags |= {"vwn/effective_segments/mean": {step: 4 * value for step, value in values.items()}}
        tags |= {"vwn_layers/depth_window/layer_002": values, "lm loss validation": falling(2.0, steps=end)}
        folder = known / "wide16" / f"seed-{seed}"
        write_run(folder, tags | {"lm loss": falling(2.0, steps=end)}, megatron_arguments(16))
    (found,) = routings(compare(find_runs([known]), None)).values()
    assert (found.independent.final, found.effective, found.window) == (10, 40, 10)


def test_the_loss_on_a_test_set_is_not_taken_for_the_last_validation(tmp_path):
    file = write_run(tmp_path / "base", {"lm loss validation": falling(1.0)}, megatron_arguments(1) | {"do_test": 1})
    extra = write_run(tmp_path / "extra", {"lm loss validation": {STEPS: 9.0}})
    extra.rename(file.with_name(f"{file.name}.2"))
    (run,) = find_runs([tmp_path / "base"])
    assert run.scalars["lm loss validation"][STEPS] == pytest.approx(4.0)


@pytest.mark.parametrize("do_test", [0, 1])
def test_the_second_validation_of_the_last_step_is_not_taken(tmp_path, do_test):
    """It is on other samples than the regular one, with which a curve would seem to turn up."""
    tag, folder = "lm loss validation", tmp_path / "base"
    file = write_run(folder, {tag: falling(1.0)}, megatron_arguments(1) | {"do_test": do_test})
    for number, loss in enumerate([4.7, 9.0][: 1 + do_test], 2):  # the second validation, the test set
        extra = write_run(tmp_path / str(number), {tag: {STEPS: loss}})
        extra.rename(file.with_name(f"{file.name}.{number}"))
    (run,) = find_runs([folder])
    assert run.scalars[tag] == pytest.approx(falling(1.0))


def test_the_spread_of_curves():
    curves = [Curve(np.array([1.0, 2.0]), np.array([5.0, each])) for each in (4.0, 4.2, 4.1)]
    assert spread(curves).half == pytest.approx([0, T2 * 0.1 / math.sqrt(3)]) and spread(curves[:1]).half is None


def test_a_cut_file_is_used_as_far_as_it_is_whole_and_the_report_says_so(known, capsys):
    (file,) = (known / "wide2" / "seed-1" / "events").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    assert program.main(["report", str(known)]) == 0
    assert f"wide2/seed-1: {file.name} is cut in its last record" in capsys.readouterr().out
    assert "is cut in its last record" in (known / "report" / "report.md").read_text()


def test_unequal_tags_are_noted_where_the_rest_is_usable(known, capsys):
    for file in (known / "wide2" / "seed-1" / "events").iterdir():
        file.unlink()
    write_run(known / "wide2" / "seed-1" / "events", {"lm loss": falling(1.0)}, megatron_arguments(2))
    assert program.main(["report", str(known)]) == 0
    assert "wide2/seed-1: no 'lm loss validation' in the event files" in capsys.readouterr().out
    assert results(known / "report")["wide2/seed-1"]["validation_final_loss"] == ""


def test_unknown_tokens_make_steps_the_axis(tmp_path, capsys):
    for name, fall in (("base", 1.0), ("r2", 2.0)):
        write_run(tmp_path / "runs" / name, {"lm loss": falling(fall, every=1)}, samples=False)
    assert program.main(["report", str(tmp_path / "runs")]) == 0
    assert "steps stand for tokens" in capsys.readouterr().out
    text = (tmp_path / "runs" / "report" / "report.md").read_text()
    assert "No run was validated" in text and "400 steps" in text


def test_names_of_runs_are_text_in_both_formats(tmp_path):
    names = ["<img src=x onerror=alert(1)>", "a|b*c*_d_`e`[f](g)#"]
    for name, fall in zip(["base", *names], (1.0, 2.0, 0.5), strict=True):
        write_run(tmp_path / "runs" / name, {"lm loss": falling(fall, every=1)}, samples=False)
    assert program.main(["report", str(tmp_path / "runs")]) == 0
    text = (tmp_path / "runs" / "report" / "report.md").read_text()
    assert "<img" not in text and r"| a\|b\*c\*\_d\_\`e\`\[f\](g)\# | - | 1 |" in text
    page = (tmp_path / "runs" / "report" / "report.html").read_text()
    for name in names:
        assert f"<td>{html.escape(name, quote=False)}</td>" in page
    assert page.count("<img") == page.count('src="data:image/svg+xml;base64,')


def refusal(capsys, *words) -> str:
    """What a report says that is refused; it must be one sentence, with exit code 2."""
    assert program.main(["report", *map(str, words)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("vwn-study: ") and message.count("\n") == 1
    return message


def test_folders_that_make_no_report_are_refused(tmp_path, capsys):
    runs = tmp_path / "runs"
    assert "is no folder" in refusal(capsys, runs)
    runs.mkdir()
    assert "holds no event files" in refusal(capsys, runs)
    write_run(runs / "empty", {})
    assert "hold no scalars at all" in refusal(capsys, runs)
    (runs / "odd").mkdir()
    (runs / "odd" / "events.out.tfevents.1").write_bytes(b"no record of any kind" * 9)
    assert "hold no scalars at all" in refusal(capsys, runs)
    write_run(runs / "wide", {"lm loss validation": falling(2.0)}, megatron_arguments(2))
    assert "none of the runs is without a virtual width" in refusal(capsys, runs)
    write_run(runs / "base", {"lm loss": falling(1.0)}, megatron_arguments(1))
    assert "unequal tags: no run of the baseline base has 'lm loss validation'" in refusal(capsys, runs)
    assert "no run of the baseline other" in refusal(capsys, runs, "--baseline", "other")
    assert "would both be" in refusal(capsys, *_twice(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "holds thesis.txt, which no report wrote" in refusal(capsys, runs, "--output", tmp_path / "mine")
    (tmp_path / "mine" / "report.md").write_text("mine, too")
    assert "holds thesis.txt, which no report wrote" in refusal(capsys, runs, "--output", tmp_path / "mine")
    (tmp_path / "mine" / "thesis.txt").rename(tmp_path / "mine" / "figure.png")
    assert "holds figure.png, which no report wrote" in refusal(capsys, runs, "--output", tmp_path / "mine")
    assert not (runs / "report").exists() and (tmp_path / "mine" / "figure.png").exists()
    for name, key, value in (("run.json", "tokens_per_step", "x"), ("run.json", "commit", "abc")):
        (runs / "wide" / name).write_text(json.dumps({key: value}))
        assert f"has {key}: '{value}', which vwn-study did not write: delete it." in refusal(capsys, runs)
    (runs / "wide" / "run.json").write_text("[1]")
    assert "run.json holds no JSON object" in refusal(capsys, runs)


def test_a_report_without_its_extra_says_what_to_install(tmp_path):
    program = "import sys; sys.modules['scipy'] = None; from megatron_vwn.study.__main__ import main; sys.exit(main())"
    done = launch.real(0, "-c", program, "report", tmp_path)
    assert (
        done.returncode == 2 and done.stderr == "vwn-study: a report needs scipy: pip install 'megatron_vwn[study]'.\n"
    )


def _twice(tmp_path):
    for name in ("seed-1", "s1"):
        write_run(tmp_path / "twice" / "base" / name, {"lm loss": falling(1.0)})
    return (tmp_path / "twice",)


def test_a_report_that_fails_leaves_the_old_one_and_nothing_half_written(known, monkeypatch):
    assert program.main(["report", str(known)]) == 0
    before = (known / "report" / "report.html").read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_study_report, "as_html", fail)
    assert program.main(["report", str(known)]) == 130
    assert (known / "report" / "report.html").read_bytes() == before
    assert not [path for path in known.iterdir() if path.name.startswith(".")]


def test_an_advantage_that_grows_is_followed_to_the_decay_of_the_learning_rate(tmp_path, capsys):
    """The baseline falls in a line; the variant t times faster after t, until 300 of 400 steps."""
    steps = range(20, STEPS + 1, 20)
    wsd = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": "100", "train_iters": str(STEPS), "lr_decay_iters": "None"}
    for name, r, losses in (
        ("base", 1, {step: 5 - step / 400 for step in steps}),
        ("wide4", 4, {step: 5 - step / 400 * (1 + step / 800) for step in steps}),
    ):
        # Megatron's tag of the first of several validation sets.
        scalars = {"lm loss": losses, "lm loss validation-0": losses, "lm loss validation-1": dict.fromkeys(steps, 9.0)}
        write_run(tmp_path / "runs" / name / "seed-1" / "events", scalars, megatron_arguments(r) | wsd)
    (validation,) = compare(find_runs([tmp_path / "runs"]), None).results
    assert validation.constant_until == 300 * TOKENS
    (base,) = (run for run in find_runs([tmp_path / "runs"]) if run.r == 1)
    base.arguments["lr_decay_iters"] = "250"
    assert constant_until(base) == 150 * TOKENS
    here = validation.compared["wide4"]
    # t = x (1 + x / 800): x = 400 (sqrt(1 + t / 200) - 1), read off a curve with a point every 20 steps.
    expected = {share: t / (400 * (math.sqrt(1 + t / 200) - 1)) for share in SHARES for t in [share * STEPS]}
    found = at_shares(here.growth, validation.budget)
    for share, ratio in expected.items():
        assert found[share].mean == pytest.approx(ratio, rel=2e-3), share
    assert here.constant_gap.mean == pytest.approx(-300 / 400 * 300 / 800, rel=1e-6)
    assert change(here.growth, 100 * TOKENS, 300 * TOKENS).mean == pytest.approx(
        expected[0.75] - expected[0.25], abs=5e-3
    )
    assert program.main(["report", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    first = (tmp_path / "out" / "report.md").read_text().partition("## What came out")[0]
    assert "The advantage between a quarter of the training and the end of the constant learning rate" in first
    assert "wide4 grows, by +0.18" in first, first
