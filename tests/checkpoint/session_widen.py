"""Megatron's side of the widening tests: an ordinary model is saved, widened and loaded, on one rank.

Prints one JSON line per check for the test that started it.
"""

import megatron_vwn.cpu

megatron_vwn.cpu.install()

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from parallel import harness  # noqa: E402
from parallel.cases import ALONE, Case, stream  # noqa: E402

from megatron_vwn.checkpoint.widen_cli import main as vwn_widen  # noqa: E402
from megatron_vwn.megatron_fixes import apply_fixes  # noqa: E402
from megatron_vwn.training.flags.defaults import megatron_defaults  # noqa: E402

STEPS = 50


def save(session: harness.Session, folder: Path) -> None:
    """What Megatron's pretrain() would have saved of this model, without an optimizer."""
    config, case = session.config, session.case
    arguments = argparse.Namespace(
        **megatron_defaults()
        | {
            "hybrid_layer_pattern": case.pattern,
            "hidden_size": config.hidden_size,
            "num_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
            "kv_channels": config.kv_channels,
            "ffn_hidden_size": config.ffn_hidden_size,
            "normalization": config.normalization,
            "swiglu": True,
            "add_bias_linear": False,
            "position_embedding_type": "rope",
            "max_position_embeddings": harness.SEQUENCE,
            "padded_vocab_size": harness.VOCABULARY,
            "untie_embeddings_and_output_weights": True,
            "transformer_impl": "local",
            "num_experts": config.num_moe_experts,
            "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
            "init_method_std": 0.02,
        }
    )
    folder.mkdir()
    state = session.models[0].sharded_state_dict(prefix="", metadata={"dp_cp_group": session.groups.dp_cp})
    dist_checkpointing.save({"model": state, "args": arguments, "iteration": 7}, str(folder))


def load(session: harness.Session, folder: Path) -> None:
    model = session.models[0]
    state = model.sharded_state_dict(prefix="", metadata={"dp_cp_group": session.groups.dp_cp})
    model.load_state_dict(dist_checkpointing.load({"model": state}, str(folder / "release"))["model"])


def logits(session: harness.Session) -> torch.Tensor:
    batch = next(harness.micro_batches(session))
    with torch.no_grad():
        return session.models[0](batch["tokens"], batch["position_ids"], harness.causal_mask())


def train(session: harness.Session) -> tuple[float, float]:
    """The loss of one global batch before and after some steps on it."""
    optimizer = torch.optim.Adam(session.models[0].parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        losses.append(harness.forward_backward(session))
        optimizer.step()
    return losses[0], harness.forward_backward(session)


def widened(baseline: harness.Session, folder: Path, m: int, n: int, embedding: str, *flags: str) -> harness.Session:
    target = folder.with_name(f"{folder.name}-{m}-{n}-{embedding}{''.join(flags)}")
    argv = [folder, target, "--vwn-m", m, "--vwn-n", n, "--vwn-embedding", embedding, *flags]
    assert vwn_widen([str(word) for word in argv]) == 0
    pattern = baseline.case.pattern.split("/")[0] if "drop" in flags else baseline.case.pattern
    width = stream(m, n, embedding=embedding, reduce_norm=False)
    session = harness.build(ALONE, dataclasses.replace(baseline.case, pattern=pattern, virtual_width=width), seed=9)
    load(session, target)
    return session


def check(folder: Path):
    """Yields the name of each check and what was found."""
    baseline = harness.build(ALONE, Case(pattern="*-*-", virtual_width=None))
    save(baseline, folder / "dense")
    expected = logits(baseline)
    for m, n, embedding in ((2, 3, "wide"), (2, 8, "projected"), (4, 32, "tiled")):
        session = widened(baseline, folder / "dense", m, n, embedding)
        error = ((logits(session) - expected).norm() / expected.norm()).item()
        before, after = train(session)
        yield f"({m},{n}) {embedding}", {"error": error, "before": before, "after": after}

    further = harness.build(ALONE, Case(pattern="*E*E/*E", virtual_width=None))
    save(further, folder / "further")
    expected = harness.forward_backward(further)
    for choice in ("drop", "fresh"):
        session = widened(further, folder / "further", 2, 8, "projected", "--further-predictions", choice)
        loss = harness.forward_backward(session)
        yield f"further predictions: {choice}", {"error": abs(loss - expected) / expected}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    apply_fixes()
    harness.initialize_groups(ALONE)
    for name, found in check(folder):
        print("CHECK", json.dumps({"name": name, **found}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
