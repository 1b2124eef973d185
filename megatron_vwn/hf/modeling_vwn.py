"""Virtual Width Networks (arXiv 2511.11238) for transformers. Needs torch and transformers alone: it is copied next to
the weights. Arithmetic and parameters are those of ``megatron_vwn``, to which tests pin every line.

    token -> over-width embedding -> H [n segments of E = D/m] -> ... -> reduction -> final norm -> head
    one sublayer:   X = A_read^T H     Y = T(X)     H' = B^T Y + A_carry^T H

Shape suffixes:
    N   n, segments of the over-width state         D   hidden size, D = M * E
    M   m, segments of one backbone vector          K   coefficients per segment: m read, (n or 0) carry, m write
    E   channels of a segment                       T   tokens

Learned A, B, S, W_expand and W_reduce are deviations from the paper's initial values: initially zero. Between
sublayers the state is [batch, sequence, N * E].
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_vwn import VWNConfig

SINKHORN_KAPPA = 8.0
SINKHORN_ITERATIONS = 20
# The polynomial hash of n-grams: no product of two numbers below the prime overflows 64 bits.
NGRAM_PRIME = 2**31 - 1
NGRAM_BASE = 1_103_515_245
NO_TOKEN = -1
# Of the token that an n-gram or a loss must not look at.
NO_LABEL = -100
# transformers 5.24 gave the cache another name; both are taken, and this one is handed on.
CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"
# Arguments that the model hands on to attention, or that the head's loss reads. Any other is refused: what is swallowed
# may be a cache by its next name.
HANDED_ON = {
    *("output_attentions", "output_router_logits", "is_causal", "debug_io", "debug_io_dir", "prune_layers"),
    *("num_items_in_batch", "shift_labels", "ignore_index"),
    # Packed sequences, continuous batching, vLLM and SGLang.
    *("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("cache", "read_index", "write_index", "block_table", "max_seqlen_q", "max_seqlen_k"),
    *("logits_indices", "logits_processor_args", "attention_instances", "forward_batch"),
}
ENGINES = ("vllm", "sglang")
MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for half precisions, else the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def backbone_norm(config: VWNConfig, size: int) -> nn.Module:
    """torch's own norm, which is what Megatron's local backend uses: its rounding is part of the function."""
    return (nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm)(size, eps=config.norm_eps)


# ------------------------------------------------------------------------------------------------ the over-width stream


def tile(x_ME: Tensor, n: int) -> Tensor:
    """Copy m segments to n: segment j of the result is segment j mod m."""
    return torch.cat([x_ME] * -(-n // x_ME.shape[-2]), dim=-2)[..., :n, :]


def average_copies(h_NE: Tensor, m: int) -> Tensor:
    """The mean of the copies of each backbone segment: what undoes ``tile``."""
    n = h_NE.shape[-2]
    if n % m == 0:
        return h_NE.unflatten(-2, (-1, m)).mean(-3)
    return torch.stack([h_NE[..., i::m, :].mean(-2) for i in range(m)], dim=-2)


def sinkhorn(logits_NN: Tensor) -> Tensor:
    """exp(logits) with rows and columns scaled in turn to sum to one, columns last."""
    a_NN = (logits_NN - logits_NN.amax((-2, -1), keepdim=True)).exp()
    for _ in range(SINKHORN_ITERATIONS):
        a_NN = a_NN / a_NN.sum(-1, keepdim=True)
        a_NN = a_NN / a_NN.sum(-2, keepdim=True)
    return a_NN


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast would take products down to half precision. Cheap where there is none: two per sublayer and token."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


class _Undecayed(str):
    """A name that transformers' Trainer, which searches names for "bias" and "norm", takes for a bias's."""

    __slots__ = ()

    def lower(self) -> str:
        return "bias"


class _Parameters(dict):
    """Parameters by name, of which Trainer does not decay routing and scale: it goes by names, where Megatron spares
    all one-dimensional parameters, and the names of a checkpoint do not change."""

    def __iter__(self) -> Iterator[str]:
        return (_Undecayed(name) if name in ("routing", "scale") else name for name in super().__iter__())


class VWNConnection(nn.Module):
    """What replaces the residual connection of one sublayer.

        tanh:     [A_read | A_carry | B^T] = S o tanh(RMSNorm(H) W / sqrt(E)) + A        static:  A
        sigmoid:                             A o 2 sigmoid(S o (RMSNorm(H) W / sqrt(E)))

    Coefficients, products and sums are fp32 at least; RMSNorm(H) W / sqrt(E) is rounded to the stream's dtype, in which
    training keeps it.
    """

    def __init__(self, config: VWNConfig):
        super().__init__()
        self.m, self.n, self.gate, self.eps = config.vwn_m, config.vwn_n, config.vwn_gate, config.norm_eps
        self.dynamic = config.vwn_connection == "dynamic"
        self.doubly_stochastic = config.vwn_carry == "doubly-stochastic"
        self.num_carry = 0 if config.vwn_carry == "identity" else self.n
        self.segment_size = config.hidden_size // self.m
        self.num_coefficients = 2 * self.m + self.num_carry
        # Flat as in Megatron, where one-dimensional parameters do not decay.
        self._parameters = _Parameters()
        self.routing = nn.Parameter(torch.zeros(self.n * self.num_coefficients))
        if self.dynamic:
            self.scale = nn.Parameter(torch.zeros(self.n * self.num_coefficients))
            self.weight = nn.Parameter(torch.zeros(self.segment_size, self.num_coefficients))
            self.norm = nn.Parameter(torch.ones(self.segment_size))
        self.register_buffer("pattern", self.initial_pattern(), persistent=False)
        self.prepared: tuple[Tensor, ...] | None = None

    def initial_pattern(self) -> Tensor:
        """The initial [A_read | A_carry | B^T] as [N, K]."""
        identity_NN = torch.eye(self.n)
        identity_MM = identity_NN[: self.m, : self.m]
        return torch.cat([identity_NN[:, : self.m], identity_NN[:, : self.num_carry], tile(identity_MM, self.n)], -1)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Read: the sublayer's input X [..., D], and what ``write`` wants: A_carry [T, N, N or 0] and B^T [T, N, M].

        All parameters are used here: offloading brings those of a module to its device when its forward is called.
        """
        with without_autocast(hidden_states.device):
            h_TNE = self._segments(hidden_states)
            coefficients_TNK = self._coefficients(h_TNE, hidden_states.dtype)
            read_TNM, *kept = coefficients_TNK.split([self.m, self.num_carry, self.m], dim=-1)
            x_TME = torch.bmm(read_TNM.mT, h_TNE)
            return x_TME.view(*hidden_states.shape[:-1], self.m * self.segment_size).to(hidden_states.dtype), kept

    def write(self, hidden_states: Tensor, output: Tensor, kept: list[Tensor]) -> Tensor:
        """H' from the state that was read, the sublayer's output [..., D] and what reading gave."""
        with without_autocast(hidden_states.device):
            h_TNE = self._segments(hidden_states)
            y_TME = output.to(h_TNE.dtype).reshape(-1, self.m, self.segment_size)
            carry_TNN, write_TNM = kept
            if self.num_carry:
                out_TNE = torch.bmm(carry_TNN.mT, h_TNE).baddbmm_(write_TNM, y_TME)
            else:
                out_TNE = torch.baddbmm(h_TNE, write_TNM, y_TME)
            return out_TNE.view_as(hidden_states).to(hidden_states.dtype)

    def _segments(self, hidden_states: Tensor) -> Tensor:
        h_TNE = hidden_states.reshape(-1, self.n, self.segment_size)
        return h_TNE.to(accumulation_dtype(hidden_states.dtype))

    def _coefficients(self, h_TNE: Tensor, dtype: torch.dtype) -> Tensor:
        # [A_read | A_carry | B^T] of each token, in the dtype of h.
        if torch.compiler.is_compiling() or self.prepared is None:
            static_NK, *dynamic = self._prepare(h_TNE.dtype)
        else:
            self.prepared = self.prepared or self._prepare(h_TNE.dtype)
            static_NK, *dynamic = self.prepared
        if self.dynamic:
            coefficients_TNK = self._gated(h_TNE, dtype, static_NK, *dynamic)
        else:
            coefficients_TNK = static_NK.expand(h_TNE.shape[0], -1, -1)
        if self.doubly_stochastic:
            read_TNM, carry_TNN, write_TNM = coefficients_TNK.split([self.m, self.n, self.m], dim=-1)
            identity_NN = self.pattern[:, self.m : self.m + self.n]
            carry_TNN = sinkhorn((SINKHORN_KAPPA - 1) * identity_NN + carry_TNN)
            coefficients_TNK = torch.cat([read_TNM, carry_TNN, write_TNM], dim=-1)
        return coefficients_TNK

    def _gated(
        self, h_TNE: Tensor, dtype: torch.dtype, static_NK: Tensor, scale_NK: Tensor, weight_EK: Tensor
    ) -> Tensor:
        h_RE = h_TNE.reshape(-1, self.segment_size)
        # RMSNorm's mean and 1 / sqrt(E) make it a sum.
        squares_R1 = torch.linalg.vector_norm(h_RE, dim=1, keepdim=True).square()
        inverse_R1 = torch.rsqrt(squares_R1 + self.segment_size * self.eps)
        logits_RK = (h_RE @ weight_EK * inverse_R1).to(dtype).to(h_TNE.dtype)
        logits_TNK = logits_RK.view(-1, *static_NK.shape)
        if self.gate == "tanh":
            return torch.addcmul(static_NK, scale_NK, torch.rsub(logits_TNK.sigmoid(), 1, alpha=2))
        return static_NK * (scale_NK * logits_TNK).sigmoid()

    def _prepare(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        # What does not depend on the state. tanh(z) = 1 - 2 sigmoid(-2 z), with the -2 in W, because torch's sigmoid is
        # several times as fast on a CPU as its tanh; of zero it is zero.
        static_NK = self.routing.to(dtype).view_as(self.pattern) + self.pattern
        if not self.dynamic:
            return (static_NK,)
        scale_NK = 1 + self.scale.to(dtype).view_as(self.pattern)
        weight_EK = self.norm.to(dtype)[:, None] * self.weight.to(dtype)
        if self.gate == "tanh":
            return static_NK, scale_NK, -2 * weight_EK
        return 2 * static_NK, scale_NK, weight_EK


class VWNExpansion(nn.Module):
    """H = W_expand X with W_expand = tiling + weight / sqrt(D); undivided where vwn_linear is plain."""

    def __init__(self, config: VWNConfig):
        super().__init__()
        self.m, self.n = config.vwn_m, config.vwn_n
        self.divisor = config.linear_divisor(config.hidden_size)
        self.weight = nn.Parameter(torch.zeros(self.n, config.hidden_size // self.m, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., N * E]."""
        copies = tile(x.unflatten(-1, (self.m, -1)), self.n).flatten(-2)
        deviation = F.linear(x.to(self.weight.dtype), self.weight.flatten(0, 1))
        return torch.add(copies, deviation, alpha=1 / self.divisor)


class VWNNGramEmbedding(nn.Embedding):
    """The sum of the hashed embeddings of the n-grams that end at each token; one table after another."""

    def __init__(self, config: VWNConfig):
        super().__init__(len(config.vwn_ngrams) * config.vwn_ngram_vocab, config.over_width)
        self.lengths, self.rows, self.document_end = config.vwn_ngrams, config.vwn_ngram_vocab, config.vwn_document_end

    def forward(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """Token ids [batch, h + count], NO_TOKEN where there is none, to embeddings [batch, count, N * E] of the last
        ``count``; those before are only looked at. starts [batch or 1, count] marks tokens that nothing goes before."""
        code, count = tokens + 1, starts.shape[1]
        starts = F.pad(starts, (code.shape[1] - count, 0))
        codes, same_document = [code], torch.ones_like(code, dtype=torch.bool)
        for distance in range(1, max(self.lengths)):
            earlier = F.pad(code, (distance, 0))[:, : code.shape[1]]
            # Once an end or a start lies between, everything before it belongs to another document.
            started = F.pad(starts, (distance - 1, 0))[:, : code.shape[1]]
            same_document = same_document & (earlier != self.document_end + 1) & ~started
            codes.append(earlier * same_document)
        total = 0
        for table, length in enumerate(self.lengths):
            hashed = torch.zeros_like(code)
            for each in reversed(codes[:length]):
                hashed = (hashed * NGRAM_BASE + each) % NGRAM_PRIME
            total = total + super().forward((hashed % self.rows + table * self.rows)[:, -count:])
        return total


class VWNGroupNorm(nn.Module):
    """A norm over groups of D channels, of all D' where n is no multiple of m: layer norm in models that use it."""

    def __init__(self, config: VWNConfig):
        super().__init__()
        self.group_size = config.hidden_size if config.vwn_n % config.vwn_m == 0 else config.over_width
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.over_width))
        self.bias = nn.Parameter(torch.zeros(config.over_width)) if config.normalization == "LayerNorm" else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., N * E], normed, in the accumulation dtype."""
        h = hidden_states.to(accumulation_dtype(hidden_states.dtype)).unflatten(-1, (-1, self.group_size))
        if self.bias is None:
            return F.rms_norm(h, h.shape[-1:], eps=self.eps).flatten(-2) * self.weight.to(h.dtype)
        normed = F.layer_norm(h, h.shape[-1:], eps=self.eps).flatten(-2)
        return torch.addcmul(self.bias.to(h.dtype), normed, self.weight.to(h.dtype))


class VWNReduction(nn.Module):
    """X = W_reduce GroupNorm(H), W_reduce = averaging the copies + weight / sqrt(D'); undivided where plain."""

    def __init__(self, config: VWNConfig):
        super().__init__()
        self.m, self.n = config.vwn_m, config.vwn_n
        self.divisor = config.linear_divisor(config.over_width)
        self.weight = nn.Parameter(torch.zeros(config.hidden_size, self.n, config.hidden_size // self.m))
        self.norm = VWNGroupNorm(config) if config.vwn_reduce_norm else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., N * E] to [..., D] in the model's dtype."""
        h = hidden_states if self.norm is None else self.norm(hidden_states)
        mean = average_copies(h.unflatten(-1, (self.n, -1)), self.m).flatten(-2)
        deviation = F.linear(h.to(self.weight.dtype), self.weight.flatten(1))
        return torch.add(mean, deviation, alpha=1 / self.divisor).to(self.weight.dtype)


# ------------------------------------------------------------------------------------------------ sublayers


class VWNRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotated channels, the first partial_rotary_factor of each head."""

    def __init__(self, config: VWNConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config, None)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: VWNConfig, device=None, **kwargs) -> tuple[Tensor, float]:
        """Inverse frequencies; transformers calls it by this name to fill the buffer after a load."""
        dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [batch, sequence] to two tensors [batch, sequence, rotated] of x's dtype: cosines, and sines with
        the signs that ``apply_rotary`` wants."""
        with torch.autocast(x.device.type, enabled=False):
            angles = position_ids[..., None].float() * self.inv_freq.float().to(x.device)
            cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos.to(x.dtype), sin.to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first channels of [batch, heads, sequence, head_dim] in two halves."""
    if cos.shape[-1] < x.shape[-1]:
        rotated, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
        return torch.cat((apply_rotary(rotated, cos, sin), rest), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention written out: the interface of ALL_ATTENTION_FUNCTIONS, and the one that returns its weights."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class VWNAttention(nn.Module):
    """Grouped-query attention. Serving engines rely on layer_idx, config, is_causal and on exactly one call of what
    ALL_ATTENTION_FUNCTIONS gave, with scaling an attribute."""

    def __init__(self, config: VWNConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        # Further predictions come behind the trunk's last attention and are like it.
        self.layer_type = config.layer_types[min(layer_idx, len(config.layer_types) - 1)]
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.add_bias_linear)
        self.q_norm = backbone_norm(config, self.head_dim) if config.qk_layernorm else nn.Identity()
        self.k_norm = backbone_norm(config, self.head_dim) if config.qk_layernorm else nn.Identity()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, sequence, D] to the same, and the attention weights where the implementation has them."""
        shape = hidden_states.shape[:-1]
        query = self.q_norm(self.q_proj(hidden_states).view(*shape, -1, self.head_dim)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(*shape, -1, self.head_dim)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        if position_embeddings is not None:
            query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)
        if (cache := kwargs.pop(CACHE, None)) is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


class VWNMLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where the model is not gated."""

    def __init__(self, config: VWNConfig, intermediate_size: int):
        super().__init__()
        bias = config.add_bias_linear
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same."""
        up = self.up_proj(x)
        return self.down_proj(self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * up)


def expert_scores(logits: Tensor, score_function: str) -> Tensor:
    """Scores [..., experts] in fp32 at least."""
    if score_function == "softmax":
        return F.softmax(logits, dim=-1, dtype=torch.float32)
    return logits.float().sigmoid() if score_function == "sigmoid" else F.softplus(logits.float()).sqrt()


class VWNRouter(nn.Module):
    """Scores of all experts, and the chosen ones with their weights: Megatron's TopKRouter without its groups."""

    def __init__(self, config: VWNConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.score_function, self.pre_softmax = config.moe_router_score_function, config.moe_router_pre_softmax
        self.scaling_factor = config.moe_router_topk_scaling_factor
        self.dtype = ROUTER_DTYPES.get(config.moe_router_dtype)
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        self.expert_bias = None
        if config.moe_router_enable_expert_bias:
            # Moved by counting tokens, not by gradients, and fp32 in every model: small differences decide who is
            # chosen. Megatron's is a buffer, but the loaders of serving engines look at parameters.
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.expert_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, experts], weights [T, k] and indices [T, k]."""
        dtype = self.dtype or x_TD.dtype
        logits = F.linear(x_TD.to(dtype), self.weight.to(dtype))
        if self.score_function == "softmax":
            scores = expert_scores(logits, "softmax") if self.pre_softmax else logits
            weights, indices = scores.topk(self.top_k, dim=-1)
            if not self.pre_softmax:
                weights = F.softmax(weights, dim=-1, dtype=torch.float32)
        else:
            scores = expert_scores(logits, self.score_function)
            # The bias balances who is chosen and has no part in the weights.
            choice = scores if self.expert_bias is None else scores + self.expert_bias.float()
            indices = choice.topk(self.top_k, dim=-1).indices
            weights = scores.gather(-1, indices)
            if self.top_k > 1:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.scaling_factor:
            weights = weights * self.scaling_factor
        return logits, weights.to(logits.dtype), indices


class _Experts(nn.Module):
    """All experts in two 3D parameters, as Megatron's checkpoints and transformers' grouped kernels have them."""

    up_name: str

    def __init__(self, config: VWNConfig):
        super().__init__()
        self.num_experts, size = config.num_experts, config.moe_intermediate_size
        up_size = 2 * size if config.gated_mlp else size
        setattr(self, self.up_name, nn.Parameter(torch.zeros(self.num_experts, up_size, config.hidden_size)))
        self.down_proj = nn.Parameter(torch.zeros(self.num_experts, config.hidden_size, size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """One expert after the other; transformers replaces it by grouped kernels (experts_implementation)."""
        output = torch.zeros_like(hidden_states)
        up_proj = getattr(self, self.up_name)
        for expert in range(self.num_experts):
            token, place = (top_k_index == expert).nonzero(as_tuple=True)
            up = F.linear(hidden_states[token], up_proj[expert])
            y = F.linear(self._activate(up), self.down_proj[expert]) * top_k_weights[token, place, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output


@use_experts_implementation
class VWNExperts(_Experts):
    """Gated experts: gate_up_proj [experts, 2F, D], down_proj [experts, D, F]."""

    up_name = "gate_up_proj"

    def _activate(self, up: Tensor) -> Tensor:
        gate, up = up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


@use_experts_implementation(has_gate=False)
class VWNUngatedExperts(_Experts):
    """Experts without a gate: up_proj [experts, F, D], down_proj [experts, D, F]."""

    up_name = "up_proj"

    def _activate(self, up: Tensor) -> Tensor:
        return self.act_fn(up)


class VWNMoE(nn.Module):
    """Routed experts, and one for all tokens where the config has it."""

    def __init__(self, config: VWNConfig):
        super().__init__()
        self.gate = VWNRouter(config)
        self.experts = (VWNExperts if config.gated_mlp else VWNUngatedExperts)(config)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = VWNMLP(config, shared) if shared else None
        self.shared_expert_gate = (
            nn.Linear(config.hidden_size, 1, bias=False) if shared and config.shared_expert_gate else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, D] to the same."""
        x_TD = x.reshape(-1, x.shape[-1])
        _, weights, indices = self.gate(x_TD)
        output_TD = self.experts(x_TD, indices, weights)
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(x_TD)
            if self.shared_expert_gate is not None:
                shared_TD = shared_TD * self.shared_expert_gate(x_TD).sigmoid()
            output_TD = output_TD + shared_TD
        return output_TD.view_as(x)


class VWNLayer(GradientCheckpointingLayer):
    """One symbol of the pattern: a connection around one sublayer and its norm.

    Args:
        config: the model's.
        symbol: "*", "-" or "E".
        layer_idx: which attention it is, counting only those; unused by the others.
    """

    def __init__(self, config: VWNConfig, symbol: str, layer_idx: int):
        super().__init__()
        self.connection = VWNConnection(config)
        self.input_layernorm = backbone_norm(config, config.hidden_size)
        self.layer_type = None
        if symbol == "*":
            self.self_attn = VWNAttention(config, layer_idx)
            self.layer_type = self.self_attn.layer_type
        else:
            self.mlp = VWNMoE(config) if symbol == "E" else VWNMLP(config, config.intermediate_size)

    def forward(self, hidden_states: Tensor, attention_mask: dict[str, Tensor] | None = None, **kwargs) -> Tensor:
        """The state [batch, sequence, N * E] to the next."""
        x, kept = self.connection(hidden_states)
        # The stream may be fp32 around a model of lower precision.
        x = self.input_layernorm(x.to(self.input_layernorm.weight.dtype))
        if self.layer_type is None:
            y = self.mlp(x)
        else:
            y, _ = self.self_attn(x, attention_mask=(attention_mask or {}).get(self.layer_type), **kwargs)
        return self.connection.write(hidden_states, y, kept)


def build_layers(config: VWNConfig, pattern: str, first_attention: int = 0) -> nn.ModuleList:
    """The sublayers of a pattern."""
    counts = [first_attention + pattern[:i].count("*") for i in range(len(pattern))]
    return nn.ModuleList(VWNLayer(config, symbol, count) for symbol, count in zip(pattern, counts, strict=True))


# ------------------------------------------------------------------------------------------------ further predictions


class VWNFusion(nn.Module):
    """H_j = W_e GroupNorm(embedding)_j + W_h GroupNorm(state)_j: one map [2E -> E] shared by all segments."""

    def __init__(self, config: VWNConfig):
        super().__init__()
        self.n, segment = config.vwn_n, config.hidden_size // config.vwn_m
        self.embedding_norm = VWNGroupNorm(config)
        self.state_norm = VWNGroupNorm(config)
        self.weight = nn.Parameter(torch.zeros(segment, 2, segment))

    def forward(self, embedding: Tensor, hidden_states: Tensor) -> Tensor:
        """Two states [..., N * E] to one."""
        pair = [self.embedding_norm(embedding), self.state_norm(hidden_states)]
        pair_N2E = torch.stack([x.unflatten(-1, (self.n, -1)) for x in pair], dim=-2).to(self.weight.dtype)
        return (pair_N2E.flatten(-2) @ self.weight.flatten(1).T).flatten(-2).to(hidden_states.dtype)


class VWNMultiTokenPrediction(nn.Module):
    """One prediction depth: fusion, sublayers, and a reduction and norm of its own before the shared head."""

    def __init__(self, config: VWNConfig, first_attention: int):
        super().__init__()
        self.expansion = VWNExpansion(config) if config.vwn_embedding == "projected" else None
        self.fusion = VWNFusion(config)
        self.layers = build_layers(config, config.mtp_hybrid_pattern, first_attention)
        self.reduction = VWNReduction(config)
        self.norm = backbone_norm(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, embedding: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        """The state of the depth before and the over-width embedding of the token ahead to the next state and the
        head's input."""
        hidden_states = self.fusion(embedding, hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states, self.norm(self.reduction(hidden_states))


# ------------------------------------------------------------------------------------------------ models


class _HasExperts:
    """A method that says so of a model by its configuration, and no of a class, which cannot know."""

    def __get__(self, model: PreTrainedModel | None, _: type) -> Callable[[], bool]:
        return lambda: model is not None and "E" in model.config.hybrid_pattern


class VWNPreTrainedModel(PreTrainedModel):
    """What transformers wants to know."""

    config: VWNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VWNLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"router_logits": OutputRecorder(VWNRouter, index=0), "attentions": VWNAttention}  # noqa: RUF012

    def __init__(self, config: VWNConfig):
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = [r"^(model\.)?mtp\."]

    _can_set_experts_implementation = _HasExperts()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VWNConnection):
            for name, parameter in module.named_parameters(recurse=False):
                (init.ones_ if name == "norm" else init.zeros_)(parameter)
            init.copy_(module.pattern, module.initial_pattern())
        elif isinstance(module, (VWNExpansion, VWNReduction, VWNNGramEmbedding)):
            init.zeros_(module.weight)
        elif isinstance(module, VWNGroupNorm):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (VWNFusion, _Experts)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, VWNRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.expert_bias is not None:
                init.zeros_(module.expert_bias)


@dataclass
class VWNModelOutput(MoeModelOutputWithPast):
    """With the over-width state [batch, sequence, N * E] behind the last layer, where a head has asked for it."""

    stream: Tensor | None = None


class VWNModel(VWNPreTrainedModel):
    """The decoder, from token ids to the head's input [batch, sequence, hidden_size]."""

    def __init__(self, config: VWNConfig):
        super().__init__(config)
        table_width = config.over_width if config.vwn_embedding == "wide" else config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, table_width, config.pad_token_id)
        learned = config.position_embedding_type == "learned_absolute"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, table_width) if learned else None
        self.embed_expansion = VWNExpansion(config) if config.vwn_embedding == "projected" else None
        self.embed_ngrams = VWNNGramEmbedding(config) if config.vwn_ngrams else None
        self.layers = build_layers(config, config.hybrid_pattern)
        # Sublayers behind which what others call a layer ends: those before the next attention.
        self.layer_ends = {i - 1 for i, symbol in enumerate(config.hybrid_pattern) if symbol == "*"}
        self.layer_ends -= {config.hybrid_pattern.index("*") - 1}
        self.reduction = VWNReduction(config)
        self.norm = backbone_norm(config, config.hidden_size)
        self.rotary_emb = VWNRotaryEmbedding(config) if config.position_embedding_type == "rope" else None
        self.gradient_checkpointing = False
        self.post_init()

    def table_rows(self, inputs_embeds: Tensor, position_ids: Tensor) -> Tensor:
        """Rows of the table with those of their positions, where these are learned."""
        return inputs_embeds if self.embed_positions is None else inputs_embeds + self.embed_positions(position_ids)

    def widen(self, rows: Tensor, expansion: VWNExpansion | None) -> Tensor:
        """Rows [..., table_width] to a state [..., N * E]: the trunk's, or that of tokens ahead."""
        if self.config.fp32_residual_connection:
            rows = rows.float()
        if self.config.vwn_embedding == "wide":
            return rows
        if expansion is not None:
            return expansion(rows)
        return tile(rows.unflatten(-1, (self.config.vwn_m, -1)), self.config.vwn_n).flatten(-2)

    def layer_arguments(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        **kwargs,
    ) -> dict:
        """What every sublayer is given beside the state."""
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        arguments = {"position_ids": position_ids, CACHE: cache}
        if not isinstance(attention_mask, dict):  # generate() makes the masks itself for a static cache
            given = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                **arguments,
            }
            attention_mask = {kind: MASKS[kind](**given) for kind in sorted(set(self.config.layer_types))}
        position_embeddings = None
        if self.rotary_emb is not None:
            cos_and_sin = self.rotary_emb(inputs_embeds, position_ids)
            position_embeddings = tuple(each.unsqueeze(1) for each in cos_and_sin)  # for all heads
        # Last: what older versions call a cache besides is one of their engine's, for its attention.
        return arguments | {
            "attention_mask": attention_mask,
            "position_embeddings": position_embeddings,
            **kwargs,
        }

    def read_out(self, hidden_states: Tensor) -> Tensor:
        """What is shown of a state: its reduction [batch, sequence, D], or itself."""
        return hidden_states if self.config.output_wide_hidden_states else self.reduction(hidden_states)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        ngram_tokens: Tensor | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        output_stream: bool = False,
        **kwargs,
    ) -> VWNModelOutput:
        """As every decoder of transformers; inputs_embeds are rows of embed_tokens, before their expansion.

        A model with n-grams wants input_ids and, once a cache holds tokens, what ``generate`` passes: ngram_tokens
        [batch, h + sequence], the ids of these tokens and of some before, NO_TOKEN where there is none.

        hidden_states are num_hidden_layers + 1 tensors [batch, sequence, D]: the input of the layers; the state behind
        each but the last, that is before the next attention; last_hidden_state. The input is the rows of the table
        where these are D wide. States are shown by the reduction of the last one, before the final norm, and nothing is
        computed from what is shown. With output_wide_hidden_states in the configuration all are the states themselves,
        [batch, sequence, N * E], the last one before its reduction; output_stream returns that one as ``stream``.

        Raises:
            ValueError: one sentence about arguments that are not known or cannot be followed.
        """
        cache, kwargs = known_arguments(past_key_values, cache, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if self.embed_ngrams is not None and ngram_tokens is None:
            ngram_tokens = self._ngram_tokens(input_ids, attention_mask, cache, kwargs)
        arguments = self.layer_arguments(inputs_embeds, attention_mask, position_ids, cache, **kwargs)
        rows = self.table_rows(inputs_embeds, arguments["position_ids"])
        stream = self.widen(rows, self.embed_expansion)
        if ngram_tokens is not None:
            stream = stream + self.embed_ngrams(ngram_tokens, sequence_starts(**arguments)).to(stream.dtype)
        shown = None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            narrow = not self.config.output_wide_hidden_states and rows.shape[-1] == self.config.hidden_size
            shown = [rows if narrow else self.read_out(stream)]
        for index, layer in enumerate(self.layers):
            stream = layer(stream, **arguments)
            if shown is not None and index in self.layer_ends:
                shown.append(self.read_out(stream))
        last = self.norm(self.reduction(stream))
        if shown is not None:
            shown = (*shown, stream if self.config.output_wide_hidden_states else last)
        return VWNModelOutput(
            last_hidden_state=last, hidden_states=shown, stream=stream if output_stream else None, **{CACHE: cache}
        )

    def _ngram_tokens(
        self, input_ids: Tensor | None, attention_mask: Tensor | dict | None, cache: Cache | None, others: dict
    ) -> Tensor:
        """The tokens of whole sequences; of anything else a wrong n-gram would go unnoticed."""
        if input_ids is None:
            raise ValueError("n-grams are of tokens: give input_ids instead of inputs_embeds.")
        if "attention_instances" in others or "read_index" in others or self.config._attn_implementation in ENGINES:
            raise ValueError("n-grams need the tokens of each request, which this engine keeps: use generate().")
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError("n-grams reach back into the cache: give ngram_tokens too, as generate() does.")
        if attention_mask is not None and (not torch.is_tensor(attention_mask) or attention_mask.dim() != 2):
            raise ValueError(
                "n-grams cannot tell from such a mask where a sequence begins: give attention_mask as [batch, "
                "sequence], or ngram_tokens too."
            )
        return mask_tokens(input_ids, attention_mask)


# A head looks its decoder up; the class of a folder's own code is known to nobody else.
AutoModel.register(VWNConfig, VWNModel, exist_ok=True)


def known_arguments(past_key_values: Cache | None, cache: object, others: dict) -> tuple[Cache | None, dict]:
    """The cache, by whichever name it came, and what is handed on; no argument is swallowed.

    Raises:
        ValueError: for an argument that is not known, or two caches.
    """
    if cache is not None and CACHE == "past_key_values" and not isinstance(cache, Cache):
        cache, others = None, others | {"cache": cache}  # continuous batching's, for its attention alone
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one of them.")
    # Tokenizers send the types of tokens unasked, and they mean nothing here.
    given = {name: value for name, value in others.items() if value is not None and name != "token_type_ids"}
    if unknown := [name for name in given if name not in HANDED_ON]:
        raise ValueError(f"this model has no argument {', '.join(unknown)}: leave it out, or install a newer version.")
    return (past_key_values if cache is None else cache), given


def sequence_starts(
    position_ids: Tensor, seq_idx: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, **_
) -> Tensor:
    """Which tokens begin another of the sequences that are packed in a row, [batch or 1, tokens]: where positions do
    not go on by one, by which attention tells them apart too, or where a collator says so."""
    starts = F.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    if seq_idx is not None:
        starts = starts | F.pad(seq_idx.diff(dim=-1) != 0, (1, 0))
    if cu_seq_lens_q is not None:
        ends = torch.zeros(starts.shape[1] + 1, dtype=torch.bool, device=starts.device)
        starts = starts | ends.index_fill(0, cu_seq_lens_q[1:].to(starts.device, torch.long), True)[:-1]
    return starts


def mask_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """NO_TOKEN in place of padding, as far as a mask [batch, sequence] tells."""
    if not torch.is_tensor(attention_mask) or attention_mask.dim() != 2:
        return input_ids
    return input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, NO_TOKEN)


def load_balancing_loss(
    router_logits: tuple[Tensor, ...], config: VWNConfig, attention_mask: Tensor | None = None
) -> Tensor:
    """That of transformers' models with experts, on the scores of this model's router: the number of experts times the
    sum over them of their choices per token times their mean score, over all tokens of all layers [layers][T, experts]
    that attention_mask [batch, sequence] leaves. num_experts_per_tok where all are alike.

    The choices are those of the scores alone: as in Megatron's loss, a bias of the choice (expert_bias), which balances
    by itself, has no part in it, so they are not always the experts that the tokens went to.
    """
    device = router_logits[0].device
    logits_TX = torch.cat([each.to(device) for each in router_logits]).float()
    scores_TX = expert_scores(logits_TX, config.moe_router_score_function)
    scores_TX = scores_TX / (scores_TX.sum(-1, keepdim=True) + 1e-20)
    chosen_TX = torch.zeros_like(scores_TX).scatter_(1, scores_TX.topk(config.num_experts_per_tok).indices, 1.0)
    counted_T1 = scores_TX.new_ones(len(scores_TX), 1)
    if torch.is_tensor(attention_mask) and attention_mask.dim() == 2:
        sequence = len(router_logits[0]) // len(attention_mask)
        mask = attention_mask[:, -sequence:].reshape(-1, 1).to(counted_T1)
        counted_T1 = mask.repeat(len(router_logits), 1)
    tokens = counted_T1.sum()
    shares_X, means_X = (chosen_TX * counted_T1).sum(0) / tokens, (scores_TX * counted_T1).sum(0) / tokens
    return config.num_experts * (shares_X * means_X).sum()


class VWNForCausalLM(VWNPreTrainedModel, GenerationMixin):
    """The decoder with its head, and with the further predictions of the checkpoint.

    These are trained with the rest: in training mode the mean of their losses, times mtp_loss_scaling_factor, is added
    to ``loss``, as it is to Megatron's gradients. With a factor of 0 they stay as they are; with num_mtp_layers=0,
    mtp_hybrid_pattern="" they are left out.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: VWNConfig):
        super().__init__(config)
        if config.num_mtp_layers:
            self._keys_to_ignore_on_load_unexpected = None
        self.model = VWNModel(config)
        # Here, because no other head trains them.
        attentions = (config.hybrid_pattern.count("*"), config.mtp_hybrid_pattern.count("*"))
        self.model.mtp = nn.ModuleList(
            VWNMultiTokenPrediction(config, attentions[0] + depth * attentions[1])
            for depth in range(config.num_mtp_layers)
        )
        if not config.mtp_loss_scaling_factor:
            self.model.mtp.requires_grad_(False)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Logits of the next token and, with labels, their loss; further predictions are in that of training alone (see
        the class). With output_router_logits there is ``aux_loss``, the balance of experts, and router_aux_loss_coef
        times as much is added to ``loss``."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        further = labels is not None and self.training and self.config.mtp_loss_scaling_factor and len(self.model.mtp)
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        if further:
            self._check_further(cache if past_key_values is None else past_key_values, kwargs)
        outputs = self.model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            output_router_logits=output_router_logits,
            output_stream=bool(further),
            **given,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        if further:
            loss = loss + self._further_loss(outputs.stream, input_ids, inputs_embeds, labels, **given, **kwargs)
        if output_router_logits and outputs.router_logits:
            aux_loss = load_balancing_loss(outputs.router_logits, self.config, attention_mask)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: outputs.get(CACHE)},
        )

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args, **kwargs
    ):
        """As every model's; what connections make of their parameters alone is kept while it runs, and no longer."""
        if kwargs.get("use_mtp", getattr(generation_config or self.generation_config, "use_mtp", None)):
            raise ValueError(
                "use_mtp drafts with further predictions as transformers builds them, and this model's are others: "
                "leave it out; mtp_logits() gives theirs."
            )
        connections = [module for module in self.modules() if isinstance(module, VWNConnection)]
        try:
            for connection in connections:
                connection.prepared = ()
            return super().generate(inputs, generation_config, *args, **kwargs)
        finally:
            for connection in connections:
                connection.prepared = None

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *, inputs_embeds: Tensor | None = None, **kwargs
    ) -> dict:
        """As every model's; with n-grams also the tokens that the new ones follow, always equally many."""
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if self.config.vwn_ngrams:
            if inputs_embeds is not None:
                raise ValueError("n-grams are of tokens: give generate() their ids instead of inputs_embeds.")
            cached, new = inputs.get(CACHE), inputs["input_ids"].shape[1]
            if cached is not None and int(cached.get_seq_length()) != input_ids.shape[1] - new:
                raise ValueError("n-grams look back: give generate() the whole sequence, and no prefill_chunk_size.")
            before = max(self.config.vwn_ngrams) - 1
            tokens = F.pad(mask_tokens(input_ids, kwargs.get("attention_mask")), (before, 0), value=NO_TOKEN)
            inputs["ngram_tokens"] = tokens[:, -(before + new) :]
        return inputs

    def mtp_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Logits of each further prediction: entry k at position t is about token t + k + 2.

        The last k + 1 positions have no token ahead to be told and are meaningless, as in Megatron.
        """
        stream = self.model(input_ids, attention_mask, use_cache=False, output_stream=True).stream
        return [logits for logits, _ in self._further(stream, input_ids, None, attention_mask, None)]

    def _further(
        self,
        stream: Tensor,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | dict | None,
        position_ids: Tensor | None,
        **kwargs,
    ) -> Iterator[tuple[Tensor, dict]]:
        """Logits of each further prediction from the trunk's last state, and the arguments of its layers."""
        model = self.model
        rows = model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        arguments = model.layer_arguments(rows, attention_mask, position_ids, None, **kwargs)
        position_ids = arguments["position_ids"]
        # Megatron puts token 0 behind the last.
        behind = model.embed_tokens(position_ids.new_zeros(len(rows), 1)).to(rows.dtype)
        for mtp in model.mtp:
            rows, position_ids = torch.cat([rows[:, 1:], behind], dim=1), F.pad(position_ids[:, 1:], (0, 1))
            ahead = model.widen(model.table_rows(rows, position_ids), mtp.expansion)
            stream, prediction = mtp(stream, ahead, **arguments)
            yield self.lm_head(prediction), arguments

    def _check_further(self, cache: Cache | None, others: dict) -> None:
        if (cache is not None and cache.get_seq_length() > 0) or others.get("shift_labels") is not None:
            raise ValueError(
                "further predictions are trained on whole sequences, without a cache and with labels alone: set "
                "mtp_loss_scaling_factor to 0."
            )

    def _further_loss(
        self, stream: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None, labels: Tensor, **kwargs
    ) -> Tensor:
        """The factor times the mean over depths of their loss; labels do not look into another packed sequence."""
        kwargs = {name: value for name, value in kwargs.items() if name != "shift_labels"}
        ignored, count = kwargs.get("ignore_index", NO_LABEL), kwargs.get("num_items_in_batch")
        losses = []
        for depth, (logits, arguments) in enumerate(self._further(stream, input_ids, inputs_embeds, **kwargs)):
            shift, length = depth + 2, labels.shape[1]
            sequence = sequence_starts(**arguments).cumsum(-1)
            ahead = F.pad(labels[:, shift:], (0, min(shift, length)), value=ignored)
            same = F.pad(sequence[:, shift:], (0, min(shift, length)), value=-1) == sequence
            shifted = ahead.masked_fill(~same.to(ahead.device), ignored)
            # A mean over no token would be NaN: a short batch has a next token and none behind it.
            counted = (shifted != ignored).sum().clamp_min(1) if count is None else count
            given = kwargs | {"shift_labels": shifted, "num_items_in_batch": counted}
            losses.append(self.loss_function(logits=logits, labels=None, vocab_size=self.vocab_size, **given))
        return self.config.mtp_loss_scaling_factor * torch.stack(losses).mean()


class VWNForSequenceClassification(GenericForSequenceClassification, VWNPreTrainedModel):
    """A class of the last token of each sequence that is no padding."""


class VWNForTokenClassification(GenericForTokenClassification, VWNPreTrainedModel):
    """A class of each token."""


__all__ = [
    "VWNForCausalLM",
    "VWNForSequenceClassification",
    "VWNForTokenClassification",
    "VWNModel",
    "VWNPreTrainedModel",
]
