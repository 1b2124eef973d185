"""What the quickstart can train: a table of recipes, and Megatron's flags for one of them on a machine."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch


@dataclass(frozen=True)
class Machine:
    """The size of model that a machine can train in minutes; all recipes share it.

    Attributes:
        kind: "cpu" or "gpu".
        ranks: processes; two share each layer by tensor and sequence parallelism, and the experts between them.
        sequence: tokens per sample.
        batch: samples per step.
        precision: flags.
        experts: further flags of a recipe with experts.
    """

    kind: str
    ranks: int
    hidden_size: int
    heads: int
    sequence: int
    batch: int
    learning_rate: float
    precision: str = ""
    experts: str = ""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one global batch."""
        return self.batch * self.sequence


@dataclass(frozen=True)
class Recipe:
    """A model and a schedule; the baseline and the run with a virtual width share all but ``virtual_width``.

    Attributes:
        pattern: per kind of machine; one symbol is one sublayer, * attention, - MLP, E experts; / begins the layers
            that predict one token further (MTP).
        steps: per kind of machine; a multiple of 100.
        further: flags that only this recipe has; names in braces are attributes of the machine.
        virtual_width: the flags that the second run has in addition.
    """

    pattern: dict[str, str]
    steps: dict[str, int]
    further: str = ""
    virtual_width: str = "--vwn-m 2 --vwn-n 8"


DEFAULT = "dense"
RECIPES = {
    "dense": Recipe(
        pattern={"cpu": "*-*-*-*-", "gpu": "*-*-*-*-*-*-"},
        steps={"cpu": 400, "gpu": 500},
    ),
    # Experts are divided, not cut (expert tensor parallelism 1): gloo cannot gather the unequal loads of cut ones.
    "moe-mtp": Recipe(
        pattern={"cpu": "*E*E/*E", "gpu": "*E*E*E*E/*E"},
        steps={"cpu": 200, "gpu": 500},
        further="""
            --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size {hidden_size}
            --moe-shared-expert-intermediate-size {hidden_size}
            --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall
            --expert-model-parallel-size {ranks} --expert-tensor-parallel-size 1 {experts}
            --mtp-loss-scaling-factor 0.3
        """,
    ),
}


def this_machine() -> Machine:
    """Two CPU processes, or a larger model on up to two GPUs."""
    if not torch.cuda.is_available():
        return Machine("cpu", ranks=2, hidden_size=128, heads=4, sequence=128, batch=8, learning_rate=3e-3)
    return Machine(
        "gpu",
        ranks=min(2, torch.cuda.device_count()),
        hidden_size=512,
        heads=8,
        sequence=256,
        batch=16,
        learning_rate=1e-3,
        precision="--bf16",
        # Transformer Engine's layers have no other experts than grouped ones, Megatron's local layers only others.
        experts="--moe-grouped-gemm" if find_spec("transformer_engine") else "",
    )


def megatron_flags(recipe: Recipe, machine: Machine, data: str, index: str) -> list[str]:
    """Megatron's flags without those of a run's folders and of the virtual width.

    Args:
        recipe: what to train.
        machine: where.
        data: path of the tokenised text without ``_train``, ``_valid`` and ``_tokenizer``.
        index: folder for the order of the samples.
    """
    layout = "--tensor-model-parallel-size 2 --sequence-parallel" if machine.ranks == 2 else ""
    steps, evaluation_batch = recipe.steps[machine.kind], 2 * machine.batch
    return f"""
        --hybrid-layer-pattern {recipe.pattern[machine.kind]}
        --hidden-size {machine.hidden_size} --num-attention-heads {machine.heads}
        --normalization RMSNorm --disable-bias-linear --squared-relu --position-embedding-type rope
        --attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights
        --seq-length {machine.sequence} --max-position-embeddings {machine.sequence}
        --train-data-path {data}_train --valid-data-path {data}_valid --data-cache-path {index}
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model {data}_tokenizer
        --micro-batch-size {machine.batch} --global-batch-size {machine.batch} --train-iters {steps}
        --lr {machine.learning_rate} --min-lr {machine.learning_rate / 10} --lr-decay-style cosine
        --lr-warmup-iters {steps // 20} --adam-beta2 0.95 --weight-decay 0.1 --seed 1
        --eval-interval {steps // 10} --eval-iters {49_152 // (evaluation_batch * machine.sequence)}
        --eval-micro-batch-size {evaluation_batch} --eval-global-batch-size {evaluation_batch}
        --log-interval {steps // 50} --log-timers-to-tensorboard --save-interval {steps // 4}
        --use-distributed-optimizer {layout} {machine.precision} {recipe.further.format(**vars(machine))}
    """.split()
