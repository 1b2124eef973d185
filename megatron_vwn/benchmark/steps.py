"""``vwn-benchmark layer`` and ``model``: whole steps of the ordinary model and of its wide twins, in turn.

Before anything is timed, every wide model must agree twice: fresh, with the ordinary model, whose function it then
computes; and with perturbed connections, with the same layers around the paper's equations (``ops.reference``).
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from megatron_vwn import ops
from megatron_vwn.benchmark import machine, memory, models, report
from megatron_vwn.benchmark.models import Description
from megatron_vwn.benchmark.timing import Timed, interleave
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.ops import costs
from megatron_vwn.training.monitoring.monitor import Monitor
from megatron_vwn.training.monitoring.writers import Report

BASELINE, WIDE = "baseline", "VWN"
# Of --vwn-log-interval, over which the cost of one monitored step is spread.
INTERVAL = 100
# Norm of the difference over norm, per output and per gradient; in bf16 each of a layer's products rounds anew.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

HEADER = ("variant", "ms", "10 to 90 %", "over baseline", "TFLOP/s", "kept MiB", "peak MiB", "floor ms", "remark")


@dataclass
class Candidate:
    """One variant: its flags, and once built its model.

    Attributes:
        name: in tables.
        flags: what it has beyond the ordinary model's flags.
        description: of the model; None when ``reason`` says why there is none.
    """

    name: str
    flags: tuple[str, ...]
    description: Description | None = None
    reason: str = ""
    model: torch.nn.Module | None = None


def candidates(flags: Sequence[str], width: Sequence[str], blocks: Sequence[int], *, gpu: bool) -> list[Candidate]:
    """The ordinary model, the wide one, and the wide one with its stream recomputed in blocks.

    Args:
        flags: of the ordinary model.
        width: the ``--vwn-*`` flags.
        blocks: values of --vwn-recompute-block.
        gpu: whether there is one.
    """
    found = [Candidate(BASELINE, ()), Candidate(WIDE, tuple(width))]
    found += [
        Candidate(f"VWN, recompute block {k}", (*width, "--vwn-recompute-block", str(k)))
        for k in blocks
        if "--vwn-recompute-block" not in width
    ]
    for candidate in found:
        try:
            candidate.description = models.describe([*flags, *candidate.flags], gpu=gpu)
        except VirtualWidthError as refusal:
            # The models themselves must be possible; an option of theirs need not be.
            if candidate.flags in ((), tuple(width)):
                raise
            candidate.reason = str(refusal)
    return found


class Layers:
    """The layers alone, on a random stream."""

    only_layers = True

    def __init__(self, description: Description, device: torch.device):
        sequence, batch = description.batch_shape
        hidden, dtype = description.args.hidden_size, description.dtype
        generator = torch.Generator().manual_seed(0)
        shape = (sequence, batch, hidden)
        self.x = torch.randn(shape, generator=generator).to(dtype).to(device)
        self.dx = torch.randn(shape, generator=generator).to(dtype).to(device)
        self.mask = _causal_mask(description, device)

    def stream(self, model) -> Tensor:
        """The input of a model of any width: x, tiled."""
        return _tiled(self.x, model).requires_grad_()

    def gradient(self, model) -> Tensor:
        """A gradient of the output that weighs the output of every width alike: dx on the first segments."""
        width = getattr(model, "virtual_width", None)
        if width is None:
            return self.dx
        rest = width.over_width(self.dx.shape[-1]) - self.dx.shape[-1]
        return torch.nn.functional.pad(self.dx, (0, rest))

    def forward(self, model) -> Tensor:
        """Output of the layers, in the width of the model's stream."""
        stream = self.stream(model)
        model.set_input_tensor(stream)
        return model(input_ids=None, position_ids=None, attention_mask=self.mask)

    def backward(self, model, output: Tensor) -> None:
        """From the gradient that every width has in common."""
        output.backward(self.gradient(model))

    def common(self, output: Tensor) -> Tensor:
        """What an ordinary and a fresh wide model have in common."""
        return output[..., : self.x.shape[-1]]


class Loss:
    """A whole model on random tokens."""

    only_layers = False

    def __init__(self, description: Description, device: torch.device):
        sequence, batch = description.batch_shape
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, description.args.vocab_size, (batch, sequence + 1), generator=generator).to(device)
        self.tokens, self.labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.positions = torch.arange(sequence, device=device).expand(batch, -1)
        self.loss_mask = torch.ones(batch, sequence, device=device)
        self.mask = _causal_mask(description, device)

    def forward(self, model) -> Tensor:
        """Mean loss."""
        losses = model(self.tokens, self.positions, self.mask, labels=self.labels, loss_mask=self.loss_mask)
        return losses.float().mean()

    def backward(self, model, output: Tensor) -> None:
        """Of the loss."""
        output.backward()

    def common(self, output: Tensor) -> Tensor:
        """The loss."""
        return output


def _causal_mask(description: Description, device: torch.device) -> Tensor | None:
    """Megatron's own layers want one; Transformer Engine's make it where they need it."""
    if description.args.transformer_impl != "local":
        return None
    s = description.args.seq_length
    return torch.triu(torch.ones(1, 1, s, s, dtype=torch.bool, device=device), 1)


def _tiled(x: Tensor, model) -> Tensor:
    width = getattr(model, "virtual_width", None)
    if width is None:
        return x.clone()
    x_TME = x.reshape(-1, width.m, x.shape[-1] // width.m)
    return ops.tile(x_TME, width.n).reshape(*x.shape[:-1], -1).clone()


def _evaluate(task, model) -> dict[str, Tensor]:
    """Output and gradients by name, in fp64."""
    model.zero_grad(set_to_none=True)
    output = task.forward(model)
    task.backward(model, output)
    found = {"output": task.common(output).detach().double().clone()}
    found |= {f"d {n}": p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _disagreement(
    actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype, what: str, *, same_model: bool
) -> str | None:
    if same_model and (missing := sorted(expected.keys() ^ actual.keys())):
        return f"{what}: {missing[0]} and {len(missing) - 1} more have a gradient on one side alone"
    errors = {}
    for name in expected.keys() & actual.keys():
        errors[name] = ((actual[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-30)).item()
    off = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    if not off:
        return None
    name = max(off, key=lambda key: off[key] if off[key] == off[key] else float("inf"))
    return f"{what}: {len(off)} of {len(errors)} tensors, {name} by {off[name]:.1e} (allowed {TOLERANCE[dtype]:.0e})"


def check(task, candidate: Candidate, baseline: Candidate) -> str | None:
    """Where a wide model disagrees, fresh with the ordinary model, or perturbed with the reference; None if nowhere."""
    description = candidate.description
    fresh_width = replace(description.virtual_width, embedding="tiled", reduce_norm=False, ngrams=(), ngram_vocab=None)
    fresh = models.build(replace(description, virtual_width=fresh_width), only_layers=task.only_layers)
    models.copy_backbone(baseline.model, fresh)
    dtype = description.dtype
    expected = _evaluate(task, baseline.model)
    if description.args.mtp_num_layers:
        # A wide model predicts further tokens by another, shared fusion: only the next token's loss is the same.
        expected = {"output": expected["output"]}
    if off := _disagreement(
        _evaluate(task, fresh), expected, dtype, "fresh, against the ordinary model", same_model=False
    ):
        return off
    del fresh
    models.perturb(candidate.model)
    with models.by_reference(candidate.model):
        expected = _evaluate(task, candidate.model)
    return _disagreement(
        _evaluate(task, candidate.model), expected, dtype, "perturbed, against the reference", same_model=True
    )


def run(
    found: list[Candidate],
    task_class: type[Layers] | type[Loss],
    device: torch.device,
    *,
    bandwidth: float,
    warmup: int,
    rounds: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """Build, check and time; one result per candidate, the ordinary model first."""
    baseline = found[0]
    # Megatron logs every model that it builds.
    logging.getLogger("megatron").setLevel(logging.ERROR)
    task = task_class(baseline.description, device)
    baseline.model = models.build(baseline.description, only_layers=task.only_layers)
    results = {candidate.name: {"variant": candidate.name, "flags": list(candidate.flags)} for candidate in found}
    agreed = [baseline]
    for candidate in found[1:]:
        if candidate.description is None:
            results[candidate.name] |= {"status": "missing", "reason": candidate.reason}
            continue
        say(f"checking {candidate.name}")
        try:
            candidate.model = models.build(candidate.description, only_layers=task.only_layers)
            models.copy_backbone(baseline.model, candidate.model)
            off = check(task, candidate, baseline)
        except (RuntimeError, VirtualWidthError) as error:
            results[candidate.name] |= {"status": "failed", "reason": " ".join(str(error).split())[:200]}
            continue
        if off:
            results[candidate.name] |= {"status": "disagrees", "reason": off}
        else:
            agreed.append(candidate)
    say("measuring memory")
    for candidate in agreed:
        found_memory = _memory(task, candidate.model, device)
        results[candidate.name] |= {"status": "measured"}
        results[candidate.name] |= {"kept_bytes": found_memory.kept, "peak_bytes": found_memory.peak}
    say("timing " + ", ".join(candidate.name for candidate in agreed))
    with TemporaryDirectory() as events:
        steps = {}
        for candidate in agreed:
            steps |= _steps(task, candidate, events)
        clock = machine.make_clock(device, cold=False, hide_launches=False)
        seconds = interleave(steps, clock, sets=1, warmup=warmup, rounds=rounds)
    for candidate in agreed:
        results[candidate.name]["seconds"] = vars(seconds[candidate.name])
        if (monitored := seconds.get(_monitored(candidate))) is not None:
            added = monitored.median / seconds[candidate.name].median - 1
            results[candidate.name] |= {"monitored_seconds": vars(monitored), "monitoring": added / INTERVAL}
    _compare(results, agreed, task, bandwidth)
    return list(results.values())


def _steps(task, candidate: Candidate, events: str) -> dict[str, Timed]:
    """Forward and backward of layers; of a model also the optimizer's step, with Megatron's wrapper, and of the wide
    one the same step where --vwn-log-interval takes and writes its statistics."""
    model = candidate.model
    if task.only_layers:

        def step(_: int) -> None:
            model.zero_grad(set_to_none=True)
            task.backward(model, task.forward(model))

        return {candidate.name: Timed(step)}
    trainer = models.Trainer(candidate.description, model)
    found = {candidate.name: Timed(lambda _: trainer.step(task.forward))}
    if candidate.name != WIDE:
        return found
    width = replace(candidate.description.virtual_width, log_interval=1)
    writer, iteration = SummaryWriter(events), itertools.count(1)
    report = Report(width, tensorboard=lambda: writer, wandb=lambda: None, say=lambda line: None)
    # The forward step asks once for its iteration; every one is another.
    monitor = Monitor(width, iteration=lambda: next(iteration), report=report.here)
    watched = monitor.watch(lambda _, chunk: task.forward(chunk))
    return found | {_monitored(candidate): Timed(lambda _: trainer.step(partial(watched, None)))}


def _monitored(candidate: Candidate) -> str:
    return f"{candidate.name}, monitored"


def _memory(task, model, device: torch.device) -> memory.Footprint:
    """Of both passes, after one that made whatever is made once."""
    task.backward(model, task.forward(model))
    model.zero_grad(set_to_none=True)
    found = memory.footprint(device, lambda: task.forward(model), lambda output: task.backward(model, output))
    model.zero_grad(set_to_none=True)
    return found


def _compare(results: dict[str, dict], agreed: Iterable[Candidate], task, bandwidth: float) -> None:
    """Add what follows from the measurements: overhead, achieved rate, floor of the connections."""
    base = results[BASELINE]["seconds"]["median"]
    for candidate in agreed:
        result, description = results[candidate.name], candidate.description
        tokens = description.args.seq_length * description.args.micro_batch_size
        seconds = result["seconds"]["median"]
        if candidate.name == BASELINE:
            layers = str(description.args.hybrid_layer_pattern).count("*")
            flops = 6 * models.active_parameters(candidate.model) + models.attention_flops(description, layers)
            result |= {"flops_per_token": flops, "flop_rate": flops * tokens / seconds}
            continue
        vw, hidden = description.virtual_width, description.args.hidden_size
        width = costs.Width.of(vw, hidden)
        floor = costs.layer_floor_seconds(
            width,
            tokens,
            bandwidth=bandwidth,
            element_bytes=description.dtype.itemsize,
            connections=len(candidate.model.decoder.layers),
        )
        result |= {
            "overhead": seconds / base - 1,
            "floor_seconds": floor,
            "added_over_floor": (seconds - base) / floor,
        }


def table_rows(results: Iterable[dict]) -> list[list[str]]:
    """One line of the printed table per result."""
    rows = []
    for result in results:
        cells = [result["variant"], *[""] * 7, ""]
        if result["status"] != "measured":
            cells[-1] = f"{result['status']}: {result['reason']}"
            rows.append(cells)
            continue
        seconds = result["seconds"]
        cells[1:3] = report.milliseconds(seconds)
        if "overhead" in result:
            cells[3] = f"{100 * result['overhead']:+.1f} %"
            cells[7] = f"{1e3 * result['floor_seconds']:.2f}"
            cells[8] = f"adds {result['added_over_floor']:.1f} x its traffic floor"
        if "monitoring" in result:
            cells[8] += f"; --vwn-log-interval {INTERVAL} adds {100 * result['monitoring']:.2f} %"
        if "flop_rate" in result:
            cells[4] = f"{result['flop_rate'] / 1e12:.3g}"
        cells[5] = f"{result['kept_bytes'] / 2**20:.1f}"
        cells[6] = f"{result['peak_bytes'] / 2**20:.1f}"
        rows.append(cells)
    return rows
