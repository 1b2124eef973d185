"""Machine code of a kernel: its instructions by class, what each waits for, and one program's dynamic sequence.

An instruction of Hopper is 128 bits; the upper ones hold what the assembler decided for the scheduler: cycles to stall,
which of six barriers it sets when its result is written (or its sources are read), and which it waits for.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from megatron_vwn.benchmark.prediction.ttgir import Loop
from megatron_vwn.config import VirtualWidthError

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LABEL = re.compile(r"^(\.L_x_\d+):")
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;\s*/\* 0x([0-9a-f]+) \*/")
_SECOND = re.compile(r"/\* 0x([0-9a-f]+) \*/")
_TARGET = re.compile(r"BRA.*`\((\.L_x_\d+)\)")
# Of a longer sequence a part with fewer iterations stands for the whole.
_LONGEST = 20_000

# Classes of instructions by the first word of their names; what is not here only takes a slot to issue.
_CLASSES = {
    "integer": "LOP3 IADD3 ISETP SEL PRMT SHF FSETP FSEL FMNMX VIADD VIADDMNMX LEA SGXT PLOP3 IMNMX VIMNMX IABS P2R "
    "R2P BMSK VABSDIFF F2FP FSET FCHK MOV POPC FLO LOP I2FP HSETP2 BREV CS2R ISCADD",
    "multiply": "IMAD",
    "float": "FFMA FMUL FADD FSWZADD HFMA2 HADD2 HMUL2 FFMA2 HMNMX2",
    "special": "MUFU F2F F2I I2F FRND",
    "mma": "HMMA IMMA",
    "wgmma": "HGMMA",
    "global": "LDG STG LDL STL LD ST ATOM ATOMG RED",
    "copy": "LDGSTS",
    "shared": "LDS STS LDSM STSM ATOMS",
    "shuffle": "SHFL",
    "barrier": "BAR",
    "special register": "LDC S2R",
}
_CLASS = {name: kind for kind, names in _CLASSES.items() for name in names.split()}
_ELEMENT = {"8": 1, "U8": 1, "S8": 1, "16": 2, "U16": 2, "S16": 2, "64": 8, "128": 16}
_FMA_OF_HMMA = {"16816": 2048, "1688": 1024, "1684": 512}


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        name: with its modifiers, "LDG.E.128".
        text: with its operands.
        predicate: that guards it, or None.
        stall: cycles until the warp may issue the next one.
        sets: the barrier that its result frees, or 7.
        frees: the barrier that reading its sources frees, or 7.
        waits: barriers that it waits for, as bits.
        kind: its class.
        bytes: of memory, for a warp.
        multiplies: multiply-adds of a matrix instruction.
        target: index of the instruction that it branches to, or None.
    """

    name: str
    text: str
    predicate: str | None
    stall: int
    sets: int
    frees: int
    waits: int
    kind: str = ""
    bytes: int = 0
    multiplies: int = 0
    target: int | None = None

    def __post_init__(self) -> None:
        first, _, modifiers = self.name.partition(".")
        self.kind = _CLASS.get(first) or ("uniform" if first[0] == "U" or first in ("R2UR", "S2UR") else "other")
        if self.kind in ("global", "copy", "shared"):
            words = modifiers.split(".")
            if first in ("LDSM", "STSM"):
                self.bytes = 128 * (int(words[-1]) if words[-1].isdecimal() else 1)
            else:
                self.bytes = 32 * next((_ELEMENT[word] for word in words if word in _ELEMENT), 4)
        elif self.kind == "mma":
            shape = next((word for word in modifiers.split(".") if word in _FMA_OF_HMMA), "16816")
            self.multiplies = _FMA_OF_HMMA[shape]
        elif self.kind == "wgmma":
            m, n, k = map(int, re.search(r"(\d+)x(\d+)x(\d+)", modifiers).groups())
            self.multiplies = m * n * k
            in_registers = re.search(r"HGMMA\S*\s+R\d+, R\d+, gdesc", self.text)
            self.bytes = 2 * k * (n if in_registers else m + n)


@dataclass
class Code:
    """A kernel's instructions and what the assembler says of it: registers of a thread, bytes of stack of a thread."""

    instructions: list[Instruction]
    registers: int
    stack: int
    size: int

    @classmethod
    def of(cls, cubin: bytes) -> "Code":
        """Disassemble with the tools that Triton ships."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            resources = tool("cuobjdump", "-res-usage", file.name)
            lines = tool("nvdisasm", "-c", "-hex", file.name).splitlines()
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", resources).groups())
        return cls(_instructions(lines), registers, stack, len(cubin))

    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of every loop, outer ones before inner ones; what spins behind EXIT is none."""
        back = [(x.target, i) for i, x in enumerate(self.instructions) if x.target is not None and x.target < i - 3]
        return sorted(back, key=lambda loop: (loop[0], -loop[1]))

    def sequence(self, loops: Sequence[Loop]) -> tuple[list[int], float]:
        """Indices of what a warp executes, and how many such sequences a program is.

        Of a loop around others (tiles of a program that stays) one iteration stands for all, and of very many
        iterations some.

        Args:
            loops: of the program, in the order of its text.
        """
        spans = self.loops()
        trips = dict(zip(spans, self._matched(spans, loops), strict=True))
        times = 1.0
        for first, last in spans:
            if any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
                times *= trips[first, last]
                trips[first, last] = 1
        end = next((i for i, x in enumerate(self.instructions) if x.name == "EXIT" and x.predicate is None), None)
        end = len(self.instructions) if end is None else end + 1
        length = end + sum((last + 1 - first) * (trips[first, last] - 1) for first, last in spans)
        if length > _LONGEST:
            trips = {span: max(1, count * _LONGEST // length) for span, count in trips.items()}
        indices = self._expand(0, end, spans, trips)
        return indices, times * max(1.0, length / max(1, len(indices)))

    def _expand(self, start: int, end: int, spans: list[tuple[int, int]], trips: dict) -> list[int]:
        indices: list[int] = []
        position = start
        for first, last in spans:
            if first < position or last >= end:
                continue
            indices += range(position, first)
            inside = [span for span in spans if first <= span[0] and span[1] <= last and span != (first, last)]
            indices += self._expand(first, last + 1, inside, trips) * trips[first, last]
            position = last + 1
        return indices + list(range(position, end))

    def _matched(self, spans: list[tuple[int, int]], loops: Sequence[Loop]) -> list[int]:
        """Trips of the code's loops. Both orders agree, but that a short loop may have been unrolled: then a loop is
        known by what its last comparison compares with."""
        if len(spans) > len(loops):
            raise VirtualWidthError("the machine code has loops that the program has not: it cannot be predicted.")
        left, trips = list(loops), []
        for number, span in enumerate(spans):
            spare = len(left) - (len(spans) - number)
            ends = self._compared(span)
            known = next((i for i in range(spare + 1) if ends & {left[i].upper, left[i].upper - left[i].step}), spare)
            trips.append(left[known].trips)
            left = left[known + 1 :]
        return trips

    def _compared(self, span: tuple[int, int]) -> set[int]:
        """Constants that comparisons of a loop compare with."""
        found = set()
        for x in self.instructions[span[0] : span[1]]:
            if x.name.startswith(("ISETP", "UISETP")):
                found |= {int(number, 16) for number in re.findall(r", (0x[0-9a-f]+)", x.text)}
        return found


def tool(name: str, *arguments: str) -> str:
    """What a tool that Triton ships prints."""
    done = subprocess.run([_BIN / name, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise VirtualWidthError(f"{name} of triton {triton.__version__} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def _instructions(lines: list[str]) -> list[Instruction]:
    labels: dict[str, int] = {}
    branches: dict[int, str] = {}
    found: list[Instruction] = []
    for number, line in enumerate(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _LINE.match(line):
            control = int(_SECOND.search(lines[number + 1])[1], 16) >> 41
            if target := _TARGET.match(match[2]):
                branches[len(found)] = target[1]
            found.append(
                Instruction(
                    name=match[2].split()[0],
                    text=match[2],
                    predicate=match[1],
                    stall=control & 15,
                    sets=control >> 5 & 7,
                    frees=control >> 8 & 7,
                    waits=control >> 11 & 63,
                )
            )
    for index, label in branches.items():
        found[index].target = labels[label]
    return found
