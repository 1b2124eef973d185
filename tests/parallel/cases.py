"""What the parallel session checks, as data: imported by pytest, which must not import Megatron, and by the ranks."""

from dataclasses import dataclass, field

from megatron_vwn.config import VirtualWidthConfig

RANKS = 4


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; the data-parallel size is what remains of the world."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    alone: bool = False
    """Every rank is a world of its own that sees all data and reduces nothing: the single-process run."""


ALONE = Layout(alone=True)
TP2 = Layout(tp=2)
TP2_SP = Layout(tp=2, sequence_parallel=True)
PP2 = Layout(pp=2)
PP2_VPP2 = Layout(pp=2, vpp=2)


def stream(m: int = 2, n: int = 6, **switches) -> VirtualWidthConfig:
    return VirtualWidthConfig(**{"m": m, "n": n, "embedding": "projected", **switches})


@dataclass(frozen=True)
class Case:
    """A model: hybrid pattern without stage marks, the stream (None: baseline) and config overrides."""

    pattern: str = "*-*-*-*-"
    virtual_width: VirtualWidthConfig | None = field(default_factory=stream)
    hidden: int = 32
    overrides: tuple[tuple[str, object], ...] = ()

    def but(self, **overrides) -> "Case":
        """The same model with some config fields changed."""
        return Case(self.pattern, self.virtual_width, self.hidden, (*self.overrides, *overrides.items()))


FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE = Case(pattern="*E*E")
NO_ATTENTION = Case(pattern="----")

# name -> (layout, case in that layout); every case is compared with the same one alone.
PARITY: dict[str, tuple[Layout, Case]] = {
    "DP4": (Layout(), Case()),
    "DP4 distributed optimizer": (Layout(distributed_optimizer=True), Case()),
    "TP2 replicated": (TP2, Case(virtual_width=stream(partition="replicated"))),
    "TP2 width": (TP2, Case(virtual_width=stream(partition="width"))),
    "TP4 width": (Layout(tp=4), Case()),
    "TP2+SP": (TP2_SP, Case()),
    "TP2+SP distributed optimizer": (Layout(tp=2, sequence_parallel=True, distributed_optimizer=True), Case()),
    "PP2 1F1B": (PP2, Case()),
    "PP4 1F1B": (Layout(pp=4), Case()),
    "PP2 x VPP2": (PP2_VPP2, Case()),
    "TP2 width x PP2": (Layout(tp=2, pp=2), Case()),
    "TP2+SP x PP2": (Layout(tp=2, pp=2, sequence_parallel=True), Case()),
    "TP2+SP x PP2 x VPP2": (Layout(tp=2, pp=2, vpp=2, sequence_parallel=True), Case()),
    "CP2": (Layout(cp=2), NO_ATTENTION),
    "CP2 x TP2+SP": (Layout(cp=2, tp=2, sequence_parallel=True), NO_ATTENTION),
    "EP2 alltoall": (Layout(ep=2), MOE.but(moe_token_dispatcher_type="alltoall")),
    "EP2 allgather": (Layout(ep=2), MOE.but(moe_token_dispatcher_type="allgather")),
    "EP2 x TP2+SP": (Layout(ep=2, tp=2, sequence_parallel=True), MOE.but(moe_token_dispatcher_type="alltoall")),
    "EP2 x PP2": (Layout(ep=2, pp=2), MOE.but(moe_token_dispatcher_type="alltoall")),
    "full recompute": (Layout(), Case().but(**FULL_RECOMPUTE)),
    "full recompute, TP2+SP": (TP2_SP, Case().but(**FULL_RECOMPUTE)),
    "full recompute, TP2 width": (TP2, Case().but(**FULL_RECOMPUTE)),
    "full recompute, PP2 x VPP2": (PP2_VPP2, Case().but(**FULL_RECOMPUTE)),
    "selective recompute, TP2+SP": (TP2_SP, Case().but(recompute_granularity="selective")),
    **{
        f"{embedding} embedding, {name}": (layout, Case(virtual_width=stream(embedding=embedding)))
        for embedding in ("wide", "tiled")
        for name, layout in (("TP2 width", TP2), ("TP2+SP", TP2_SP), ("PP2", PP2))
    },
    **{
        f"{what}, {name}": (layout, case)
        for what, case in {
            "static": Case(virtual_width=stream(connection="static")),
            "static, identity carry": Case(virtual_width=stream(connection="static", carry="identity")),
            "sigmoid": Case(virtual_width=stream(gate="sigmoid")),
            "identity carry": Case(virtual_width=stream(carry="identity")),
            "doubly stochastic carry": Case(virtual_width=stream(carry="doubly-stochastic")),
            "r = 3/2": Case(virtual_width=stream(2, 3)),
            "m = 1": Case(virtual_width=stream(1, 4)),
            "LayerNorm": Case().but(normalization="LayerNorm"),
            "learned positions": Case().but(_position_embedding_type="learned_absolute"),
        }.items()
        for name, layout in (("TP2 width", TP2), ("TP2+SP", TP2_SP))
    },
}

# Other attention than one key and value per head that sees everything before it.
LATENT = Case(pattern="+-+-")
PARITY |= (
    {
        f"{what}, {name}": (layout, case)
        for what, case in {
            "GQA": Case().but(num_query_groups=2),
            # Sublayers count from 1, and those that 2 divides go without the window: of the attention, only the second.
            "sliding window": Case(pattern="*--*").but(window_size=(3, 0), window_attn_skip_freq=2),
        }.items()
        for name, layout in (("TP2 width", TP2), ("TP2+SP", TP2_SP), ("PP2", PP2))
    }
    | {
        # Without sequence parallelism Megatron's own gradients of latent attention are wrong on several ranks: refused.
        f"{what}, {name}": (layout, case)
        for what, case in {
            "MLA": LATENT,
            "gated delta net": Case(pattern="G-G-"),
            "MLA, yarn, no query latent, no norms": LATENT.but(rope_type="yarn", q_lora_rank=None, qk_layernorm=False),
        }.items()
        for name, layout in (
            ("TP2+SP", TP2_SP),
            ("PP2", PP2),
            ("TP2+SP x PP2", Layout(tp=2, pp=2, sequence_parallel=True)),
        )
    }
    | {
        "MLA, MTP, full recompute, TP2+SP": (TP2_SP, Case(pattern="+-+-/+-").but(**FULL_RECOMPUTE)),
    }
)

# Everything together: attention, experts, two predictions.
FURTHER = Case(pattern="*E*E/*E")
PARITY |= {
    f"MTP, {name}": (layout, FURTHER if layout.cp == 1 else Case(pattern="-/-"))
    for name, layout in {
        "DP4": Layout(),
        "TP2+SP": TP2_SP,
        "PP2": PP2,
        "PP2 x VPP2": PP2_VPP2,
        "EP2": Layout(ep=2),
        "TP2+SP x PP2": Layout(tp=2, pp=2, sequence_parallel=True),
        "CP2": Layout(cp=2),
    }.items()
} | {
    # No experts: where ranks round otherwise, a token may choose another.
    "MTP, bf16, TP2+SP": (TP2_SP, Case(pattern="*-*-/*-").but(bf16=True)),
    "MTP, bf16, PP2": (PP2, FURTHER.but(bf16=True)),
    # Megatron refuses experts under tensor parallelism without sequence parallelism.
    "MTP, TP2 width": (TP2, Case(pattern="*-*-/*-")),
    "MTP, full recompute, TP2+SP": (TP2_SP, FURTHER.but(**FULL_RECOMPUTE)),
    "MTP, two depths, PP2": (PP2, Case(pattern="*-*-/*-/*-")),
    "MTP, wide embedding, PP2": (PP2, Case(pattern="*-*-/*-", virtual_width=stream(embedding="wide"))),
    "MTP, r = 3/2, TP2 width": (TP2, Case(pattern="*-/*-", virtual_width=stream(2, 3))),
    **{
        f"tied tiled embedding, {name}": (
            layout,
            Case(pattern=pattern, virtual_width=stream(embedding="tiled")).but(
                _share_embeddings_and_output_weights=True
            ),
        )
        # With stages and further predictions at once Megatron cannot save a tied model.
        for name, layout, pattern in (("PP2", PP2, "*-*-"), ("MTP, TP2+SP", TP2_SP, "*-*-/*-"))
    },
}

# About one sequence in six has a document's end in it.
NGRAMS = {"ngrams": (2, 3), "ngram_vocab": 64, "document_end": 7}
PARITY |= {
    f"n-grams, {name}": (layout, Case(pattern=pattern, virtual_width=stream(**NGRAMS, **switches)))
    for name, layout, pattern, switches in (
        ("TP2 replicated", TP2, "*-*-", {"partition": "replicated"}),
        ("TP2 width", TP2, "*-*-", {}),
        ("TP2+SP, wide embedding", TP2_SP, "*-*-", {"embedding": "wide"}),
        ("CP2", Layout(cp=2), "----", {"embedding": "tiled"}),
        ("CP2 x TP2+SP", Layout(cp=2, tp=2, sequence_parallel=True), "----", {}),
        ("MTP, PP2", PP2, "*-*-/*-", {}),
    )
}

# Blocks of a length that none of the stages and chunks is a multiple of, or that none is as long as.
ALL_IN_CHUNKS = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3}
SOME_IN_CHUNKS = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "moe"]}
PARITY |= {
    f"stream recompute, {name}": (layout, case)
    for name, layout, case in (
        ("TP2 replicated", TP2, Case(virtual_width=stream(partition="replicated", recompute_block=3))),
        ("TP2 width", TP2, Case(virtual_width=stream(recompute_block=3))),
        (
            "doubly stochastic carry, TP2 width x PP2",
            Layout(tp=2, pp=2),
            Case(virtual_width=stream(carry="doubly-stochastic", recompute_block=3)),
        ),
        ("CP2 x TP2+SP", Layout(cp=2, tp=2, sequence_parallel=True), Case("----", stream(recompute_block=3))),
        ("PP2", PP2, Case(virtual_width=stream(recompute_block=3))),
        (
            "TP2+SP x PP2 x VPP2",
            Layout(tp=2, pp=2, vpp=2, sequence_parallel=True),
            Case(virtual_width=stream(recompute_block=9)),
        ),
        (
            "MTP, TP2+SP x PP2",
            Layout(tp=2, pp=2, sequence_parallel=True),
            Case(FURTHER.pattern, stream(recompute_block=2)),
        ),
        ("MTP, EP2", Layout(ep=2), Case(FURTHER.pattern, stream(recompute_block=3))),
        (
            "selective recompute, EP2 x TP2+SP",
            Layout(ep=2, tp=2, sequence_parallel=True),
            Case("*-*E", stream(recompute_block=3)).but(**SELECTIVE),
        ),
        ("full recompute, chunks of 3, PP2", PP2, Case(virtual_width=stream(recompute_block=2)).but(**ALL_IN_CHUNKS)),
        ("full recompute of 1, PP2", PP2, Case(virtual_width=stream(recompute_block=2)).but(**SOME_IN_CHUNKS)),
        (
            "bf16 around an fp32 stream, PP2",
            PP2,
            Case(virtual_width=stream(recompute_block=2)).but(bf16=True, fp32_residual_connection=True),
        ),
    )
}

# Megatron's static inference does without sequence parallelism.
GENERATION: dict[str, tuple[Layout, Case]] = {
    "TP1": (ALONE, Case()),
    "TP2 width": (TP2, Case()),
    "TP2 replicated": (TP2, Case(virtual_width=stream(partition="replicated"))),
    "MTP weights": (ALONE, Case(pattern="*-*-/*-")),
    "experts": (ALONE, MOE),
    "n-grams, TP1": (ALONE, Case(virtual_width=stream(embedding="wide", **NGRAMS))),
    "n-grams, TP2 width": (TP2, Case(virtual_width=stream(**NGRAMS))),
}

# FLAGS: Megatron's other flags that reach what a connection reads or writes; those that do not interact share a row.
EP2 = Layout(ep=2)
EP2_TP2_SP = Layout(ep=2, tp=2, sequence_parallel=True)
FLAGS: dict[str, tuple[dict[str, Layout], Case]] = {
    "attention flags": (
        {"TP2 width": TP2, "TP2+SP": TP2_SP},
        Case().but(
            qk_layernorm=True,
            attention_output_gate=True,
            rotary_interleaved=True,
            no_rope_freq=(0, 0, 1, 0, 0, 0, 1, 0),
            softmax_type="learnable",
            apply_query_key_layer_scaling=True,
        ),
    ),
    "biases, ungated MLP, no positions": (
        {"TP2 width": TP2, "TP2+SP": TP2_SP},
        Case().but(add_bias_linear=True, add_qkv_bias=True, gated_linear_unit=False, _position_embedding_type="none"),
    ),
    "fused cross entropy, chunked MLP, uncloned embedding": (
        {"TP2+SP": TP2_SP},
        Case().but(
            cross_entropy_loss_fusion=True,
            mlp_chunks_for_training=2,
            clone_scatter_output_in_embedding=False,
            activation_func_clamp_value=2.0,
        ),
    ),
    # Without a bias per expert, which Megatron updates behind the backward pass that is compared here.
    "router flags": (
        {"EP2 x TP2+SP": EP2_TP2_SP, "ETP2 x TP2+SP": Layout(tp=2, etp=2, sequence_parallel=True)},
        MOE.but(
            moe_router_score_function="sigmoid",
            moe_router_num_groups=2,
            moe_router_group_topk=1,
            moe_router_topk_scaling_factor=2.0,
            moe_router_dtype="fp64",
            moe_router_load_balancing_type="seq_aux_loss",
            moe_z_loss_coeff=0.01,
            moe_shared_expert_gate=True,
        ),
    ),
    # Data-parallel ranks drop what one rank would: the capacity is counted per micro-batch.
    "dropped tokens, overlapped shared expert": (
        {"EP2": EP2},
        MOE.but(
            moe_router_pre_softmax=True,
            moe_expert_capacity_factor=0.8,
            moe_pad_expert_input_to_capacity=True,
            moe_token_drop_policy="position",
            moe_shared_expert_overlap=True,
        ),
    ),
    # Of the recipes; messages of experts pass while the shared expert computes.
    "overlapped shared expert, stream recompute, MTP": (
        {"EP2 x TP2+SP": EP2_TP2_SP},
        Case(pattern="*-*E/*E", virtual_width=stream(recompute_block=4)).but(
            moe_token_dispatcher_type="alltoall", moe_shared_expert_overlap=True
        ),
    ),
    "sinkhorn": (
        {"EP2": EP2},
        MOE.but(moe_router_load_balancing_type="sinkhorn", moe_router_topk=1, moe_aux_loss_coeff=0.0),
    ),
    "recomputed MLP and experts": (
        {"EP2 x TP2+SP": EP2_TP2_SP},
        Case(pattern="*-*E").but(recompute_granularity="selective", recompute_modules=["core_attn", "mlp", "moe"]),
    ),
    "MTP, repeated layer": ({"PP2": PP2}, Case(pattern="*-*-/*-/*-").but(mtp_use_repeated_layer=True)),
    # Not with a projected embedding: Megatron would detach its W_expand too, which is refused.
    "MTP, detached heads": (
        {"PP2": PP2},
        Case(pattern="*-*-/*-/*-", virtual_width=stream(embedding="wide")).but(mtp_detach_heads=True),
    ),
    "bf16 around an fp32 stream": ({"PP2": PP2}, Case().but(bf16=True, fp32_residual_connection=True)),
    "grouped micro-batches, overlapped flush": (
        {"TP2+SP x PP2 x VPP2": Layout(tp=2, pp=2, vpp=2, sequence_parallel=True)},
        Case().but(
            microbatch_group_size_per_vp_stage=4,
            overlap_p2p_comm_warmup_flush=True,
            # Said for the single rank too, whose configuration would be refused otherwise.
            overlap_p2p_comm=True,
            batch_p2p_comm=False,
        ),
    ),
}
PARITY |= {
    f"{what}, {name}": (layout, case) for what, (layouts, case) in FLAGS.items() for name, layout in layouts.items()
}

# Replicas must stay bitwise equal while training, in every partition.
TRAINING: dict[str, tuple[Layout, Case]] = {
    "TP2 replicated": (TP2, Case(virtual_width=stream(partition="replicated"))),
    "TP2 width": (TP2, Case()),
    "TP2+SP": (TP2_SP, Case()),
    "TP2+SP distributed optimizer": (Layout(tp=2, sequence_parallel=True, distributed_optimizer=True), Case()),
}

# name -> (layout that saves, layout that loads, case in both, and another optimizer than the distributed Adam).
DENSE = Case(pattern="*-*-/*-", virtual_width=stream(**NGRAMS))
TP2_SP_PP2 = Layout(tp=2, pp=2, sequence_parallel=True)
RESHARDING: dict[str, tuple[Layout, Layout, Case] | tuple[Layout, Layout, Case, str]] = {
    name: (TP2_SP, layout, case)
    for name, layout, case in (
        ("TP1", Layout(), DENSE),
        ("TP2 width", TP2, DENSE),
        ("TP2 replicated", TP2, Case(DENSE.pattern, stream(partition="replicated", **NGRAMS))),
        ("PP2", PP2, DENSE),
        ("PP2 x VPP2", PP2_VPP2, DENSE),
        ("TP2 width x PP2", Layout(tp=2, pp=2), DENSE),
        ("TP2+SP x PP2", TP2_SP_PP2, DENSE),
    )
} | {
    f"experts, {name}": (EP2, layout, FURTHER)
    for name, layout in (
        ("EP1", Layout()),
        ("PP2 x VPP2", PP2_VPP2),
        ("EP2 x PP2", Layout(ep=2, pp=2)),
        ("EP2 x TP2+SP", EP2_TP2_SP),
        ("TP2+SP x PP2", TP2_SP_PP2),
    )
}
# And from one optimizer to the two that Megatron has where experts have a data-parallel group of their own.
RESHARDING["experts, EP1 to EP2"] = (Layout(), EP2, FURTHER)

# name -> (layout, case, how Muon orthogonalises what tensor-parallel ranks share): five steps equal one rank's.
SMALL = Case(pattern="*-/*-", virtual_width=stream(**NGRAMS))
SMALL_EXPERTS = Case(pattern="*E/*E")
MUON: dict[str, tuple[Layout, Case, str]] = {
    "TP2+SP": (TP2_SP, SMALL, "duplicated"),
    "TP2 width": (TP2, SMALL, "distributed"),
    "TP2 replicated": (TP2, Case(SMALL.pattern, stream(partition="replicated", **NGRAMS)), "duplicated"),
    "PP2": (PP2, SMALL, "duplicated"),
    "EP2": (EP2, SMALL_EXPERTS, "duplicated"),
    "ETP2 x TP2+SP": (Layout(tp=2, etp=2, sequence_parallel=True), SMALL_EXPERTS, "duplicated"),
    "MLA": (TP2_SP, Case(pattern="+-"), "distributed"),
}
# name -> (layout, case, whether each rank's matrices are its part of the buffers, as without
# --no-use-layer-wise-param-layout). Data-parallel ranks that share Muon's work train as those that each do all of it.
LAYERS_OF_MUON: dict[str, tuple[Layout, Case, bool]] = {
    "TP2+SP": (TP2_SP, SMALL, True),
    "EP2 x PP2": (Layout(ep=2, pp=2), MOE.but(moe_router_load_balancing_type="none"), True),
    "EP2, lists": (EP2, SMALL_EXPERTS, False),
}
RESHARDING["Muon, PP2"] = (TP2_SP, PP2, SMALL, "muon")
RESHARDING["Muon, TP2 width"] = (TP2_SP, TP2, SMALL, "muon")
RESHARDING["Muon, EP4"] = (EP2, Layout(ep=4), SMALL_EXPERTS, "muon")
RESHARDING["layers of Muon, DP4"] = (TP2_SP, Layout(), SMALL.but(bf16=True), "layers of muon")

# (m, n, reduction norm): function-preserving without the norm; with it only at a vanishing norm eps.
BIRTH: dict[str, tuple[int, int, bool]] = {
    f"({m},{n}){', reduction norm' if norm else ''}": (m, n, norm)
    for m, n in [(1, 2), (2, 3), (2, 8), (3, 7), (4, 4), (4, 32)]
    for norm in ((False, True) if n % m == 0 else (False,))
}

# (m, n) with one and two further predictions.
BIRTH_MTP: dict[str, tuple[int, int, str]] = {
    "(2,8)": (2, 8, "*-*-/*-"),
    "(4,4)": (4, 4, "*-*-/*-"),
    "(2,8), two depths": (2, 8, "*-/*-/*-"),
    "(2,8), experts": (2, 8, "*E/*E"),
}

# Rows that no token has: some of one rank's, all of another's; one head and one that further predictions share.
PADDED: dict[str, tuple[Layout, Case]] = {
    "TP2 width, MTP": (TP2, Case("*-*-/*-")),
    "TP4, tied": (Layout(tp=4), Case("*-", stream(embedding="tiled")).but(_share_embeddings_and_output_weights=True)),
    "TP2+SP, fused, bf16": (TP2_SP, Case("*-").but(cross_entropy_loss_fusion=True, bf16=True)),
    "TP2, ordinary model": (TP2, Case("*-", None)),
}

CHECKS = [
    *(f"parity: {name}" for name in PARITY),
    *(f"replicas: {name}" for name in TRAINING),
    *(f"muon: {name}" for name in MUON),
    *(f"layers of Muon: {name}" for name in LAYERS_OF_MUON),
    "Muon trains what it should",
    *(f"resharding: {name}" for name in RESHARDING),
    *(f"birth: {name}" for name in BIRTH),
    *(f"birth with MTP: {name}" for name in BIRTH_MTP),
    *(f"generation: {name}" for name in GENERATION),
    "n-grams are what their definition says",
    "MTP leaves the next token alone",
    "no attention mask",
    *(f"padded vocabulary: {name}" for name in PADDED),
    "weight decay",
    "same backbone, seed for seed",
]
