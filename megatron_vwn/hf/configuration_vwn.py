"""What a VWN checkpoint says about its model. Needs transformers alone: it is copied next to the weights."""

import shutil
from pathlib import Path

from transformers import PreTrainedConfig

CODE = ("configuration_vwn.py", "modeling_vwn.py")
"""What a folder needs to be loaded where megatron_vwn is not installed."""

CHOICES = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "position_embedding_type": ("rope", "learned_absolute", "none"),
    "moe_router_score_function": ("softmax", "sigmoid", "sqrtsoftplus"),
    "moe_router_dtype": (None, "fp32", "fp64"),
    "vwn_connection": ("dynamic", "static"),
    "vwn_gate": ("tanh", "sigmoid"),
    "vwn_carry": ("full", "identity", "doubly-stochastic"),
    "vwn_embedding": ("wide", "projected", "tiled"),
    "vwn_linear": ("scaled", "plain"),
}


# By sublayer, what is split among tensor-parallel ranks. The stream and everything that acts on it are replicated;
# sublayers are split as in any decoder. There is no pipeline plan: engines size what they send between stages by
# hidden_size, and the stream is wider.
_SPLIT_ATTENTION = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
}
_SPLIT_NORMS = dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), "replicated_with_grad_allreduce")
_SPLIT_EXPERTS = {"mlp.experts.down_proj": "rowwise", "mlp.experts": "moe_tp_experts"}


class VWNConfig(PreTrainedConfig):
    """A decoder whose residual stream has n segments of width hidden_size / m.

    Fields that transformers has a name for carry it; the rest are called as Megatron's, without dashes.

    Args:
        hybrid_pattern: one symbol per sublayer, in order: "*" attention, "-" MLP, "E" mixture of experts.
        num_hidden_layers: the number of ATTENTION sublayers, derived from the pattern. Caches and serving engines
            count keys and values by it; for "*-*-*-" it is what everybody calls the number of layers.
        layer_types: "full_attention" or "sliding_attention" of each attention sublayer.
        sliding_window: tokens that a sliding attention sees, itself included (Megatron's window_size[0] + 1).
        gated_mlp: act(gate(x)) * up(x), else act(up(x)); for experts too.
        add_bias_linear: biases in attention and MLP; add_qkv_bias: in the projections to Q, K and V alone.
        rope_parameters: {"rope_theta": ..., "partial_rotary_factor": ...}, or any other type of transformers.
        fp32_residual_connection: keep the stream in fp32 around a model of lower precision.
        shared_expert_intermediate_size: width of an expert that sees every token; 0 for none.
        shared_expert_gate: scale that expert's output by sigmoid of one more projection.
        router_aux_loss_coef: what the balance of experts is multiplied by before it is added to the loss, where
            output_router_logits asks for it.
        num_mtp_layers: modules that predict further tokens: trained by VWNForCausalLM, unused by generate(); 0, with an
            empty mtp_hybrid_pattern, leaves them out.
        mtp_hybrid_pattern: the sublayers of each of them.
        mtp_loss_scaling_factor: what the mean of their losses is multiplied by before it is added to the loss in
            training; 0 freezes them.
        output_wide_hidden_states: hidden_states are the over-width states themselves (see VWNModel.forward).
        vwn_m: fraction rate m; vwn_n: segments n of the stream, n >= m.
        vwn_connection: "dynamic" or "static"; vwn_gate: "tanh" or "sigmoid"; vwn_carry: "full", "identity" or
            "doubly-stochastic"; vwn_embedding: "wide", "projected" or "tiled"; vwn_reduce_norm: a group norm before the
            reduction. None means as in training: projected, and a norm where m divides n, above r = 2.
        vwn_linear: "scaled": the stored expansion and reduction are divided by the square root of what they sum over;
            "plain": they are not.
        vwn_ngrams: lengths of the n-grams whose hashed embeddings are added to the trunk's input, which have
            vwn_ngram_vocab rows each and do not cross the token vwn_document_end.

    Raises:
        ValueError: one sentence about settings that no model can have.
    """

    model_type = "vwn"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    default_theta = 10000.0

    vocab_size: int = 32000
    hidden_size: int = 512
    hybrid_pattern: str = "*-*-*-*-"
    num_hidden_layers: int | None = None

    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_layernorm: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    attention_dropout: float = 0.0
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    position_embedding_type: str = "rope"
    max_position_embeddings: int = 4096
    rope_parameters: dict | None = None

    intermediate_size: int = 1408
    hidden_act: str = "silu"
    gated_mlp: bool = True
    normalization: str = "RMSNorm"
    norm_eps: float = 1e-5
    fp32_residual_connection: bool = False

    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    moe_router_score_function: str = "softmax"
    moe_router_pre_softmax: bool = False
    moe_router_topk_scaling_factor: float | None = None
    moe_router_enable_expert_bias: bool = False
    moe_router_dtype: str | None = None
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001

    num_mtp_layers: int = 0
    mtp_hybrid_pattern: str = ""
    mtp_loss_scaling_factor: float = 0.1

    output_wide_hidden_states: bool = False

    vwn_m: int = 1
    vwn_n: int = 4
    vwn_connection: str = "dynamic"
    vwn_gate: str = "tanh"
    vwn_carry: str = "full"
    vwn_embedding: str | None = None
    vwn_reduce_norm: bool | None = None
    vwn_linear: str = "scaled"
    vwn_ngrams: list[int] | None = None
    vwn_ngram_vocab: int | None = None
    vwn_document_end: int | None = None

    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        m, n, attentions = self.vwn_m, self.vwn_n, self.hybrid_pattern.count("*")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.num_hidden_layers is None:
            self.num_hidden_layers = attentions
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * attentions
        if self.vwn_embedding is None:
            self.vwn_embedding = "projected" if n > 2 * m else "wide"
        if self.vwn_reduce_norm is None:
            self.vwn_reduce_norm = n > 2 * m and n % m == 0
        self.vwn_ngrams = list(self.vwn_ngrams or ())
        self._check()
        self.base_model_tp_plan = self._tensor_parallel_plan()
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """As every configuration's. One that names code (auto_map) is saved with it, and names only what is there."""
        if names := getattr(self, "auto_map", None):
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            copy_code(folder)
            # With "--" the code is a hub's and stays there.
            here = {key: (folder / f"{name.split('.')[0]}.py").exists() for key, name in names.items()}
            self.auto_map = {key: name for key, name in names.items() if "--" in name or here[key]}
        super().save_pretrained(save_directory, *args, **kwargs)

    def linear_divisor(self, fan_in: int) -> float:
        """What the stored deviation of W_expand or W_reduce, which sums over so many channels, is divided by."""
        return fan_in**0.5 if self.vwn_linear == "scaled" else 1.0

    @property
    def over_width(self) -> int:
        """Channels of the stream."""
        return self.hidden_size // self.vwn_m * self.vwn_n

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to Q, K and V have a bias."""
        return self.add_bias_linear or self.add_qkv_bias

    def _tensor_parallel_plan(self) -> dict[str, str]:
        # Of the modules that this model has.
        def mlp(prefix: str) -> dict[str, str]:
            gate = {f"{prefix}.gate_proj": "colwise"} if self.gated_mlp else {}
            return gate | {f"{prefix}.up_proj": "colwise", f"{prefix}.down_proj": "rowwise"}

        plan = _SPLIT_ATTENTION | (_SPLIT_NORMS if self.qk_layernorm else {})
        if "-" in self.hybrid_pattern:
            plan |= mlp("mlp")
        if "E" in self.hybrid_pattern:
            up = ("gate_up_proj", "packed_colwise") if self.gated_mlp else ("up_proj", "colwise")
            plan |= {f"mlp.experts.{up[0]}": up[1]} | _SPLIT_EXPERTS
            if self.shared_expert_intermediate_size:
                plan |= mlp("mlp.shared_expert")
        return {f"layers.*.{name}": how for name, how in plan.items()}

    def _check(self) -> None:
        m, n, attentions = self.vwn_m, self.vwn_n, self.hybrid_pattern.count("*")
        symbols = set(self.hybrid_pattern + self.mtp_hybrid_pattern)
        wrong = [
            (m < 1 or n < m, f"vwn_n = {n} must be at least vwn_m = {m}, and both at least 1."),
            (m >= 1 and self.hidden_size % m, f"hidden_size {self.hidden_size} is not divisible by vwn_m = {m}."),
            *(
                (getattr(self, name) not in values, f"{name} is {getattr(self, name)!r}: choose one of {values}.")
                for name, values in CHOICES.items()
            ),
            (
                self.vwn_embedding == "wide" and self.tie_word_embeddings,
                "a wide embedding table cannot be tied to an output head of width hidden_size: set tie_word_embeddings "
                "to false or choose vwn_embedding projected or tiled.",
            ),
            (
                self.vwn_reduce_norm and m >= 1 and n % m,
                f"vwn_reduce_norm needs vwn_n to be a multiple of vwn_m, and {n} is none of {m}.",
            ),
            (
                self.vwn_ngrams and None in (self.vwn_ngram_vocab, self.vwn_document_end),
                "vwn_ngrams needs vwn_ngram_vocab and vwn_document_end.",
            ),
            (
                symbols - set("*-E"),
                f"hybrid patterns {self.hybrid_pattern!r} and {self.mtp_hybrid_pattern!r} may contain *, - and E only.",
            ),
            (attentions == 0, f"hybrid_pattern {self.hybrid_pattern!r} has no attention: it needs at least one *."),
            (
                self.num_hidden_layers != attentions or len(self.layer_types) != attentions,
                f"num_hidden_layers {self.num_hidden_layers} and layer_types {self.layer_types} must count the "
                f"{attentions} attention sublayers of {self.hybrid_pattern!r}: leave them out.",
            ),
            (
                "sliding_attention" in self.layer_types and not self.sliding_window,
                "layer_types has a sliding_attention, which needs sliding_window.",
            ),
            (
                self.num_attention_heads % self.num_key_value_heads,
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}.",
            ),
            (
                "E" in symbols and not 0 < self.num_experts_per_tok <= self.num_experts,
                f"a pattern with E needs 0 < num_experts_per_tok <= num_experts, not {self.num_experts_per_tok} of "
                f"{self.num_experts}.",
            ),
            ("E" in symbols and self.add_bias_linear, "experts have no biases here: set add_bias_linear to false."),
            (
                self.moe_router_enable_expert_bias and self.moe_router_score_function == "softmax",
                "moe_router_enable_expert_bias needs moe_router_score_function sigmoid or sqrtsoftplus.",
            ),
            (
                bool(self.num_mtp_layers) != bool(self.mtp_hybrid_pattern),
                "num_mtp_layers and mtp_hybrid_pattern describe further predictions together: give both or neither.",
            ),
            (
                "*" in self.mtp_hybrid_pattern and len(set(self.layer_types)) > 1,
                "attention of further predictions follows the trunk's layer_types, which must then be all alike.",
            ),
        ]
        for condition, sentence in wrong:
            if condition:
                raise ValueError(sentence)


def copy_code(folder: str | Path) -> None:
    """Copy the files of code that lie beside this one, which a folder's own code may lie alone, into a folder."""
    for file in (Path(__file__).with_name(name) for name in CODE):
        if file.exists():
            shutil.copyfile(file, Path(folder) / file.name)


__all__ = ["VWNConfig"]
