"""Hybrid patterns: which are none, which sublayers a pipeline rank gets, and what Megatron cannot train of that.

Nothing here needs torch or Megatron: recipes and studies are checked with it on machines that have nothing installed,
and the training program's refusals call it too.
"""

from collections.abc import Sequence

from megatron_vwn.config import VirtualWidthError

# Megatron's marks in a hybrid pattern: between pipeline stages, before the layers of further predictions; and experts.
_STAGE, _FURTHER, _EXPERTS = "|", "/", "E"
# Megatron's sublayers; it does not mix the first with those of another kind of attention.
SUBLAYERS = "*-E+DGM"
_ATTENTION, _OTHER_ATTENTION = "*", {"+", "D"}
# Of a pattern in a sentence.
_LONGEST_SHOWN = 60
# Ways to balance experts whose loss is logged.
_LOGGED = {"aux_loss", "seq_aux_loss", "global_aux_loss"}

BLOCKS_OF_ONE = (
    "--vwn-recompute-block finds no two sublayers in a row where Megatron recomputes each by itself: drop it, or "
    "--recompute-granularity full, or recompute uniformly with --recompute-num-layers of at least 2."
)


def check_pattern(pattern: str, experts: object) -> None:
    """Refuse what is no hybrid pattern, before anything cuts or counts it.

    Megatron refuses most of this too, but divides by zero where there is no sublayer before the first ``/``, trains
    without further predictions where nothing stands behind it, and takes what memory holds for gradients (a norm of
    6e11, or NaN) where one of several stages per rank is empty.

    Args:
        pattern: ``--hybrid-layer-pattern``, not empty.
        experts: ``--num-experts``; None or 0 for none.

    Raises:
        VirtualWidthError: the first fault.
    """
    shown = repr(pattern if len(pattern) <= _LONGEST_SHOWN else pattern[: _LONGEST_SHOWN - 3] + "...")
    for symbol in pattern:
        if symbol not in (*SUBLAYERS, _STAGE, _FURTHER):
            raise VirtualWidthError(
                f"--hybrid-layer-pattern {shown} has {symbol!r}, which is no sublayer: write * (attention), - (MLP), "
                "E (experts), + (latent attention), D (sparse attention), G (gated delta net) or M (Mamba), with | "
                "between pipeline stages and / before every further prediction."
            )
    trunk, *further = pattern.split(_FURTHER)
    if not all((*trunk.split(_STAGE), *further)):
        raise VirtualWidthError(
            f"--hybrid-layer-pattern {shown} has a part without sublayers beside | or /: write sublayers on both sides "
            "of every mark, or leave the mark out."
        )
    if any(_STAGE in part for part in further):
        raise VirtualWidthError(
            f"--hybrid-layer-pattern {shown} has | behind /, but further predictions are all on the last stage: leave "
            "it out there."
        )
    if len(set(further)) > 1:
        raise VirtualWidthError(
            f"--hybrid-layer-pattern {shown} has further predictions of unlike sublayers, which Megatron does not "
            "build: write the same behind every /."
        )
    if _ATTENTION in pattern and _OTHER_ATTENTION & set(pattern):
        raise VirtualWidthError(
            f"--hybrid-layer-pattern {shown} mixes * (attention) with + (latent attention) or D (sparse attention), "
            "which Megatron does not build: choose one kind."
        )
    if experts and _EXPERTS not in pattern:
        raise VirtualWidthError("--num-experts finds no sublayer E in --hybrid-layer-pattern: write one or drop it.")
    if _EXPERTS in pattern and not experts:
        raise VirtualWidthError("the sublayer E (experts) needs --num-experts: add it, or write - for an MLP.")


def stages_of_ranks(pattern: str, ranks: int, first: int | None = None, last: int | None = None) -> list[list[str]]:
    """Sublayers of every pipeline rank's virtual stages; those of further predictions follow the last one's.

    Args:
        pattern: Megatron's ``--hybrid-layer-pattern``, with marks or without.
        ranks: pipeline ranks.
        first, last: ``--decoder-first-pipeline-num-layers`` and ``--decoder-last-pipeline-num-layers``, which only a
            pattern without marks may have.

    Returns:
        Nothing where stages do not divide, which other checks refuse.
    """
    trunk, _, further = pattern.partition(_FURTHER)
    stages = trunk.split(_STAGE)
    if len(stages) == 1 < ranks:  # Megatron cuts it
        between = ranks - (first is not None) - (last is not None)
        rest = len(trunk) - (first or 0) - (last or 0)
        if rest < 0 or (rest % between if between else rest):
            return []
        sizes = [rest // between] * between if between else []
        sizes = ([] if first is None else [first]) + sizes + ([] if last is None else [last])
        begins = [sum(sizes[:number]) for number in range(ranks)]
        stages = [trunk[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]
    if len(stages) % ranks:
        return []
    if further:
        stages[-1] += _FURTHER + further
    return [stages[rank::ranks] for rank in range(ranks)]


def rank_without_experts(stages: Sequence[Sequence[str]]) -> str | None:
    """The sentence about a pipeline rank without experts in a model that has some, None if all have.

    Megatron 0.19 sums the logged losses of routers over pipeline ranks, in tensors that are shorter where a rank has no
    experts, and dies in the first step.

    Args:
        stages: ``stages_of_ranks``.
    """
    counts = [sum(stage.count(_EXPERTS) for stage in held) for held in stages]
    if not any(counts) or all(counts):
        return None
    rank = counts.index(0)
    return (
        f"pipeline rank {rank} of {len(stages)} has no experts ({_STAGE.join(stages[rank])}), and Megatron's log of "
        "their losses would fail in the first step: use fewer stages, or give every rank a sublayer E."
    )


def check_experts(stages: Sequence[Sequence[str]], balancing: object, coefficients: object, z_loss: object) -> None:
    """Refuse a pipeline rank without experts where Megatron would die of it.

    Args:
        stages: ``stages_of_ranks``.
        balancing, coefficients, z_loss: as ``logs_router_losses`` takes them.

    Raises:
        VirtualWidthError: the sentence of ``rank_without_experts``.
    """
    sentence = rank_without_experts(stages) if logs_router_losses(balancing, coefficients, z_loss) else None
    if sentence is not None:
        raise VirtualWidthError(sentence)


def recomputes_single_sublayers(
    granularity: str | None, method: str | None, layers: int | None, stages: Sequence[Sequence[str]]
) -> bool:
    """Whether Megatron recomputes every sublayer by itself, so that blocks of stream recompute would be of one each.

    Args:
        granularity, method, layers: ``--recompute-granularity``, ``--recompute-method``, ``--recompute-num-layers``.
        stages: ``stages_of_ranks``.
    """
    if granularity != "full":
        return False
    if method == "uniform":
        return (layers or 1) == 1
    every = [stage for held in stages for stage in held]
    # By method block it leaves the layers of further predictions alone.
    return bool(every) and _FURTHER not in every[-1] and (layers or 1) >= max(map(len, every))


def logs_router_losses(balancing: object, coefficients: object, z_loss: object) -> bool:
    """Whether routers have losses that Megatron logs.

    Args:
        balancing: ``--moe-router-load-balancing-type``, one or several.
        coefficients: ``--moe-aux-loss-coeff``, one or several, as numbers or as text.
        z_loss: ``--moe-z-loss-coeff``, or None.
    """
    kinds = [balancing] if isinstance(balancing, str) else list(balancing or ())
    weights = coefficients if isinstance(coefficients, list | tuple) else [coefficients]
    return z_loss is not None or (bool(_LOGGED & set(kinds)) and any(map(_is_weight, weights)))


def _is_weight(value: object) -> bool:
    try:
        return float(value or 0) != 0
    except (TypeError, ValueError):  # no number, which other checks refuse
        return False
