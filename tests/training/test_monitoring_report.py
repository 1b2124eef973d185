"""What a snapshot becomes: charts, pictures, warnings and what wandb gets."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.ops.parameters import initial_pattern
from megatron_vwn.training.flags.vwn import add_arguments, virtual_width_from_args
from megatron_vwn.training.monitoring import images as routing_images
from megatron_vwn.training.monitoring import scalars as monitoring_scalars
from megatron_vwn.training.monitoring.snapshot import ConnectionStatistics, Place, Snapshot
from megatron_vwn.training.monitoring.writers import Report
from megatron_vwn.training.refusals.monitoring import check_monitoring

LAYERS, FURTHER = 8, 2


def snapshot(m=2, n=4, *, mean=None, energy=None, iteration=100, layers=LAYERS) -> Snapshot:
    """Every connection with these token means, by default the initial ones, and this energy per segment."""
    pattern = initial_pattern(m, n, n, dtype=torch.float64, device="cpu")
    connection = ConnectionStatistics(
        m=m,
        static=pattern,
        mean=pattern if mean is None else mean,
        spread=0.1 * pattern,
        dynamic_share=0.5,
        gate_saturation=0.25,
        gram_NN=torch.diag(torch.ones(n, dtype=torch.float64) if energy is None else energy),
    )
    places = [Place(0, i) for i in range(1, layers + 1)] + [Place(1, i) for i in range(1, FURTHER + 1)]
    return Snapshot(
        iteration=iteration,
        connections=dict.fromkeys(places, connection),
        gradient_norms={"routing": 3.0, "scale": 0.0, "weight": 4.0, "norm": 0.0, "reduce": 12.0},
        connection_gradient_norms=dict.fromkeys(places, 5.0),
    )


def scalars_of(taken: Snapshot) -> dict[str, float]:
    return monitoring_scalars.scalars(taken, monitoring_scalars.per_connection(taken))


def carrying(factor: float, m=2, n=4) -> torch.Tensor:
    pattern = initial_pattern(m, n, n, dtype=torch.float64, device="cpu")
    pattern[:, m : m + n] *= factor
    return pattern


def test_numbers_of_a_model_at_birth():
    found = scalars_of(snapshot())
    expected = {
        "vwn/depth_window/max": LAYERS / 2,  # it reads the LAYERS - 1 outputs before it alike
        "vwn/depth_window/min": 1,
        "vwn_layers/depth_window/layer_008": LAYERS / 2,
        "vwn_layers/depth_window/mtp_1_layer_002": 1,
        "vwn/carry_gain_forward_max/max": 1,
        "vwn/carry_kept/mean": 1,
        "vwn/carry_mixed/mean": 0,
        "vwn/effective_segments/min": 4,
        "vwn/segment_norm_max/mean": 1,
        "vwn/gradient_norm/all": 13,
        "vwn_layers/connection_gradient_norm/mtp_1_layer_001": 5,
    }
    assert {tag: found[tag] for tag in expected} == pytest.approx(expected)
    assert "vwn_layers/depth_window/layer_001" not in found and "vwn_layers/depth_window/mtp_1_layer_001" not in found


def test_numbers_of_a_carry_that_doubles():
    found = scalars_of(snapshot(mean=carrying(2.0)))
    assert found["vwn_layers/carry_gain_mean/layer_008"] == 2
    assert found["vwn_layers/carry_gain_backward_max/layer_001"] == 2**LAYERS
    assert found["vwn_layers/carry_gain_forward_max/mtp_1_layer_001"] == 2**FURTHER
    # Older outputs count twice as much with every sublayer that they pass: weights 1, 2 at distances 1, 2.
    assert found["vwn_layers/depth_window/layer_003"] == pytest.approx((1 * 1 + 2 * 2) / (1 + 2))


def test_every_chart_finds_its_tags():
    taken = snapshot(layers=40)
    tags = scalars_of(taken).keys()
    charts = [chart for category in monitoring_scalars.layout(taken).values() for chart in category.values()]
    assert len(charts) > 10
    for kind, patterns in charts:
        exact = [pattern.strip("^$") for pattern in patterns]
        assert set(exact) <= tags, exact
        assert len(patterns) == 3 if kind == "Margin" else 1 < len(patterns) <= 6


def test_pictures():
    found = routing_images.images(snapshot())
    assert found.keys() == {
        "vwn/routing",
        "vwn/routing_static",
        "vwn/routing_spread",
        "vwn/segment_norms",
        "vwn/depth_receptive_field",
        "vwn/depth_receptive_field_mtp_1",
    }
    for tag, pixels in found.items():
        high, wide, colours = pixels.shape
        assert pixels.dtype == np.uint8 and colours == 3 and 100 < high < 800 and 100 < wide < 800, (tag, pixels.shape)
        assert 0.6 < wide / high < 1.7, (tag, pixels.shape)
    assert "vwn/routing_spread" not in routing_images.images(static(snapshot()))


def static(taken: Snapshot) -> Snapshot:
    spread = torch.zeros(4, 8, dtype=torch.float64)
    for connection in taken.connections.values():
        object.__setattr__(connection, "spread", spread)
    return taken


def cells(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    """How many pixels have exactly this colour."""
    return int((pixels == colour).all(-1).sum())


def test_colours_of_a_mosaic():
    m, n = 1, 2
    matrix = np.array([[1.0, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 5.0]])
    pixels = routing_images.mosaic([matrix], ["1"], m, "x")
    side = routing_images._cell_size(max(n + 2, 2 * m + n + 1))
    # One cell of 1, one beyond it, one of -1; and the ends of the scale of colours.
    scale = cells(routing_images.mosaic([0 * matrix], ["1"], m, "x"), routing_images._RED)
    assert cells(pixels, routing_images._RED) == 2 * side**2 + scale
    assert cells(pixels, routing_images._BLUE) == side**2 + scale


def test_shape_of_the_depth_map():
    field = np.tril(np.ones((4, 5)), 0)
    pixels = routing_images.depth_map(field, [1, 2, 3, 4])
    dark, nothing = cells(pixels, routing_images._VIOLET), cells(pixels, routing_images._NOTHING)
    # Of 4 x 4 cells 10 are read and 6 lie in the future; lines and the scale take few.
    assert dark / nothing == pytest.approx(10 / 6, rel=0.05)


def test_large_models_stay_small_pictures():
    values = np.random.default_rng(0).normal(size=(64, 80)) / 8
    assert max(routing_images.mosaic([values] * 48, [str(i) for i in range(48)], 8, "x").shape) < 900
    assert max(routing_images.depth_map(np.tril(np.ones((192, 193))), range(1, 193)).shape) < 700


class Writer:
    """Keeps the calls of a SummaryWriter."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args))


def report(virtual_width=None, wandb=None) -> tuple[Report, Writer]:
    writer = Writer()
    width = virtual_width or VirtualWidthConfig(m=2, n=4)
    return Report(width, tensorboard=lambda: writer, wandb=lambda: wandb), writer


def test_warnings_are_said_once_and_say_what_to_try(capsys):
    told, _ = report()
    told.write(snapshot())
    assert capsys.readouterr().out == ""
    collapsed = torch.tensor([1.0, 1e-4, 1e-4, 1e-4], dtype=torch.float64)
    told.write(snapshot(energy=collapsed, iteration=200))
    told.write(snapshot(energy=collapsed, mean=carrying(1.5), iteration=300))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2, said
    assert said[0].startswith("megatron_vwn: warning at iteration 200: the segments collapse: before layer 1 1.00 of 4")
    assert "iteration 300: the carry from layer 1 to the end amplifies 25.6 times (threshold 16)" in said[1]
    for line in said:
        assert "--vwn-carry doubly-stochastic or identity, a lower --lr" in line
    for lost in ({"mean": carrying(float("nan"))}, {"energy": torch.full((4,), float("inf"), dtype=torch.float64)}):
        told, _ = report()
        told.write(snapshot(**lost))
        (line,) = capsys.readouterr().out.splitlines()
        assert "is not finite; go back to a checkpoint before" in line
    told, _ = report(VirtualWidthConfig(m=2, n=4, carry="identity"))
    told.write(snapshot(energy=collapsed))
    assert "start again with a lower --lr" in capsys.readouterr().out


def test_the_flag_and_where_it_writes(monkeypatch):
    argv = ["--vwn-m", "2", "--vwn-n", "4", "--vwn-log-interval", "100"]
    width = virtual_width_from_args(add_arguments(argparse.ArgumentParser()).parse_args(argv))
    assert width == VirtualWidthConfig(m=2, n=4, log_interval=100)
    for wrong in (0, -1, 1.5):
        with pytest.raises(VirtualWidthError, match=r"--vwn-log-interval is .*: give a whole number of at least 1"):
            VirtualWidthConfig(m=2, n=4, log_interval=wrong)
    with pytest.raises(VirtualWidthError, match="--vwn-log-interval says nothing without --vwn-m and --vwn-n"):
        virtual_width_from_args(add_arguments(argparse.ArgumentParser()).parse_args(argv[4:]))
    nowhere = SimpleNamespace(tensorboard_dir=None, wandb_project="")
    check_monitoring(nowhere, VirtualWidthConfig(m=2, n=4))
    check_monitoring(nowhere, None)
    for of_a_writer in ({"tensorboard_dir": "runs"}, {"wandb_project": "mine"}):
        check_monitoring(SimpleNamespace(**vars(nowhere) | of_a_writer), width)
    with pytest.raises(VirtualWidthError, match="nowhere to write: add --tensorboard-dir or --wandb-project"):
        check_monitoring(nowhere, width)
    monkeypatch.setattr("megatron_vwn.training.refusals.monitoring.find_spec", lambda name: None)
    with pytest.raises(VirtualWidthError, match="needs the package tensorboard"):
        check_monitoring(SimpleNamespace(tensorboard_dir="runs", wandb_project=""), width)


def test_the_layout_is_written_once_and_numbers_that_are_none_are_survived():
    told, writer = report()
    told.write(snapshot())
    told.write(snapshot(mean=carrying(float("nan")), energy=torch.full((4,), float("inf"), dtype=torch.float64)))
    names = [name for name, *_ in writer.calls]
    assert names.count("add_custom_scalars") == 1
    assert names.count("add_image") == 12 and names.count("add_scalar") == 2 * len(scalars_of(snapshot()))
    for name, _, value, *_ in (call for call in writer.calls if call[0] == "add_histogram"):
        assert np.isfinite(value).all() and value.size, name


def test_wandb_gets_everything_in_one_call():
    logged = []
    wandb = SimpleNamespace(
        Histogram=lambda np_histogram: ("histogram", len(np_histogram[0])),
        Image=lambda pixels: ("image", pixels.shape),
        log=lambda values, step: logged.append((values, step)),
    )
    taken = snapshot()
    Report(VirtualWidthConfig(m=2, n=4), tensorboard=lambda: None, wandb=lambda: wandb).write(taken)
    ((values, step),) = logged
    assert step == 100
    expected = scalars_of(taken).keys() | monitoring_scalars.histograms(taken).keys()
    assert values.keys() == expected | routing_images.images(taken).keys()
    assert Report(VirtualWidthConfig(m=2, n=4), tensorboard=lambda: None, wandb=lambda: None).here() is None
