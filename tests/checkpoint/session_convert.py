"""Megatron's side of the conversion tests: real saves of TP2 x PP2, converted and converted back, loaded in another
layout. Writes into the folder named on the command line, and one torch file of what the models compute."""

import megatron_vwn.cpu

megatron_vwn.cpu.install()

import argparse  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from checkpoint.saves import GENERATED, SAVES  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from parallel import harness  # noqa: E402
from parallel.cases import ALONE  # noqa: E402

from megatron_vwn.checkpoint.convert_cli import main as vwn_convert  # noqa: E402
from megatron_vwn.training.flags.defaults import megatron_defaults  # noqa: E402
from megatron_vwn.training.flags.vwn import record_virtual_width  # noqa: E402

PROMPT = 8
TABLES = ("word_embeddings.weight", "output_layer.weight")


def arguments(session: harness.Session) -> argparse.Namespace:
    """What Megatron's pretrain() would have saved beside this model."""
    config, case, layout = session.config, session.case, session.layout
    own = {name: value for name in megatron_defaults() if (value := getattr(config, name, None)) is not None}
    args = argparse.Namespace(
        **megatron_defaults()
        | own
        | {
            "hybrid_layer_pattern": harness.cut(case.pattern, layout.pp),
            "swiglu": True,
            "group_query_attention": config.num_query_groups != config.num_attention_heads,
            "position_embedding_type": "rope",
            "max_position_embeddings": 2 * GENERATED,
            "padded_vocab_size": dict(case.overrides).get("_rows", harness.VOCABULARY),
            "vwn_tokens": harness.VOCABULARY,
            "untie_embeddings_and_output_weights": True,
            "num_experts": config.num_moe_experts,
            "params_dtype": config.params_dtype,
            "seq_length": harness.SEQUENCE,
        }
    )
    record_virtual_width(args, case.virtual_width)
    return args


def state_of(session: harness.Session) -> dict:
    (model,) = session.models
    return model.sharded_state_dict(prefix="", metadata={"dp_cp_group": session.groups.dp_cp})


def of_tokens(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a checkpoint without rows that pad the vocabulary."""
    return tensor[: harness.VOCABULARY] if key.endswith(TABLES) else tensor


def perturbed(case) -> harness.Session:
    session = harness.build(ALONE, case)
    harness.perturb(session)
    generator = torch.Generator().manual_seed(9)
    for name, tensor in session.models[0].state_dict(keep_vars=True).items():
        # Norm weights and the bias of the choice of experts: the identity hides every mistake with them.
        if torch.is_tensor(tensor) and tensor.dim() == 1 and not harness.is_virtual_width(name):
            tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return session


@torch.no_grad()
def computed(session: harness.Session) -> dict[str, torch.Tensor]:
    """Logits of a prompt, and the prompt continued greedily by whole forward passes; which experts tokens took; the
    loss of these tokens, as in training."""
    (model,) = session.models
    head, routing, model = [], [], model.eval()
    hooks = [model.output_layer.register_forward_hook(lambda _, __, out: head.append(out[0][:, 0].clone()))]
    for name, module in model.named_modules():
        if name.startswith("decoder") and name.endswith("router"):
            hooks.append(module.register_forward_hook(lambda _, __, out: routing.append(out[1].bool())))
    tokens = torch.randint(harness.VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(4))
    for _ in range(GENERATED + 1):
        head.clear(), routing.clear()
        size = tokens.shape[1]
        mask = torch.triu(torch.ones(1, 1, size, size, dtype=torch.bool), 1)
        model(tokens, torch.arange(size)[None], mask)
        head[-1] = head[-1][:, : harness.VOCABULARY]
        tokens = torch.cat([tokens, head[-1][-1:].argmax(-1, keepdim=True)], dim=1)
    for hook in hooks:
        hook.remove()
    experts = torch.stack(routing) if routing else None
    losses = model(tokens[:, :-2], torch.arange(size - 1)[None], mask[..., 1:, 1:], labels=tokens[:, 1:-1])
    return {"tokens": tokens[:, :-1], "logits": head[-1], "experts": experts, "loss": losses.mean().item()}


def check(name: str, folder: Path) -> dict:
    case, saving, loading = SAVES[name]
    alone = perturbed(case)
    expected, _ = harness.collect(alone)
    result = computed(alone)
    saved = harness.build(saving, case)
    harness.load_globals(saved, expected)
    here = torch.distributed.get_rank() == 0
    paths = [folder / f"{name}{end}" for end in ("", " in HF", " and back")]
    if here:
        paths[0].mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(
        {"model": state_of(saved), "args": arguments(saved), "iteration": 7},
        str(paths[0]),
        validate_access_integrity=True,
    )
    loss = harness.forward_backward(saved)
    torch.distributed.barrier()
    if here:
        megatron, hugging_face, back = map(str, paths)
        assert vwn_convert(["to-hf", megatron, hugging_face]) == 0
        assert vwn_convert(["from-hf", hugging_face, back]) == 0
    torch.distributed.barrier()
    loaded = harness.build(loading, case, seed=99)
    state = dist_checkpointing.load({"model": state_of(loaded)}, str(paths[2] / "release"))
    loaded.models[0].load_state_dict(state["model"])
    actual, _ = harness.collect(loaded)
    different = [key for key in expected if not torch.equal(of_tokens(key, actual[key]), of_tokens(key, expected[key]))]
    return result | {"different": different, "losses": (loss, harness.forward_backward(loaded))}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {name: check(name, folder) for name in SAVES}
    if torch.distributed.get_rank() == 0:
        torch.save(results, folder / "computed.pt")
