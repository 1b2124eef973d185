"""The entry point trains other kinds of attention: flags that Megatron reads, in layouts that cut the model."""

import launch
from models import tiny
from torch.distributed.checkpoint import FileSystemReader

FLAGS = tiny(
    None,
    "--vwn-m 2 --vwn-n 6 --save-interval 3 --ckpt-format torch_dist",
    hidden_size=64,
    train_iters=3,
    eval_interval=100,
    vocab_size=255,
)
LATENT = """
    --hybrid-layer-pattern +-+- --multi-latent-attention --q-lora-rank 16 --kv-lora-rank 12 --qk-head-dim 8
    --qk-pos-emb-head-dim 4 --v-head-dim 6 --qk-layernorm --tensor-model-parallel-size 2 --sequence-parallel
"""
GROUPED = "--hybrid-layer-pattern *-|*- --pipeline-model-parallel-size 2 --group-query-attention --num-query-groups 2"


def train(flags, folder):
    """Losses of three steps on two ranks, and the shapes of the tensors in the checkpoint after them."""
    done = launch.session(
        2,
        "-m",
        "megatron_vwn.training.pretrain",
        *FLAGS,
        *flags.split(),
        "--save",
        folder,
        env=launch.WITHOUT_GPU,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    losses = [float(line.split("lm loss:")[1].split("|")[0]) for line in done.stdout.splitlines() if "lm loss:" in line]
    assert len(losses) == 3 and losses[2] < losses[0], losses
    entries = FileSystemReader(folder / "iter_0000003").read_metadata().state_dict_metadata
    return losses, {name: tuple(getattr(entry, "size", ())) for name, entry in entries.items()}


def test_latent_attention_in_tensor_and_sequence_parallel(tmp_path):
    _, shapes = train(LATENT, tmp_path)
    for layer in ("decoder.layers.0", "decoder.layers.2"):
        assert shapes[f"{layer}.self_attention.linear_kv_down_proj.weight"] == (12 + 4, 64)
        assert shapes[f"{layer}.self_attention.linear_kv_up_proj.weight"] == (4 * (8 + 6), 12)


def test_grouped_queries_and_a_window_in_two_stages(tmp_path):
    everything, shapes = train(GROUPED, tmp_path / "everything")
    window, _ = train(f"{GROUPED} --window-size 4,0", tmp_path / "window")
    assert shapes["decoder.layers.2.self_attention.linear_qkv.weight"] == ((4 + 2 * 2) * 16, 64)
    assert window[0] != everything[0]
