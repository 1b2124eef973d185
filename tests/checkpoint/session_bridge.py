"""The real Megatron-Bridge: every model of hf/cases.py from a Hugging Face folder to Megatron and back, in several
layouts of two ranks, beside what vwn-convert makes of the same folder. Writes into the folder named on the command
line, and a JSON file of what was found."""

import megatron_vwn.cpu

megatron_vwn.cpu.install()

import json  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from checkpoint import transformer_engine_stub  # noqa: E402
from checkpoint.bridge_cases import BASE, CHANGED, EXPRESSIBLE, INEXPRESSIBLE, LAYOUTS, REFUSED  # noqa: E402
from hf.cases import HALF, MODELS, SEQUENCE  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.utils import unwrap_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from megatron_vwn.checkpoint import verify  # noqa: E402
from megatron_vwn.checkpoint.bridge_settings import config_of  # noqa: E402
from megatron_vwn.checkpoint.convert_cli import main as vwn_convert  # noqa: E402
from megatron_vwn.checkpoint.torch_dist import TorchDistReader  # noqa: E402
from megatron_vwn.config import VirtualWidthError  # noqa: E402
from megatron_vwn.hf import VWNConfig, VWNForCausalLM, add_code  # noqa: E402

transformer_engine_stub.install()

from megatron.bridge import AutoBridge  # noqa: E402

import megatron_vwn.checkpoint.bridge  # noqa: E402

ROOT = Path(sys.argv[1])
# How vwn-convert's comparison rounds: what a run chooses, not the model.
_AS_VERIFY = {"bias_activation_fusion": False, "attention_softmax_in_fp32": False}
TOKENS = torch.randint(96, (2, SEQUENCE), generator=torch.Generator().manual_seed(4))


def on_first_rank(work) -> None:
    if torch.distributed.get_rank() == 0:
        work()
    torch.distributed.barrier()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def different(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same bytes, or are only on one side."""
    return sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found
        or name not in expected
        or found[name].dtype != expected[name].dtype
        or not torch.equal(found[name], expected[name])
    )


def settings_of(folder: Path) -> dict:
    # Bridge names code where it was told to trust it.
    found = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in found.items() if name != "auto_map"}


def make(name: str, settings: dict, dtype: torch.dtype) -> Path:
    """A Hugging Face folder of a model away from initialisation, and what vwn-convert makes of it beside."""
    folder = ROOT / name

    def write() -> None:
        model = VWNForCausalLM(VWNConfig(**settings, dtype=dtype))
        generator = torch.Generator().manual_seed(3)
        for key, parameter in model.named_parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
            if "expert_bias" not in key:  # fp32 in every model
                parameter.data = parameter.data.to(dtype)
        model.save_pretrained(folder)
        add_code(folder)
        # Bridge saves no folder without one.
        words = Tokenizer(WordLevel({str(token): token for token in range(96)}, unk_token="0"))
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="7").save_pretrained(folder)
        assert vwn_convert(["from-hf", str(folder), f"{folder} in Megatron"]) == 0

    on_first_rank(write)
    return folder


def build(bridge: AutoBridge, settings: dict) -> list:
    provider = bridge.to_megatron_provider()
    for name, value in settings.items():
        assert hasattr(provider, name), name
        setattr(provider, name, value)
    provider.finalize()
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


@torch.no_grad()
def logits(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of further predictions [b, s, V], then of the next token."""
    found: list[torch.Tensor] = []
    model = unwrap_model(model).eval()
    # Cloned: losses of further predictions are computed in place.
    hook = model.output_layer.register_forward_hook(lambda _, __, out: found.append(out[0].transpose(0, 1).clone()))
    mask = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool), 1)
    model(TOKENS, torch.arange(SEQUENCE).expand_as(TOKENS), mask)
    hook.remove()
    return found


def furthest(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Norm-relative."""
    pairs = zip(found, expected, strict=True)
    return max(((a.double() - e.double()).norm() / e.double().norm()).item() for a, e in pairs)


def converted(model: torch.nn.Module, folder: Path) -> list[str]:
    """Tensors of a model that are not those of vwn-convert's checkpoint, of this rank."""
    state = {key: tensor for key, tensor in model.state_dict().items() if torch.is_tensor(tensor)}
    mine = {key: tensor.clone() for key, tensor in state.items()}
    for tensor in state.values():
        tensor.fill_(float("nan"))
    verify._load(model, TorchDistReader(Path(f"{folder} in Megatron")), VWNConfig.from_pretrained(folder))
    return different({key: tensor for key, tensor in model.state_dict().items() if key in mine}, mine)


def vwn_logits(folder: Path, dtype: torch.dtype) -> list[torch.Tensor]:
    """Of our own model of vwn-convert's checkpoint, in Megatron."""
    reader = TorchDistReader(Path(f"{folder} in Megatron"))
    model = verify._megatron_model(reader.arguments, dtype)
    verify._load(model, reader, VWNConfig.from_pretrained(folder))
    return logits(model)


def check(name: str, settings: dict, dtype: torch.dtype = torch.float32) -> dict:
    folder = make(name, settings, dtype)
    expected, report = tensors(folder), {}
    for layout, values in LAYOUTS.items():
        if "expert_model_parallel_size" in values and "E" not in settings["hybrid_pattern"]:
            continue
        bridge = AutoBridge.from_hf_pretrained(folder)
        models = build(bridge, values | _AS_VERIFY | {"parallel_output": False})
        exported = dict(bridge.export_hf_weights(models, cpu=True, show_progress=False))
        found = logits(models[0])
        if layout == "alone":
            here = vwn_logits(folder, dtype)
        saved = ROOT / f"{name}, {layout}, saved"
        bridge.save_hf_pretrained(models, saved, show_progress=False, strict=False)
        report[layout] = {
            "exported": different(exported, expected),
            "saved": different(tensors(saved), expected),
            "config": settings_of(saved) == settings_of(folder),
            "logits": furthest(found, here),
            "converted": converted(unwrap_model(models[0]), folder),
        }
        parallel_state.destroy_model_parallel()
    return report


def carried(name: str) -> list[str]:
    """Fields of the provider that another value of one field of the configuration changes."""
    value, further = CHANGED[name]
    before, after = (
        AutoBridge.from_hf_config(VWNConfig(**BASE | further | changed, architectures=["VWNForCausalLM"]))
        for changed in ({}, {name: value})
    )
    before, after = (vars(bridge.to_megatron_provider(load_weights=False)) for bridge in (before, after))
    return [field for field in before if before[field] != after[field]]


def refusals() -> dict[str, str]:
    """What is refused, and how."""
    found = {}

    def refused(name: str, work) -> None:
        try:
            work()
        except VirtualWidthError as error:
            found[name] = str(error)

    def provider(**settings) -> object:
        config = VWNConfig(**BASE | settings, architectures=["VWNForCausalLM"])
        return AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)

    def finalized(**settings) -> None:
        made = provider()
        vars(made).update(settings)
        made.finalize()

    refused("gated gelu", lambda: provider(**MODELS[REFUSED]))
    refused("unknown field", lambda: provider(vwn_later=3))
    refused("a field that says nothing", lambda: provider(hybrid_pattern="*-", num_experts=0))
    refused("another model's name", lambda: provider(rms_norm_eps=1e-6))
    refused("stages", lambda: finalized(pipeline_model_parallel_size=2))
    refused("layers", lambda: finalized(hybrid_stack_spec=dict))
    refused("padding", lambda: finalized(should_pad_vocab=True))
    refused("vocabulary", lambda: finalized(vocab_size=97, tensor_model_parallel_size=2))
    refused("partition", lambda: finalized(vwn_partition="sequence", tensor_model_parallel_size=2))
    refused("another activation", lambda: config_of(replace(provider(), activation_func=torch.tanh)))
    whole = AutoBridge.from_hf_pretrained(ROOT / "n-grams")
    models = build(whole, {})
    refused("fp8", lambda: list(whole._model_bridge.build_export_fp8_tasks(whole.hf_pretrained, models)))
    # A tensor that neither side can place.
    models[0].register_parameter("another", torch.nn.Parameter(torch.zeros(1)))
    refused("another parameter", lambda: list(whole.export_hf_weights(models, show_progress=False)))
    del models[0].another
    lacking = ROOT / "lacking"
    on_first_rank(lambda: lack(ROOT / "n-grams", lacking, "model.layers.2.connection.routing"))
    refused("a tensor that lacks", lambda: build(AutoBridge.from_hf_pretrained(lacking), {}))
    on_first_rank(lambda: lack(ROOT / "n-grams", lacking, "", another=torch.zeros(1)))
    refused("a tensor too many", lambda: build(AutoBridge.from_hf_pretrained(lacking), {}))
    parallel_state.destroy_model_parallel()
    return found


def lack(folder: Path, target: Path, name: str, **further: torch.Tensor) -> None:
    """A copy of a folder without one tensor."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    left = {key: tensor for key, tensor in tensors(folder).items() if key != name}
    save_file(left | further, target / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    report = {"models": {name: check(name, settings) for name, settings in EXPRESSIBLE.items()}}
    report["models"] |= {f"{name}, bf16": check(f"{name}, bf16", EXPRESSIBLE[name], torch.bfloat16) for name in HALF}
    report["fields"] = {name: carried(name) for name in CHANGED if name not in INEXPRESSIBLE}
    report["refusals"] = refusals()
    (ROOT / f"report {torch.distributed.get_rank()}.json").write_text(json.dumps(report, indent=1))
