"""What the planner needs to know of a recipe: sizes of the model, its stages, and the parallel layout."""

from collections import Counter
from dataclasses import dataclass
from functools import cache

from megatron_vwn.config import VirtualWidthConfig, VirtualWidthError
from megatron_vwn.ops.costs import Width
from megatron_vwn.recipes.layout import check_layout, hybrid_pattern
from megatron_vwn.recipes.recipe import Recipe
from megatron_vwn.recipes.width import virtual_width_of

KINDS = {"*": "attention", "-": "MLP", "E": "MoE"}
_NOT_MODELLED = (
    "multi-latent-attention",
    "use-tp-pp-dp-mapping",
    "vwn-ngrams",
    "fp8-format",
    "overlap-moe-expert-parallel-comm",
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One run, in numbers.

    Attributes:
        hidden, ffn, heads, groups, head_channels: D, the dense MLP's width, and of attention; groups are those of keys.
        gated, qk_norm, tied, fused_loss: of the MLPs, of attention, of embedding and head, of the cross entropy.
        experts, top_k, expert_ffn, shared_ffn: of a mixture of experts; zeros without.
        vocabulary, sequence: rows of the embedding, tokens of a sequence.
        width, virtual_width: None for the ordinary model.
        stages: sublayers of every virtual pipeline stage, in the model's order.
        predictions: sublayers of every layer that predicts further tokens; they are on the last stage.
        tensor, pipeline, virtual, context, expert, data: sizes of the layout; ``virtual`` is stages per pipeline rank.
        sequence_parallel, partition: how tensor-parallel ranks share tokens and the stream.
        gpus, gpus_per_node, micro_batch, batch: of the run; the batch is global, in sequences.
        granularity, method, recompute_layers, modules: Megatron's recompute; "" without.
        block: ``--vwn-recompute-block``.
        shards_optimizer, overlaps_gradients: of the data-parallel ranks.
        gradient_bytes, optimizer_bytes: of one parameter.
        overlaps_shared: whether the messages of experts go while the shared expert computes.
        imbalance: tokens of the fullest expert-parallel rank over the mean, assumed; 1 where one rank has all experts.
    """

    hidden: int
    ffn: int
    heads: int
    groups: int
    head_channels: int
    gated: bool
    qk_norm: bool
    tied: bool
    fused_loss: bool
    experts: int
    top_k: int
    expert_ffn: int
    shared_ffn: int
    vocabulary: int
    sequence: int
    width: Width | None
    virtual_width: VirtualWidthConfig | None
    stages: tuple[str, ...]
    predictions: tuple[str, ...]
    tensor: int
    pipeline: int
    virtual: int
    context: int
    expert: int
    data: int
    sequence_parallel: bool
    partition: str
    gpus: int
    gpus_per_node: int
    micro_batch: int
    batch: int
    granularity: str
    method: str
    recompute_layers: int
    modules: tuple[str, ...]
    block: int | None
    shards_optimizer: bool
    overlaps_gradients: bool
    gradient_bytes: int
    optimizer_bytes: int
    overlaps_shared: bool = False
    imbalance: float = 1.0

    @property
    def over_width(self) -> int:
        """D' of the stream; D in the ordinary model."""
        return self.width.over_width if self.width else self.hidden

    @property
    def stream_channels(self) -> int:
        """Channels of the stream on one rank: fewer under the width partition."""
        return self.over_width // self.tensor if self.partition == "width" else self.over_width

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that a tensor-parallel group works on."""
        return self.micro_batch * self.sequence // self.context

    @property
    def own_tokens(self) -> int:
        """Those of them that one rank holds between sublayers."""
        return self.tokens // self.tensor if self.sequence_parallel else self.tokens

    @property
    def micro_batches(self) -> int:
        """Of one step, one after another."""
        return self.batch // (self.micro_batch * self.data)

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.gpus // (self.pipeline * self.expert)

    def chunks(self, rank: int) -> list[str]:
        """Sublayers of a pipeline rank's virtual stages."""
        return list(self.stages[rank :: self.pipeline])

    def unlike_stages(self) -> list[int]:
        """The first of all pipeline ranks that have the same sublayers and the same ends of the model."""
        first: dict[tuple, int] = {}
        for rank in range(self.pipeline):
            first.setdefault((*self.chunks(rank), rank == 0, rank == self.pipeline - 1), rank)
        return list(first.values())

    def sublayers(self) -> str:
        """All of the trunk."""
        return "".join(self.stages)


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters that a rank holds.

    Attributes:
        dense: those with a copy on every data-parallel rank.
        experts: those of the routed experts that this rank has.
        summed: of ``dense``, those whose gradients are summed over tensor-parallel ranks after the backward pass.
    """

    dense: int = 0
    experts: int = 0
    summed: int = 0

    @property
    def total(self) -> int:
        """Of the rank."""
        return self.dense + self.experts

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(self.dense + other.dense, self.experts + other.experts, self.summed + other.summed)

    def __mul__(self, times: int) -> "Parameters":
        return Parameters(self.dense * times, self.experts * times, self.summed * times)


@cache
def counts(sublayers: str) -> tuple[tuple[str, int], ...]:
    """How often each symbol comes; a search asks for the same rows a hundred thousand times."""
    return tuple(Counter(sublayers).items())


def shape_of(recipe: Recipe, imbalance: float = 1.0) -> Shape:
    """A recipe in numbers.

    Args:
        recipe: the run.
        imbalance: see ``Shape``.

    Raises:
        VirtualWidthError: its layout does not divide, or it has something that the planner has no formulas for.
    """
    check_layout(recipe)
    pattern = hybrid_pattern(recipe)
    _refuse_unknown(recipe, pattern)
    trunk, *predictions = pattern.split("/")
    stages, pipeline = tuple(trunk.split("|")), recipe.number("pipeline-model-parallel-size", 1)
    tensor, context = recipe.number("tensor-model-parallel-size", 1), recipe.number("context-parallel-size", 1)
    heads, hidden = recipe.number("num-attention-heads"), recipe.number("hidden-size")
    parallel = bool(recipe.get("sequence-parallel")) and tensor > 1
    virtual_width = virtual_width_of(recipe.flags)
    routed = bool(recipe.get("num-experts"))
    shared_ffn = recipe.get("moe-shared-expert-intermediate-size") or 0 if routed else 0
    precise = bool(recipe.get("use-precision-aware-optimizer"))
    state_keys = ("main-params-dtype", "exp-avg-dtype", "exp-avg-sq-dtype") if precise else ("", "", "")
    return Shape(
        hidden=hidden,
        ffn=recipe.number("ffn-hidden-size", 4 * hidden),
        heads=heads,
        groups=recipe.number("num-query-groups", 1) if recipe.get("group-query-attention") else heads,
        head_channels=recipe.number("kv-channels", hidden // heads),
        gated=bool(recipe.get("swiglu")),
        qk_norm=bool(recipe.get("qk-layernorm")),
        tied=not recipe.get("untie-embeddings-and-output-weights"),
        fused_loss=bool(recipe.get("cross-entropy-loss-fusion")),
        experts=recipe.number("num-experts") if routed else 0,
        top_k=recipe.number("moe-router-topk", 2) if routed else 0,
        expert_ffn=recipe.number("moe-ffn-hidden-size", recipe.number("ffn-hidden-size", 4 * hidden)) if routed else 0,
        shared_ffn=shared_ffn,
        vocabulary=recipe.number("padded-vocab-size"),
        sequence=recipe.number("seq-length"),
        width=virtual_width and Width.of(virtual_width, hidden),
        virtual_width=virtual_width,
        stages=stages,
        predictions=tuple(predictions),
        tensor=tensor,
        pipeline=pipeline,
        virtual=len(stages) // pipeline,
        context=context,
        expert=recipe.number("expert-model-parallel-size", 1),
        data=recipe.world_size // (tensor * pipeline * context),
        sequence_parallel=parallel,
        partition=virtual_width.resolve_partition(tensor_parallel_size=tensor, sequence_parallel=parallel)
        if virtual_width
        else "sequence",
        gpus=recipe.world_size,
        gpus_per_node=recipe.number("gpus-per-node"),
        micro_batch=recipe.number("micro-batch-size"),
        batch=recipe.number("global-batch-size"),
        granularity=recipe.get("recompute-granularity") or "",
        method=recipe.get("recompute-method") or "",
        recompute_layers=recipe.number("recompute-num-layers", 1),
        modules=_modules(recipe.get("recompute-modules")),
        block=virtual_width and virtual_width.recompute_block,
        shards_optimizer=bool(recipe.get("use-distributed-optimizer")),
        overlaps_gradients=bool(recipe.get("overlap-grad-reduce")),
        gradient_bytes=2
        if recipe.get("grad-reduce-in-bf16")
        else _bytes(recipe.get("main-grads-dtype") if precise else None),
        optimizer_bytes=sum(_bytes(recipe.get(key)) for key in state_keys),
        overlaps_shared=bool(recipe.get("moe-shared-expert-overlap") and shared_ffn),
        imbalance=imbalance if recipe.number("expert-model-parallel-size", 1) > 1 else 1.0,
    )


def with_gpus(recipe: Recipe, gpus: int) -> Recipe:
    """The recipe on another number of GPUs; its layout is not looked at.

    Raises:
        VirtualWidthError: they are no whole nodes.
    """
    per_node = min(recipe.number("gpus-per-node"), gpus)
    if gpus < 1 or gpus % per_node:
        raise VirtualWidthError(f"--gpus is {gpus}: give whole nodes of {per_node} GPUs, or gpus-per-node=NUMBER.")
    return recipe.with_values({"nodes": gpus // per_node, "gpus-per-node": per_node})


def _modules(given: str | list[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ["core_attn"])


def _bytes(dtype: str | None) -> int:
    sizes = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
    if (dtype or "fp32") not in sizes:
        raise VirtualWidthError(
            f"{dtype!r} is no dtype of the precision-aware optimizer: give one of {', '.join(sizes)}."
        )
    return sizes[dtype or "fp32"]


def _refuse_unknown(recipe: Recipe, pattern: str) -> None:
    for symbol in pattern:
        if symbol not in (*KINDS, "|", "/"):
            raise VirtualWidthError(
                f"{recipe.name} has sublayers {symbol!r}, and the planner has formulas for {' '.join(KINDS)} alone: "
                "leave them out."
            )
    for key in _NOT_MODELLED:
        if recipe.get(key):
            raise VirtualWidthError(f"{key} is not in the planner's formulas: leave it out to plan the rest.")
    if recipe.number("expert-tensor-parallel-size", 1) > 1:
        raise VirtualWidthError("expert-tensor-parallel-size above 1 is not in the planner's formulas: make it 1.")
    if recipe.get("moe-token-dispatcher-type", "alltoall") not in ("alltoall", "flex") and recipe.get("num-experts"):
        raise VirtualWidthError(
            "the planner's experts communicate all-to-all: set moe-token-dispatcher-type to alltoall."
        )
    # What torch operations keep of the stream is several times what the kernels keep.
    width = virtual_width_of(recipe.flags)
    if width is not None and (width.carry == "doubly-stochastic" or width.n > 64 or width.kernels == "torch"):
        raise VirtualWidthError(
            f"{recipe.name} runs on torch operations, and the planner has formulas for the fused kernels alone: choose "
            "a full or identity carry, up to 64 segments and vwn-kernels auto."
        )
    if recipe.get("optimizer", "adam") != "adam":
        raise VirtualWidthError(
            f"the planner's optimizer is adam, not {recipe.get('optimizer')}: set optimizer to adam."
        )
    if not recipe.get("bf16"):
        raise VirtualWidthError(f"{recipe.name} does not train in bf16, which all formulas suppose: set bf16.")
