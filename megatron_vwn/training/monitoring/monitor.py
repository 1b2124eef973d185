"""Monitoring of a virtual width while it trains: when statistics are taken, and how they get to where they are written.

In one step of ``--vwn-log-interval`` the first micro-batch of every model chunk is observed: each sublayer hands over
the state that it has read (``modules.layers``), from which ``routing_statistics`` computes what the connection did with
it. When Megatron has finished the gradients of that step their norms are taken, everything is summed over the ranks
that see other tokens or channels and brought to all pipeline stages, and the rank that has Megatron's writers reports
it. In all other steps one comparison of two numbers is done.

Nothing of the training is touched: no random number is drawn, no gradient is recorded, no tensor of the model is
changed. What Megatron recomputes, or runs again to check itself, is not observed again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model, get_model_config, unwrap_model
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer
from torch import Tensor

from megatron_vwn.config import VirtualWidthConfig
from megatron_vwn.training.monitoring.gradients import squared_norms
from megatron_vwn.training.monitoring.snapshot import OF_CONNECTIONS, OF_MODULES, ConnectionStatistics, Place, Snapshot
from megatron_vwn.training.monitoring.statistics import Observation, observe, total_over_tokens
from megatron_vwn.training.monitoring.writers import Report


def monitored(forward_step: Callable, virtual_width: VirtualWidthConfig | None) -> Callable:
    """The forward step of Megatron's ``pretrain()``, observed every --vwn-log-interval steps if that was given."""
    if virtual_width is None or virtual_width.log_interval is None:
        return forward_step
    report = Report(virtual_width, tensorboard=get_tensorboard_writer, wandb=get_wandb_writer)
    # Megatron counts the step from zero while it is trained, and from one when it logs it.
    monitor = Monitor(virtual_width, iteration=lambda: get_args().curr_iteration + 1, report=report.here)
    return monitor.watch(forward_step)


@dataclass
class _Step:
    """What has been observed in the step that is being observed."""

    iteration: int
    chunks: set[int] = field(default_factory=set)
    observed: dict[Place, Observation] = field(default_factory=dict)


class Monitor:
    """Observes the steps of a training loop.

    Args:
        virtual_width: the stream; ``log_interval`` says which steps.
        iteration: the number of the step that is being trained, counted from one.
        report: called on every rank in every observed step; returns what shall get the ``Snapshot`` on this rank, or
            None where nothing shall. Only where something does, the host waits for the device.
    """

    def __init__(
        self,
        virtual_width: VirtualWidthConfig,
        *,
        iteration: Callable[[], int],
        report: Callable[[], Callable[[Snapshot], None] | None],
    ):
        self._virtual_width = virtual_width
        self._iteration, self._report = iteration, report
        self._step: _Step | None = None
        self._places: list[list[Place]] | None = None

    def watch(self, forward_step: Callable) -> Callable:
        """A forward step, as Megatron's schedules call it, that is observed when its step is one of the interval."""

        @wraps(forward_step)
        def watched(data_iterator, model):
            if not self._observes(model):
                return forward_step(data_iterator, model)
            with self._observing(model):
                return forward_step(data_iterator, model)

        return watched

    def _observes(self, chunk: torch.nn.Module) -> bool:
        """Whether this is the first micro-batch of the chunk in a step of the interval."""
        if not chunk.training:
            return False
        iteration = self._iteration()
        if iteration % self._virtual_width.log_interval != 0:
            return False
        if self._step is None or self._step.iteration != iteration:
            self._step = _Step(iteration)
            self._await_gradients(chunk)
        return id(chunk) not in self._step.chunks

    @contextmanager
    def _observing(self, chunk: torch.nn.Module) -> Iterator[None]:
        self._step.chunks.add(id(chunk))
        layers = _connected_layers(chunk)
        for place, layer in layers:
            layer.observer = partial(self._observe, place, layer.connection)
        try:
            yield
        finally:
            for _, layer in layers:
                layer.observer = None

    def _observe(self, place: Place, connection, state: Tensor) -> None:
        while place in self._step.observed:  # the layers of one further prediction may serve for all
            place = Place(place.depth + 1, place.number)
        self._step.observed[place] = observe(connection, state)

    def _await_gradients(self, chunk: torch.nn.Module) -> None:
        """Let the schedule call us once it has finished the gradients of this step, through the one hook there is."""
        config = get_model_config(chunk)
        stock = config.finalize_model_grads_func
        if isinstance(stock, _Finish):  # of a step that came to no end
            stock = stock.stock
        config.finalize_model_grads_func = _Finish(config, stock, self._finish)

    def _finish(self, chunks: Sequence[torch.nn.Module]) -> None:
        if not isinstance(chunks, Sequence):
            chunks = [chunks]
        step, layers = self._step, [pair for chunk in chunks for pair in _connected_layers(chunk)]
        observed = dict(sorted(step.observed.items()))
        groups = get_attr_wrapped_model(chunks[0], "pg_collection")
        config = get_model_config(chunks[0])
        rows, modules = self._rows(observed, chunks, dict(sorted(layers)), groups, _loss_scale(config))
        places, rows, modules = self._all_stages(list(observed), rows, modules, groups.pp)
        report = self._report()
        step.observed.clear()
        if report is not None:
            report(self._snapshot(step.iteration, places, rows.cpu(), modules.cpu(), config.hidden_size))

    def _rows(self, observed, chunks, layers, groups: ProcessGroupCollection, scale: Tensor) -> tuple[Tensor, Tensor]:
        """A row per connection of this stage, its squared gradient norms at the end, and those of other modules."""
        connections = {place: layer.connection for place, layer in layers.items()}
        squares, modules = squared_norms(chunks, connections, groups, scale)
        # Layers that serve for several further predictions have one gradient: with the first of their places.
        of_place = dict(zip(connections, squares, strict=True))
        if not observed:
            return squares.new_zeros(0, 0), modules
        partition = next(iter(connections.values())).partition
        statistics = total_over_tokens(observed, partition, groups)
        none = squares.new_zeros(len(OF_CONNECTIONS))
        squares = torch.stack([of_place.get(place, none) for place in observed])
        return torch.cat([statistics, squares], dim=1), modules

    def _all_stages(
        self, local: list[Place], rows: Tensor, modules: Tensor, group: torch.distributed.ProcessGroup
    ) -> tuple[list[Place], Tensor, Tensor]:
        """The rows of all pipeline stages, in order of their places, on all of them."""
        if group.size() == 1:
            return local, rows, modules
        if self._places is None:
            self._places = [None] * group.size()
            torch.distributed.all_gather_object(self._places, (local, rows.shape[1]), group=group)
        places = sorted(place for stage, _ in self._places for place in stage)
        everything = modules.new_zeros(len(places), max(width for _, width in self._places))
        for number, place in enumerate(local):
            everything[places.index(place)] = rows[number]
        flat = torch.cat([everything.flatten(), modules])
        torch.distributed.all_reduce(flat, group=group)
        return places, flat[: everything.numel()].view_as(everything), flat[everything.numel() :]

    def _snapshot(
        self, iteration: int, places: list[Place], rows: Tensor, modules: Tensor, hidden_size: int
    ) -> Snapshot:
        vw = self._virtual_width
        sizes = vw.m, vw.n, vw.num_carry, vw.segment_size(hidden_size)
        statistics, squares = rows[:, : -len(OF_CONNECTIONS)], rows[:, -len(OF_CONNECTIONS) :]
        by_kind = dict(zip((*OF_CONNECTIONS, *OF_MODULES), (*squares.sum(0), *modules), strict=True))
        absent = set() if vw.dynamic else {"scale", "weight", "norm"}
        absent |= {"expand"} if vw.embedding != "projected" else set()
        absent |= {"ngrams"} if not vw.ngrams else set()
        absent |= {"fusion"} if not places[-1].depth else set()
        return Snapshot(
            iteration=iteration,
            connections={p: ConnectionStatistics.of(r, *sizes) for p, r in zip(places, statistics, strict=True)},
            gradient_norms={k: square.sqrt().item() for k, square in by_kind.items() if k not in absent},
            connection_gradient_norms={p: s.sum().sqrt().item() for p, s in zip(places, squares, strict=True)},
        )


class _Finish:
    """In place of ``config.finalize_model_grads_func`` until it has been called once."""

    def __init__(self, config, stock: Callable | None, then: Callable[[Sequence[torch.nn.Module]], None]):
        self._config, self.stock, self._then = config, stock, then

    def __call__(self, chunks: Sequence[torch.nn.Module], *args, **kwargs) -> None:
        self._config.finalize_model_grads_func = self.stock
        if self.stock is not None:
            self.stock(chunks, *args, **kwargs)
        self._then(chunks)


def _connected_layers(chunk: torch.nn.Module) -> list[tuple[Place, torch.nn.Module]]:
    """The layers of a chunk, and where they are in the whole model."""
    model = unwrap_model(chunk)
    found = [(Place(0, layer.layer_number), layer) for layer in model.decoder.layers]
    if model.mtp_process:
        for depth, further in enumerate(model.mtp.layers, 1):
            found += [(Place(depth, i), layer) for i, layer in enumerate(further.mtp_model_layer.layers, 1)]
    return found


def _loss_scale(config) -> Tensor | None:
    """What Megatron's optimizer multiplied the loss with."""
    if config.grad_scale_func is None:
        return None
    return torch.as_tensor(config.grad_scale_func(torch.ones((), device=torch.cuda.current_device())))
