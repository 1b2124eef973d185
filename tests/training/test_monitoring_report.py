"""What a snapshot becomes: charts, pictures, warnings and what wandb gets."""

import argparse
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.ops.parameters import initial_pattern
from megatron_vwn.training.flags.vwn import add_arguments, virtual_width_from_args
from megatron_vwn.training.monitoring import images as routing_images
from megatron_vwn.training.monitoring import scalars as monitoring_scalars
from megatron_vwn.training.monitoring.charts import layout, layout_summary
from megatron_vwn.training.monitoring.depth import independent_directions
from megatron_vwn.training.monitoring.descriptions import Descriptions
from megatron_vwn.training.monitoring.reference import at_birth, reference_scalars
from megatron_vwn.training.monitoring.snapshot import ConnectionStatistics, Place, Snapshot
from megatron_vwn.training.monitoring.verdict import verdict
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


WIDTH = VirtualWidthConfig(m=2, n=4, embedding="projected")


def test_every_chart_finds_its_tags():
    taken = snapshot(layers=40)
    references = reference_scalars(WIDTH, 40)
    tags = scalars_of(taken).keys() | references.keys()
    categories = layout(taken, references)
    charts = {title: chart for category in categories.values() for title, chart in category.items()}
    assert len(charts) > 10
    for kind, content in charts.values():
        found = (
            {tag for series in content for tag in series} if kind == "bands" else {tag.strip("^$") for tag in content}
        )
        assert found <= tags, found - tags
        assert kind == "bands" or 1 < len(content) <= 8
    _, (values, birth, most) = charts["independent segments, lines at birth and n"]
    assert values == tuple(f"vwn/independent_segments/{of}" for of in ("mean", "min", "max"))
    assert birth == ("vwn/independent_segments/birth",) * 3 and most == ("vwn/independent_segments/n",) * 3
    _, lines = charts["independent segments of layers 1, 9, 17, 24, 32, 40"]
    assert "^vwn_layers/independent_segments/layer_009$" in lines and "^vwn/independent_segments/birth$" in lines
    assert [category.title for category in Layout.FromString(_layout_bytes(categories)).category] == list(categories)


def _layout_bytes(categories) -> bytes:
    (value,) = layout_summary(categories).value
    assert value.tag == "custom_scalars__config__"
    return value.tensor.string_val[0]


def test_values_at_birth_are_those_of_a_fresh_model():
    found = scalars_of(snapshot())
    copies = torch.eye(2, dtype=torch.float64).repeat(2, 2)  # segments 0 and 2 are alike, and 1 and 3
    for name, value in at_birth(WIDTH, LAYERS).items():
        if name in ("dynamic_share", "gate_saturation"):  # which this snapshot of a test invents
            assert value == 0
        elif name == "independent_segments":
            assert value == independent_directions(copies) == 2
        else:
            assert found[f"vwn/{name}/mean"] == pytest.approx(value), name
    uneven = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.float64)
    three = VirtualWidthConfig(m=2, n=3, embedding="tiled")
    assert at_birth(three, 2)["independent_segments"] == pytest.approx(independent_directions(uneven))
    assert "independent_segments" not in at_birth(VirtualWidthConfig(m=2, n=4, embedding="wide"), 2)


def test_every_tag_has_a_description():
    taken = snapshot()
    describe = Descriptions(WIDTH, taken).of
    tags = scalars_of(taken).keys() | reference_scalars(WIDTH, LAYERS).keys()
    tags |= monitoring_scalars.histograms(taken).keys() | routing_images.images(taken).keys()
    for tag in tags:
        assert describe(tag).endswith("."), tag
    assert describe("vwn/independent_segments/mean") == (
        "Mean over the trunk's connections: how many segments are no copies of others; more than at birth means that "
        "width is used. 2 in a model that has just been made. (m, n) = (2, 4), 8 connections."
    )
    assert describe("vwn_layers/segment_norms/mtp_1_layer_002").startswith("Layer 2 of further prediction 1, by its")
    with pytest.raises(KeyError):
        describe("vwn/unheard_of/mean")


@pytest.mark.parametrize(
    ("width", "independent", "dynamic", "said"),
    [
        (WIDTH, 1.9, 0.01, "1.9 of 4 independent segments (2.0 at birth), dynamic share 1 %: barely used yet"),
        (
            WIDTH,
            2.05,
            0.5,
            "(2.0 at birth), dynamic share 50 %: barely used yet, though coefficients depend on the token",
        ),
        (WIDTH, 2.2, 0.002, "dynamic share less than 1 %: the width is partly used"),
        (WIDTH, 2.6, 0.01, "the width is used"),
        (WIDTH, float("nan"), 0.01, "the stream is not finite"),
        (replace(WIDTH, connection="static"), 2.6, 0.0, "(2.0 at birth): the width is used"),
        (replace(WIDTH, embedding="wide"), 3.9, 0.01, "3.9 of 4 independent segments (m = 2; more at birth), "),
        (VirtualWidthConfig(m=4, n=4), 3.9, 0.01, "there is no width beyond the backbone's"),
    ],
)
def test_the_verdict_of_a_step(width, independent, dynamic, said):
    taken = snapshot(iteration=60)
    values = monitoring_scalars.per_connection(taken)
    values["independent_segments"] = dict.fromkeys(taken.connections, independent)
    values["dynamic_share"] = dict.fromkeys(taken.connections, dynamic)
    line = verdict(taken, values, width)
    assert line.startswith("step 60: ") and said in line and "\n" not in line
    if width.embedding == "wide" and width.n > width.m:  # the snapshot's tenth of spread is all that was learned
        assert "1 % of the coefficients learned, dynamic share 1 %: barely used yet" in line


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
    """Keeps what a SummaryWriter would write."""

    def __init__(self):
        self.values, self.file_writer, self.default_bins = [], self, [-1.0, 0.0, 1.0]

    def add_summary(self, summary, step=None):
        self.values += [(value, step) for value in summary.value]


def report(virtual_width=None, wandb=None) -> tuple[Report, Writer]:
    writer = Writer()
    return Report(virtual_width or WIDTH, tensorboard=lambda: writer, wandb=lambda: wandb), writer


def warnings(capsys) -> list[str]:
    """What was printed, but for the verdict of every step."""
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("megatron_vwn: step ")]


def test_warnings_are_said_once_and_say_what_to_try(capsys):
    told, _ = report()
    told.write(snapshot())
    assert warnings(capsys) == []
    collapsed = torch.tensor([1.0, 1e-4, 1e-4, 1e-4], dtype=torch.float64)
    told.write(snapshot(energy=collapsed, iteration=200))
    told.write(snapshot(energy=collapsed, mean=carrying(1.5), iteration=300))
    said = warnings(capsys)
    assert len(said) == 2, said
    assert said[0].startswith("megatron_vwn: warning at iteration 200: the segments collapse: before layer 1 1.00 of 4")
    assert "iteration 300: the carry from layer 1 to the end amplifies 25.6 times (threshold 16)" in said[1]
    for line in said:
        assert "--vwn-carry doubly-stochastic or identity, a lower --lr" in line
    for lost in ({"mean": carrying(float("nan"))}, {"energy": torch.full((4,), float("inf"), dtype=torch.float64)}):
        told, _ = report()
        told.write(snapshot(**lost))
        (line,) = warnings(capsys)
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
    values = [value for value, _ in writer.values]
    assert [value.tag for value in values].count("custom_scalars__config__") == 1
    kinds = {"simple_value": 0, "histo": 0, "image": 0}
    for value in values:
        for kind in kinds:
            kinds[kind] += value.HasField(kind)
        if value.HasField("histo"):
            assert np.isfinite(value.histo.sum) and value.histo.num
    assert kinds["image"] == 12 and kinds["histo"] > 30
    assert kinds["simple_value"] == 2 * (len(scalars_of(snapshot())) + len(reference_scalars(WIDTH, LAYERS)))


def test_the_first_value_of_every_tag_is_described():
    told, writer = report()
    told.write(snapshot())
    first = [value for value, _ in writer.values if value.tag != "custom_scalars__config__"]
    assert all(value.metadata.summary_description and value.metadata.data_class for value in first)
    assert {value.metadata.plugin_data.plugin_name for value in first} == {"scalars", "histograms", "images"}
    told.write(snapshot(iteration=200))
    assert not any(value.metadata.summary_description for value, step in writer.values if step == 200)


def test_wandb_gets_everything_in_one_call():
    logged = []
    wandb = SimpleNamespace(
        Histogram=lambda np_histogram: ("histogram", len(np_histogram[0])),
        Image=lambda pixels: ("image", pixels.shape),
        log=lambda values, step: logged.append((values, step)),
    )
    taken = snapshot()
    Report(WIDTH, tensorboard=lambda: None, wandb=lambda: wandb).write(taken)
    ((values, step),) = logged
    assert step == 100
    expected = (
        scalars_of(taken).keys() | reference_scalars(WIDTH, LAYERS).keys() | monitoring_scalars.histograms(taken).keys()
    )
    assert values.keys() == expected | routing_images.images(taken).keys()
    assert Report(VirtualWidthConfig(m=2, n=4), tensorboard=lambda: None, wandb=lambda: None).here() is None
