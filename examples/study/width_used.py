"""Does a trained model use its width? python examples/study/width_used.py FOLDER --data PREFIX

The loss of an exported model on held-out tokens, and by how much it rises without one thing that the model has learned:
what the copies of a backbone segment do not have in common, coefficients that depend on the token, and the static
routing. The model is not trained again, so the rises say what it leans on, not what it could do without.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_vwn.cli import exit_code
from megatron_vwn.config import VirtualWidthError
from megatron_vwn.data.indexed import check_indexed_dataset, map_sequences
from megatron_vwn.hf import VWNForCausalLM
from megatron_vwn.hf.modeling_vwn import VWNConnection, average_copies, tile

PROGRAM = "width_used.py"
# Sequences at once: the logits of all of them would not fit into memory.
BATCH = 4


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that vwn-convert to-hf wrote")
    parser.add_argument("--data", required=True, metavar="PREFIX", help="tokens that vwn-prepare-data held out")
    parser.add_argument("--sequences", type=int, default=64, help="how many are read (default: %(default)s)")
    options = parser.parse_args(argv)
    return exit_code(PROGRAM, lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if not (options.folder / "config.json").is_file():
        raise VirtualWidthError(f"{options.folder} has no config.json: give a folder that vwn-convert to-hf wrote.")
    model = VWNForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    tokens_BS = read_tokens(options.data, options.sequences, model.config)
    whole, shares = loss(model, tokens_BS), energy_of_differences(model, tokens_BS)
    connections = connections_of(model)
    print(f"{tokens_BS.numel():,} tokens of {options.data}: loss {whole:.4f}\n")
    print("| without | loss rises by | copies differ in this share of the stream's energy |")
    print("|---|---|---|")
    with equal_copies(connections):
        _row("what copies of a segment have for themselves, after every sublayer", loss(model, tokens_BS) - whole)
    for place, (connection, share) in enumerate(zip(connections, shares, strict=True), start=1):
        with equal_copies([connection]):
            _row(f"the same, after sublayer {place} alone", loss(model, tokens_BS) - whole, share)
    if model.config.vwn_connection == "dynamic":
        with zeroed(connections, "weight"):
            _row("coefficients that depend on the token", loss(model, tokens_BS) - whole)
    with zeroed(connections, "routing"):
        _row("learned static routing", loss(model, tokens_BS) - whole)


def _row(what: str, rise: float, share: float | None = None) -> None:
    print(f"| {what} | {rise:+.4f} | {'' if share is None else f'{100 * share:.1f} %'} |", flush=True)


def read_tokens(prefix: str, sequences: int, config) -> Tensor:
    """The first tokens, [B, S]; S is the longest sequence of the model.

    Raises:
        VirtualWidthError: for data that is missing or damaged, too short, or of another vocabulary.
    """
    length = config.max_position_embeddings
    held = check_indexed_dataset(prefix).tokens
    if not 0 < sequences <= held // length:
        raise VirtualWidthError(
            f"{prefix} has {held:,} tokens, which are {held // length} sequences of {length}: give --sequences from 1 "
            "to that."
        )
    tokens, _, _ = map_sequences(prefix)
    found = torch.from_numpy(tokens[: sequences * length].astype("int64")).view(sequences, length)
    if found.max() >= config.vocab_size:
        raise VirtualWidthError(
            f"{prefix} has the token {found.max()}, and the model ends at {config.vocab_size - 1}: give its own data."
        )
    return found


@torch.no_grad()
def loss(model: VWNForCausalLM, tokens_BS: Tensor) -> float:
    """The mean cross entropy of the next token, in nats."""
    nats = 0.0
    for batch_BS in tokens_BS.split(BATCH):
        logits = model(batch_BS).logits[:, :-1].float()
        nats += F.cross_entropy(logits.flatten(0, 1), batch_BS[:, 1:].flatten(), reduction="sum").item()
    return nats / tokens_BS[:, 1:].numel()


def connections_of(model: VWNForCausalLM) -> list[VWNConnection]:
    """Those of the trunk, first to last."""
    return [layer.connection for layer in model.model.layers]


@contextmanager
def _after_writes(
    connections: Sequence[VWNConnection], change: Callable[[VWNConnection, Tensor], Tensor]
) -> Iterator[None]:
    # ``change`` takes a connection and the state that it has written, [T, N, E].
    def changed(connection: VWNConnection) -> Callable[..., Tensor]:
        def write(*arguments) -> Tensor:
            state = VWNConnection.write(connection, *arguments)
            return change(connection, state.unflatten(-1, (connection.n, -1))).flatten(-2)

        return write

    try:
        for connection in connections:
            connection.write = changed(connection)
        yield
    finally:
        for connection in connections:
            vars(connection).pop("write", None)


def equal_copies(connections: Sequence[VWNConnection]):
    """A context in which all copies of a backbone segment are their mean after each of these connections."""
    return _after_writes(connections, _equal)


def _equal(connection: VWNConnection, h_TNE: Tensor) -> Tensor:
    return tile(average_copies(h_TNE, connection.m), connection.n)


def energy_of_differences(model: VWNForCausalLM, tokens_BS: Tensor) -> list[float]:
    """After each sublayer, the share of the stream's energy in which copies differ from their mean."""
    connections = connections_of(model)
    apart, whole = (dict.fromkeys(connections, 0.0) for _ in range(2))

    def measure(connection: VWNConnection, h_TNE: Tensor) -> Tensor:
        apart[connection] += (h_TNE - _equal(connection, h_TNE)).square().sum().item()
        whole[connection] += h_TNE.square().sum().item()
        return h_TNE

    with _after_writes(connections, measure):
        loss(model, tokens_BS)
    return [apart[connection] / whole[connection] for connection in connections]


@contextmanager
def zeroed(connections: Sequence[VWNConnection], name: str) -> Iterator[None]:
    """A context in which a parameter of these connections is zero, as in a fresh model."""
    parameters = [getattr(connection, name) for connection in connections]
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data.zero_()
        yield
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.data.copy_(value)


if __name__ == "__main__":
    sys.exit(main())
