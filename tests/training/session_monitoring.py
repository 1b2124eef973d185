"""Monitoring in parallel layouts, against the paper's equations on the states of one rank; four ranks under torchrun.

``session_monitoring.py REPORT [NAME ...]``: rank 0 writes one JSON line per check.
"""

import megatron_vwn.cpu

megatron_vwn.cpu.install()

import json  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from dataclasses import fields, replace  # noqa: E402
from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402
from unittest.mock import patch  # noqa: E402

import torch  # noqa: E402
from megatron.core.distributed.finalize_model_grads import finalize_model_grads  # noqa: E402
from ops.unfused import unfused  # noqa: E402
from parallel import harness  # noqa: E402
from parallel.cases import ALONE, Case, Layout  # noqa: E402
from parallel.harness import expect  # noqa: E402
from training.test_monitoring import LAYOUTS  # noqa: E402

from megatron_vwn.config import OF_THE_RUN, VirtualWidthConfig  # noqa: E402
from megatron_vwn.megatron_fixes import apply_fixes  # noqa: E402
from megatron_vwn.ops import reference  # noqa: E402
from megatron_vwn.training.monitoring.monitor import Monitor  # noqa: E402
from megatron_vwn.training.monitoring.snapshot import Place, Snapshot  # noqa: E402

# Sums in another order, and in fp32 where the reference has fp64.
TOLERANCE = 1e-5
LOSS_SCALE = 256


def places(session: harness.Session) -> dict[Place, torch.nn.Module]:
    """The layers of a model that stands alone."""
    (model,) = session.models
    found = {Place(0, i): layer for i, layer in enumerate(model.decoder.layers, 1)}
    if model.mtp_process:
        for depth, further in enumerate(model.mtp.layers, 1):
            found |= {Place(depth, i): layer for i, layer in enumerate(further.mtp_model_layer.layers, 1)}
    return found


@cache
def on_one_rank(case: Case):
    """Parameters, the states that every sublayer reads of each micro-batch, connection parameters in fp64, and
    gradients."""
    session = harness.build(ALONE, case)
    harness.perturb(session, std=0.3)
    for name, parameter in session.parameters():
        if name.endswith("connection.weight"):
            parameter.data *= 4  # so that some gates saturate
    parameters, _ = harness.collect(session)
    harness.forward_backward(session)
    gradients, _ = harness.collect(session, "gradients")
    states: dict[Place, list] = {}
    depths = session.config.mtp_num_layers or 0
    repeated, batch = session.config.mtp_use_repeated_layer, 0

    def keep(place: Place):
        def hook(layer, args, kwargs):
            state = kwargs.get("hidden_states", args[0] if args else None)
            at = place
            while repeated and at.depth and len(states.get(at, ())) > batch:  # one layer serves every depth
                at = Place(at.depth + 1, at.number)
            states.setdefault(at, []).append(state.double())

        return hook

    layers = places(session)
    hooks = [layer.register_forward_pre_hook(keep(place), with_kwargs=True) for place, layer in layers.items()]
    # A layer gets a state, rather than the write that leads to it, where boundaries are not fused.
    with torch.no_grad(), unfused():
        for data in harness.micro_batches(session):
            arguments = {"labels": data["labels"], "loss_mask": data["loss_mask"]}
            session.models[0](data["tokens"], data["position_ids"], harness.causal_mask(), **arguments)
            batch += 1
    for hook in hooks:
        hook.remove()
    expect(all(len(of_place) == harness.MICRO_BATCHES for of_place in states.values()), "states are missing")
    expect(max(place.depth for place in states) == depths, sorted(states))
    connections = {}
    for place in states:
        p = layers[place if place in layers else Place(1, place.number)].connection()
        doubles = {name: t.double() for name, t in p._asdict().items() if isinstance(t, torch.Tensor)}
        connections[place] = p._replace(**doubles)
    return parameters, states, connections, gradients


def matrices(h_TNE: torch.Tensor, p) -> torch.Tensor:
    """[A_read | A_carry | B^T] of every token by the reference."""
    a_read_TNM, a_carry_TNN, b_TMN = reference.routing(h_TNE, p)
    return torch.cat([a_read_TNM, a_carry_TNN, b_TMN.transpose(1, 2)], dim=-1)


def expected(case: Case, data_parallel_size: int) -> dict[Place, dict[str, torch.Tensor]]:
    """What monitoring has to find in the first micro-batches of all data-parallel ranks."""
    _, states, connections, _ = on_one_rank(case)
    found = {}
    for place, p in connections.items():
        h = torch.cat([state.flatten(0, 1) for state in states[place][:data_parallel_size]])
        h_TNE = h.unflatten(-1, (p.n, -1))
        c_TNK = matrices(h_TNE, p)
        static_NK = matrices(h_TNE[:1], p._replace(weight_EK=None))[0]
        # The identity is no coefficient; the gates are those that the reference squashes.
        learned = torch.ones(c_TNK.shape[-1], dtype=torch.bool)
        if not p.num_carry:
            learned[p.m : p.m + p.n] = False
        dynamic = (c_TNK - static_NK)[..., learned].square().sum((1, 2)).mean()
        saturated = torch.zeros(())
        if p.dynamic:
            logits = reference.rms_norm(h_TNE, p.norm_E, p.eps) @ p.weight_EK / h_TNE.shape[-1] ** 0.5
            gate = torch.tanh(logits) if p.gate == "tanh" else 2 * torch.sigmoid((1 + p.scale_NK) * logits) - 1
            saturated = (gate.abs() > 0.95).double().mean()
        gram_NN = torch.einsum("tae,tbe->ab", h_TNE, h_TNE) / (h_TNE.shape[0] * h_TNE.shape[-1])
        eigenvalues = torch.linalg.eigvalsh(gram_NN)
        norms_N = h_TNE.square().mean((0, 2)).sqrt()
        found[place] = {
            "static": static_NK,
            "mean": c_TNK.mean(0),
            "spread": c_TNK.std(0, correction=0),
            "read": c_TNK.mean(0)[:, : p.m],
            "carry": c_TNK.mean(0)[:, p.m : p.m + p.n],
            "write": c_TNK.mean(0)[:, p.m + p.n :].T,
            "dynamic_share": dynamic / (dynamic + static_NK[:, learned].square().sum()),
            "gate_saturation": saturated,
            "segment_norms": norms_N,
            "effective_segments": norms_N.square().sum() ** 2 / norms_N.pow(4).sum(),
            "independent_segments": eigenvalues.sum() ** 2 / eigenvalues.square().sum(),
        }
    return found


def expected_norms(case: Case) -> tuple[dict[str, float], dict[Place, float]]:
    """Of the gradients of one rank, by kind of parameter and by connection."""
    _, _, connections, gradients = on_one_rank(case)
    kinds: dict[str, float] = {}
    of_place = dict.fromkeys(connections, 0.0)
    for key, gradient in gradients.items():
        if not harness.is_virtual_width(key):
            continue
        square, parts = gradient.square().sum().item(), key.split(".")
        if "connection" in parts:
            kind, number = parts[-1], int(parts[parts.index("connection") - 1]) + 1
            depth = int(parts[2]) + 1 if parts[0] == "mtp" else 0
            of_place[Place(depth, number)] += square
        else:
            kind = {"expansion": "expand", "reduction": "reduce", "fusion": "fusion", "ngram_embeddings": "ngrams"}[
                next(part for part in parts if part in ("expansion", "reduction", "fusion", "ngram_embeddings"))
            ]
        kinds[kind] = kinds.get(kind, 0.0) + square
    return {k: v**0.5 for k, v in kinds.items()}, {k: v**0.5 for k, v in of_place.items()}


def monitored(session: harness.Session) -> tuple[Snapshot, float]:
    """One observed step, and its loss."""
    found: list[Snapshot] = []
    vw = replace(session.case.virtual_width, log_interval=3)
    monitor = Monitor(vw, iteration=lambda: 6, report=lambda: found.append)
    with patch.object(harness, "_forward_step", monitor.watch(harness._forward_step)):
        loss = harness.forward_backward(session)
        harness.forward_backward(session)  # the same step once more, as when Megatron checks itself
    (snapshot,) = found
    expect(session.config.finalize_model_grads_func.func is finalize_model_grads, "the hook stays behind")
    return snapshot, loss


def error(actual, wanted) -> float:
    actual, wanted = torch.as_tensor(actual).double(), torch.as_tensor(wanted).double()
    return ((actual - wanted).norm() / wanted.norm().clamp_min(1e-9)).item()


def on_its_own(case: Case) -> Case:
    """The same function on one rank: nothing that says how it is computed."""
    how = {field.name: field.default for field in fields(VirtualWidthConfig) if field.name in OF_THE_RUN}
    overrides = tuple((key, value) for key, value in case.overrides if not key.startswith("recompute"))
    return replace(case, virtual_width=replace(case.virtual_width, **how), overrides=overrides)


def check(layout: Layout, case: Case) -> str:
    """Everything that a snapshot holds, on every rank; and a step that is the same to the bit with and without."""
    plain = on_its_own(case)
    parameters, *_ = on_one_rank(plain)
    wanted = expected(plain, harness_data_parallel(layout))
    kinds, of_place = expected_norms(plain)
    session = harness.build(layout, case, seed=2)
    harness.load_globals(session, parameters)
    session.config.grad_scale_func = lambda loss: LOSS_SCALE * loss
    loss = harness.forward_backward(session)
    before = [p.main_grad.clone() for _, p in session.parameters()]
    snapshot, same = monitored(session)
    expect(loss == same, f"the loss is {same!r} instead of {loss!r}")
    different = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(
        different,
        [n for (n, p), old in zip(session.parameters(), before, strict=True) if not torch.equal(p.main_grad, old)],
    )
    expect(not any(different), f"gradients differ: {different}")
    expect(snapshot.iteration == 6 and list(snapshot.connections) == sorted(wanted), list(snapshot.connections))
    errors = {
        f"{place} {name}": error(getattr(snapshot.connections[place], name), value)
        for place, values in wanted.items()
        for name, value in values.items()
    }
    expect(snapshot.gradient_norms.keys() == kinds.keys(), (snapshot.gradient_norms, kinds))
    norms = {kind: error(snapshot.gradient_norms[kind], norm) for kind, norm in kinds.items()}
    if not session.config.mtp_use_repeated_layer:
        norms |= {str(p): error(snapshot.connection_gradient_norms[p], norm) for p, norm in of_place.items()}
    # One rank alone accumulates its gradients in bf16.
    errors |= {name: value * (TOLERANCE / 2e-2 if session.config.bf16 else 1) for name, value in norms.items()}
    beyond = {name: f"{value:.1e}" for name, value in errors.items() if not value <= TOLERANCE}
    expect(not beyond, f"beyond {TOLERANCE:g}: {beyond}")
    shares = [values["dynamic_share"].item() for values in wanted.values()]
    expect(not plain.virtual_width.dynamic or min(shares) > 1e-2, f"hardly dynamic: {shares}")
    saturated = [values["gate_saturation"].item() for values in wanted.values()]
    expect(not plain.virtual_width.dynamic or max(saturated) > 0, "no gate saturates")
    return f"worst {max(errors.values()):.1e}, {len(errors)} values, saturated {max(saturated):.3f}"


def harness_data_parallel(layout: Layout) -> int:
    return torch.distributed.get_world_size() // (layout.tp * layout.pp * layout.cp)


def main(report: Path, wanted: list[str]) -> None:
    torch.set_num_threads(1)
    apply_fixes()
    harness.initialize_groups(ALONE)
    for name in wanted or LAYOUTS:
        try:
            outcome = {"check": name, "passed": True, "detail": check(*LAYOUTS[name])}
        except harness.Different:
            outcome = {"check": name, "passed": False, "detail": traceback.format_exc()}
        except Exception:
            with report.open("a") as file:
                print(json.dumps({"check": name, "passed": False, "detail": traceback.format_exc()}), file=file)
            raise
        if torch.distributed.get_rank() == 0:
            with report.open("a") as file:
                print(json.dumps(outcome), file=file)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
