"""How much of the residual stream survives when it is kept in fewer bits than bf16.

    python -m megatron_vwn_tools.stream_precision [--model FOLDER --text FILE] [--json FILE] [--plot FILE]

After every sublayer the stream is rounded to a storage format, as a kernel would that writes it so; everything else is
computed in fp64. The error is the norm of the difference to the unrounded stream over its norm, by depth. Without a
model, 60 random sublayers with perturbed connections are passed; with a Hugging Face folder of this package, such as
vwn-convert writes, its layers on a text, and the loss is shown as well.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from megatron_vwn_tools._program import exit_code
from torch import Tensor

from megatron_vwn.config import VirtualWidthError
from megatron_vwn.ops import ConnectionParameters, composed, tile

FP8_MAX, INT8_MAX = 448.0, 127.0
# Sublayers after which the error is shown.
DEPTHS = (1, 4, 15, 30, 60)

Format = Callable[[Tensor, torch.Generator], Tensor]


def bf16(h_TNE: Tensor, generator: torch.Generator) -> Tensor:
    """What is stored today."""
    return h_TNE.to(torch.bfloat16).to(h_TNE.dtype)


def scaled(kind: str, channels: str | int, *, stochastic: bool = False) -> Format:
    """8 bits and one bf16 scale for some channels of a token: its largest value becomes the format's largest.

    Args:
        kind: "int8", or "fp8" for e4m3.
        channels: "segment", "token", or a number of channels within a segment.
        stochastic: round up with a probability that makes the mean exact (int8).
    """

    def store(h_TNE: Tensor, generator: torch.Generator) -> Tensor:
        group = {"segment": h_TNE.shape[-1], "token": h_TNE[0].numel()}.get(channels, channels)
        groups = h_TNE.reshape(h_TNE.shape[0], -1, group)
        limit = INT8_MAX if kind == "int8" else FP8_MAX
        # Rounded to bf16 and up, so that nothing overflows.
        scale = (groups.abs().amax(-1, keepdim=True) / limit * (1 + 2.0**-8)).clamp_min(1e-30).to(torch.bfloat16)
        values = groups / scale.to(h_TNE.dtype)
        if kind == "fp8":
            values = values.clamp(-limit, limit).to(torch.float8_e4m3fn).to(h_TNE.dtype)
        elif stochastic:
            noise = torch.rand(values.shape, generator=generator, dtype=values.dtype)
            values = (values + noise).floor().clamp(-limit, limit)
        else:
            values = values.round()
        return (values * scale.to(h_TNE.dtype)).view_as(h_TNE)

    return store


FORMATS: dict[str, Format] = {
    "bf16": bf16,
    "int8 / token": scaled("int8", "token"),
    "int8 / segment": scaled("int8", "segment"),
    "int8 / segment, stochastic": scaled("int8", "segment", stochastic=True),
    "int8 / 32 channels": scaled("int8", 32),
    "fp8 / token": scaled("fp8", "token"),
    "fp8 / segment": scaled("fp8", "segment"),
    "fp8 / 32 channels": scaled("fp8", 32),
}


def bytes_per_element(name: str, segment: int, over_width: int) -> float:
    """Stored bytes of an element, its share of a scale included."""
    if name == "bf16":
        return 2.0
    channels = {"segment": segment, "token": over_width}.get(name.split(" / ")[1].split(",")[0], 32)
    return 1 + 2 / channels


def floor_change(n: int, m: int, stored: float, *, gradients_too: bool) -> float:
    """Bytes of ``write_read``, forward and backward, over those of a stream in bf16.

    Forward reads H, Y and writes H', X; backward reads H, Y, dX, dH' and writes dH, dY. Only H and H' are stored in the
    format, or with ``gradients_too`` dH' and dH as well; whatever has width D stays in bf16.
    """
    gradients = 2 * n * (stored if gradients_too else 2.0)
    return (3 * n * stored + gradients + 5 * m * 2.0) / (5 * n * 2.0 + 5 * m * 2.0)


class RandomSublayers:
    """Sublayers T(x) = gain W2 gelu(W1 rmsnorm(x)) around connections as training leaves them: everything perturbed.

    Args:
        m, n, hidden_size: of the stream.
        tokens: T.
        sublayers: how many.
        std: of the deviations in A and B and of the logits' weights.
    """

    def __init__(self, m: int, n: int, hidden_size: int, tokens: int, sublayers: int, std: float, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        self._sublayers = sublayers
        x_TME = self._draw(tokens, m, hidden_size // m)
        self.start = tile(x_TME, n)
        self._connections, self._weights = [], []
        for _ in range(sublayers):
            k, e = 2 * m + n, hidden_size // m
            # Deviations add up over n segments: this keeps the stream's size about constant.
            routing_NK = std / math.sqrt(n) * self._draw(n, k)
            scale_NK = std / math.sqrt(n) * self._draw(n, k) - 1 + 1 / math.sqrt(n)
            parameters = (routing_NK, scale_NK, std * self._draw(e, k), 1 + std * self._draw(e))
            self._connections.append(ConnectionParameters(m, n, "tanh", 1e-6, *parameters))
            up = self._draw(hidden_size, 2 * hidden_size) / math.sqrt(hidden_size)
            self._weights.append((up, self._draw(2 * hidden_size, hidden_size) / math.sqrt(2 * hidden_size)))

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def states(self, store: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], float | None]:
        """The stream after every sublayer, stored; there is no loss."""
        h_TNE, states = store(self.start), []
        for p, (up, down) in zip(self._connections, self._weights, strict=True):
            x_TD = composed.read(h_TNE, p)
            normed_TD = x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + 1e-6)
            y_TD = torch.nn.functional.gelu(normed_TD @ up) @ down
            h_TNE = store(composed.write(h_TNE, y_TD, p))
            states.append(h_TNE)
        return states, None


class TrainedModel:
    """A Hugging Face folder of this package on the beginning of a text.

    Args:
        folder: the model, with its tokenizer.
        text: a file in UTF-8.
        tokens: how many of its tokens.
    """

    def __init__(self, folder: Path, text: Path, tokens: int):
        from transformers import AutoTokenizer

        from megatron_vwn.hf import VWNForCausalLM

        try:
            self._model = VWNForCausalLM.from_pretrained(folder, dtype=torch.float64)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            # More characters than so many tokens have, and not a whole corpus.
            self._ids = tokenizer(text.read_text()[: 20 * tokens], return_tensors="pt").input_ids[:, :tokens]
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise VirtualWidthError(f"{folder} and {text} cannot be read ({reason}): give others.") from error
        config = self._model.config
        self.m, self.n, self.hidden_size = config.vwn_m, config.vwn_n, config.hidden_size

    def states(self, store: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], float | None]:
        """The stream after every sublayer, stored, and the loss."""
        states = []

        def keep(layer, arguments, output: Tensor) -> Tensor:
            states.append(store(output.reshape(-1, self.n, output.shape[-1] // self.n)))
            return states[-1].view_as(output)

        handles = [layer.register_forward_hook(keep) for layer in self._model.model.layers]
        try:
            with torch.no_grad():
                loss = self._model(self._ids, labels=self._ids).loss.item()
        finally:
            for handle in handles:
                handle.remove()
        return states, loss


def measure(source: RandomSublayers | TrainedModel, seed: int = 0) -> dict[str, dict]:
    """Relative error after every sublayer, and the loss, per format; "exact" has no errors."""
    exact, loss = source.states(lambda h: h)
    found: dict[str, dict] = {"exact": {"errors": [0.0] * len(exact), "loss": loss}}
    for name, form in FORMATS.items():
        generator = torch.Generator().manual_seed(seed)
        states, loss = source.states(lambda h, form=form, generator=generator: form(h, generator))
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(states, exact, strict=True)]
        found[name] = {"errors": errors, "loss": loss}
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0, or 2 for a refusal."""
    return exit_code("stream_precision", lambda: _run(_parser().parse_args(argv)))


def _run(options: argparse.Namespace) -> None:
    if (options.model is None) != (options.text is None):
        raise VirtualWidthError("--model and --text belong together: give both, or neither for random sublayers.")
    if options.hidden_size % options.m or options.n < options.m or (options.hidden_size // options.m) % 32:
        raise VirtualWidthError("segments must be whole and multiples of 32 channels, and n at least m: choose others.")
    if options.model is not None:
        source = TrainedModel(options.model, options.text, options.tokens)
        options.m, options.n, options.hidden_size = source.m, source.n, source.hidden_size
    else:
        shape = (options.m, options.n, options.hidden_size, options.tokens, options.sublayers)
        source = RandomSublayers(*shape, options.std, options.seed)
    found = measure(source, options.seed)
    depth = len(found["exact"]["errors"])
    shown = sorted({d for d in DEPTHS if d < depth} | {depth})
    print(f"(m, n) = ({options.m}, {options.n}), {depth} sublayers, {options.tokens} tokens; error after sublayer")
    print(f"{'format':28}" + "".join(f"{d:>9}" for d in shown) + "   / bf16     loss   bytes  traffic  with gradients")
    last = found["bf16"]["errors"][-1]
    segment = options.hidden_size // options.m
    for name, row in found.items():
        line = f"{name:28}" + "".join(f"{row['errors'][d - 1]:9.1e}" for d in shown)
        line += f"{row['errors'][-1] / last:9.1f}" + ("" if row["loss"] is None else f"{row['loss']:9.4f}").rjust(9)
        if name != "exact":
            stored = bytes_per_element(name, segment, segment * options.n)
            row["bytes_per_element"] = stored
            row["traffic"], row["traffic_with_gradients"] = (
                floor_change(options.n, options.m, stored, gradients_too=too) for too in (False, True)
            )
            line += f"{stored:8.3f}{100 * row['traffic']:8.0f} %{100 * row['traffic_with_gradients']:14.0f} %"
        print(line)
    if options.json:
        options.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, **found}))
    if options.plot:
        _plot(found, options.plot)


def _plot(found: dict[str, dict], path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise VirtualWidthError("--plot needs matplotlib: install it, or use --json.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    for name, row in found.items():
        if name != "exact":
            axes.semilogy(range(1, len(row["errors"]) + 1), row["errors"], label=name)
    axes.set(xlabel="sublayer", ylabel="relative error of the stream")
    axes.legend()
    figure.savefig(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stream_precision", description=__doc__.splitlines()[0])
    parser.add_argument("--m", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--n", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--sublayers", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--std", type=float, default=0.1, help="of the connections' deviations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a trained model instead of random sublayers")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what it reads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every depth")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG (needs matplotlib)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
