"""What the entry point refuses: one process prepares all command lines, and a few launches check exit codes."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import launch
import pytest
import torch
from models import tiny

import megatron_vwn
from megatron_vwn.tracker import TRACKER
from megatron_vwn.training.refusals.stages import SUBLAYERS

MODEL = tiny(
    "*-*-",
    hidden_size=64,
    ffn_hidden_size=None,
    hidden_dropout=None,
    attention_dropout=None,
    train_iters=2,
    lr="1e-3",
    eval_iters=1,
    eval_interval=100,
    mock_data=None,
    vocab_size=255,
)
MOCK = ["--mock-data"]
WIDE = ["--vwn-m", "2", "--vwn-n", "6"]
OVERRIDE, KEEP = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
PROGRAM = ["-m", "megatron_vwn.training.pretrain"]

FOLDERS = [
    "--save",
    "--load",
    "--pretrained-checkpoint",
    "--tensorboard-dir",
    "--data-cache-path",
    "--non-persistent-global-ckpt-dir",
    "--wandb-save-dir",
]

# Flags after MODEL (the last one given counts), and words that the sentence must have: what is wrong, what to change.
REFUSED_WITH_VIRTUAL_WIDTH = {
    "--hidden-size 65": ["--hidden-size 65", "--vwn-m 2"],
    "--vwn-m 32 --vwn-n 64 --tensor-model-parallel-size 4": ["E = 2", "4 tensor-parallel ranks", "another m"],
    "--vwn-partition sequence --tensor-model-parallel-size 2": ["--vwn-partition sequence", "--sequence-parallel"],
    "--vwn-partition width --tensor-model-parallel-size 2 --sequence-parallel": ["--vwn-partition width", "drop"],
    "--spec some.module layers": ["--spec"],
    "--apply-residual-connection-post-layernorm": ["--apply-residual-connection-post-layernorm"],
    "--fused-residual-rmsnorm": ["--fused-residual-rmsnorm"],
    "--use-transformer-engine-op-fuser": ["--use-transformer-engine-op-fuser"],
    "--use-megatron-fsdp": ["--use-megatron-fsdp", "--use-distributed-optimizer"],
    "--use-torch-fsdp2": ["--use-torch-fsdp2", "--use-distributed-optimizer"],
    "--init-model-with-meta-device": ["--init-model-with-meta-device"],
    "--tensor-parallel-num-weight-shards 2": ["--tensor-parallel-num-weight-shards"],
    "--expert-tensor-parallel-num-weight-shards 2": ["--expert-tensor-parallel-num-weight-shards"],
    "--cuda-graph-impl local": ["--cuda-graph-impl"],
    "--enable-cuda-graph": ["--enable-cuda-graph"],
    "--external-cuda-graph": ["--external-cuda-graph"],
    "--optimizer-cuda-graph": ["--optimizer-cuda-graph"],
    "--overlap-moe-expert-parallel-comm": ["--overlap-moe-expert-parallel-comm"],
    "--delay-wgrad-compute": ["--delay-wgrad-compute"],
    "--distribute-saved-activations": ["--distribute-saved-activations"],
    "--fine-grained-activation-offloading": ["--fine-grained-activation-offloading", "--recompute-granularity full"],
    "--cpu-offloading-num-layers 2": ["--cpu-offloading-num-layers", "--recompute-granularity full"],
    "--moe-paged-stash": ["--moe-paged-stash"],
    "--hybrid-layer-pattern *-*-/*- --mtp-detach-heads": ["--mtp-detach-heads", "--vwn-embedding wide or tiled"],
    "--vwn-kernels triton": ["--vwn-kernels triton", "there is no GPU", "auto or torch"],
    "--vwn-kernels cuda": ["--vwn-kernels", "auto, triton, torch"],
    "--hybrid-layer-pattern *-*-/*- --recompute-granularity full --recompute-method uniform --recompute-num-layers 2": [
        "further predictions",
        "--recompute-num-layers 1",
    ],
    "--vwn-recompute-block 2 --recompute-granularity full --recompute-method uniform": [
        "--vwn-recompute-block finds no two sublayers",
        "--recompute-num-layers of at least 2",
    ],
    "--vwn-recompute-block 2 --recompute-granularity full --recompute-method block --recompute-num-layers 4": [
        "--vwn-recompute-block finds no two sublayers",
        "drop it",
    ],
    "--vwn-n 1000000": ["--vwn-n 1000000", "32,000 GB on a rank", "lower --vwn-n."],
    "--vwn-ngrams 2,3 --vwn-ngram-vocab 9000000000000": ["GB on a rank", "lower --vwn-n or --vwn-ngram-vocab."],
    "--vwn-ngrams 2,200 --vwn-ngram-vocab 64": ["--vwn-ngrams", "--seq-length", "shorten them"],
    "--pipeline-model-parallel-size 2 --hybrid-layer-pattern *-|*-/*- --position-embedding-type learned_absolute": [
        "tables of learned positions",
        "--position-embedding-type rope",
    ],
    "--use-mup": ["--use-mup"],
    "--cuda-graph-warmup-steps 1": ["--cuda-graph-warmup-steps", "drop it"],
    "--optimizer soap": ["--optimizer", "adam, sgd, muon or dist_muon"],
    "--optimizer lion": ["--optimizer lion", "choose adam or muon"],
    "--optimizer muon --tensor-model-parallel-size 2": ["--muon-tp-mode blockwise", "duplicated or distributed"],
    "--optimizer dist_muon --bf16 --sequence-parallel --tensor-model-parallel-size 2": ["--muon-tp-mode blockwise"],
    "--ckpt-format torch": ["--ckpt-format", "torch_dist"],
    "--non-persistent-ckpt-type local": ["--non-persistent-ckpt-type", "global"],
    "--ckpt-convert-format torch": ["--ckpt-convert-format"],
    "--moe-use-upcycling": ["--moe-use-upcycling"],
}
REFUSED_ALWAYS = {
    "--muon-nesterov": ["--muon-nesterov", "--optimizer", "drop it"],
    "--optimizer muon --lion-beta1 0.9": ["--lion-beta1", "--muon-scalar-optimizer lion"],
    "--optimizer adaptive_muon": ["--optimizer adaptive_muon", "choose muon"],
    "--optimizer muon --fp16": ["fp16", "--bf16"],
    "--optimizer dist_muon": ["dist_muon", "add --bf16"],
    "--optimizer muon --use-distributed-optimizer": ["--use-distributed-optimizer", "add --bf16"],
    "--optimizer dist_muon --bf16 --num-distributed-optimizer-instances 2": ["--num-distributed-optimizer-instances"],
    "--optimizer muon --no-use-layer-wise-param-layout": ["--no-use-layer-wise-param-layout", "--optimizer dist_muon"],
    "--optimizer muon --overlap-param-gather-with-optimizer-step": ["--overlap-param-gather-with-optimizer-step"],
    "--optimizer muon --use-precision-aware-optimizer": ["--use-precision-aware-optimizer", "adam"],
    "--optimizer sgd --optimizer-cpu-offload": ["--optimizer-cpu-offload", "adam"],
    "--optimizer muon --muon-coefficient-type custom": ["--muon-coefficient-type", "quintic"],
    "--optimizer muon --muon-num-ns-steps 0": ["--muon-num-ns-steps", "at least 1"],
    "--optimizer sgd --use-distributed-optimizer": ["--optimizer sgd", "--use-distributed-optimizer"],
    "--optimizer sgd --save somewhere": ["--optimizer sgd", "--no-save-optim"],
    "--num-layers 5": ["--num-layers", "--hybrid-layer-pattern"],
    "--hybrid-layer-pattern *-M-": ["--transformer-impl local", "install Transformer Engine"],
    "--hybrid-layer-pattern *-G-": ["--transformer-impl local", "install Transformer Engine"],
    "--multi-latent-attention": ["--multi-latent-attention", "--hybrid-layer-pattern", "+"],
    "--hybrid-layer-pattern +- --tensor-model-parallel-size 2": ["latent attention", "--sequence-parallel"],
    "--hybrid-layer-pattern +- --qk-layernorm": ["--qk-layernorm", "--q-lora-rank"],
    "--hybrid-layer-pattern +- --mla-down-proj-fusion": ["--mla-down-proj-fusion", "drop it"],
    "--recompute-granularity selective --recompute-modules mla_up_proj": ["--recompute-modules", "leave them out"],
    "--window-size 4,4": ["--window-size", "LEFT,0"],
    "--window-size=-1,0": ["--window-size", "LEFT,0"],
    "--window-size 4": ["--window-size", "LEFT,0"],
    "--group-query-attention --num-query-groups 2 --tensor-model-parallel-size 4": ["--num-query-groups", "multiple"],
    "--transformer-impl transformer_engine": ["--transformer-impl transformer_engine", "--transformer-impl local"],
    "--distributed-backend nccl": ["--distributed-backend nccl", "--distributed-backend gloo"],
    "--recompute-granularity selective --recompute-modules layernorm": ["--recompute-modules", "leave them out"],
    "--pipeline-model-parallel-size 2 --hybrid-layer-pattern *|-|*|- --no-overlap-p2p-communication": [
        "--no-overlap-p2p-communication",
        "drop it",
    ],
    "--pipeline-model-parallel-size 2 --hybrid-layer-pattern *-|*E --num-experts 4 --moe-aux-loss-coeff 0.01": [
        "pipeline rank 0 of 2 has no experts (*-)",
        "give every rank a sublayer E",
    ],
    "--pipeline-model-parallel-size 2 --hybrid-layer-pattern *E*- --num-experts 4 --moe-z-loss-coeff 0.01": [
        "pipeline rank 1 of 2 has no experts (*-)",
    ],
    "--perform-rl-step": ["--perform-rl-step"],
    "--inprocess-restart": ["--inprocess-restart", "--max-restarts"],
    "--heterogeneous-layers-config-path x.json": ["--heterogeneous-layers-config-path"],
    "--use-checkpoint-args": ["--use-checkpoint-args", "--load"],
    "--mtp-num-layers 1": ["--hybrid-layer-pattern", "drop --mtp-num-layers"],
    "--hybrid-layer-pattern *E --num-experts 4 --tensor-model-parallel-size 2": ["--sequence-parallel"],
    "--num-experts 4": ["--num-experts", "--hybrid-layer-pattern"],
    "--hybrid-layer-pattern *-/": ["'*-/' has a part without sublayers", "leave the mark out"],
    "--hybrid-layer-pattern /*-": ["'/*-' has a part without sublayers", "write sublayers"],
    "--pipeline-model-parallel-size 2 --hybrid-layer-pattern *-||*-|": ["has a part without sublayers"],
    "--hybrid-layer-pattern *E": ["E (experts)", "add it"],
    "--position-embedding-type mrope --mrope-section 1": ["--position-embedding-type", "choose rope"],
    "--reset-position-ids": ["--reset-position-ids", "learned_absolute"],
    "--attention-backend local": ["--attention-backend", "--transformer-impl local"],
    "--attention-backend flash": ["--attention-backend", "Transformer Engine"],
    "--fp8-format hybrid": ["--fp8-format", "Transformer Engine"],
    "--apply-layernorm-1p": ["--apply-layernorm-1p", "Transformer Engine"],
    "--moe-latent-size 16": ["--moe-latent-size", "Transformer Engine"],
    "--save-activations-interval 2": ["--save-activations-interval", "Transformer Engine"],
    "--qk-l2-norm": ["--qk-l2-norm", "drop it"],
    "--sft": ["--sft", "drop it"],
    "--logits-load-dir teacher": ["--logits-load-dir", "drop it"],
    "--moe-layer-freq 2": ["--moe-layer-freq", "drop it"],
    "--rampup-batch-size 2 2 8": ["--rampup-batch-size", "drop it"],
    "--init-method-xavier-uniform": ["--init-method-xavier-uniform", "drop it"],
    "--dino-head-hidden-size 7": ["--dino-head-hidden-size", "vision", "drop it"],
    "--use-same-sampling-seed-across-dp-ranks": ["--use-same-sampling-seed-across-dp-ranks", "inference"],
    "--seed 12345678901234567890": ["--seed", "at most 4000000000"],
    "--seed 0": ["--seed", "at least 1"],
    "--eval-interval 0": ["--eval-interval", "--eval-iters 0"],
    "--num-attention-heads 7": ["Megatron refuses these flags", "args.hidden_size % args.num_attention_heads == 0"],
    "--context-parallel-size 2": ["context parallelism", "drop --context-parallel-size"],
    "--hybrid-layer-pattern=---- --context-parallel-size 3": ["Megatron refuses these flags", "world size"],
    "--no-such-flag": ["unrecognized arguments: --no-such-flag"],
}
ACCEPTED = {
    "ordinary model": [],
    "Muon": [*WIDE, "--optimizer", "muon", "--muon-scalar-optimizer", "lion", "--lion-beta1", "0.9"],
    "Muon, layer by layer": [*WIDE, "--optimizer", "dist_muon", "--bf16", *OVERLAP],
    "Muon, lists": [*WIDE, "--optimizer", "dist_muon", "--bf16", "--no-use-layer-wise-param-layout"],
    "SGD": [*WIDE, "--optimizer", "sgd"],
    "full recompute": [*WIDE, "--recompute-granularity", "full", "--recompute-method", "uniform"],
    "fp32 stream": [*WIDE, "--bf16", "--fp32-residual-connection"],
    "latent attention": [*WIDE, "--hybrid-layer-pattern", "+-+-", "--multi-latent-attention"],
    "grouped queries": [*WIDE, "--group-query-attention", "--num-query-groups", "2"],
    "window": [*WIDE, "--window-size", "4,0"],
    "multi-token prediction": [*WIDE, "--hybrid-layer-pattern", "*-*-/*-"],
    "dropout": [*WIDE, "--hidden-dropout", "0.1"],
    "experts": [*WIDE, "--hybrid-layer-pattern", "*E*E", "--num-experts", "4"],
    "stream recompute": [*WIDE, "--vwn-recompute-block", "2"],
    "stream recompute in chunks": [
        *WIDE,
        "--vwn-recompute-block",
        "2",
        *RECOMPUTE,
        "uniform",
        "--recompute-num-layers",
        "2",
    ],
    "stream recompute of some": [
        *WIDE,
        "--vwn-recompute-block",
        "2",
        *RECOMPUTE,
        "block",
        "--recompute-num-layers",
        "2",
    ],
    "stream recompute of further predictions": [
        *WIDE,
        "--hybrid-layer-pattern",
        "*-*-/*-",
        "--vwn-recompute-block",
        "2",
        *RECOMPUTE,
        "block",
        "--recompute-num-layers",
        "4",
    ],
    "distributed optimizer": [*WIDE, "--use-distributed-optimizer", *OVERLAP],
}


def sentences(done):
    """The lines of stderr that the entry point wrote (the emulation's line comes from megatron_vwn.cpu)."""
    return [line for line in done.stderr.splitlines() if line.startswith("megatron_vwn: ")]


def assert_no_traceback_of_ours(done):
    package = re.escape(str(Path(megatron_vwn.__file__).parent))
    assert not re.search(f'File "{package}/[^"]*", line', done.stdout + done.stderr)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a checkpoint from two pipeline stages that exchanged over-width states."""
    folder = tmp_path_factory.mktemp("checkpoint") / "wide"
    stages = ["--hybrid-layer-pattern", "*-|*-", "--pipeline-model-parallel-size", "2"]
    flags = [*MODEL, *MOCK, *WIDE, *stages, "--save", folder, "--save-interval", "1"]
    done = launch.session(2, *PROGRAM, *flags, env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stderr
    assert "lm loss" in done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def prepared(checkpoint, tmp_path_factory):
    """What preparing each command line gave."""
    folder = tmp_path_factory.mktemp("refusals")
    for name in ("wide", "ordinary", "damaged", "untracked", "empty tracker", "no tracker", "begun", "legacy"):
        shutil.copytree(checkpoint, folder / name)
    # A common.pt, as older versions of Megatron wrote it, has precedence over what the shards say.
    torch.save({"args": Namespace(hidden_size=64), "iteration": 2}, folder / "ordinary" / "iter_0000002" / "common.pt")
    for shard in (folder / "damaged").rglob("*.distcp"):
        shard.write_bytes(b"cut short")
    for metadata in (shutil.copytree(checkpoint, folder / "with code")).rglob(".metadata"):
        metadata.write_bytes(b"cos\nmkdir\n(S'" + str(folder / "executed").encode() + b"'\ntR.")
    (folder / "untracked" / "latest_checkpointed_iteration.txt").write_text("two\n")
    (folder / "untracked" / TRACKER).write_text("two\n")
    (folder / "empty tracker" / TRACKER).write_text("")
    for name in ("no tracker", "begun", "legacy"):
        (folder / name / TRACKER).unlink()
    for path in (folder / "begun").glob("*/metadata.json"):
        path.unlink()
    for path in (folder / "legacy").glob("iter_*"):
        shutil.rmtree(path)
        (path / "mp_rank_00").mkdir(parents=True)
    (folder / "empty").mkdir()
    yaml = folder / "flags.yaml"
    yaml.write_text("hidden_size: 64\n")

    run = [*MODEL, *MOCK]
    argv = {flags: [*run, *WIDE, *flags.split()] for flags in REFUSED_WITH_VIRTUAL_WIDTH}
    argv |= {f"{flags} (ordinary)": [*run, *flags.split()] for flags in REFUSED_ALWAYS}
    argv |= {f"{flags} (wide)": [*run, *WIDE, *flags.split()] for flags in REFUSED_ALWAYS}
    argv |= {name: [*run, *flags] for name, flags in ACCEPTED.items()}
    argv["no pattern"] = [*run[2:], *WIDE]
    argv["no data"] = [*MODEL, *WIDE]
    argv["missing data"] = [*MODEL, *WIDE, "--data-path", str(folder / "text")]
    argv["tied"] = [*run, "--vwn-m", "2", "--vwn-n", "4", "--vwn-embedding", "wide"]
    argv["tied"].remove("--untie-embeddings-and-output-weights")
    argv["yaml"] = [*run, *WIDE, "--yaml-cfg", str(yaml)]
    argv["ordinary fp32 stream"] = [*run, "--bf16", "--fp32-residual-connection"]
    argv["unknown symbol"] = [*run, *WIDE, "--hybrid-layer-pattern", "*-X-"]
    argv["experts with biases"] = [*run, *WIDE, "--hybrid-layer-pattern", "*E", "--num-experts", "2"]
    argv["experts with biases"].remove("--disable-bias-linear")
    for name, source, flags in (
        ("resume", "wide", WIDE),
        ("other partition", "wide", [*WIDE, "--vwn-partition", "replicated", "--vwn-recompute-block", "2"]),
        ("other n", "wide", ["--vwn-m", "2", "--vwn-n", "8"]),
        ("other gate and norm", "wide", [*WIDE, "--vwn-gate", "sigmoid", "--no-vwn-reduce-norm"]),
        ("other norms", "wide", [*WIDE, "--qk-layernorm"]),
        ("other rotary base", "wide", [*WIDE, "--rotary-base", "77"]),
        ("fine-tuning", "wide", [*WIDE, "--finetune"]),
        ("no positions", "wide", [*WIDE, "--position-embedding-type", "none"]),
        ("no positions, fine-tuning", "wide", [*WIDE, "--position-embedding-type", "none", "--finetune"]),
        ("other rotation", "wide", [*WIDE, "--rotary-interleaved", "--rotary-percent", "0.5"]),
        ("other norms, fine-tuning", "wide", [*WIDE, "--qk-layernorm", "--finetune"]),
        ("longer", "wide", [*WIDE, "--train-iters", "5"]),
        ("longer by its own schedule", "wide", [*WIDE, "--train-iters", "5", "--lr", "1e-4", OVERRIDE]),
        ("longer by the checkpoint's", "wide", [*WIDE, "--train-iters", "5", "--lr", "1e-4", KEEP]),
        ("other schedule", "wide", [*WIDE, "--lr-decay-style", "cosine", "--weight-decay", "0.3", "--min-lr", "1e-5"]),
        ("larger batches", "wide", [*WIDE, "--global-batch-size", "8", OVERRIDE]),
        ("smaller batches", "wide", [*WIDE, "--global-batch-size", "2", OVERRIDE]),
        ("two schedules", "wide", [*WIDE, OVERRIDE, KEEP]),
        ("bf16", "wide", [*WIDE, "--bf16"]),
        ("bf16, new optimizer", "wide", [*WIDE, "--bf16", "--no-load-optim"]),
        ("other optimizer", "wide", [*WIDE, "--use-distributed-optimizer", "--adam-beta2", "0.9"]),
        ("Muon from Adam", "wide", [*WIDE, "--optimizer", "muon", "--muon-momentum", "0.95"]),
        (
            "other layout",
            "wide",
            [*WIDE, "--recompute-granularity", "selective", "--clip-grad", "0.5", "--no-rope-fusion", "--seed", "7"],
        ),
        ("ordinary from wide", "wide", []),
        ("wide from ordinary", "ordinary", WIDE),
        ("ordinary from ordinary", "ordinary", []),
        ("damaged", "damaged", WIDE),
        ("untracked", "untracked", WIDE),
        ("missing step", "wide", [*WIDE, "--ckpt-step", "7"]),
        ("with code", "with code", WIDE),
        ("empty tracker", "empty tracker", WIDE),
        ("empty tracker and a step", "empty tracker", [*WIDE, "--ckpt-step", "1"]),
        ("no tracker", "no tracker", WIDE),
        ("begun", "begun", WIDE),
        ("legacy", "legacy", WIDE),
        ("empty", "empty", WIDE),
        ("empty but demanded", "empty", [*WIDE, "--exit-on-missing-checkpoint"]),
    ):
        argv[name] = [*run, *flags, "--load", str(folder / source)]
    (folder / "file").touch()
    for flag in FOLDERS:
        argv[f"{flag} names a file"] = [*run, *WIDE, flag, str(folder / "file")]
        argv[f"{flag} lies in a file"] = [*run, *WIDE, flag, str(folder / "file" / "below")]
        argv[f"{flag} is to be made"] = [*run, *WIDE, "--save-interval", "1", flag, str(folder / "new" / "folder")]
    (folder / "cases.json").write_text(json.dumps({"argv": argv, "model": run}))
    session = Path(__file__).parent / "session_refusals.py"
    env = launch.WITHOUT_GPU | {"TMPDIR": str(folder)}  # tracebacks are kept there
    done = launch.session(0, session, folder / "cases.json", folder / "results.json", env=env)
    assert done.returncode == 0, done.stderr
    return {"folder": str(folder)} | json.loads((folder / "results.json").read_text())


def assert_refused(result, words):
    sentence = result.get("refusal", f"accepted: {result}")
    for part in words:
        assert part in sentence
    assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("flags", REFUSED_WITH_VIRTUAL_WIDTH)
def test_refused_with_a_virtual_width(prepared, flags):
    assert_refused(prepared[flags], REFUSED_WITH_VIRTUAL_WIDTH[flags])


@pytest.mark.parametrize("model", ["ordinary", "wide"])
@pytest.mark.parametrize("flags", REFUSED_ALWAYS)
def test_refused_for_every_model(prepared, flags, model):
    assert_refused(prepared[f"{flags} ({model})"], REFUSED_ALWAYS[flags])


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no pattern", ["--hybrid-layer-pattern is missing"]),
        ("no data", ["--data-path", "--mock-data"]),
        ("missing data", ["text.idx does not exist"]),
        ("tied", ["--untie-embeddings-and-output-weights", "--vwn-embedding"]),
        ("yaml", ["--yaml-cfg"]),
        ("ordinary fp32 stream", ["--fp32-residual-connection", "Transformer Engine"]),
        ("experts with biases", ["--disable-bias-linear"]),
        ("nothing may be written", ["--save", "nothing may be written to", "give another folder"]),
        ("full disk", ["--tensorboard-dir", "nothing can be written to", "(No space left on device)", "make room"]),
        ("no launcher", ["where the ranks meet", "start this with torchrun"]),
        ("unknown symbol", ["'*-X-' has 'X', which is no sublayer", "write *"]),
        ("other norms", ["qk_layernorm = False", "has qk_layernorm = True", "another --load"]),
        ("no positions", ["position_embedding_type = rope", "position_embedding_type = none", "add --finetune"]),
        ("other rotation", ["rotary_interleaved = False, rotary_percent = 1.0", "= True, rotary_percent = 0.5"]),
        ("other norms, fine-tuning", ["qk_layernorm = False", "or another --load"]),
        ("longer", ["--train-iters 2", "has --train-iters 5: add --override-opt", "--use-checkpoint-opt"]),
        (
            "other schedule",
            ["linear --weight-decay 0.01, but", "--min-lr 1e-05 --lr-decay-style cosine --weight-decay 0.3: add"],
        ),
        ("smaller batches", ["8 samples in 2 steps", "--global-batch-size 2", "--train-samples"]),
        ("two schedules", ["contradict each other", "drop one"]),
        ("bf16", ["--bf16 False, but this run has --bf16 True", "--no-load-optim"]),
        (
            "other optimizer",
            ["--adam-beta2 0.999 --use-distributed-optimizer False", "0.9 --use-distributed-optimizer True"],
        ),
        (
            "Muon from Adam",
            ["--optimizer adam --muon-momentum 0.9, but", "--optimizer muon --muon-momentum 0.95: give"],
        ),
        ("moved experts", ["--expert-model-parallel-size 8", "with 1", "at least 2", "--no-load-optim"]),
        ("split query groups", ["--muon-no-split-qkv", "fewer ranks"]),
        ("biases of experts", ["--expert-model-parallel-size", "--disable-bias-linear"]),
        ("no Muon", ["emerging-optimizers", "install the extra muon"]),
        ("other document end", ["end at token 3", "documents with 4", "the checkpoint's tokenizer"]),
        ("other n", ["--vwn-n 6", "--vwn-n 8", "another --load"]),
        ("other gate and norm", ["--vwn-gate tanh --vwn-reduce-norm", "--vwn-gate sigmoid --no-vwn-reduce-norm"]),
        ("ordinary from wide", ["trained with --vwn-m 2 --vwn-n 6", "started without a virtual width"]),
        ("wide from ordinary", ["trained without a virtual width", "started with --vwn-m 2 --vwn-n 6"]),
        ("damaged", ["cannot be read", "--ckpt-step"]),
        ("untracked", ["cannot be read"]),
        ("with code", [".metadata asks for os.mkdir", "nothing of it was run"]),
        ("other backend", ["for --transformer-impl transformer_engine", "has local", "vwn-widen"]),
        ("missing step", ["cannot be read", "iter_0000007", "traceback in"]),
        ("legacy", ["holds iter_0000001 but no latest", "name it with --ckpt-step"]),
        ("drifted reader", ["is not the one that megatron_vwn was written for", "four values", "0.19.2"]),
        ("damaged load", ["(x.weight from model not in state dict)", "--ckpt-step or --load"]),
        ("empty but demanded", ["holds no checkpoint", "--exit-on-missing-checkpoint"]),
    ],
)
def test_refused(prepared, case, words):
    assert_refused(prepared[case], words)


def test_code_in_a_checkpoint_did_not_run(prepared):
    assert prepared["folder"] and not (Path(prepared["folder"]) / "executed").exists()


@pytest.mark.parametrize("flag", FOLDERS)
def test_a_file_where_a_folder_must_be_is_refused(prepared, flag):
    for case in ("names a file", "lies in a file"):
        assert_refused(prepared[f"{flag} {case}"], [flag, "/file is a file: give a folder"])
    assert prepared[f"{flag} is to be made"]["virtual_width"]


def test_sublayers_are_megatrons(prepared):
    assert sorted(SUBLAYERS) == prepared["sublayers"]


def test_stages_are_those_that_megatron_cuts(prepared):
    assert len(prepared["stages"]) > 5
    for pattern, ours, megatrons in prepared["stages"]:
        assert ours == megatrons, pattern


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(prepared, case):
    assert prepared[case]["virtual_width"] == (case != "ordinary model")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("resume", "training resumes from iteration 2"),
        ("other partition", "training resumes from iteration 2"),
        ("ordinary from ordinary", "training resumes from iteration 2"),
        ("fine-tuning", "training starts from iteration 0 with the weights in"),
        ("other rotary base", "it changes the model's function: rotary_base 10000 -> 77"),
        ("no positions, fine-tuning", "it changes the model's function: position_embedding_type rope -> none"),
        ("bf16, new optimizer", "with a new optimizer and schedule; it changes the model's function: bf16 False -> Tr"),
        ("longer by its own schedule", "of the schedule: --train-iters 2 -> 5, --lr 0.001 -> 0.0001"),
        ("longer by the checkpoint's", "of the schedule: --lr 0.001 is kept"),
        ("larger batches", "of the schedule: --global-batch-size 4 -> 8"),
        ("other layout", "training resumes from iteration 2"),
        ("other layout", "it changes the data: --seed 1234 -> 7"),
        ("empty tracker", "resumes from iteration 2 in"),
        ("empty tracker", "its newest whole checkpoint (latest_checkpointed_iteration.txt is missing or empty)"),
        ("no tracker", "its newest whole checkpoint (latest_checkpointed_iteration.txt is missing or empty)"),
        ("empty tracker and a step", "training resumes from iteration 1"),
        ("begun", "no checkpoint that is whole (iter_0000001, iter_0000002 begun): training starts from the beginning"),
        ("empty", "holds no checkpoint: training starts from the beginning"),
    ],
)
def test_says_where_training_starts(prepared, case, words):
    assert any(words in line for line in prepared[case]["said"])
    changes = any("changes the model's function" in line for line in prepared[case]["said"])
    assert changes == (case in ("other rotary base", "no positions, fine-tuning", "bf16, new optimizer"))
    assert any("changes the data" in line for line in prepared[case]["said"]) == (case == "other layout")


def test_says_what_a_resumed_run_changes_of_the_data(prepared):
    of_data = prepared["other data"]
    assert len(of_data["each"]) > 25 and len(of_data["each of a cyclic loader"]) == 3
    for said in of_data["each"] + of_data["each of a cyclic loader"]:
        assert len(said) == 1 and " -> " in said[0], said
    assert of_data["none"] == [[]] * 5
    assert of_data["a folder"] == ["--train-data-path 1 /old/a -> 1 /new/a"]
    assert of_data["to a cyclic loader"] == ["--dataloader-type single -> cyclic"]
    long = "--train-data-path of 198 -> 198 words, the first that differs is no. 17: 8 -> 0"
    assert of_data["a long blend"] == [long]


def test_a_longer_run_at_a_new_rate_goes_on(checkpoint):
    stages = ["--hybrid-layer-pattern", "*-|*-", "--pipeline-model-parallel-size", "2"]
    news = ["--train-iters", "4", "--lr", "1e-4", "--global-batch-size", "8", OVERRIDE]
    done = launch.session(
        2, *PROGRAM, *MODEL, *MOCK, *WIDE, *stages, *news, "--load", checkpoint, env=launch.WITHOUT_GPU
    )
    assert done.returncode == 0, done.stderr
    rates = re.findall(r"iteration +(\d)/.*learning rate: ([\d.E+-]+)", done.stdout)
    # After two batches of 4, which are one batch of 8 of the new schedule: linear from 1e-4 to 0 over four of them.
    assert rates == [("3", "5.000000E-05"), ("4", "2.500000E-05")]


def test_every_field_that_may_differ_is_a_field(prepared):
    unknown, twice, compared = prepared["fields"]
    assert unknown == [] and twice == []
    assert {"softmax_scale", "rotary_percent", "layernorm_epsilon", "activation_func"} <= set(compared)


def test_a_resumed_muon_is_the_one_that_was_saved(prepared):
    """Its precision and how ranks share the work may change: neither is part of its state."""
    compared, sentence = prepared["Muon's settings"]
    assert {"muon_momentum", "muon_nesterov", "muon_scale_mode", "muon_split_qkv"} <= set(compared)
    assert not {"muon_fp32_matmul_prec", "muon_tp_mode"} & set(compared)
    assert "--use-distributed-optimizer False, but this run has --use-distributed-optimizer True" in sentence


def test_a_fault_of_the_machine_is_not_said_to_be_one_of_flags(prepared):
    assert prepared["fault of the machine"] == {"error": "RuntimeError('CUDA error: uncorrectable ECC error')"}


def test_a_tokenizer_of_another_size_is_refused(prepared):
    same, asked_for, more, more_padded, fewer = prepared["other vocabulary"]
    assert same is None and asked_for is None
    for sentence in (more, more_padded):
        assert "has 256 rows, but the 300 tokens of this run's tokenizer make 512: give the checkpoint's" in sentence
    assert "has 512 rows, but the 200 tokens of this run's tokenizer make 256" in fewer


def test_a_full_disk_is_said_and_no_other_fault(prepared):
    named, hidden, other = prepared["full disk of a checkpoint"]
    for line in (named, hidden):
        assert line.startswith("No space left on device: ") and "make room" in line
    assert other is None


def test_a_full_disk_elsewhere_is_not_the_checkpoint_s(prepared):
    refused, raised, saving = prepared["full disk elsewhere than --save"]
    assert refused[0] == 2 and refused[1].startswith("megatron_vwn: the sample indices cannot be written")
    assert raised == ["OSError(28, 'No space left on device')", ""]
    assert saving[0] == 1 and saving[1].startswith("megatron_vwn: No space left on device: ")


def test_a_schedule_in_samples_leaves_the_size_of_batches_free(prepared):
    equal, ends_early, compared = prepared["parts of a schedule"]
    assert equal and ends_early == [True, False, False, False]
    assert compared == []  # they say where gradients and the optimizer are


def test_a_checkpoint_may_name_files_that_are_gone(prepared):
    file, code = prepared["moved files"]
    assert file == ["te_precision_config_file /gone.yaml -> None"]
    assert "was trained with spec = ['no.such.module', 'layers'], but this run has spec = None: give" in code


def test_says_what_is_trained_and_which_flags_were_added(prepared):
    added, stream = prepared["full recompute"]["said"]
    assert "--distributed-backend gloo" in added and "there is no GPU" in added
    assert "3x: 6 segments of 32 channels around a backbone of 64" in stream
    assert prepared["ordinary model"]["transformer_impl"] == "local"
    assert "sublayers kept" not in stream
    assert "state of one in 2 sublayers kept" in prepared["stream recompute"]["said"][-1]


def test_flags_of_a_later_megatron_are_refused_unless_allowed_and_then_said(prepared):
    of_later = prepared["later megatron"]
    assert of_later["not typed"]["virtual_width"] and of_later["its default"]["virtual_width"]
    assert_refused(of_later["typed"], ["not in the support matrix", "--mtp-loss-scaling-factor", "drop what"])
    assert of_later["allowed"]["said"][-1].endswith("lets through: --mtp-loss-scaling-factor.")


def test_a_node_that_writes_no_events_may_have_a_full_disk(prepared):
    assert "refusal" not in prepared["full disk elsewhere"], prepared["full disk elsewhere"]


def test_exit_codes(prepared):
    # Training that ends, an exit flag of Megatron, Megatron giving up, an error code of Megatron.
    assert prepared["exit codes"] == [0, 0, 1, "SystemExit(3)"]


def test_the_ordinary_model_is_built_as_megatron_builds_it(prepared):
    ours, megatrons = prepared["baseline arguments"]
    assert ours == megatrons


@pytest.mark.parametrize("embedding", ["tiled", "projected"])
def test_both_models_start_from_the_same_backbone(prepared, embedding):
    difference = prepared[f"backbone {embedding}"]
    assert difference["missing"] == [] and difference["different"] == []
    assert len(difference["shared"]) > 10


def test_a_refused_launch_says_one_sentence_and_fails():
    torchrun = ["-m", "megatron_vwn.training.torchrun", "--standalone", "--nproc-per-node", "2"]
    done = launch.real(0, *torchrun, *PROGRAM, *MODEL, *MOCK, "--vwn-m", "4", "--vwn-n", "2", env=launch.WITHOUT_GPU)
    assert done.returncode == 2
    assert len(sentences(done)) == 1 and "--vwn-n 2 is smaller than --vwn-m 4" in sentences(done)[0]
    assert_no_traceback_of_ours(done)


def test_data_that_was_cut_short_is_refused_before_training(tmp_path):
    prefix = tmp_path / "text"
    prefix.with_suffix(".idx").write_bytes(b"MMIDIDX\x00\x00" + bytes(3))
    prefix.with_suffix(".bin").write_bytes(bytes(100))
    argv = [
        *MODEL,
        *WIDE,
        "--data-path",
        str(prefix),
        "--split",
        "90,5,5",
        "--tensorboard-dir",
        str(tmp_path / "events"),
    ]
    done = launch.session(0, *PROGRAM, *argv, env=launch.WITHOUT_GPU)
    assert done.returncode == 2
    assert len(sentences(done)) == 1 and "text.idx is cut short" in sentences(done)[0]
    assert_no_traceback_of_ours(done)
    assert not (tmp_path / "events").exists()
