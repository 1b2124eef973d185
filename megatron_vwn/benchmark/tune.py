"""``vwn-benchmark tune``: which tiles are fastest on this machine, within a time that the user gives.

A kernel's tile is changed one step at a time, and a change stays if the pass that launches the kernel becomes faster by
more than noise. Both tiles take turns on the same inputs. What was found is merged into the file that the kernels read
before their first launch (``ops.kernels.geometry.tuned_file``), once the operation agrees with fp64. Without a GPU the
model of ``benchmark.prediction.predict`` can be asked instead; what it says is printed and used by nobody.
"""

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from triton.runtime.jit import JITFunction

from megatron_vwn.atomic import atomic_file
from megatron_vwn.benchmark import kernels, machine
from megatron_vwn.benchmark.operations import Kernels, Problem, differentiated, grad_outputs
from megatron_vwn.benchmark.prediction.compile import Launch, launches_compiled, passes
from megatron_vwn.benchmark.prediction.model import GPUS, predict
from megatron_vwn.benchmark.prediction.predict import ARCHITECTURE, as_kernel
from megatron_vwn.benchmark.timing import Timed, interleave
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.ops.costs import PASSES, Pass
from megatron_vwn.ops.kernels import geometry
from megatron_vwn.ops.kernels.geometry import Tile

# Less is noise.
_GAIN = 0.02
_ROUNDS = 9
_REGISTERS = (None, 96, 128, 168)


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles one step from a tile, those that mostly matter first."""
    for up in (True, False):

        def twice_or_half(*fields: str, up: bool = up) -> Tile:
            return tile._replace(**{f: 2 * getattr(tile, f) if up else max(1, getattr(tile, f) // 2) for f in fields})

        def deeper_or_not(field: str, up: bool = up) -> Tile:
            return tile._replace(**{field: max(1, getattr(tile, field) + (1 if up else -1))})

        yield twice_or_half("channels")
        yield deeper_or_not("stages")
        yield twice_or_half("tokens", "warps")  # some families have one warp for each token
        yield twice_or_half("warps")
        yield twice_or_half("tokens")
        yield twice_or_half("second_channels")
        yield deeper_or_not("second_stages")
    for registers in _REGISTERS:
        yield tile._replace(maxnreg=registers)


def search(start: Tile, race: Callable[[Tile, Tile], float | None], is_over: Callable[[], bool]) -> tuple[Tile, float]:
    """Climb from a tile as long as there is time.

    Args:
        start: the tile that is used now.
        race: seconds of the second tile over seconds of the first; None if the second cannot run or changes nothing.
        is_over: whether the time is used up.

    Returns:
        The best tile, and its seconds over those of the first.
    """
    best, ratio, tried = start, 1.0, {start}
    climbing = True
    while climbing:
        climbing = False
        for tile in neighbours(best):
            if is_over():
                return best, ratio
            if tile in tried:
                continue
            tried.add(tile)
            found = race(best, tile)
            if found is not None and found < 1 - _GAIN:
                best, ratio, climbing = tile, ratio * found, True
                break
    return best, ratio


def merged(old: Sequence[dict], new: Sequence[dict]) -> list[dict]:
    """Rows of the file: new ones replace old ones of the same kernel, n and architecture."""
    rows = {(row["kernel"], row["n"], row["architecture"]): row for row in (*old, *new)}
    return [rows[key] for key in sorted(rows)]


def tune(
    problems: Sequence[Problem], seconds: float, say: Callable[[str], None], *, gpu: str | None = None
) -> list[dict]:
    """Tune the kernels of some operations; every pass gets its share of the time that is left.

    Args:
        problems: operations, the most important first; on a GPU, or on the meta device for a model.
        seconds: in all, but for the last race that is under way.
        say: gets a line for each tile that is faster.
        gpu: whose model is asked; None measures.

    Returns:
        Rows of the file for tiles that are faster than what is used now.
    """
    end = time.monotonic() + seconds
    found: list[dict] = []
    with _Tiles(_rows(geometry.tuned_file()) if gpu is None else []) as tiles:
        both = [(problem, direction) for problem in problems for direction in PASSES]
        for number, (problem, direction) in enumerate(both):
            until = time.monotonic() + (end - time.monotonic()) / (len(both) - number)
            trial = _Measured(problem, direction, tiles) if gpu is None else _Predicted(problem, direction, tiles, gpu)
            found = merged(found, _tune_pass(trial, until, say))
    return found


def write(rows: Sequence[dict]) -> Path:
    """Merge rows into the file that the kernels read."""
    path = geometry.tuned_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(merged(_rows(path), rows), indent=1) + "\n")
    geometry.forget_tuned()
    return path


def _rows(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except ValueError:
        raise VirtualWidthError(f"{path} is no file of tiles: remove it.") from None


class _Tiles:
    """The tiles that kernels use within: those of a file of its own, which is written anew for each trial."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __enter__(self) -> "_Tiles":
        self._folder, self._before = TemporaryDirectory(), os.environ.get("VWN_TILES")
        os.environ["VWN_TILES"] = str(Path(self._folder.name) / "tiles.json")
        self.use(None)
        return self

    def __exit__(self, *_) -> None:
        del os.environ["VWN_TILES"]
        if self._before is not None:
            os.environ["VWN_TILES"] = self._before
        self._folder.cleanup()
        geometry.forget_tuned()

    def use(self, row: dict | None) -> None:
        """All rows, and this one in place of its namesake."""
        geometry.tuned_file().write_text(json.dumps(merged(self.rows, [row] if row else [])))
        geometry.forget_tuned()


def _tune_pass(trial: "_Trial", until: float, say: Callable[[str], None]) -> list[dict]:
    problem, tiles, found = trial.problem, trial.tiles, []
    n = triton.next_power_of_2(problem.width.n)
    # A tile has its kernel's name, or one for all kernels that share it.
    names = [name for name, *_ in trial.launched(None)] + [key[0] for key in geometry.TABLE if key[1] == n]
    names = list(dict.fromkeys(names))
    for number, name in enumerate(names):
        own = time.monotonic() + (until - time.monotonic()) / (len(names) - number)
        row = {"kernel": name, "n": n, "architecture": trial.architecture, "triton": triton.__version__}
        row |= {key: problem.label[key] for key in ("m", "hidden_size", "tokens", "dtype")}
        start = trial.tile(name)

        def race(first: Tile, second: Tile, row: dict = row) -> float | None:
            return trial.race(*({**row, "tile": tile._asdict()} for tile in (first, second)))

        best, ratio = search(start, race, lambda own=own: time.monotonic() > own)
        if best != start:
            row |= {"tile": best._asdict(), "seconds_over_before": ratio, "pass": trial.direction}
            tiles.rows = merged(tiles.rows, [row])
            tiles.use(None)
            if off := trial.wrong():
                raise VirtualWidthError(
                    f"{name} with {best} disagrees with fp64, {off}: report it; nothing was written."
                )
            found.append(row)
            say(f"{name} {trial.direction} n = {n}: {ratio:.0%} of the time with {best}")
    return found


class _Trial(ABC):
    """One pass of an operation with tiles of choice."""

    architecture: str

    def __init__(self, problem: Problem, direction: Pass, tiles: _Tiles):
        self.problem, self.direction, self.tiles = problem, direction, tiles

    @abstractmethod
    def tile(self, kernel: str) -> Tile:
        """That a kernel has now."""

    @abstractmethod
    def launched(self, row: dict | None) -> list[tuple]:
        """Name, hash and grid of each launch of the pass."""

    @abstractmethod
    def compared(self, first: dict, second: dict) -> float | None:
        """Seconds with the second row of the file over seconds with the first; None if the second is no choice."""

    def wrong(self) -> str | None:
        """What disagrees with fp64."""
        return None

    def race(self, first: dict, second: dict) -> float | None:
        """See ``search``."""
        try:
            if self.launched(first) == self.launched(second):
                return None
        except Exception:  # whatever Triton and the driver raise for a tile that does not fit
            return None
        return self.compared(first, second)


class _Measured(_Trial):
    """On this machine's GPU."""

    def __init__(self, problem: Problem, direction: Pass, tiles: _Tiles):
        super().__init__(problem, direction, tiles)
        self.architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(problem.device))
        self.clock = machine.make_clock(problem.device, cold=True)
        generator = torch.Generator(problem.device).manual_seed(0)
        self.leaves = Kernels().leaves(problem, generator)
        with torch.no_grad():
            self.weights = grad_outputs(problem, Kernels().outputs(problem, self.leaves), generator)

    def tile(self, kernel):
        """See ``_Trial``."""
        return geometry.tile(kernel, self.problem.width.n, self.problem.device)

    def launched(self, row):
        """See ``_Trial``."""
        self.tiles.use(row)
        prepared = self._prepare()
        with _launches() as launched:
            self._call(prepared)
        torch.cuda.synchronize()
        return launched

    def compared(self, first, second):
        """See ``_Trial``."""
        timed = {name: self._timed(row) for name, row in (("first", first), ("second", second))}
        found = interleave(timed, self.clock, sets=1, warmup=2, rounds=_ROUNDS)
        return found["second"].median / found["first"].median

    def wrong(self):
        """See ``_Trial``."""
        return kernels.disagreement(kernels.errors(Kernels(), self.problem), self.problem.dtype)

    def _timed(self, row: dict) -> Timed:
        def prepare(number: int):
            self.tiles.use(row)
            return self._prepare()

        return Timed(self._call, prepare=prepare)

    def _prepare(self):
        return None if self.direction == "forward" else Kernels().outputs(self.problem, self.leaves)

    def _call(self, outputs) -> None:
        if outputs is None:
            Kernels().outputs(self.problem, self.leaves)
        else:
            torch.autograd.grad(outputs, list(differentiated(self.leaves).values()), self.weights)


class _Predicted(_Trial):
    """By the model of a GPU, on tensors of the meta device."""

    def __init__(self, problem: Problem, direction: Pass, tiles: _Tiles, gpu: str):
        super().__init__(problem, direction, tiles)
        self.gpu, self.architecture = GPUS[gpu], ARCHITECTURE[gpu]
        self._seconds: dict[tuple, float] = {}

    def tile(self, kernel):
        """See ``_Trial``."""
        with launches_compiled(self.architecture):
            return geometry.tile(kernel, self.problem.width.n, self.problem.device)

    def launched(self, row):
        """See ``_Trial``."""
        self.tiles.use(row)
        for call in passes(Kernels(), self.problem).values():
            with launches_compiled(self.architecture) as launched:
                call()
            if self.direction == "forward":
                break
        for launch in launched:
            if (key := _key(launch)) not in self._seconds:
                self._seconds[key] = self._predict(launch)
        return [_key(launch) for launch in launched]

    def compared(self, first, second):
        """See ``_Trial``; of the kernels that differ alone."""
        one, other = (self.launched(row) for row in (first, second))
        differing = [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]]
        return sum(self._seconds[key] for _, key in differing) / sum(self._seconds[key] for key, _ in differing)

    def _predict(self, launch: Launch) -> float:
        kernel = as_kernel(launch)
        # What spills is not to be had at any speed.
        return math.inf if kernel.code.stack else predict(kernel, self.gpu).seconds


def _key(launch: Launch) -> tuple:
    return launch.name, launch.compiled.hash, launch.grid


@contextmanager
def _launches() -> Iterator[list[tuple]]:
    run, launched = JITFunction.run, []

    def recorded(kernel, *args, grid, warmup, **kwargs):
        compiled = run(kernel, *args, grid=grid, warmup=warmup, **kwargs)
        launched.append((compiled.metadata.name, compiled.hash, grid))
        return compiled

    JITFunction.run = recorded
    try:
        yield launched
    finally:
        JITFunction.run = run
