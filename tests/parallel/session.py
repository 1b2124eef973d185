"""Every parallel check in one torchrun session, because importing Megatron costs more than all of them.

Rank 0 writes one JSON line per check to the file named on the command line as soon as it is done, so a session that
dies still says how far it came.
"""

import megatron_vwn.cpu

megatron_vwn.cpu.install()

import dataclasses  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
from parallel import harness, resharding  # noqa: E402
from parallel.cases import (  # noqa: E402
    ALONE,
    BIRTH,
    BIRTH_MTP,
    CHECKS,
    GENERATION,
    LAYERS_OF_MUON,
    MUON,
    NGRAMS,
    PADDED,
    PARITY,
    RANKS,
    RESHARDING,
    TRAINING,
    Case,
    Layout,
    stream,
)
from parallel.generation import generation  # noqa: E402
from parallel.harness import expect  # noqa: E402
from parallel.optimizers import losses_of, optimizer_for, optimizer_of, train  # noqa: E402

from megatron_vwn.config import OF_THE_RUN, VirtualWidthConfig  # noqa: E402
from megatron_vwn.megatron_fixes import apply_fixes  # noqa: E402
from megatron_vwn.ops.ngrams import ngram_rows  # noqa: E402

# (loss, gradient). fp32: sums over 128 tokens, and through 8 sublayers over ranks, in another order. bf16: one rounding
# is up to 4e-3, and a gradient has passed some forty of them, summed as their squares; a missing sum over ranks is 0.3.
FP32_TOLERANCES = 1e-6, 1e-4
BF16_TOLERANCES = 1e-2, 3e-2
BIRTH_TOLERANCE = 1e-5  # the same function, computed through a wide stream
TRAINING_STEPS = 8
MUON_STEPS = 5


@cache
def reference(case: Case):
    """The case on one rank: global parameters, losses of all predictions, global gradients.

    Ask for it before building a session: there is one set of process groups at a time.
    """
    session = harness.build(ALONE, case)
    harness.perturb(session)
    parameters, _ = harness.collect(session)
    losses = losses_of(session)
    gradients, _ = harness.collect(session, "gradients")
    return parameters, losses, gradients


def expect_losses(session: harness.Session, losses: list[float]) -> tuple[dict, list[str], float]:
    """A forward and backward pass has these losses; gradients, what replicas differ in, their tolerance."""
    actual = losses_of(session)
    gradients, unequal = harness.collect(session, "gradients")
    loss_tolerance, gradient_tolerance = BF16_TOLERANCES if session.config.bf16 else FP32_TOLERANCES
    off = [abs(a - e) / e for a, e in zip(actual, losses, strict=True)]
    expect(max(off) <= loss_tolerance, f"losses {actual} instead of {losses}")
    return gradients, unequal, gradient_tolerance


def within(errors: dict[str, float], tolerance: float) -> str:
    """The worst error as text; Different names what is beyond the tolerance."""
    beyond = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    expect(not beyond, f"beyond {tolerance:g}: {beyond}")
    worst = max(errors, key=errors.get)
    return f"worst {errors[worst]:.1e} ({worst})"


def parity(layout: Layout, case: Case) -> str:
    """Loss and every gradient, of VWN and backbone parameters, equal the single-rank run's."""
    parameters, losses, gradients = reference(_without_layout(case))
    session = harness.build(layout, case, seed=2)
    harness.load_globals(session, parameters)
    actual_gradients, unequal, gradient_tolerance = expect_losses(session, losses)
    expect(not unequal, f"gradients differ between replicas of {unequal}")
    errors = harness.relative_errors(actual_gradients, gradients)
    vwn = [key for key in errors if harness.is_virtual_width(key)]
    alive = all(gradients[key].norm() > 0 for key in vwn)
    expect(vwn and alive, "a VWN gradient is zero: the check would prove nothing")
    return within(errors, gradient_tolerance)


def _without_layout(case: Case) -> Case:
    """The same function on one rank: nothing that says how it is computed."""
    how = ("recompute", "moe_token_dispatcher_type")
    overrides = tuple((key, value) for key, value in case.overrides if not key.startswith(how))
    defaults = {field.name: field.default for field in dataclasses.fields(VirtualWidthConfig)}
    virtual_width = dataclasses.replace(case.virtual_width, **{name: defaults[name] for name in OF_THE_RUN})
    return dataclasses.replace(case, virtual_width=virtual_width, overrides=overrides)


def replicas(layout: Layout, case: Case) -> str:
    """After eight steps of Adam every replica of every parameter is bitwise equal on all ranks."""
    parameters, _, _ = reference(_without_layout(case))
    session = harness.build(layout, case, seed=2)
    harness.load_globals(session, parameters)
    before, _ = harness.collect(session)
    losses = train(session, optimizer_of(session), range(TRAINING_STEPS))
    after, unequal = harness.collect(session)
    expect(not unequal, f"replicas drifted apart: {unequal}")
    expect(losses[-1] < losses[0], losses)
    still = [key for key in after if harness.is_virtual_width(key) and torch.equal(before[key], after[key])]
    expect(not still, f"never trained: {still}")
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"


@cache
def trained_by_muon_alone(case: Case) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of five steps of Muon on one rank, and the parameters after them."""
    parameters, _, _ = reference(case)
    session = harness.build(ALONE, case, seed=2)
    harness.load_globals(session, parameters)
    losses = train(session, optimizer_for("muon", session), range(MUON_STEPS))
    return losses, harness.collect(session)[0]


def muon(layout: Layout, case: Case, tp_mode: str) -> str:
    """Five steps of Muon from one set of parameters have the losses of one rank, and replicas stay bitwise equal."""
    parameters, _, _ = reference(_without_layout(case))
    losses, expected = trained_by_muon_alone(_without_layout(case))
    session = harness.build(layout, case, seed=2)
    harness.load_globals(session, parameters)
    actual = train(session, optimizer_for("muon", session, muon_tp_mode=tp_mode), range(MUON_STEPS))
    after, unequal = harness.collect(session)
    expect(not unequal, f"replicas drifted apart: {unequal}")
    still = [key for key in after if torch.equal(after[key], parameters[key])]
    expect(not still, f"never trained: {still}")
    off = max(abs(a - e) / e for a, e in zip(actual, losses, strict=True))
    expect(off <= 1e-5, f"losses {actual} instead of {losses}")
    return f"losses {off:.1e}, {within(harness.relative_errors(after, expected), FP32_TOLERANCES[1])}"


def layers_of_muon(layout: Layout, case: Case, in_buffers: bool) -> str:
    """Two steps of data-parallel ranks that share Muon's work: bitwise the parameters of ranks that each do all of it.

    Megatron shares it in bf16 only. Without clipping, because the norm of gradients is summed in another order.
    """
    parameters, _, _ = reference(case)
    results = []
    for kind in ("muon", "layers of muon"):
        by_layers = in_buffers and kind == "layers of muon"
        session = harness.build(layout, case.but(bf16=True), seed=2, by_layers=by_layers)
        harness.load_globals(session, parameters)
        optimizer = optimizer_for(kind, session, clip_grad=1e9)
        norms = []
        for step in range(2):
            optimizer.zero_grad()
            losses_of(session, step)
            norms.append(optimizer.step()[1])
        after, unequal = harness.collect(session)
        expect(not unequal, f"replicas drifted apart: {unequal}")
        results.append((after, norms))
    (whole, norms), (parts, other_norms) = results
    different = [key for key in whole if not torch.equal(whole[key], parts[key])]
    expect(not different, f"trained differently: {different}")
    off = max(abs(a - e) / e for a, e in zip(other_norms, norms, strict=True))
    expect(off <= 1e-5, f"gradient norms {other_norms} instead of {norms}")
    return f"gradient norms {off:.1e}"


def trained_by_muon() -> str:
    """Which parameters of a model with everything Muon has, by name, in its own groups; and in its baseline's."""
    case = Case(pattern="+E+-/+-", virtual_width=stream(**NGRAMS)).but(normalization="LayerNorm")
    latent = ("proj", "q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj")
    mlp = (f"{where}linear_fc{i}" for where in ("", "mlp.", "mlp.shared_experts.") for i in (1, 2))
    backbone = {"mlp.router", *(f"self_attention.linear_{each}" for each in latent), *mlp}
    for each, fusion in ((case, "fusion"), (dataclasses.replace(case, virtual_width=None), "eh_proj")):
        session = harness.build(Layout(), each)
        names = {id(p): name.removeprefix("module.") for name, p in session.parameters()}
        muon, others = set(), set()
        for group in optimizer_for("muon", session).param_groups:
            (muon if "optimizer" not in group else others).update(names[id(p)] for p in group["params"])
        expect(muon | others == set(names.values()) and not muon & others, "parameters without a group, or in two")
        kinds = {re.sub(r"^.*(layers|local_experts)\.\d+\.", "", name).removesuffix(".weight") for name in muon}
        expect(kinds == backbone | {fusion}, f"{kinds ^ (backbone | {fusion})} of {kinds}")
    return f"{len(muon)} of the baseline's {len(names)} tensors"


@cache
def saved(layout: Layout, case: Case, kind: str) -> tuple[Path, list[float], dict[str, torch.Tensor]]:
    """A checkpoint after four steps, the losses of the two steps after it and the parameters at the end."""
    parameters, _, _ = reference(case)
    session = _of_kind(kind, layout, case, seed=2)
    harness.load_globals(session, parameters)
    optimizer = optimizer_for(kind, session)
    train(session, optimizer, range(4))
    folder = resharding.save(session, optimizer)
    losses = train(session, optimizer, range(4, 6))
    return folder, losses, harness.collect(session)[0]


def _of_kind(kind: str, layout: Layout, case: Case, seed: int) -> harness.Session:
    layout = dataclasses.replace(layout, distributed_optimizer=kind == "adam")
    return harness.build(layout, case, seed, by_layers=kind == "layers of muon")


def reshard(saving: Layout, layout: Layout, case: Case, kind: str = "adam") -> str:
    """A checkpoint of one layout, loaded in another, is saved the same to the last bit and trained on the same."""
    folder, losses, parameters = saved(saving, _without_layout(case), kind)
    session = _of_kind(kind, layout, case, seed=5)
    optimizer = optimizer_for(kind, session)
    resharding.restore(session, optimizer, folder)
    different = resharding.differences(folder, resharding.save(session, optimizer))
    expect(not different, f"not what was loaded: {different}")
    actual = train(session, optimizer, range(4, 6))
    errors = {f"loss {i}": abs(a - e) / e for i, (a, e) in enumerate(zip(actual, losses, strict=True))}
    errors |= harness.relative_errors(harness.collect(session)[0], parameters)
    return within(errors, BF16_TOLERANCES[0] if session.config.bf16 else 1e-5)


def birth(m: int, n: int, reduce_norm: bool) -> str:
    """A fresh VWN with the baseline's backbone weights, copied by name, computes the baseline."""
    # Only with a vanishing eps is the reduction norm, followed by the final norm, exactly the final norm.
    eps = {"layernorm_epsilon": 1e-12} if reduce_norm else {}
    case = Case(virtual_width=None, hidden=48).but(**eps)
    baseline = harness.build(ALONE, case)
    weights, _ = harness.collect(baseline)
    logits = _logits(baseline)
    harness.forward_backward(baseline)
    gradients, _ = harness.collect(baseline, "gradients")
    spread = logits.softmax(-1).max(-1).values.mean().item()
    expect(spread > 5 / harness.VOCABULARY, f"nearly uniform predictions ({spread:.2f}): everything would look equal")

    wide = harness.build(
        ALONE,
        dataclasses.replace(case, virtual_width=stream(m, n, embedding="tiled", reduce_norm=reduce_norm)),
        seed=7,
    )
    fresh, _ = harness.collect(wide)
    harness.load_globals(wide, {**fresh, **weights})
    actual = _logits(wide)
    harness.forward_backward(wide)
    wide_gradients, _ = harness.collect(wide, "gradients")
    errors = harness.relative_errors({key: wide_gradients[key] for key in gradients}, gradients)
    errors["logits"] = ((actual - logits).norm() / logits.norm()).item()
    return within(errors, BIRTH_TOLERANCE)


def birth_with_further_predictions(m: int, n: int, pattern: str) -> str:
    """With the shared map [2E -> E] as the dense fusion I_m (x) W_e | I_m (x) W_h, all losses are the baseline's.

    Megatron predicts further from the state after the final norm, we from the one before: equal for unit norm weights
    and a vanishing eps, but for the gradients of those norm weights, which further predictions do not reach here.
    """
    case = Case(pattern=pattern, virtual_width=None).but(layernorm_epsilon=1e-12)
    generator = torch.Generator().manual_seed(13)
    segment = case.hidden // m
    baseline = harness.build(ALONE, case)
    weights, _ = harness.collect(baseline)
    fusion = {}
    for key in [key for key in weights if key.endswith("eh_proj.weight")]:
        pair = torch.randn(segment, 2, segment, generator=generator, dtype=torch.float64) / segment**0.5
        fusion[key.replace("eh_proj", "fusion")] = pair
        weights[key] = torch.cat([torch.kron(torch.eye(m), pair[:, i]) for i in (0, 1)], dim=1)
    harness.load_globals(baseline, weights)
    losses = losses_of(baseline)
    gradients, _ = harness.collect(baseline, "gradients")

    width = stream(m, n, embedding="tiled", reduce_norm=False)
    wide = harness.build(ALONE, dataclasses.replace(case, virtual_width=width), seed=7)
    fresh, _ = harness.collect(wide)
    harness.load_globals(wide, {**fresh, **weights, **fusion})
    actual = losses_of(wide)
    wide_gradients, _ = harness.collect(wide, "gradients")
    passed_by = ("final_norm.weight", "final_layernorm.weight")
    shared = [key for key in gradients if key in wide_gradients and not key.endswith(passed_by)]
    errors = harness.relative_errors({k: wide_gradients[k] for k in shared}, {k: gradients[k] for k in shared})
    errors |= {f"loss {i}": abs(a - e) / e for i, (a, e) in enumerate(zip(actual, losses, strict=True))}
    return within(errors, BIRTH_TOLERANCE)


def generate(layout: Layout, case: Case) -> str:
    """Megatron's static inference with perturbed parameters in some layout."""
    parameters, _, _ = reference(_without_layout(case))
    session = harness.build(layout, case, seed=2)
    harness.load_globals(session, parameters)
    return generation(session)


def ngrams_by_definition() -> str:
    """A fresh model has its n-grams at zero; learned ones add the rows that the definition names, length by length."""
    case = Case(virtual_width=stream(**NGRAMS))
    plain = harness.build(ALONE, dataclasses.replace(case, virtual_width=stream()))
    fresh = harness.build(ALONE, case)
    weights = harness.collect(plain)[0]
    born = harness.collect(fresh)[0]
    different = [key for key in weights if not torch.equal(weights[key], born[key])]
    expect(not different, f"drawn differently: {different}")
    batch = next(harness.micro_batches(fresh))
    arguments = batch["tokens"], batch["position_ids"]
    without = plain.models[0].embedding(*arguments)
    expect(torch.equal(without, fresh.models[0].embedding(*arguments)), "n-grams are not zero at birth")
    table = fresh.models[0].embedding.ngram_embeddings.weight.data.normal_()
    vw = case.virtual_width
    rows = ngram_rows(batch["tokens"], vw.ngrams, vw.ngram_vocab, vw.document_end)
    expected = sum(one[rows[..., i]] for i, one in enumerate(table.split(vw.ngram_vocab)))
    added = (fresh.models[0].embedding(*arguments) - without).transpose(0, 1)
    return within({"n-grams": ((added - expected).norm() / expected.norm()).item()}, 1e-6)


def next_token_with_and_without_further_predictions() -> str:
    """Predicting further tokens changes the trunk through gradients only."""
    case = Case(pattern="*-*-/*-")
    parameters, losses, _ = reference(case)
    trunk = harness.build(ALONE, dataclasses.replace(case, pattern="*-*-"))
    harness.load_globals(trunk, parameters)
    alone = harness.forward_backward(trunk)
    expect(alone == losses[0], f"{alone!r} instead of {losses[0]!r}")
    return f"{alone:.6f} in both"


def no_attention_mask() -> str:
    """Local attention, that of further predictions too, is causal without a mask: losses and gradients to the bit."""
    session = harness.build(ALONE, Case("*-*-/*-"), seed=5)
    outcomes = []
    for mask in (harness.causal_mask, lambda: None):
        with mock.patch.object(harness, "causal_mask", mask):
            outcomes.append((losses_of(session), harness.collect(session, "gradients")[0]))
    (losses, gradients), (other_losses, other_gradients) = outcomes
    expect(losses == other_losses, f"{other_losses} instead of {losses}")
    different = [key for key in gradients if not torch.equal(gradients[key], other_gradients[key])]
    expect(not different, different)
    return f"{len(gradients)} gradients"


def padded_vocabulary(layout: Layout, case: Case) -> str:
    """Rows that pad a vocabulary for more ranks change neither losses nor gradients, and get none themselves."""
    parameters, losses, gradients = reference(case)
    parameters = dict(parameters)
    padding = harness.VOCABULARY // 2
    padded = case.but(_rows=harness.VOCABULARY + padding, _tokens=harness.VOCABULARY)
    session = harness.build(layout, padded, seed=2)
    tables = {key for key in parameters if key.endswith(("word_embeddings.weight", "output_layer.weight"))}
    generator = torch.Generator().manual_seed(3)
    for key in tables:  # what a fresh table has there: as likely as any token
        width = parameters[key].shape[1]
        parameters[key] = torch.cat([parameters[key], torch.randn(padding, width, generator=generator)])
    harness.load_globals(session, parameters)
    actual_gradients, _, gradient_tolerance = expect_losses(session, losses)
    learned = [key for key in tables if actual_gradients[key][harness.VOCABULARY :].any()]
    expect(tables and not learned, f"rows that pad get gradients: {learned}")
    for key in tables:
        actual_gradients[key] = actual_gradients[key][: harness.VOCABULARY]
    return within(harness.relative_errors(actual_gradients, gradients), gradient_tolerance)


def _logits(session: harness.Session) -> torch.Tensor:
    with torch.no_grad():
        batch = next(harness.micro_batches(session))
        return session.models[0](batch["tokens"], batch["position_ids"], harness.causal_mask())


def weight_decay() -> str:
    """A, B, S and norms do not decay; W, W_expand and W_reduce do, in the optimizer's own groups."""
    session = harness.build(Layout(), Case())
    names = {id(p): name.removeprefix("module.") for name, p in session.parameters()}
    decays = {}
    for group in optimizer_of(session).param_groups:
        for p in group["params"]:
            decays[names[id(p)]] = group["wd_mult"] != 0
    expect(decays.keys() == set(names.values()), "parameters without a group")
    expected = {
        "connection.routing": False,
        "connection.scale": False,
        "connection.norm": False,
        "connection.weight": True,
        "embedding.expansion.weight": True,
        "decoder.reduction.weight": True,
        "decoder.reduction.norm.weight": False,
    }
    seen = set()
    for name, does in decays.items():
        for suffix, should in expected.items():
            if name.endswith(suffix):
                expect(does == should, f"{name} {'decays' if does else 'does not decay'}")
                seen.add(suffix)
    expect(seen == expected.keys(), expected.keys() - seen)
    return f"{sum(decays.values())} of {len(decays)} tensors decay"


def same_backbone() -> str:
    """A VWN model draws the random numbers of its baseline, so the same seed gives the same backbone."""
    wide, _ = harness.collect(harness.build(ALONE, Case(), seed=11))
    narrow, _ = harness.collect(harness.build(ALONE, Case(virtual_width=None), seed=11))
    different = [key for key in narrow if not torch.equal(wide[key], narrow[key])]
    expect(not different, different)
    expect(all(map(harness.is_virtual_width, wide.keys() - narrow.keys())), "unknown parameters")
    return f"{len(narrow)} tensors"


def check(name: str) -> str:
    kind, _, rest = name.partition(": ")
    match kind:
        case "parity":
            return parity(*PARITY[rest])
        case "replicas":
            return replicas(*TRAINING[rest])
        case "muon":
            return muon(*MUON[rest])
        case "layers of Muon":
            return layers_of_muon(*LAYERS_OF_MUON[rest])
        case "Muon trains what it should":
            return trained_by_muon()
        case "resharding":
            return reshard(*RESHARDING[rest])
        case "birth":
            return birth(*BIRTH[rest])
        case "birth with MTP":
            return birth_with_further_predictions(*BIRTH_MTP[rest])
        case "generation":
            return generate(*GENERATION[rest])
        case "n-grams are what their definition says":
            return ngrams_by_definition()
        case "MTP leaves the next token alone":
            return next_token_with_and_without_further_predictions()
        case "padded vocabulary":
            return padded_vocabulary(*PADDED[rest])
        case "no attention mask":
            return no_attention_mask()
        case "weight decay":
            return weight_decay()
        case "same backbone, seed for seed":
            return same_backbone()
    raise KeyError(name)


def record(report: Path, outcome: dict) -> None:
    with report.open("a") as file:
        print(json.dumps(outcome), file=file)


def main(report: Path, wanted: list[str]) -> None:
    torch.set_num_threads(1)
    apply_fixes()
    harness.initialize_groups(ALONE)
    assert torch.distributed.get_world_size() == RANKS
    for name in wanted or CHECKS:
        try:
            outcome = {"check": name, "passed": True, "detail": check(name)}
        except harness.Different:
            # Compared after the last collective, on tensors that all ranks have: every rank arrives here.
            outcome = {"check": name, "passed": False, "detail": traceback.format_exc()}
        except Exception:
            # The other ranks may wait in a collective for ever: this session is over.
            record(report, {"check": name, "passed": False, "detail": traceback.format_exc()})
            raise
        if torch.distributed.get_rank() == 0:
            record(report, outcome)
        torch.distributed.barrier()
    resharding.remove()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
