"""Conversion of real saves: Megatron to Hugging Face and back, and what both compute."""

import json

import pytest
import torch
from checkpoint.saves import GENERATED, SAVES
from transformers import AutoModelForCausalLM

import megatron_vwn.hf
from megatron_vwn.checkpoint.folders import SafetensorsReader
from megatron_vwn.checkpoint.torch_dist import TorchDistReader
from megatron_vwn.hf.modeling_vwn import VWNRouter

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
FEWEST = 0.8  # of the tokens, whose experts must agree in bf16: near ties are rare


@pytest.mark.parametrize("name", SAVES)
def test_back_is_bit_equal(name, saves):
    there, back = TorchDistReader(saves / name), TorchDistReader(saves / f"{name} and back")
    assert there.tensors.keys() == back.tensors.keys()
    for key, whole in back.tensors.items():
        tensor = there.read(key)
        if "padded" in name and key.endswith(("word_embeddings.weight", "output_layer.weight")):
            assert len(tensor) == 128
            tensor = tensor[:96]
        assert (tensor.shape, tensor.dtype) == (whole.shape, whole.dtype) and torch.equal(tensor, back.read(key)), key
    for told in ("vwn_tokens", "padded_vocab_size"):
        assert getattr(there.arguments, told) == getattr(back.arguments, told)
    assert {key for key in there.objects if "_extra_state" in key} <= set(back.objects)


@pytest.mark.parametrize("name", SAVES)
def test_dtypes_are_kept(name, saves):
    for tensors in (TorchDistReader(saves / name).tensors, SafetensorsReader(saves / f"{name} in HF").tensors):
        exact = {key for key in tensors if key.endswith("expert_bias")}
        assert len(exact) == (3 if "experts" in name else 0)
        assert all(tensors[key].dtype == torch.float32 for key in exact)
        rest = {info.dtype for key, info in tensors.items() if key not in exact}
        assert rest == {torch.bfloat16 if "bf16" in name else torch.float32}


@pytest.mark.parametrize("name", SAVES)
def test_megatron_loads_it_in_another_layout(name, saves):
    result = torch.load(saves / "computed.pt")[name]
    assert result["different"] == []
    before, after = result["losses"]
    assert after == pytest.approx(before, rel=1e-2 if "bf16" in name else 1e-6)


@pytest.mark.parametrize("name", SAVES)
@torch.no_grad()
def test_same_logits_and_text(name, saves):
    expected = torch.load(saves / "computed.pt")[name]
    model = AutoModelForCausalLM.from_pretrained(saves / f"{name} in HF", dtype="auto")
    assert isinstance(model, megatron_vwn.hf.VWNForCausalLM) and model.dtype == expected["logits"].dtype
    routing = []
    for module in model.model.layers.modules():
        if isinstance(module, VWNRouter):
            module.register_forward_hook(
                lambda _, __, out: routing.append(torch.zeros(out[0].shape, dtype=torch.bool).scatter(1, out[2], True))
            )
    tokens, e = expected["tokens"], expected["logits"].double()
    out = model(tokens, labels=tokens)
    a = out.logits[0].double()
    assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-2 if model.dtype == torch.bfloat16 else 1e-5)
    if model.dtype == torch.bfloat16 and routing:
        agree = (torch.stack(routing) == expected["experts"]).all(-1).all(0)
        assert agree.float().mean() >= FEWEST
        a, e = a[agree], e[agree]
    assert ((a - e).norm() / e.norm()).item() <= TOLERANCE[model.dtype]
    if model.dtype != torch.float32:
        return  # rounding decides ties
    prompt = tokens[:, :-GENERATED]
    for use_cache in (True, False):
        text = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=GENERATED,
            do_sample=False,
            use_cache=use_cache,
        )
        assert text.shape[1] == prompt.shape[1] + GENERATED and torch.equal(text, tokens)


def test_model_card_and_arguments(saves):
    folder = saves / "experts, MTP in HF"
    card = (folder / "README.md").read_text()
    assert "# experts, MTP in HF\n" in card and "partial" not in card
    assert "r = 3" in card and "1 x `*E`" in card
    lines = [line for line in card.splitlines() if "from_pretrained(" in line]
    assert len(lines) == 2 and all("trust_remote_code=True" in line for line in lines) and "executes the code" in card
    assert len(card.splitlines()) < 40 and "`megatron_arguments.json`" in card
    arguments = json.loads((folder / "megatron_arguments.json").read_text())
    assert arguments["hybrid_layer_pattern"] == "*E|*E/*E" and "params_dtype" not in arguments
