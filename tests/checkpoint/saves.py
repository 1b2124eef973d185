"""What the session saves, as data: imported by pytest, which must not import Megatron, and by the ranks."""

from parallel.cases import Case, Layout

RANKS = 4
TP2_PP2 = Layout(tp=2, pp=2, sequence_parallel=True)
EXPERTS = Case("*E*E/*E").but(
    num_query_groups=2,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_topk_scaling_factor=2.5,
)
# 96 tokens; of its four shares of rows one has no token at all.
PADDED = Case("*-*-/*-").but(_rows=128, _tokens=96)
# name -> the model, the layout that saves it, and another that loads what came back from Hugging Face.
SAVES = {
    "dense": (Case(), TP2_PP2, Layout(pp=4)),
    "dense, bf16": (Case().but(bf16=True), TP2_PP2, Layout(tp=2)),
    "padded vocabulary, MTP": (PADDED, TP2_PP2, Layout(tp=4)),
    "experts, MTP": (EXPERTS, Layout(tp=2, pp=2, ep=2, sequence_parallel=True), Layout(ep=2, pp=2)),
    "experts, MTP, bf16": (EXPERTS.but(bf16=True), TP2_PP2, Layout(ep=2)),
}
GENERATED = 64
