"""Models for benchmarks, built from Megatron's flags by the same lines as in ``pretrain()``; one process, no ranks.

Importing this module imports Megatron: without a GPU, ``megatron_vwn.cpu.install()`` comes first.
"""

import argparse
import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config
from torch import Tensor

from megatron_vwn.benchmark.machine import has_gpu
from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.megatron_fixes import apply_fixes
from megatron_vwn.modules.layers import CONNECTED
from megatron_vwn.ops import reference
from megatron_vwn.training.model import VirtualWidthModelBuilder, model_config_from_args
from megatron_vwn.training.run import Run

# What Megatron wants to know although nothing is trained.
_ALWAYS = "--mock-data --tokenizer-type NullTokenizer --vocab-size 8191 --train-iters 1 --lr 1e-4 --eval-iters 0 "
_ALWAYS += "--eval-interval 1 --max-position-embeddings 131072 --hidden-dropout 0 "
_ALWAYS += "--attention-dropout 0 --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
_ALWAYS += "--untie-embeddings-and-output-weights"


@dataclass(frozen=True)
class Description:
    """Megatron's validated arguments and the virtual width, None for the ordinary model."""

    args: argparse.Namespace
    virtual_width: VirtualWidthConfig | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        return self.args.params_dtype

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Tokens of a sample, samples of a micro-batch."""
        return self.args.seq_length, self.args.micro_batch_size


def describe(flags: Sequence[str], *, gpu: bool) -> Description:
    """Parse and validate flags as training does, quietly.

    Args:
        flags: Megatron's and ours; what a benchmark need not say is added.
        gpu: whether there is one.

    Raises:
        VirtualWidthError: flags that cannot be run, or more than one rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise VirtualWidthError("vwn-benchmark measures one process: start it without torchrun.")
    apply_fixes()
    typed = {flag.partition("=")[0] for flag in flags}
    added = [words for words in _ALWAYS.replace(" --", "\n--").split("\n") if words.split()[0] not in typed]
    with contextlib.redirect_stdout(io.StringIO()):
        run = Run.parse([*flags, *" ".join(added).split()], gpu=gpu)
        run.check()
    if run.args.world_size > 1 or run.args.fp16:
        raise VirtualWidthError("vwn-benchmark measures one rank in fp32 or bf16: drop --fp16.")
    return Description(run.args, run.virtual_width)


def groups() -> ProcessGroupCollection:
    """Process groups of one rank, made once."""
    if not torch.distributed.is_initialized():
        backend = "nccl" if has_gpu() else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    return ProcessGroupCollection.use_mpu_process_groups()


def build(description: Description, *, only_layers: bool) -> HybridModel:
    """A model, or its layers alone: those of a pipeline stage between the first and the last.

    The same seed gives backbones the same weights.
    """
    collection = groups()
    torch.manual_seed(description.args.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(description.args.seed)
    with contextlib.redirect_stdout(io.StringIO()):
        builder = VirtualWidthModelBuilder(model_config_from_args(description.args, description.virtual_width))
        model = builder.build_model(collection, pre_process=not only_layers, post_process=not only_layers)
    return model.to(description.dtype).cuda()


def copy_backbone(source: HybridModel, target: HybridModel) -> None:
    """Give ``target`` every parameter of ``source`` that it has a place for."""
    weights = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def perturb(model: HybridModel, std: float = 0.05, seed: int = 0) -> None:
    """Move the parameters of connections, which are deviations and start at zero, to where training takes them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".connection." in name:
                parameter.add_((std * torch.randn(parameter.shape, generator=generator)).to(parameter))


@contextlib.contextmanager
def by_reference(model: HybridModel) -> Iterator[None]:
    """Within, the connections of the model's layers are computed by the paper's equations, and nothing else changes.

    Raises:
        VirtualWidthError: the stack went past its layers' ``forward``, so nothing was compared.
    """
    layers, calls = [layer for layer in model.decoder.layers if hasattr(layer, "connection")], 0
    stock = {connected: plain for plain, connected in CONNECTED.items()}

    def forward(layer: TransformerLayer, hidden_states: Tensor, *args, **kwargs):
        nonlocal calls
        calls += 1
        p = layer.connection()
        h_TNE = hidden_states.reshape(-1, p.n, hidden_states.shape[-1] // p.n)
        x = reference.read(h_TNE, p).view(*hidden_states.shape[:-1], -1)
        output = stock[type(layer)].forward(layer, x.to(layer.config.params_dtype), *args, **kwargs)
        y, *rest = output if isinstance(output, tuple) else (output,)
        h_TNE = reference.write(h_TNE, y.flatten(0, 1), p).view(hidden_states.shape)
        return (h_TNE, *rest) if isinstance(output, tuple) else h_TNE

    for layer in layers:
        layer.forward = partial(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
    if calls < len(layers):
        raise VirtualWidthError("the stack does not call its layers one by one, so the reference could not step in.")


class Trainer:
    """A model with Megatron's data-parallel wrapper and optimizer."""

    def __init__(self, description: Description, model: HybridModel):
        collection = groups()
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = DistributedDataParallel(
                model.config, get_megatron_ddp_config(description.args), model, pg_collection=collection
            )
            config, overrides = get_megatron_optimizer_config(description.args)
            self.optimizer = get_megatron_optimizer(
                config, [self.model], overrides, use_gloo_process_groups=False, pg_collection=collection
            )
        self.model.config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=collection)

    def step(self, loss_of) -> None:
        """One optimizer step on the loss (a scalar) that ``loss_of(model)`` returns."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss_of(self.model).backward()
        self.model.config.finalize_model_grads_func([self.model])
        self.optimizer.step()


def active_parameters(model: HybridModel) -> float:
    """Parameters of matrices that one token meets: of routed experts only those it is sent to; no embedding."""
    config, total = model.config, 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or "embedding" in name:
            continue
        routed = ".experts." in name
        total += parameter.numel() * (config.moe_router_topk / config.num_moe_experts if routed else 1)
    return total


def attention_flops(description: Description, layers: int) -> float:
    """Per token, forward and backward, of causal attention's two products: 6 s (heads x channels) in each layer."""
    args = description.args
    channels = (args.kv_channels or args.hidden_size // args.num_attention_heads) * args.num_attention_heads
    return 6.0 * args.seq_length * channels * layers
