"""TensorBoard's page in a real browser, with what monitoring writes; skipped where there is no browser."""

import importlib.util
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.ops.parameters import initial_pattern
from megatron_vwn.training.monitoring.snapshot import ConnectionStatistics, Place, Snapshot
from megatron_vwn.training.monitoring.writers import Report

EXAMPLE = Path(__file__).parents[2] / "examples" / "study" / "screenshots.py"
M, N, LAYERS = 2, 6, 4
# Name of every picture in the images tab, with the size that the browser has decoded.
PICTURES = """JSON.stringify(everything().filter(e => e.tagName == "TF-IMAGE-LOADER").map(
    e => [e.tag, ...everything(e.shadowRoot).filter(i => i.tagName == "IMG").map(i => i.naturalWidth)]))"""
TITLES = "JSON.stringify(everything().map(e => e.innerText || ''))"


def load():
    spec = importlib.util.spec_from_file_location("screenshots", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


screenshots = load()


def browser() -> str:
    try:
        return screenshots.find_browser()
    except screenshots.CannotShow as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def logdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("events")
    writer = SummaryWriter(str(folder))
    report = Report(VirtualWidthConfig(m=M, n=N), tensorboard=lambda: writer, wandb=lambda: None)
    generator = torch.Generator().manual_seed(0)
    pattern = initial_pattern(M, N, N, dtype=torch.float64, device="cpu")
    for step in (100, 200, 300):
        connections = {}
        for number in range(1, LAYERS + 1):
            moved = pattern + 0.001 * step * torch.randn(pattern.shape, generator=generator, dtype=torch.float64)
            states = torch.randn(N, 64, generator=generator, dtype=torch.float64)
            connections[Place(0, number)] = ConnectionStatistics(
                m=M,
                static=moved,
                mean=moved,
                spread=moved.abs() / 10,
                dynamic_share=0.01,
                gate_saturation=0.0,
                gram_NN=states @ states.T / 64,
            )
        norms = dict.fromkeys(connections, 1.0 / step)
        report.write(
            Snapshot(
                iteration=step,
                connections=connections,
                gradient_norms={"routing": 1.0 / step, "scale": 0.1 / step},
                connection_gradient_norms=norms,
            )
        )
    writer.close()
    return folder


def test_the_images_tab_shows_mosaic_and_heat_map(logdir):
    path = browser()
    with screenshots.tensorboard(logdir) as address:
        with screenshots.Page(path, f"{address}#images", 1500, 1100) as page:
            page.settle()
            shown = {tag: widths for tag, *widths in json.loads(page.evaluate(PICTURES))}
        with screenshots.Page(path, f"{address}#custom_scalars", 1500, 1100) as page:
            page.settle()
            titles = json.loads(page.evaluate(TITLES))
    # A picture that the browser could not decode is 0 wide.
    assert all(len(widths) == 1 and widths[0] > 100 for widths in shown.values()), shown
    assert {"vwn/routing", "vwn/depth_receptive_field", "vwn/segment_norms"} <= shown.keys(), shown
    for title in ("Virtual width: is it used?", "effective segments", "depth window, by layer"):
        assert any(text.strip().startswith(title) for text in titles), title


def test_pictures_are_written(logdir, tmp_path, monkeypatch):
    browser()
    one = "custom-scalars"
    monkeypatch.setattr(screenshots, "TABS", {one: screenshots.TABS[one]})  # each takes seconds
    report = tmp_path / "report.html"
    report.write_text("<title>x</title><h1 style='color:#aa0000'>A report</h1>")
    assert screenshots.main([str(logdir), str(report), str(tmp_path / "made" / "pictures")]) == 0
    pictures = sorted((tmp_path / "made" / "pictures").iterdir())
    assert [path.name for path in pictures] == ["custom-scalars.png", "report.png"]
    for path in pictures:
        assert path.stat().st_size < 200_000, path
        with Image.open(path) as image:
            assert image.width >= 1200 and len(image.convert("RGB").getcolors(1 << 20)) > 2, path


@pytest.mark.parametrize(
    ("logdir", "report", "said"),
    [("empty", "report.html", "holds no event files"), ("empty", "none.html", "there is no")],
)
def test_what_is_missing_is_said_in_one_sentence(tmp_path, capsys, monkeypatch, logdir, report, said):
    monkeypatch.setattr(screenshots, "find_browser", lambda: sys.executable)
    (tmp_path / "empty").mkdir()
    (tmp_path / "report.html").write_text("x")
    assert screenshots.main([str(tmp_path / logdir), str(tmp_path / report), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_without_a_browser(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert screenshots.main([str(tmp_path), str(tmp_path / "report.html"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("screenshots: no browser was found among chromium")


def test_a_program_that_is_no_browser(tmp_path, monkeypatch, capsys, logdir):
    monkeypatch.setattr(screenshots, "find_browser", lambda: "/bin/true")
    monkeypatch.setattr(screenshots, "tensorboard", lambda _: nullcontext("http://nowhere/"))
    (tmp_path / "report.html").write_text("x")
    assert screenshots.main([str(logdir), str(tmp_path / "report.html"), str(tmp_path / "out")]) == 2
    assert "/bin/true does not answer" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
