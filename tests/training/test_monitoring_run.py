"""The event files of a real run in two pipeline stages, and the same run without monitoring."""

import launch
import pytest
from models import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS, INTERVAL = 6, 3
FLAGS = tiny(
    "*-|*-/*-",
    "--pipeline-model-parallel-size 2 --vwn-m 2 --vwn-n 6 --lr-decay-style constant --tensorboard-log-interval 1",
    ffn_hidden_size=48,
    seq_length=16,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    micro_batch_size=1,
    train_iters=STEPS,
    lr="1e-3",
    eval_iters=1,
    eval_interval=2,
)
PER_CONNECTION = [
    "effective_segments",
    "independent_segments",
    "segment_norm_max",
    "segment_norm_min",
    "dynamic_share",
    "gate_saturation",
    "read_spread",
    "carry_spread",
    "write_spread",
    "carry_kept",
    "carry_mixed",
    "carry_gain_forward_max",
    "carry_gain_backward_max",
    "carry_gain_mean",
    "connection_gradient_norm",
    "depth_window",
]
AT_BIRTH = ["independent_segments", "effective_segments", "dynamic_share", "gate_saturation", "depth_window"]
AT_BIRTH += ["carry_kept", "carry_mixed", "carry_gain_forward_max", "carry_gain_backward_max"]
KINDS = ["all", "routing", "scale", "weight", "norm", "expand", "reduce", "fusion"]
IMAGES = [
    "routing",
    "routing_static",
    "routing_spread",
    "segment_norms",
    "depth_receptive_field",
    "depth_receptive_field_mtp_1",
]
HISTOGRAMS = ["read_coefficients", "carry_coefficients", "write_coefficients", "segment_norms"]
PLACES = ["layer_001", "layer_002", "layer_003", "layer_004", "mtp_1_layer_001", "mtp_1_layer_002"]
WITHOUT_WINDOW = "layer_001", "mtp_1_layer_001"


def train(folder, *further):
    flags = [*FLAGS, "--tensorboard-dir", folder, *further]
    done = launch.session(2, "-m", "megatron_vwn.training.pretrain", *flags, env=launch.WITHOUT_GPU)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Events of the monitored run and of the other."""
    folders = [tmp_path_factory.mktemp(name) for name in ("monitored", "plain")]
    said = train(folders[0], "--vwn-log-interval", INTERVAL)
    assert said.count("of 6 independent segments (2.0 at birth), dynamic share ") == STEPS // INTERVAL, said[-2000:]
    train(folders[1])
    everything = {"scalars": 0, "images": 0, "histograms": 0}
    return [EventAccumulator(str(folder), size_guidance=everything).Reload() for folder in folders]


def ours(tags):
    return {tag for tag in tags if tag.startswith(("vwn/", "vwn_layers/", "custom_scalars"))}


def test_every_tag_once_per_interval(runs):
    events, plain = runs
    summaries = {f"vwn/{name}/{of}" for name in PER_CONNECTION for of in ("mean", "min", "max")}
    kinds = {f"vwn/gradient_norm/{kind}" for kind in KINDS}
    layers = {f"vwn_layers/{name}/{place}" for name in PER_CONNECTION for place in PLACES}
    layers -= {f"vwn_layers/depth_window/{place}" for place in WITHOUT_WINDOW}
    tags = events.Tags()
    references = {f"vwn/{name}/birth" for name in AT_BIRTH} | {f"vwn/{name}/n" for name in AT_BIRTH[:2]}
    assert ours(tags["scalars"]) == summaries | references | kinds | layers
    assert ours(tags["images"]) == {f"vwn/{name}" for name in IMAGES}
    assert ours(tags["histograms"]) == {f"vwn_layers/{name}/{place}" for name in HISTOGRAMS for place in PLACES}
    steps = list(range(INTERVAL, STEPS + 1, INTERVAL))
    for read, kind in ((events.Scalars, "scalars"), (events.Images, "images"), (events.Histograms, "histograms")):
        assert all([event.step for event in read(tag)] == steps for tag in ours(tags[kind])), kind
    assert ours(tags["tensors"]) == {"custom_scalars__config__"}
    assert not any(ours(of_kind) for of_kind in plain.Tags().values() if isinstance(of_kind, list))


def test_every_tag_is_described(runs):
    events, _ = runs
    for kind in ("scalars", "images", "histograms"):
        for tag in ours(events.Tags()[kind]):
            assert "(m, n) = (2, 6)" in events.SummaryMetadata(tag).summary_description or "gradient_norm/" in tag, tag


def test_values_are_alive(runs):
    events, _ = runs
    last = {tag: events.Scalars(tag)[-1].value for tag in ours(events.Tags()["scalars"])}
    # Every stage, and both of its neighbours in the carry product, have their part; after six steps little has moved.
    for place in PLACES:
        assert 1 < last[f"vwn_layers/effective_segments/{place}"] <= 6
        assert 0 < last[f"vwn_layers/dynamic_share/{place}"] < 0.1
        assert 0 < last[f"vwn_layers/connection_gradient_norm/{place}"] < last["vwn/gradient_norm/all"]
        assert 1 < last[f"vwn_layers/carry_gain_forward_max/{place}"] < 1.5
    gains = [last[f"vwn_layers/carry_gain_forward_max/layer_00{i}"] for i in (4, 3, 2, 1)]
    assert gains == sorted(gains) and len(set(gains)) == 4, gains
    assert last["vwn_layers/depth_window/layer_002"] == 1
    assert 1.9 < last["vwn_layers/depth_window/layer_004"] < 2.1  # still about (1 + 2 + 3) / 3
    # Megatron's own norm of all gradients, before clipping, of the same step.
    assert last["vwn/gradient_norm/all"] < events.Scalars("grad-norm")[-1].value


def test_training_is_the_same_to_the_bit(runs):
    for tag in ("lm loss", "mtp_1 loss", "grad-norm", "lm loss validation"):
        monitored, plain = ([event.value for event in run.Scalars(tag)] for run in runs)
        assert monitored == plain and len(plain) >= STEPS // 2, tag
