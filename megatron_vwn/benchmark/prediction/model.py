"""A model of an H100 or H200: how long a kernel takes, from its machine code and what it touches. Nothing is measured.

Bounds: how long each unit of the GPU is busy if nothing else ever waits. Simulation: the resident warps of one
multiprocessor walk through their instructions with the stalls, barriers and copy groups that the code itself states,
and share its units; it alone shows kernels that wait for latency. The prediction is the larger.

Calibration: Transformer Engine 2.20.2's ``_mhc_projection_fwd_fused`` at 4096 tokens, scaled to a GB200 (148
multiprocessors, about 1.95 GHz), against the times of its pull request 2790: 18.6 to 23.4 us for 22.9 measured (2048
channels), 38.0 to 41.4 for 38.8 (4096). Not modelled: bank conflicts, instruction cache, TLB, DRAM turnaround. Read
every time as +-1.5 times.
"""

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_vwn.benchmark.prediction.sass import Code, Instruction
from megatron_vwn.benchmark.prediction.ttgir import Program
from megatron_vwn.planner.hardware import HARDWARE

CALIBRATION = "one public figure (TransformerEngine's mHC projection, within 20 %); nothing here ran on a GPU"


@dataclass(frozen=True)
class Gpu:
    """A GPU's rates and sizes.

    Attributes:
        dram: bytes per second of the data sheet.
        dram_share: of it that a copy reaches.
        l2: bytes per second of hits.
        l2_bytes: its size.
        multiprocessors: of the GPU.
        hertz: clock of the multiprocessors.
        matrix: FLOPs per second of dense bf16 products.
        library_share: of both rates that library operations (matrix products, sums) reach.
        shared_bytes: shared memory of a multiprocessor.
        l1_bytes: shared memory and L1 of a multiprocessor.
        registers: of a multiprocessor.
        launch: seconds that a kernel takes to start and to end.
        small_operation: seconds of an operation of torch that has nearly nothing to do.
    """

    dram: float
    matrix: float
    dram_share: float = 0.92
    l2: float = 5.5e12
    l2_bytes: float = 50e6
    multiprocessors: int = 132
    hertz: float = 1.755e9
    library_share: float = 0.8
    shared_bytes: int = 228 * 1024
    l1_bytes: int = 256 * 1024
    registers: int = 65536
    launch: float = 2e-6
    small_operation: float = 2.5e-6


GPUS = {
    name: Gpu(dram=1e9 * HARDWARE[name].memory_gbs, matrix=1e12 * HARDWARE[name].matrix_tflops)
    for name in ("h200", "h100")
}

_SCHEDULERS = 4
_MMA_SHARE = 0.62  # of the peak that mma.sync reaches on Hopper
# Cycles that a warp's instruction occupies a pipe of its scheduler, and until its result is there.
_CYCLES = {"integer": 2, "multiply": 2, "float": 1, "uniform": 2}
_LATENCY = {"mma": 33, "wgmma": 40, "shared": 33, "shuffle": 24, "special": 20, "uniform": 12, "special register": 30}
_PIPES = ("integer", "multiply", "float", "special", "mma", "uniform")
_MEMORY = ("global", "copy", "shared", "shuffle")
_L2_LATENCY, _DRAM_LATENCY = 280, 650
_NEXT_PROGRAM, _NEXT_TILE = 600, 20  # cycles from a program's end to the start of the next, or of its next tile
_GENERATIONS = 4


@dataclass(frozen=True)
class Kernel:
    """One launch as the model sees it.

    Attributes:
        code: machine code.
        program: what one program does.
        programs: how many are launched.
        warps: of a program.
        shared: bytes of shared memory of a program.
        tensor_bytes: size of every tensor argument.
    """

    code: Code
    program: Program
    programs: int
    warps: int
    shared: int
    tensor_bytes: Mapping[str, int]


@dataclass(frozen=True)
class Prediction:
    """What the model says of one launch.

    Attributes:
        seconds: predicted.
        limit: what decides.
        bounds: seconds that each unit is busy.
        simulated: seconds by the simulation.
        traffic: bytes that must pass between DRAM and the GPU: every tensor that is touched, once each way.
        l2: bytes that multiprocessors ask of L2.
        resident: programs at a time on a multiprocessor.
        instructions: that a warp executes, by class.
    """

    seconds: float
    limit: str
    bounds: dict[str, float]
    simulated: float
    traffic: float
    l2: float
    resident: int
    instructions: dict[str, int]


def predict(kernel: Kernel, gpu: Gpu) -> Prediction:
    """Predict one launch."""
    indices, times = kernel.code.sequence(kernel.program.loops)
    instructions = [kernel.code.instructions[i] for i in indices]
    sequences = kernel.programs * times
    resident = max(1, min(_resident(kernel, gpu), math.ceil(kernel.programs / gpu.multiprocessors)))
    reads, writes = traffic(kernel)
    again = _read_again(kernel, resident, gpu)
    from_l2 = _l2_bytes(kernel, resident, gpu)
    # Cycles of one multiprocessor, with its share of what all have in common, for one sequence.
    cycles = _busy(instructions, kernel.warps)
    per_byte = gpu.multiprocessors * gpu.hertz / sequences
    cycles["L2"] = kernel.programs * from_l2 * per_byte / gpu.l2
    cycles["DRAM"] = (reads + writes + again) * per_byte / gpu.dram / gpu.dram_share
    simulation = _Simulation(
        instructions,
        warps=kernel.warps,
        programs=resident,
        dram_bytes=(reads + again) / sequences,
        global_share=from_l2 / times / max(1, _asked(instructions, kernel.warps)),
        gpu=gpu,
        pause=_NEXT_TILE if times > 1 else _NEXT_PROGRAM,
        stagger=max(50.0, 0.8 * max(cycles.values())),
    )
    steady, first = simulation.rate()
    share = max(1.0, sequences / gpu.multiprocessors)
    seconds = {name: share * value / gpu.hertz for name, value in cycles.items()}
    # Programs fill a multiprocessor one after the other, and empty it so: of that a half is lost.
    simulated = (share * steady + 0.5 * max(0.0, first - resident * steady)) / gpu.hertz
    worst = max(seconds, key=seconds.get)
    return Prediction(
        seconds=max(simulated, seconds[worst]) + gpu.launch,
        limit="latency" if simulated > 1.25 * seconds[worst] else worst,
        bounds=seconds,
        simulated=simulated + gpu.launch,
        traffic=reads + writes,
        l2=from_l2 * kernel.programs,
        resident=resident,
        instructions=dict(Counter(x.kind for x in instructions)),
    )


def traffic(kernel: Kernel) -> tuple[float, float]:
    """Bytes that a launch reads from DRAM and writes to it if everything is moved once each way."""
    read = written = 0.0
    for name, access in kernel.program.accesses.items():
        if not access.stored_first:
            read += min(kernel.tensor_bytes[name], kernel.programs * access.unique_loads)
        written += min(kernel.tensor_bytes[name], kernel.programs * access.unique_stores)
    return read, written


def _shared(kernel: Kernel, name: str) -> bool:
    """Whether programs load the same parts of a tensor, as they do of parameters."""
    return kernel.programs * kernel.program.accesses[name].unique_loads > 1.01 * kernel.tensor_bytes[name]


def _read_again(kernel: Kernel, resident: int, gpu: Gpu) -> float:
    """Bytes that come from DRAM a second time, because all programs in flight read more again than L2 holds."""
    again = held = 0.0
    for name, access in kernel.program.accesses.items():
        repeated = access.copied + access.loaded - (0 if access.stored_first else access.unique_loads)
        if access.copied and repeated > 0 and not _shared(kernel, name):
            again += repeated
            held += access.unique_loads
    held *= min(kernel.programs, resident * gpu.multiprocessors)
    return kernel.programs * again * max(0.0, 1 - gpu.l2_bytes / held) if held else 0.0


def _l2_bytes(kernel: Kernel, resident: int, gpu: Gpu) -> float:
    """Bytes that one program asks of L2. Ordinary loads of what all programs load hit L1 as far as it has room; copies
    pass it."""
    asked = needed = common = 0.0
    for name, access in kernel.program.accesses.items():
        asked += access.copied + access.stored
        if _shared(kernel, name):
            needed += min(kernel.tensor_bytes[name], access.unique_loads) if access.loaded else 0
            common += access.loaded
        else:
            asked += access.loaded if access.stored_first else min(access.loaded, access.unique_loads)
    room = gpu.l1_bytes - resident * (kernel.shared + 1024)
    return asked + common * max(0.0, 1 - room / needed) if needed else asked


def _resident(kernel: Kernel, gpu: Gpu) -> int:
    """Programs that fit on a multiprocessor beside each other."""
    of_a_warp = math.ceil(kernel.code.registers * 32 / 256) * 256
    warps = gpu.registers // _SCHEDULERS // of_a_warp * _SCHEDULERS
    by_shared = gpu.shared_bytes // (kernel.shared + 1024) if kernel.shared else 32
    return max(1, min(warps // kernel.warps, by_shared, 64 // kernel.warps, 32))


def _asked(instructions: Sequence[Instruction], warps: int) -> int:
    """Bytes that the code's global accesses would move if no lane were masked."""
    return warps * sum(x.bytes for x in instructions if x.kind in ("global", "copy"))


def _cycles(x: Instruction) -> float:
    """That an instruction occupies its unit: of a scheduler, or of the multiprocessor for memory and wgmma."""
    if x.kind == "mma":
        return x.multiplies / (256 if "TF32" in x.name else 512) / _MMA_SHARE
    if x.kind == "wgmma":
        return max(x.multiplies / 2048, x.bytes / 128)
    if x.kind in _MEMORY:
        return max(1.0, x.bytes / 128) * (2 if x.kind == "copy" else 1)
    if x.kind == "special":
        return 8 if x.name.startswith("MUFU") else 4
    return _CYCLES.get(x.kind, 1)


def _busy(instructions: Sequence[Instruction], warps: int) -> dict[str, float]:
    """Cycles of a multiprocessor's units for one sequence of a program."""
    sums: Counter = Counter()
    for x in instructions:
        sums[x.kind] += _cycles(x)
    each = warps / _SCHEDULERS
    busy = {name: sums[name] * each for name in ("integer", "multiply", "float", "special")}
    busy["issue"] = len(instructions) * each
    busy["tensor"] = (sums["mma"] + sums["wgmma"]) * each
    busy["LSU"] = sum(sums[kind] for kind in _MEMORY) * warps
    return busy


class _Step:
    """An instruction, prepared for the simulation."""

    __slots__ = ("asks", "cycles", "kind", "latency", "pipe", "release", "x")

    def __init__(self, x: Instruction, global_share: float):
        self.x, self.kind, self.cycles = x, x.kind, _cycles(x)
        self.latency = _LATENCY.get(x.kind, 4)
        self.pipe = _PIPES.index(x.kind) if x.kind in _PIPES else None
        self.asks = x.bytes * global_share if x.kind in ("global", "copy") else 0.0
        # What the warp waits for beside barriers: all but so many of its groups of copies, or of wgmma.
        self.release = None
        if (x.name.startswith("DEPBAR.LE") and "SB0" in x.text) or x.name.startswith("WARPGROUP.DEPBAR"):
            self.release = int(x.text.split(",")[1].split()[0], 16)


class _Warp:
    __slots__ = ("barriers", "copies", "copying", "groups", "multiplying", "number", "place", "program")

    def __init__(self, number: int, program: "_Running"):
        self.number, self.program = number, program
        self.begin()

    def begin(self) -> None:
        self.place = 0
        self.barriers = [0.0] * 8
        self.copies: list[float] = []  # when each committed group of copies has arrived
        self.copying = 0.0
        self.groups: list[float] = []  # likewise of wgmma
        self.multiplying = 0.0


class _Running:
    """A resident program: bytes that it still has to read from DRAM, warps that have not ended and that wait at a
    barrier, and all its warps."""

    __slots__ = ("cold", "left", "waiting", "warps")


class _Simulation:
    """One multiprocessor and the warps of its resident programs, some generations of them."""

    def __init__(
        self,
        instructions: Sequence[Instruction],
        *,
        warps: int,
        programs: int,
        dram_bytes: float,
        global_share: float,
        gpu: Gpu,
        pause: float,
        stagger: float,
    ):
        steps = {id(x): _Step(x, global_share) for x in instructions}
        self.steps = [steps[id(x)] for x in instructions]
        self.size, self.cold, self.pause = warps, dram_bytes, pause
        per_cycle = gpu.multiprocessors * gpu.hertz
        self.l2_rate, self.dram_rate = gpu.l2 / per_cycle, gpu.dram * gpu.dram_share / per_cycle
        self.lsu = self.l2 = self.dram = self.matrix = 0.0
        self.slots = [0.0] * _SCHEDULERS
        self.pipes = [[0.0] * _SCHEDULERS for _ in _PIPES]
        self.left = programs * (_GENERATIONS - 1)
        self.ends: list[float] = []
        self.queue: list[tuple[float, int]] = []
        self.warps: list[_Warp] = []
        self.programs = programs
        for number in range(programs):
            program = _Running()
            program.warps = [_Warp(number * warps + i, program) for i in range(warps)]
            self.warps += program.warps
            self._start(program, number * stagger)

    def _start(self, program: _Running, time: float) -> None:
        program.cold, program.left, program.waiting = self.cold, self.size, []
        for warp in program.warps:
            warp.begin()
            heapq.heappush(self.queue, (time, warp.number))

    def rate(self) -> tuple[float, float]:
        """Cycles per program between the end of the first generation and the end of the last but one, and the end of
        the first."""
        while self.queue:
            self._advance(*heapq.heappop(self.queue))
        ends, count = sorted(self.ends), self.programs
        first = ends[count - 1]
        return (ends[-count] - first) / (len(ends) - 2 * count + 1), first

    def _advance(self, time: float, number: int) -> None:
        warp = self.warps[number]
        if warp.place == len(self.steps):
            self._end(warp.program, time)
            return
        step = self.steps[warp.place]
        ready = self._ready(warp, step, time)
        if ready > time + 1e-9:
            heapq.heappush(self.queue, (ready, number))
            return
        warp.place += 1
        x, scheduler = step.x, number % _SCHEDULERS
        self.slots[scheduler] = time + 1
        if step.kind == "barrier" and "SYNC" in x.name:
            self._synchronize(warp, time)
            return
        result, read = self._occupy(warp, step, scheduler, time)
        barriers = warp.barriers
        barriers[x.sets] = max(barriers[x.sets], result)
        barriers[x.frees] = max(barriers[x.frees], read)
        heapq.heappush(self.queue, (time + max(1, x.stall), number))

    def _ready(self, warp: _Warp, step: _Step, time: float) -> float:
        """When the instruction can issue, as far as is known now."""
        x, scheduler = step.x, warp.number % _SCHEDULERS
        waits, bit = x.waits, 0
        while waits:
            if waits & 1 and warp.barriers[bit] > time:
                time = warp.barriers[bit]
            waits, bit = waits >> 1, bit + 1
        if step.release is not None:
            arrived = warp.copies if x.name.startswith("DEPBAR") else warp.groups
            if len(arrived) > step.release:
                time = max(time, *arrived[: len(arrived) - step.release])
        time = max(time, self.slots[scheduler])
        if step.pipe is not None:
            time = max(time, self.pipes[step.pipe][scheduler])
        if step.kind in _MEMORY:  # short queues before the units
            time = max(time, self.lsu - 40)
            if step.asks:
                time = max(time, self.l2 - 1500)
        return time

    def _occupy(self, warp: _Warp, step: _Step, scheduler: int, time: float) -> tuple[float, float]:
        """When the result is there and when the sources have been read."""
        x = step.x
        if step.pipe is not None:
            self.pipes[step.pipe][scheduler] = time + step.cycles
            return time + step.cycles + step.latency, time + 12
        if step.kind == "wgmma":
            if warp.number % self.size % 4 == 0:  # one instruction of four warps
                self.matrix = max(self.matrix, time) + step.cycles
            warp.multiplying = max(warp.multiplying, self.matrix, time) + 0.0
            if "gsb0" in x.text:
                warp.groups = [*warp.groups[-8:], warp.multiplying + step.latency]
            return time + 10, time + 10
        if step.kind not in _MEMORY:
            if x.name.startswith("LDGDEPBAR"):
                warp.copies = [*warp.copies[-8:], warp.copying]
            return time + max(4, step.latency), time + 12
        self.lsu = max(self.lsu, time) + step.cycles
        if not step.asks:
            return self.lsu + step.latency, self.lsu + 8
        self.l2 = max(self.l2, self.lsu) + step.asks / self.l2_rate
        if x.name.startswith(("STG", "STL", "ST.", "RED")):
            return self.lsu + 10, self.lsu + 8
        latency, program = _L2_LATENCY, warp.program
        if program.cold > 0 and x.bytes >= 256:
            program.cold -= step.asks
            self.dram = max(self.dram, self.lsu) + step.asks / self.dram_rate
            latency = max(_DRAM_LATENCY, self.dram + _DRAM_LATENCY - self.lsu)
        arrives = max(self.l2, self.lsu) + latency
        if step.kind == "copy":
            warp.copying = max(warp.copying, arrives)
            arrives = self.lsu + 10
        return arrives, self.lsu + 8

    def _synchronize(self, warp: _Warp, time: float) -> None:
        waiting = warp.program.waiting
        waiting.append(warp.number)
        if len(waiting) == self.size:
            for number in waiting:
                heapq.heappush(self.queue, (time + 22, number))
            warp.program.waiting = []

    def _end(self, program: _Running, time: float) -> None:
        program.left -= 1
        if program.left == 0:
            self.ends.append(time)
            if self.left:
                self.left -= 1
                self._start(program, time + self.pause)
