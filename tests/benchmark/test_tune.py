"""vwn-benchmark tune: the search with a clock of its own, and the file that the kernels read."""

import json

import pytest

pytest.importorskip("triton")

import torch
import triton

from megatron_vwn.benchmark import tune
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.ops.kernels import geometry
from megatron_vwn.ops.kernels.geometry import Tile


@pytest.fixture(autouse=True)
def own_file(monkeypatch, tmp_path):
    monkeypatch.setenv("VWN_TILES", str(tmp_path / "cache" / "tiles.json"))
    geometry.forget_tuned()
    yield
    monkeypatch.undo()
    geometry.forget_tuned()


class Machine:
    """Takes as long as a tile is far from the best; some tiles do not run."""

    def __init__(self, best: Tile, patience: int = 10_000):
        self.best, self.patience, self.races = best, patience, []

    def seconds(self, tile: Tile) -> float:
        return 1 + sum(
            (a or 256) != (b or 256) and abs((a or 256) - (b or 256)) for a, b in zip(tile, self.best, strict=True)
        )

    def race(self, first: Tile, second: Tile) -> float | None:
        self.races.append((first, second))
        if second.channels > 128:  # does not fit
            return None
        return self.seconds(second) / self.seconds(first)

    def is_over(self) -> bool:
        return len(self.races) >= self.patience


def test_a_search_finds_the_best_tile_and_tries_none_twice():
    machine = Machine(Tile(tokens=4, channels=128, second_channels=16, warps=8, stages=2, maxnreg=128))
    start = Tile()
    best, ratio = tune.search(start, machine.race, machine.is_over)
    assert best == machine.best and ratio == pytest.approx(1 / machine.seconds(start))
    tried = [second for _, second in machine.races]
    assert len(tried) == len(set(tried)) and start not in tried
    assert any(tile.channels == 256 for tile in tried)


def test_a_search_ends_with_its_time():
    machine = Machine(Tile(channels=128, warps=8), patience=3)
    best, ratio = tune.search(Tile(), machine.race, machine.is_over)
    assert len(machine.races) == 3 and best.channels == 128 and ratio < 1


def test_noise_and_tiles_that_cannot_run_change_nothing():
    for found in (0.99, None):
        assert tune.search(Tile(), lambda first, second, found=found: found, lambda: False) == (Tile(), 1.0)


def test_neighbours_are_possible_tiles():
    for tile in (Tile(), Tile(tokens=1, channels=1, second_channels=1, warps=1, stages=1, second_stages=1)):
        for other in tune.neighbours(tile):
            assert min(value for value in other if value is not None) >= 1
            assert sum(a != b for a, b in zip(tile, other, strict=True)) <= 2


def row(kernel="batched_forward", n=32, **tile):
    return {
        "kernel": kernel,
        "n": n,
        "architecture": "interpreter",
        "triton": triton.__version__,
        "tile": Tile(**tile)._asdict(),
    }


def test_what_was_found_is_what_kernels_get(monkeypatch):
    monkeypatch.setattr(geometry, "_architecture", lambda device: "interpreter")
    cpu = torch.device("cpu")
    before = geometry.tile("batched_forward", 17, cpu)
    path = tune.write([row(channels=256), row(n=16, channels=64)])
    assert path == geometry.tuned_file()
    assert geometry.tile("batched_forward", 17, cpu) == Tile(channels=256) != before
    tune.write([row(channels=512)])
    assert geometry.tile("batched_forward", 32, cpu).channels == 512
    assert geometry.tile("batched_forward", 16, cpu).channels == 64
    assert [path.name for path in path.parent.iterdir()] == ["tiles.json"]
    path.write_text("{")
    with pytest.raises(VirtualWidthError, match="is no file of tiles: remove it"):
        tune.write([row()])


def test_trials_leave_the_file_alone(monkeypatch):
    monkeypatch.setattr(geometry, "_architecture", lambda device: "interpreter")
    cpu, path = torch.device("cpu"), tune.write([row(channels=256)])
    before = path.read_text()
    with tune._Tiles(json.loads(before)) as tiles:
        assert geometry.tile("batched_forward", 32, cpu).channels == 256
        tiles.use(row(channels=16))
        assert geometry.tile("batched_forward", 32, cpu).channels == 16
        tiles.use(None)
        assert geometry.tile("batched_forward", 32, cpu).channels == 256
    assert geometry.tuned_file() == path and path.read_text() == before
