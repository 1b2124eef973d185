"""One tiny run with many of Megatron's flags about optimizer, gradients, batches, logs and files, all at once."""

import math
import re

import launch

# Two uneven pipeline stages, two data-parallel ranks that share the experts between them.
FLAGS = """
    --hybrid-override-pattern E*E* --num-experts 4 --expert-model-parallel-size 2
    --pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 3
    --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --seq-length 32 --max-position-embeddings 32
    --position-embedding-type yarn --rotary-scaling-factor 2.0 --yarn-original-max-position-embeddings 16
    --rotary-percent 0.5 --squared-relu --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights --hidden-dropout 0.1 --attention-dropout 0.1 --vwn-m 2 --vwn-n 6
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-input-jitter-eps 0.01
    --moe-aux-loss-coeff 0.01 --moe-per-layer-logging
    --fp16 --initial-loss-scale 1024 --fp32-residual-connection --data-parallel-random-init
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-average-in-collective
    --ddp-bucket-size 5000 --check-weight-hash-across-dp-replicas-interval 2 --check-for-large-grads
    --check-for-spiky-loss --decoupled-lr 1e-3 --lr 1e-2 --lr-decay-style WSD --lr-wsd-decay-iters 2 --train-iters 4
    --micro-batch-size 2 --global-batch-size 8 --eval-micro-batch-size 1
    --eval-global-batch-size 2 --eval-iters 1 --eval-interval 4 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 127 --log-interval 1 --log-params-norm --log-num-zeros-in-grad --log-throughput --log-progress
    --timing-log-level 2 --manual-gc --exit-signal-handler --no-save-rng --save-interval 4 --save-wgrads-interval 2
"""


def test_a_run_with_many_flags(tmp_path):
    folders = ["--save", tmp_path / "run", "--tensorboard-dir", tmp_path / "events"]
    folders += ["--moe-routing-trace-path", tmp_path / "routes"]
    done = launch.session(4, "-m", "megatron_vwn.training.pretrain", *FLAGS.split(), *folders, env=launch.WITHOUT_GPU)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    losses = [float(loss) for loss in re.findall(r"iteration +\d+/ +4 .*lm loss: (\S+)", log)]
    assert len(losses) == 4 and all(map(math.isfinite, losses)) and losses[-1] < losses[0], losses
    assert log.count("number of skipped iterations:   0") == 4
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "4"
    for written in ("run/wgrads/iter_0000002", "run/progress.txt", "routes", "events"):
        assert (tmp_path / written).exists(), written
