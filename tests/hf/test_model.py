"""What transformers does with a model: generation with every cache, masks, training, saving and loading."""

import pytest
import torch
from hf.cases import MODELS, NGRAMS
from transformers import AutoModel, AutoModelForCausalLM, StaticCache

from megatron_vwn.hf import VWNConfig, VWNForCausalLM, VWNModel

PROMPT = torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(0))
# Every kind of cache layer, of position and of sublayer.
GENERATING = [
    "dense, MTP twice",
    "experts by sigmoid",
    "LayerNorm, biases, learned positions, tied",
    "sliding window, partial rope",
    "window on every other attention",
]


def build(name, **changes):
    """A model of ``cases``, every parameter away from initialisation."""
    torch.manual_seed(1)
    config = VWNConfig(**{**MODELS[name], "pad_token_id": 0, "initializer_range": 0.2, **changes})
    model = VWNForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def greedy(model, tokens, new=64, **arguments):
    return model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False, **arguments)


def trained(model):
    """All parameters but the bias of the choice of experts."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", [*GENERATING, NGRAMS])
def test_greedy_decoding_is_the_same_with_every_cache(name):
    model = build(name)
    mask = torch.ones_like(PROMPT)
    tokens = greedy(model, PROMPT, attention_mask=mask)
    assert tokens.shape == (2, 73) and len(tokens[:, 9:].unique()) > 4
    static = greedy(model, PROMPT, attention_mask=mask, cache_implementation="static")
    assert torch.equal(tokens, static)
    # One forward pass over everything says what decoding without a cache would have said, token after token.
    with torch.no_grad():
        assert torch.equal(model(tokens).logits[:, 8:-1].argmax(-1), tokens[:, 9:])
    assert torch.equal(greedy(model, PROMPT, 8, attention_mask=mask, use_cache=False), tokens[:, :17])


@pytest.mark.parametrize("name", GENERATING)
@torch.no_grad()
def test_the_cache_has_a_layer_per_attention(name):
    model = build(name)
    cache = model(PROMPT, use_cache=True).past_key_values
    attentions = model.config.hybrid_pattern.count("*")
    assert len(cache.layers) == attentions and all(layer.is_initialized for layer in cache.layers)
    assert len(StaticCache(config=model.config, max_cache_len=8).layers) == attentions
    whole = model(PROMPT, use_cache=False).logits
    assert torch.equal(model(PROMPT).logits, whole)
    # In two parts, nobody counting positions for the model.
    cache = model(PROMPT[:, :5]).past_key_values
    torch.testing.assert_close(model(PROMPT[:, 5:], past_key_values=cache).logits, whole[:, 5:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_ngrams_are_never_guessed():
    model = build(NGRAMS)
    whole, cache = model(PROMPT).logits, model(PROMPT[:, :5]).past_key_values
    with pytest.raises(ValueError, match="give ngram_tokens too"):
        model(PROMPT[:, 5:], past_key_values=cache)
    rest = model(PROMPT[:, 5:], past_key_values=cache, ngram_tokens=PROMPT[:, 2:]).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(PROMPT))
    with pytest.raises(ValueError, match="no prefill_chunk_size"):
        greedy(model, PROMPT, 4, attention_mask=torch.ones_like(PROMPT), prefill_chunk_size=3)
    # The token before an end changes nothing behind it, all others do.
    ended, changed = PROMPT.clone(), PROMPT.clone()
    ended[:, 3], changed[:, 3], changed[:, 2] = 7, 7, PROMPT[:, 2] + 1

    def last(tokens, count):
        return model.model.embed_ngrams(tokens, torch.zeros(1, count, dtype=torch.bool))

    assert torch.equal(last(ended, 5), last(changed, 5)) and not torch.equal(last(ended, 6), last(changed, 6))


@torch.no_grad()
def test_beams_keep_their_own_ngrams():
    model, mask = build(NGRAMS), torch.ones_like(PROMPT)
    beams = model.generate(PROMPT, attention_mask=mask, num_beams=3, max_new_tokens=12, do_sample=False)
    again = model.generate(
        PROMPT, attention_mask=mask, num_beams=3, max_new_tokens=12, do_sample=False, use_cache=False
    )
    assert torch.equal(beams, again)


@pytest.mark.parametrize("name", ["dense, MTP twice", "experts by sigmoid", "experts by softplus, static"])
def test_generation_sees_every_change_of_a_weight(name):
    """What is prepared of the parameters does not outlive a call, however it ends and however weights change."""
    model, mask = build(name), torch.ones_like(PROMPT)
    before = greedy(model, PROMPT, 16, attention_mask=mask)
    for parameter in model.model.layers[0].connection.parameters():
        parameter.data.mul_(-20)  # moves no version counter
    fresh = VWNForCausalLM(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    after = greedy(model, PROMPT, 16, attention_mask=mask)
    assert not torch.equal(before, after) and torch.equal(after, greedy(fresh, PROMPT, 16, attention_mask=mask))

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        greedy(model, PROMPT, 16, attention_mask=mask, logits_processor=[interrupt])
    assert all(layer.connection.prepared is None for layer in model.model.layers)


@pytest.mark.parametrize("name", [*GENERATING, NGRAMS])
def test_left_padding_changes_nothing(name):
    model = build(name)
    short = PROMPT[:1, 4:]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)
    both, mask = torch.cat([padded, PROMPT[1:]]), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    tokens = greedy(model, both, 16, attention_mask=mask)
    alone = [greedy(model, p, 16, attention_mask=torch.ones_like(p)) for p in (short, PROMPT[1:])]
    assert torch.equal(tokens[0, 9:], alone[0][0, 5:]) and torch.equal(tokens[1, 9:], alone[1][0, 9:])


@pytest.mark.parametrize("name", GENERATING)
@torch.no_grad()
def test_attention_implementations_agree(name):
    model = build(name)
    mask = torch.ones_like(PROMPT)
    mask[0, :3] = 0
    logits = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        logits[implementation] = model(PROMPT, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODELS if "experts" in name])
@torch.no_grad()
def test_expert_implementations_agree(name):
    model = build(name)
    logits = {}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        logits[implementation] = model(PROMPT).logits
    for other in ("grouped_mm", "batched_mm"):
        torch.testing.assert_close(logits[other], logits["eager"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dense, MTP twice", "experts by sigmoid"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        model = build(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(PROMPT, labels=PROMPT).loss
        loss.backward()
        gradients.append({n: p.grad for n, p in trained(model)})
    plain, again = gradients
    assert all(g is not None and g.norm() > 0 for g in plain.values())
    for key, gradient in plain.items():
        torch.testing.assert_close(again[key], gradient, rtol=1e-5, atol=1e-7, msg=key)


@torch.no_grad()
def test_outputs_and_inputs():
    model = build("experts by sigmoid", attn_implementation="eager")
    out = model(PROMPT, output_attentions=True, output_router_logits=True)
    assert len(out.attentions) == 2 and len(out.router_logits) == 1
    embeddings = model.get_input_embeddings()(PROMPT)
    assert torch.equal(model(inputs_embeds=embeddings).logits, out.logits)
    torch.testing.assert_close(model(PROMPT, logits_to_keep=1).logits, out.logits[:, -1:])
    with pytest.raises(ValueError, match="exactly one"):
        model(PROMPT, inputs_embeds=embeddings)


@torch.no_grad()
def test_one_graph():
    """torch.compile finds no break, grouped experts included (dynamo alone: no compiler is needed)."""
    model = build("experts by sigmoid")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(PROMPT, use_cache=False).logits, model(PROMPT, use_cache=False).logits)


@pytest.mark.parametrize("name", ["dense, MTP twice", "experts by sigmoid"])
def test_training_under_autocast(name):
    """Weights in fp32, products in bf16: close to fp32, and every gradient is there."""
    model = build(name).train()
    exact = model(PROMPT, labels=PROMPT).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(PROMPT, labels=PROMPT).loss
    loss.backward()
    assert abs(loss.item() - exact.item()) < 0.05 * exact.item()
    assert all(p.grad.isfinite().all() for _, p in trained(model))


@pytest.mark.parametrize("name", MODELS)
def test_shards_round_trip(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is VWNForCausalLM
    assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is VWNModel
    assert all(torch.equal(t, state[f"model.{key}"]) for key, t in decoder.state_dict().items())


def test_further_predictions_survive_or_are_left_out(tmp_path):
    model = build("dense, MTP twice")
    model.save_pretrained(tmp_path)
    assert not hasattr(AutoModel.from_pretrained(tmp_path), "mtp")  # only the head that trains them has them
    kept = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(kept.model.mtp) == 2
    for ours, theirs in zip(kept.mtp_logits(PROMPT), model.mtp_logits(PROMPT), strict=True):
        assert torch.equal(ours, theirs)
    without, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, num_mtp_layers=0, mtp_hybrid_pattern="", output_loading_info=True
    )
    assert len(without.model.mtp) == 0 and not info["unexpected_keys"] and not info["missing_keys"]
    assert torch.equal(without(PROMPT).logits, model(PROMPT).logits)


def test_bf16_keeps_what_must_be_fp32(tmp_path):
    model = build("experts by sigmoid")
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    bias = half.model.layers[3].mlp.gate.expert_bias
    assert bias.dtype == torch.float32 and torch.equal(bias, model.model.layers[3].mlp.gate.expert_bias)
    assert {p.dtype for n, p in half.named_parameters() if "expert_bias" not in n} == {torch.bfloat16}
    with torch.no_grad():
        exact, actual = model(PROMPT).logits, half(PROMPT).logits.float()
    assert (actual - exact).norm() / exact.norm() < 0.5  # the same model, experts of near ties aside


def test_a_model_built_on_meta_gets_its_initial_values(tmp_path):
    """Loading fills what a checkpoint lacks: VWN parameters with zeros, norms with ones."""
    model = build("dense, MTP twice")
    state = {k: v for k, v in model.state_dict().items() if "connection" not in k and "norm" not in k}
    loaded = VWNForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    connection = loaded.model.layers[0].connection
    assert all((p == (name == "norm")).all() for name, p in connection.named_parameters())
    assert torch.equal(connection.pattern, connection.initial_pattern())
    assert (loaded.model.reduction.norm.weight == 1).all() and (loaded.model.norm.weight == 1).all()
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_tied_embeddings_are_one_tensor(tmp_path):
    model = build("LayerNorm, biases, learned positions, tied")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
