"""The quickstart's reading of logs, event files and checkpoints; its runs themselves are too long for a test."""

import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

import progress
import report

STEP = (
    " [2026-11-23 15:43:32.200968] iteration       20/     500 | consumed samples:          160 | elapsed time per "
    "iteration (ms): 691.8 | learning rate: 8.000000E-04 | global batch size:     8 | lm loss: 6.245256E+00 | loss "
    "scale: 1.0 | grad norm: 1.097 | number of skipped iterations:   0 | number of nan iterations:   0 |"
)
STEP_WITH_MTP = STEP.replace("| loss scale", "| load_balancing_loss: 7.6E-01 | mtp_1 loss: 6.501234E+00 | loss scale")
VALIDATION = (
    " validation loss at iteration 50 on validation set | lm loss value: 5.844118E+00 | lm loss PPL: 3.45E+02 | "
)


def write_run(folder, validations, seconds, sizes, further=()):
    for wall_time, (step, loss) in enumerate(validations):
        with SummaryWriter(folder / "events", filename_suffix=f".{wall_time}") as writer:
            writer.add_scalar(report.VALIDATION_LOSS, loss, step, walltime=wall_time)
    with SummaryWriter(folder / "events", filename_suffix=".seconds") as writer:
        for step, value in enumerate(seconds):
            writer.add_scalar(report.SECONDS_PER_STEP, value, step)
        for step, loss in enumerate(further):
            writer.add_scalar("mtp_1 loss", loss, step)
            writer.add_scalar("mtp_1_acceptance_rate", 50.0, step)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("20\n")
    tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    checkpoint.save(tensors, checkpoint_id=folder / "checkpoints" / "iter_0000020", no_dist=True)


def test_loss_is_reached_between_two_validations():
    curve = {10: 6.0, 20: 5.0, 30: 4.0}
    assert report.step_of_loss(curve, 4.25) == pytest.approx(27.5)
    assert report.step_of_loss(curve, 5.0) == pytest.approx(20)
    assert report.step_of_loss(curve, 6.5) == 10
    assert report.step_of_loss(curve, 3.9) is None


def test_table_states_what_event_files_and_checkpoints_say(tmp_path):
    # The second run logged step 10 twice, as one does that was interrupted and resumed: the later value counts.
    model = {"embedding.weight": (4, 3), "optimizer.state.exp_avg.embedding.weight": (4, 3), "rng_state/x": (7,)}
    write_run(tmp_path / "one", [(10, 6.0), (20, 5.0)], [0.9, 0.2, 0.1], model)
    wide = {**model, "layer.connection.routing": (5,)}
    write_run(tmp_path / "two", [(10, 9.0), (10, 5.5), (20, 4.5)], [0.9, 0.4, 0.3], wide)
    table = report.summarise(
        tmp_path / "one", tmp_path / "two", "--vwn-m 2 --vwn-n 8", tokens_per_step=100, bits_per_byte=(1.9, 1.85)
    )
    rows = {line[:35].strip(): line[35:].split() for line in table.splitlines() if line.strip("- ")}
    assert rows["final validation loss"] == ["5.0000", "4.5000"]
    assert rows["tokens to the baseline's final loss"] == ["2,000", "1,500"]
    assert rows["time per step (median)"] == ["200", "ms", "400", "ms"]
    assert rows["held-out bits per byte"] == ["1.9000", "1.8500"]
    assert rows["parameters"] == ["12", "17"]
    assert rows["of these the virtual width's"] == ["5"]
    assert "mtp" not in table and "mean over" not in table


def test_table_says_when_the_loss_was_not_reached(tmp_path):
    write_run(tmp_path / "one", [(20, 5.0)], [0.1], {"w": (1,)})
    write_run(tmp_path / "two", [(20, 5.1)], [0.1], {"w": (1,)})
    assert "not reached" in report.summarise(
        tmp_path / "one", tmp_path / "two", "wide", tokens_per_step=100, bits_per_byte=(1.9, 1.85)
    )


def test_table_has_the_mean_of_the_last_further_losses(tmp_path):
    last = [4.0, 6.0] * (report.LAST_STEPS // 2)
    write_run(tmp_path / "one", [(20, 5.0)], [0.1], {"w": (1,)}, [9.0, 9.0, *last])
    write_run(tmp_path / "two", [(20, 4.0)], [0.1], {"w": (1,)}, [9.0, *(loss - 0.5 for loss in last)])
    table = report.summarise(tmp_path / "one", tmp_path / "two", "wide", tokens_per_step=100, bits_per_byte=(1.9, 1.85))
    rows = {line[:35].strip(): line[35:].split() for line in table.splitlines()}
    assert rows["final validation loss"] == ["5.0000", "4.0000"]
    assert rows["mtp_1 loss in training"] == ["5.0000", "4.5000"]
    assert f"mtp_1 loss: mean over the last {report.LAST_STEPS} steps" in table
    assert "acceptance" not in table


def test_parameters_are_counted_without_either_optimizer_of_a_model_with_experts(tmp_path):
    sizes = {"experts.weight": (4, 3), "chained_0.optimizer.exp_avg": (100,), "chained_1.optimizer.exp_avg": (1000,)}
    write_run(tmp_path / "one", [(20, 5.0)], [0.1], sizes)
    assert report.count_parameters(tmp_path / "one") == 12


def run_script(tmp_path, capsys, script, until=500):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", script, str(folder)]
    progress.train(folder, command, until, progress.Clock(work=1000, starts=2, end=40))
    return capsys.readouterr().out


TRAINING = f"""
import pathlib, sys
print({STEP!r}); print({STEP.replace("   20/", "   30/")!r}); print({VALIDATION!r})
folder = pathlib.Path(sys.argv[1]) / "checkpoints"; folder.mkdir()
(folder / "latest_checkpointed_iteration.txt").write_text("500")
"""


def test_progress_shows_steps_and_validations_and_keeps_the_log(tmp_path, capsys):
    shown = run_script(tmp_path, capsys, TRAINING)
    assert "step   20/500  loss 6.2453    692 ms/step  left: this run 5:32, all 12:17" in shown
    assert "step   30/500  loss 6.2453    692 ms/step  left: " in shown
    assert "validation loss 5.8441" in shown
    assert STEP in (tmp_path / "run" / "log.txt").read_text()


def test_what_is_left_is_estimated_with_validations_and_with_what_is_to_come(tmp_path, capsys, monkeypatch):
    # The first ten steps end 13.84 s after the first began, the next ten steps, with a validation, 30 s later.
    times = iter([0.0, 5.0, 100.0, 101.0, 130.0, 131.0, 132.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    shown = run_script(tmp_path, capsys, TRAINING)
    pace = (130 - (100 - 20 * 0.6918)) / 30
    left = progress.minutes(470 * pace)
    everything = progress.minutes(970 * pace + progress._START_SECONDS + 40)  # one of two starts is behind us
    assert f"step   30/500  loss 6.2453    692 ms/step  left: this run {left}, all {everything}" in shown


def test_progress_shows_the_loss_of_a_further_token(tmp_path, capsys):
    shown = run_script(tmp_path, capsys, TRAINING.replace(repr(STEP), repr(STEP_WITH_MTP)))
    assert "step   20/500  loss 6.2453  mtp_1 loss 6.5012    692 ms/step" in shown
    assert "step   30/500  loss 6.2453    692 ms/step" in shown


def test_a_finished_run_is_skipped(tmp_path, capsys):
    run_script(tmp_path, capsys, TRAINING)
    assert "was reached earlier" in run_script(tmp_path, capsys, "raise SystemExit(1)")


def test_failure_shows_the_end_of_the_log(tmp_path, capsys):
    with pytest.raises(progress.RunFailedError, match=r"(?s)exit code 3.*log.txt.*line 59"):
        run_script(tmp_path, capsys, "for i in range(60): print('line', i)\nraise SystemExit(3)")


def test_a_run_that_ends_too_early_is_a_failure(tmp_path, capsys):
    with pytest.raises(progress.RunFailedError, match="ended before step 500"):
        run_script(tmp_path, capsys, "print('done')")
