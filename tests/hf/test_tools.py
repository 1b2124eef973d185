"""What people's tools ask of a model: arguments by other names, offloading, Trainer, packing, heads, plans."""

import json
import re

import pytest
import torch
from hf.cases import MODELS, NGRAMS
from hf.test_model import PROMPT, build, greedy
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.trainer import Trainer

from megatron_vwn.hf import VWNConfig, add_code
from megatron_vwn.hf.modeling_vwn import CACHE, load_balancing_loss

PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])  # positions of sequences of 4 and 5 tokens


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_has_two_names(name):
    model = build("dense, MTP twice")
    whole = model(PROMPT).logits
    cache = model(PROMPT[:, :5], use_cache=True)[CACHE]
    torch.testing.assert_close(model(PROMPT[:, 5:], **{name: cache}).logits, whole[:, 5:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(PROMPT, past_key_values=DynamicCache(), cache=DynamicCache())


@torch.no_grad()
def test_what_is_not_known_is_refused_by_name():
    model = build("experts by softplus, static")
    logits = model(PROMPT).logits
    with pytest.raises(ValueError, match="no argument kv_cache: leave it out"):
        model(PROMPT, kv_cache=DynamicCache(), head_mask=None)
    # What a collator, a tokenizer or Trainer sends besides.
    known = {"token_type_ids": torch.zeros_like(PROMPT), "num_items_in_batch": 18, "max_length_q": 9, "head_mask": None}
    assert torch.equal(model(PROMPT, **known).logits, logits)
    with pytest.raises(ValueError, match="use_mtp drafts"):
        model.generate(PROMPT, use_mtp=True)
    model.generation_config.use_mtp = True
    with pytest.raises(ValueError, match="use_mtp drafts"):
        model.generate(PROMPT)


@pytest.mark.parametrize("name", ["dense, MTP twice", "sliding window, partial rope"])
def test_generation_from_embeddings(name):
    model, mask = build(name), torch.ones_like(PROMPT)
    tokens = greedy(model, PROMPT, 8, attention_mask=mask)
    embeddings = model.get_input_embeddings()(PROMPT).detach()
    assert torch.equal(greedy(model, None, 8, inputs_embeds=embeddings, attention_mask=mask), tokens[:, 9:])


def test_ngrams_have_no_embeddings_to_begin_with():
    model = build(NGRAMS)
    with pytest.raises(ValueError, match=r"give generate\(\) their ids"):
        model.generate(inputs_embeds=model.get_input_embeddings()(PROMPT))


@torch.no_grad()
@pytest.mark.parametrize("name", [NGRAMS, "window on every other attention"])
def test_packed_sequences_do_not_see_each_other(name):
    model, row = build(name), PROMPT[:1]
    alone = torch.cat([model(row[:, :4]).logits, model(row[:, 4:]).logits], dim=1)
    torch.testing.assert_close(model(row, position_ids=PACKED, use_cache=False).logits, alone, rtol=1e-4, atol=1e-4)
    if name == NGRAMS:
        ends = torch.tensor([0, 4, 9])
        told = [{"cu_seq_lens_q": ends}, {"seq_idx": (torch.arange(9) >= 4).int()[None]}, {"position_ids": PACKED}]
        seen = [hashed(model, row, **each) for each in told]
        assert all(
            torch.equal(each, torch.cat([hashed(model, row[:, :4]), hashed(model, row[:, 4:])], 1)) for each in seen
        )
        with pytest.raises(ValueError, match="where a sequence begins"):
            model(row, attention_mask=torch.zeros(1, 1, 9, 9))


def hashed(model, tokens, **told):
    """The embeddings of n-grams that a forward pass adds."""
    found = []
    hook = model.model.embed_ngrams.register_forward_hook(lambda _, __, output: found.append(output))
    model(tokens, use_cache=False, **told)
    hook.remove()
    return found[0]


@torch.no_grad()
def test_balance_of_experts():
    model = build("experts by softmax after the choice")
    mask = torch.ones_like(PROMPT)
    mask[0, :4] = 0
    plain = model(PROMPT, attention_mask=mask, labels=PROMPT)
    out = model(PROMPT, attention_mask=mask, labels=PROMPT, output_router_logits=True)
    want = load_balancing_loss_func(out.router_logits, 4, 2, mask)
    assert plain.aux_loss is None
    torch.testing.assert_close(out.aux_loss, want)
    torch.testing.assert_close(out.loss, plain.loss + 0.001 * want)
    # By sigmoid the scores of a token do not sum to one: its shares of them do.
    config = VWNConfig(**MODELS["experts by sigmoid"])
    logits = torch.randn(18, 4, generator=torch.Generator().manual_seed(3))
    shares = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    assert torch.allclose(load_balancing_loss((logits,), config), load_balancing_loss_func((shares.log(),), 4, 2))
    assert build("dense, MTP twice")(PROMPT, output_router_logits=True).aux_loss is None


@torch.no_grad()
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_have_one_width_and_one_per_layer(name, wide):
    model = build(name, output_wide_hidden_states=wide)
    out = model.model(PROMPT, output_hidden_states=True)
    config, states = model.config, out.hidden_states
    assert len(states) == config.num_hidden_layers + 1
    assert {state.shape for state in states} == {(*PROMPT.shape, config.over_width if wide else config.hidden_size)}
    last = model.model.norm(model.model.reduction(states[-1])) if wide else states[-1]
    assert torch.equal(last, out.last_hidden_state)
    # Each is what the rest of the layers make the last one of.
    inputs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(PROMPT)
    attentions = [i for i, symbol in enumerate(config.hybrid_pattern) if symbol == "*"]
    for state, index in zip(states[1:-1], attentions[1:], strict=True):
        assert torch.equal(state, inputs[index] if wide else model.model.reduction(inputs[index]))


@pytest.mark.parametrize("name", MODELS)
def test_plans_name_what_the_model_has(name):
    model = build(name)
    names = {re.sub(r"\d+", "*", key) for key, _ in (*model.named_modules(), *model.named_parameters())}
    assert set(model.tp_plan) | set(model._fsdp_plan) <= names
    assert all(f"model.{key}" in names for key in model.config.base_model_tp_plan)
    assert "base_model_tp_plan" not in model.config.to_dict()
    if "E" in MODELS[name]["hybrid_pattern"]:
        model.set_experts_implementation("eager")
    else:
        assert model.config._experts_implementation == "eager"
        with pytest.raises(ValueError, match="does not support setting experts implementation"):
            model.set_experts_implementation("grouped_mm")


@pytest.mark.parametrize("name", ["dense, MTP twice", "experts by sigmoid", NGRAMS])
def test_training_leaves_no_parameter_without_a_gradient(name):
    model = build(name)
    labels = PROMPT.clone()
    labels[0, 4] = -100
    plain = model(PROMPT, labels=labels).loss
    loss = model.train()(PROMPT, labels=labels).loss
    expected = [  # of token t + k + 2, in the mean over depths
        nn.functional.cross_entropy(logits[:, : -k - 2].flatten(0, 1), labels[:, k + 2 :].flatten())
        for k, logits in enumerate(model.mtp_logits(PROMPT))
    ]
    torch.testing.assert_close(loss, plain + 0.1 * torch.stack(expected).mean())
    model.zero_grad()
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    cache = model(PROMPT, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="on whole sequences, without a cache"):
        model(PROMPT, labels=labels, cache=cache)


def test_further_predictions_of_packed_sequences_stay_in_them():
    model, row = build("dense, MTP twice").train(), PROMPT[:1]
    labels = row.clone()
    labels[:, 4] = -100  # as a collator marks the first token of each
    count = torch.tensor(1)  # sums, which add up
    alone = [model(part, labels=part, num_items_in_batch=count).loss for part in (row[:, :4], row[:, 4:])]
    packed = model(row, labels=labels, position_ids=PACKED, use_cache=False, num_items_in_batch=count).loss
    torch.testing.assert_close(packed, sum(alone))


def test_further_predictions_without_a_label_add_nothing():
    model, labels = build("dense, MTP twice").train(), PROMPT.clone()
    alone = model.eval()(PROMPT[:, :2], labels=labels[:, :2]).loss
    assert torch.equal(model.train()(PROMPT[:, :2], labels=labels[:, :2]).loss, alone)
    labels[:, 2:6] = -100
    expected = model(PROMPT, labels=labels).loss
    assert torch.equal(model(PROMPT, labels=labels.clamp_min(0), ignore_index=0).loss, expected)


def test_further_predictions_can_be_left_as_they_are():
    model = build("dense, MTP twice", mtp_loss_scaling_factor=0).train()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if ".mtp." in n} and frozen
    assert torch.equal(model(PROMPT, labels=PROMPT).loss, model.eval()(PROMPT, labels=PROMPT).loss)


@pytest.mark.parametrize("name", MODELS)
def test_trainer_decays_what_megatron_decays(name):
    model = build(name)
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    assert {n for n, p in model.named_parameters() if n in decayed} == {
        n for n, p in model.named_parameters() if p.dim() > 1
    }
    assert list(model.model.layers[0].connection._parameters) == [
        n for n, _ in model.model.layers[0].connection.named_parameters()
    ]


@torch.no_grad()
def test_offloading(tmp_path):
    """accelerate brings parameters where a module's forward is called, and takes them away behind it."""
    model = build("experts by sigmoid")
    model.save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name, _ in model.model.named_children() if name not in ("layers", "mtp")}
    places |= {f"layers.{i}": "cpu" if i % 2 else "disk" for i in range(len(model.model.layers))} | {"mtp": "disk"}
    places = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert {p.device.type for n, p in offloaded.named_parameters() if ".connection." in n} == {"cpu", "meta"}
    assert torch.equal(offloaded(PROMPT).logits, model(PROMPT).logits)
    assert torch.equal(greedy(offloaded, PROMPT, 4), greedy(model, PROMPT, 4))
    assert all(torch.equal(a, b) for a, b in zip(offloaded.mtp_logits(PROMPT), model.mtp_logits(PROMPT), strict=True))


def test_a_folder_saved_again_carries_its_code(tmp_path):
    model = build("dense, MTP twice")
    model.save_pretrained(tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain/config.json").read_text())
    add_code(tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "again")
    AutoConfig.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "configuration")
    auto_map = json.loads((tmp_path / "plain/config.json").read_text())["auto_map"]
    for folder in ("again", "configuration"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["auto_map"] == auto_map
        for file in {f"{name.split('.')[0]}.py" for name in auto_map.values()}:
            assert (tmp_path / folder / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


@pytest.mark.parametrize("head", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_heads(head, tmp_path):
    model = build("dense, MTP twice")
    model.save_pretrained(tmp_path)
    labels = torch.tensor([2, 0]) if head is AutoModelForSequenceClassification else PROMPT % 3
    classifier = head.from_pretrained(tmp_path, num_labels=3).train()
    assert torch.equal(classifier.model.layers[0].connection.routing, model.model.layers[0].connection.routing)
    out = classifier(PROMPT, labels=labels)
    assert out.logits.shape == (*labels.shape, 3)
    out.loss.backward()
    assert [n for n, p in classifier.named_parameters() if p.requires_grad and p.grad is None] == []
