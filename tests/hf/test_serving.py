"""What vLLM's and SGLang's Transformers backends ask of a model, simulated: their packages need a GPU."""

import ast
import inspect
import re
import textwrap

import pytest
import torch
from hf.cases import MODELS, NGRAMS
from hf.test_model import PROMPT, build
from torch import nn
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron_vwn.hf import modeling_vwn


class Engine:
    """The engine's own attention of one layer: flat [tokens, heads * channels], its own causal mask and window."""

    def __init__(self, config, layer_idx):
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.window = config.sliding_window if sliding else None
        self.calls = 0

    def forward(self, query, key, value, scale):
        self.calls += 1
        query, key, value = (
            x.view(len(x), heads, self.size).transpose(0, 1)
            for x, heads in ((query, self.heads), (key, self.kv_heads), (value, self.kv_heads))
        )
        distance = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
        seen = (distance >= 0) & (distance < (self.window or len(distance)))
        out = nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scale, enable_gqa=True)
        return out.transpose(0, 1).flatten(1)


def engine_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    assert module.is_causal and attention_mask is None
    flat = [x.transpose(1, 2).reshape(query.shape[-2], -1) for x in (query, key, value)]
    return attention_instances[module.layer_idx].forward(*flat, float(scaling)), None


@torch.no_grad()
def test_ngrams_are_refused_where_an_engine_mixes_requests():
    with pytest.raises(ValueError, match=r"use generate\(\)"):
        build(NGRAMS).model(input_ids=PROMPT[:1], use_cache=False, attention_instances={})


@pytest.mark.parametrize("name", [name for name in MODELS if name != NGRAMS])
@torch.no_grad()
def test_the_call_of_an_engine(name, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "engine", engine_attention)
    model = build(name)
    expected = model.model(PROMPT[:1]).last_hidden_state[0]
    config = model.config
    config._attn_implementation = "engine"
    decoder = AutoModel.from_config(config).eval()
    # Engines leave out what the decoder says it has not.
    left_out = [re.compile(pattern) for pattern in decoder._keys_to_ignore_on_load_unexpected]
    state = model.model.state_dict()
    decoder.load_state_dict({k: v for k, v in state.items() if not any(each.search(k) for each in left_out)})
    assert decoder.is_backend_compatible()
    instances = {layer: Engine(config, layer) for layer in range(config.num_hidden_layers)}
    for source in ({"input_ids": PROMPT[:1]}, {"inputs_embeds": decoder.get_input_embeddings()(PROMPT[:1])}):
        output = decoder(
            **source,
            use_cache=False,
            position_ids=torch.arange(PROMPT.shape[1])[None],
            attention_instances=instances,
            return_dict=False,
        )[0][0]
        assert output.shape == (PROMPT.shape[1], config.hidden_size)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert all(instance.calls == 2 for instance in instances.values())


def test_the_attention_is_called_once_and_by_a_local_name():
    source = textwrap.dedent(inspect.getsource(modeling_vwn.VWNAttention))
    forward = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == "forward")
    (name,) = (
        node.target.id if isinstance(node, ast.AnnAssign) else node.targets[0].id
        for node in ast.walk(forward)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value)
    )
    (call,) = (n for n in ast.walk(forward) if isinstance(n, ast.Call) and ast.unparse(n.func) == name)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert re.fullmatch(r"self\.\w+", keywords["scaling"]) and keywords[None] == "kwargs"


@pytest.mark.parametrize("name", MODELS)
def test_modules_say_what_engines_ask(name):
    model = build(name).model
    attentions = [module for module in model.layers.modules() if isinstance(module, modeling_vwn.VWNAttention)]
    assert [attention.layer_idx for attention in attentions] == list(range(model.config.num_hidden_layers))
    assert all(attention.config is model.config for attention in attentions)
    windows = [model.config.sliding_window if "sliding" in kind else None for kind in model.config.layer_types]
    assert [attention.sliding_window for attention in attentions] == windows
    plan = {re.compile(key.replace("*", r"\d+")): style for key, style in model.config.base_model_tp_plan.items()}
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear) and key.startswith("layers") and not key.endswith("shared_expert_gate"):
            assert sum(bool(pattern.fullmatch(key)) for pattern in plan) == 1, key
