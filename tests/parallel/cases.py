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

# Replicas must stay bitwise equal while training, in every partition.
TRAINING: dict[str, tuple[Layout, Case]] = {
    "TP2 replicated": (TP2, Case(virtual_width=stream(partition="replicated"))),
    "TP2 width": (TP2, Case()),
    "TP2+SP": (TP2_SP, Case()),
    "TP2+SP distributed optimizer": (Layout(tp=2, sequence_parallel=True, distributed_optimizer=True), Case()),
}

# Saved at TP2+SP with the distributed optimizer, loaded here.
RESHARDING: dict[str, tuple[Layout, Case]] = {
    "TP1": (Layout(distributed_optimizer=True), Case()),
    "PP2": (Layout(pp=2, distributed_optimizer=True), Case()),
    "TP2 width": (Layout(tp=2, distributed_optimizer=True), Case()),
    "TP2 replicated": (Layout(tp=2, distributed_optimizer=True), Case(virtual_width=stream(partition="replicated"))),
}

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

CHECKS = [
    *(f"parity: {name}" for name in PARITY),
    *(f"replicas: {name}" for name in TRAINING),
    *(f"resharding: {name}" for name in RESHARDING),
    *(f"birth: {name}" for name in BIRTH),
    *(f"birth with MTP: {name}" for name in BIRTH_MTP),
    "MTP leaves the next token alone",
    "weight decay",
    "same backbone, seed for seed",
]
