"""Stream recompute in one process: gradients against those without it, and which storages are alive when.

``python session_stream_recompute.py RESULTS.json``; the environment is that of a torchrun of one rank.
"""

import megatron_vwn.cpu

megatron_vwn.cpu.install()

import dataclasses  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import sys  # noqa: E402
import weakref  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from unittest.mock import patch  # noqa: E402

import torch  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from modules.storages import Storages  # noqa: E402
from modules.test_stream_recompute import BITWISE, CONNECTIONS, MEMORY, SOME, TOKENS, UNIFORM, D  # noqa: E402
from ops.unfused import unfused  # noqa: E402
from parallel import harness  # noqa: E402
from parallel.cases import ALONE, Case, stream  # noqa: E402

from megatron_vwn.config import VirtualWidthConfig  # noqa: E402
from megatron_vwn.megatron_fixes import apply_fixes  # noqa: E402
from megatron_vwn.modules.boundary import arrive, join_boundaries  # noqa: E402
from megatron_vwn.modules.connection import Connection  # noqa: E402
from megatron_vwn.modules.recompute import Block  # noqa: E402

# ------------------------------------------------------------------------------------------- gradients of a model


def trained(case: Case, fused: bool = True):
    """Loss and gradients of four micro-batches, blocks rebuilt on the way and fused boundaries passed."""
    session = harness.build(ALONE, case)
    harness.perturb(session)
    with (
        nullcontext() if fused else unfused(),
        patch.object(Connection, "write_read", autospec=True, side_effect=Connection.write_read) as crossed,
        patch.object(Block, "_rebuild", autospec=True, side_effect=Block._rebuild) as rebuilt,
    ):
        loss = harness.forward_backward(session)
    gradients = {name: p.grad.clone() for name, p in session.parameters()}
    return loss, gradients, rebuilt.call_count, crossed.call_count


def bitwise(pattern: str, switches: dict, overrides: dict, runs: list) -> dict[str, dict]:
    """What differs from the same model without stream recompute, for several block sizes."""
    case = Case(pattern, stream(**switches)).but(**{"hidden_dropout": 0.1, "attention_dropout": 0.1, **overrides})
    without = {fused: trained(case, fused) for fused in {fused for _, fused in runs}}
    report = {}
    for size, fused in runs:
        # Autograd adds the parts of dH in another order where they are not added by one operation.
        loss, gradients, _, _ = without[fused]
        recomputing = dataclasses.replace(case, virtual_width=stream(recompute_block=size, **switches))
        actual_loss, actual, rebuilt, boundaries = trained(recomputing, fused)
        different = [name for name in gradients if not torch.equal(gradients[name], actual[name])]
        report[f"{size}{'' if fused else ', unfused'}"] = {
            "different": different + ([] if actual_loss == loss else ["loss"]),
            "zero": [name for name, gradient in gradients.items() if not gradient.any()],
            "rebuilt": rebuilt,
            "boundaries": boundaries,
        }
    return report


def waits_for_parameters(fused: bool) -> bool:
    """Whether every parameter is used behind a call of the module that has it, where Megatron's data parallelism waits
    for its values: until then they are no numbers here."""
    session = harness.build(ALONE, Case("*E*-/*E", stream()))
    harness.perturb(session)
    for model in session.models:
        for module in model.modules():
            values = {p: p.detach().clone() for p in module.parameters(recurse=False)}
            for parameter in values:
                parameter.data.fill_(float("nan"))

            def arrive_late(module, arguments, values=values):
                for parameter, value in values.items():
                    parameter.data.copy_(value)

            module.register_forward_pre_hook(arrive_late)
    with nullcontext() if fused else unfused():
        return math.isfinite(harness.forward_backward(session))


# -------------------------------------------------------------------------------------------- the stream by itself


class Row:
    """Connections in a row around sublayers that keep their input alone: y = sin(x).

    Attributes:
        alive: pairs (streams, vectors) of storages of the size of H and of X and Y, as each sublayer's backward begins.
    """

    def __init__(self, size: int | None, m: int = 2, n: int = 6, *, waits: bool = True, **switches):
        self.waits = waits
        case = Case(hidden=D)
        config = harness.transformer_config(ALONE, case)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        width = VirtualWidthConfig(m=m, n=n, recompute_block=size, **switches)
        torch.manual_seed(0)
        self.over_width = width.over_width(D)
        self.connections = [Connection(config, width, groups) for _ in range(CONNECTIONS)]
        for connection in self.connections:
            for parameter in connection.parameters():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        self.start = torch.randn(TOKENS, 1, self.over_width, requires_grad=True)
        self.alive, self.empty = [], []

    def forward(self, storages: Storages | None = None, between=lambda state: state):
        state = self.start.clone()
        for number, connection in enumerate(self.connections, 1):
            arrival = arrive(connection, state)
            y = arrival.x.sin()
            if y.requires_grad:
                y.register_hook(self._watch(storages, weakref.ref(arrival.x.untyped_storage())))
            state = between(arrival.leave(y, wait=self.waits and number < CONNECTIONS))
        return state

    def gradients(self) -> list[torch.Tensor]:
        return [self.start.grad, *(p.grad for connection in self.connections for p in connection.parameters())]

    def clear(self) -> None:
        for tensor in [self.start, *(p for connection in self.connections for p in connection.parameters())]:
            tensor.grad = None

    def _watch(self, storages, input_storage):
        def look(_gradient):
            self.empty.append(input_storage().nbytes() == 0)
            if storages is not None:
                self.alive.append(self.census(storages))

        return look

    def census(self, storages: Storages) -> tuple[int, int]:
        return storages.count(TOKENS * self.over_width), storages.count(TOKENS * D)


def memory(size: int | None, fused: bool) -> dict[str, object]:
    """Storages of the size of H and of X and Y, kept by the forward pass, as each backward begins, and at the end."""
    with nullcontext() if fused else unfused():
        row = Row(size)
        with Storages() as storages:
            loss = row.forward(storages).sum()
            kept = row.census(storages)
            everything = storages.elements()
            loss.backward()
            # The loss, and with it the graph, is still there; of what is left one stream is the gradient of the start.
            left = row.census(storages)
        with Storages() as storages, torch.no_grad():
            state = row.forward()
            inference = row.census(storages)
            del state
    per_token = TOKENS * D
    return {
        "kept": kept,
        "everything": everything / per_token,
        "alive": row.alive[::-1],
        "empty": any(row.empty),
        "left": left,
        "inference": inference,
        "loss": loss.item(),
    }


def backward_twice() -> bool:
    """A graph that is kept gives the same gradients again."""
    row = Row(3)
    loss = row.forward().sum()
    loss.backward(retain_graph=True)
    first = [gradient.clone() for gradient in row.gradients()]
    row.clear()
    loss.backward()
    return all(map(torch.equal, first, row.gradients()))


def modified_between_layers() -> bool:
    """A state that somebody modified in place begins a block of its own."""
    gradients = []
    for size in (None, 3):
        row = Row(size, waits=False)
        row.forward(between=lambda state: state.mul_(1.5)).sum().backward()
        gradients.append([gradient.clone() for gradient in row.gradients()])
    return all(map(torch.equal, *gradients))


def modified_output() -> str:
    """What the backward pass says of a sublayer's output that changed since the forward pass."""
    row = Row(3)
    arrival = arrive(row.connections[0], row.start.clone())
    y = arrival.x.sin()
    loss = arrival.leave(y, wait=False).sum()
    with torch.no_grad():
        y.add_(1)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return ""


def micro_batches_in_turn() -> bool:
    """Two forward passes before the first backward pass, as in a pipeline."""
    gradients = []
    for size in (None, 3):
        row = Row(size)
        first = row.forward().sum()
        second = (0.9 * row.forward()).sum()
        first.backward()
        third = row.forward().square().sum()
        second.backward()
        third.backward()
        gradients.append([gradient.clone() for gradient in row.gradients()])
    return all(map(torch.equal, *gradients))


RECOMPUTE = {
    "ordinary": {},
    "selective": {"recompute_granularity": "selective"},
    "uniform, 2": UNIFORM | {"recompute_num_layers": 2},
    "uniform, 9": UNIFORM | {"recompute_num_layers": 9},
    "block, 2": SOME | {"recompute_num_layers": 2},
    "block, 2, fp8": SOME | {"recompute_num_layers": 2, "fp8": "hybrid"},
}


def leaving(**recompute) -> list[bool]:
    config = SimpleNamespace(**{"recompute_granularity": None, "fp8": None, "fp4": None} | recompute)
    stack = SimpleNamespace(config=config, layers=[SimpleNamespace(leaves_write=False) for _ in range(5)])
    join_boundaries(stack)
    return [layer.leaves_write for layer in stack.layers]


def main(results: Path) -> None:
    torch.set_num_threads(1)
    apply_fixes()
    harness.initialize_groups(ALONE)
    report = {
        "memory": {name: memory(*arguments) for name, arguments in MEMORY.items()},
        "backward twice": backward_twice(),
        "modified between layers": modified_between_layers(),
        "modified output": modified_output(),
        "leaving": {name: leaving(**recompute) for name, recompute in RECOMPUTE.items()},
        "micro-batches in turn": micro_batches_in_turn(),
        "waits for parameters": [waits_for_parameters(fused) for fused in (False, True)],
        "bitwise": {name: bitwise(*arguments) for name, arguments in BITWISE.items()},
    }
    results.write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
