"""Two ranks of real Megatron on the emulated GPU; started by test_cpu_session.py under torchrun.

Usage: session_cpu.py FOLDER. Every rank writes FOLDER/rank<R>.json: the results of all parts, by name.
"""

import json
import sys
from pathlib import Path

import megatron_vwn.cpu

assert megatron_vwn.cpu.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.utils import get_batch_on_this_cp_rank  # noqa: E402
from small_gpt import build, forward_backward, layout  # noqa: E402

from megatron_vwn.megatron_fixes import apply_fixes  # noqa: E402

SPLITS = {
    "dense": {
        "one": {},
        "tensor": {"tensor": 2},
        "pipeline": {"pipeline": 2},
        "interleaved": {"pipeline": 2, "chunks": 2},
    },
    "experts": {"one": {}, "expert": {"expert": 2}},
}


def collectives():
    """What gloo is asked for instead of NCCL; the ranks hold 1s and 2s."""
    mine = float(dist.get_rank() + 1)
    average = torch.full((2,), mine, device="cuda")
    dist.all_reduce(average, op=dist.ReduceOp.AVG)
    scattered = torch.empty(2, dtype=torch.bfloat16, device="cuda")
    dist.reduce_scatter_tensor(scattered, torch.full((4,), mine).bfloat16(), op=dist.ReduceOp.AVG)
    coalesced = [torch.empty(2), torch.empty(1)]
    group = dist.group.WORLD
    with dist._coalescing_manager(group, async_ops=True) as manager:
        for output in coalesced:
            source = torch.full((2 * output.numel(),), mine)
            dist.reduce_scatter_tensor(output, source, op=dist.ReduceOp.AVG, group=group, async_op=True)
    manager.wait()
    # Rank 0 keeps nothing and sends 3 rows, rank 1 keeps and sends nothing to rank 0.
    sent = torch.full((3, 1), mine) if mine == 1 else torch.empty(0, 1)
    received = torch.empty(3, 1) if mine == 2 else torch.empty(0, 1)
    receive_sizes = torch.tensor([3 if mine == 2 else 0, 0])
    send_sizes = torch.tensor([0, 3 if mine == 1 else 0])
    dist.all_to_all_single(received, sent, receive_sizes, send_sizes)
    # As many of each rank's number as the number says.
    gathered = [torch.empty(1), torch.empty(2)]
    dist.all_gather(gathered, torch.full((int(mine),), mine), async_op=True)
    return {
        "all_gather": [each.tolist() for each in gathered],
        "all_reduce": average.tolist(),
        "reduce_scatter": scattered.tolist(),
        "coalesced": [output.tolist() for output in coalesced],
        "all_to_all": received.flatten().tolist(),
    }


def layouts(folder):
    """Loss and sum of squared gradients of this rank for one set of weights, split in different ways."""
    results = {}
    for family, splits in SPLITS.items():
        experts = 4 if family == "experts" else None
        checkpoint = folder / family
        for name, sizes in splits.items():
            chunks = sizes.get("chunks", 1)
            layout(
                tensor_model_parallel_size=sizes.get("tensor", 1),
                pipeline_model_parallel_size=sizes.get("pipeline", 1),
                virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
                expert_model_parallel_size=sizes.get("expert", 1),
            )
            models = build(experts=experts, **sizes)
            states = {f"model{i if chunks > 1 else ''}": m.sharded_state_dict() for i, m in enumerate(models)}
            if name == "one":
                if dist.get_rank() == 0:
                    checkpoint.mkdir()
                dist.barrier()
                dist_checkpointing.save(states, str(checkpoint))
            else:
                loaded = dist_checkpointing.load(states, str(checkpoint))
                for model, state in zip(models, loaded.values(), strict=True):
                    model.load_state_dict(state)
            loss = forward_backward(models)
            gradients = [p.grad for m in models for p in m.parameters() if p.grad is not None]
            results[f"{family}/{name}"] = {
                "loss": loss,
                "squared_gradients": sum(g.double().square().sum().item() for g in gradients),
            }
    return results


def context_parallel():
    """The tokens [1, 8] that each of two context-parallel ranks keeps: the outer or the inner quarters."""
    layout(context_parallel_size=2)
    tokens = torch.arange(8).reshape(1, 8).cuda()
    group = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank({"tokens": tokens}, is_hybrid_cp=False, cp_group=group)
    return batch["tokens"].flatten().tolist()


class Trainer:
    """Model, DDP and distributed optimizer over two data-parallel ranks, as pretrain() builds them."""

    def __init__(self, dtype, **ddp):
        model = build(dtype=dtype)[0]
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, bucket_size=20000, **ddp
        )
        self.model = DistributedDataParallel(model.config, ddp_config, model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                weight_decay=0.1,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
                clip_grad=1.0,
            ),
            [self.model],
        )
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.optimizer.scale_loss
        if ddp.get("overlap_grad_reduce"):
            model.config.no_sync_func = self.model.no_sync

    def train(self, seeds):
        """One update per seed; returns the losses of this rank."""
        losses = []
        for seed in seeds:
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            losses.append(forward_backward([self.model], seed=seed + 100 * dist.get_rank()))
            self.optimizer.step()
        return losses

    def sharded(self, sharding, loading):
        model = self.model.module.sharded_state_dict()
        metadata = {"distrib_optim_sharding_type": sharding}
        return {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
        }

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def tensors(self):
        """Copies of every tensor that training goes on from: parameters, masters, moments and steps."""
        adam = self.optimizer.chained_optimizers[0].optimizer
        masters = [p for group in adam.param_groups for p in group["params"]]
        moments = [adam.state[p][key] for p in masters for key in ("step", "exp_avg", "exp_avg_sq")]
        return [t.detach().clone() for t in (*self.model.parameters(), *masters, *moments)]


def same(left, right):
    """Whether two lists of tensors are bitwise equal."""
    return all(map(torch.equal, left, right))


def resume(folder, sharding, dtype):
    """Two updates, a save, two more; then the same two more from the save with fresh objects."""
    layout()
    trainer = Trainer(dtype)
    trainer.train([1, 2])
    saved = trainer.tensors()
    folder.mkdir(exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(trainer.sharded(sharding, loading=False), str(folder))
    straight_losses = trainer.train([3, 4])
    straight = trainer.tensors()

    tensor_parallel.model_parallel_cuda_manual_seed(99, force_reset_rng=True)  # other weights at birth
    fresh = Trainer(dtype)
    fresh.load(dist_checkpointing.load(fresh.sharded(sharding, loading=True), str(folder)))
    restored = fresh.tensors()
    resumed_losses = fresh.train([3, 4])
    return {
        "restored": same(saved, restored),
        "resumed": same(straight, fresh.tensors()) and straight_losses == resumed_losses,
        "unmoved": sum(map(torch.equal, saved, straight)),
    }


def overlap():
    """Losses of this rank with and without overlapped communication, on streams, and with averaging collectives."""
    results = {}
    for name, flags in {
        "plain": {},
        "overlapped": {"overlap_grad_reduce": True, "overlap_param_gather": True},
        "averaged": {"average_in_collective": True},
    }.items():
        layout()
        results[name] = Trainer(torch.float32, **flags).train([1, 2, 3])
    return results


def main():
    torch.set_num_threads(1)
    apply_fixes()
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    results = {
        "collectives": collectives(),
        "layouts": layouts(folder),
        "context_parallel": context_parallel(),
        "overlap": overlap(),
        "resume": {
            f"{sharding}/{dtype}": resume(folder / f"{sharding}-{dtype}", sharding, dtype)
            for sharding in ("dp_reshardable", "fully_reshardable")
            for dtype in (torch.float32, torch.bfloat16)
        },
    }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
