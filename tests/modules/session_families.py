"""One process that compares VWN models of several kinds of attention with their baselines, in torch operations.

``python session_families.py RESULTS.json``; the environment is that of a torchrun of one rank.
"""

import megatron_vwn.cpu

megatron_vwn.cpu.install()

import dataclasses  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from parallel import harness  # noqa: E402
from parallel.cases import ALONE, Case, stream  # noqa: E402

from megatron_vwn.megatron_fixes import apply_fixes  # noqa: E402

WINDOW = 3
FAMILIES = {
    "grouped queries": Case().but(num_query_groups=2),
    "sliding window": Case().but(window_size=(WINDOW, 0)),
    "latent attention": Case(pattern="+-+-"),
    "gated delta net": Case(pattern="G-G-"),
}
TILED = stream(2, 8, embedding="tiled", reduce_norm=False)


def logits(session: harness.Session, tokens: torch.Tensor) -> torch.Tensor:
    """[b, s] token ids to [b, s, vocabulary]."""
    position = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return session.models[0](tokens.cuda(), position.cuda(), harness.causal_mask())


def tokens(session: harness.Session) -> torch.Tensor:
    return next(harness.micro_batches(session))["tokens"]


def birth(case: Case) -> dict[str, float]:
    """How far a fresh VWN with the baseline's backbone is from the baseline: logits and all gradients of the latter."""
    baseline = harness.build(ALONE, dataclasses.replace(case, virtual_width=None))
    weights, _ = harness.collect(baseline)
    expected = logits(baseline, tokens(baseline))
    harness.forward_backward(baseline)
    gradients, _ = harness.collect(baseline, "gradients")
    wide = harness.build(ALONE, dataclasses.replace(case, virtual_width=TILED), seed=7)
    fresh, _ = harness.collect(wide)
    harness.load_globals(wide, {**fresh, **weights})
    actual = logits(wide, tokens(wide))
    harness.forward_backward(wide)
    wide_gradients, _ = harness.collect(wide, "gradients")
    errors = harness.relative_errors({key: wide_gradients[key] for key in gradients}, gradients)
    return {**errors, "logits": ((actual - expected).norm() / expected.norm()).item()}


def reached_by_first_token(case: Case) -> list[int]:
    """Positions whose logits change with the first token, where one sublayer looks back."""
    session = harness.build(ALONE, dataclasses.replace(case, pattern="*-"))
    harness.perturb(session)
    before = tokens(session).clone()
    after = before.clone()
    after[:, 0] = (after[:, 0] + 1) % harness.VOCABULARY
    changed = (logits(session, after) - logits(session, before)).abs().amax(dim=(0, 2)) > 1e-6
    return changed.nonzero().flatten().tolist()


def main(results: Path) -> None:
    torch.set_num_threads(1)
    apply_fixes()
    report = {"birth": {name: birth(case) for name, case in FAMILIES.items()}}
    report["reached"] = {
        name: reached_by_first_token(case)
        for name, case in {"window": FAMILIES["sliding window"], "no window": Case()}.items()
    }
    grouped = harness.build(ALONE, FAMILIES["grouped queries"])
    report["query, key and value rows"] = grouped.models[0].decoder.layers[0].self_attention.linear_qkv.weight.shape[0]
    results.write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
