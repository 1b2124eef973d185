"""Generation with Megatron's static inference: the engine, and one token at a time through its context."""

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.engines import StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.inference.utils import InferenceMode
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from parallel import harness
from parallel.harness import SEQUENCE, VOCABULARY, expect

PROMPTS = [[3, 1, 4, 7, 5, 9], [2, 7, 1, 8]]
# Prompts of two lengths: the shorter one begins to generate while the other is still being read.
NEW = SEQUENCE - max(map(len, PROMPTS))
# fp32, one token's products in another order than those of a whole sequence.
TOLERANCE = 1e-5


class Words:
    """A tokenizer whose text is the token ids themselves."""

    vocab_size = VOCABULARY
    eod = VOCABULARY  # never predicted
    bos = None

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, ids: list[int], **kwargs) -> str:
        return " ".join(map(str, ids))


def generation(session: harness.Session) -> str:
    """The engine's greedy tokens, and one-token logits, are those of a full forward over everything before."""
    for model in session.models:
        model.eval()
    sequences = engine(session)
    greedy = 0
    for prompt, sequence in zip(PROMPTS, sequences, strict=True):
        expect(len(sequence) == len(prompt) + NEW, f"{len(sequence)} tokens after {prompt}")
        # A causal model: position t of one forward is the forward over the first t + 1 tokens.
        best = forward(session, sequence).argmax(-1).tolist()
        expect(best[len(prompt) - 1 : -1] == sequence[len(prompt) :], f"{sequence} where a full forward says {best}")
        greedy += NEW
    expect(len(set(sequences[0])) > 4, f"{sequences[0]}: one token repeated proves little")
    error = _one_token_at_a_time(session, sequences[0])
    expect(error <= TOLERANCE, f"logits of single tokens are off by {error:.1e}")
    return f"{greedy} greedy tokens; logits of single tokens off by {error:.1e}"


def engine(session: harness.Session, *, legacy: bool = True) -> list[list[int]]:
    """Prompts and greedy continuations; without ``legacy`` Megatron's dynamic batching, which needs flash attention."""
    wrapper = GPTInferenceWrapper(session.models[0], StaticInferenceContext(len(PROMPTS), SEQUENCE))
    controller = TextGenerationController(wrapper, Words())
    static = StaticInferenceEngine(controller, max_batch_size=len(PROMPTS), legacy=legacy, buffer_size_gb=1)
    expect(static.legacy == legacy, "Megatron fell back to its legacy engine")
    prompts = [" ".join(map(str, prompt)) for prompt in PROMPTS]
    requests = static.generate(prompts=prompts, sampling_params=SamplingParams(num_tokens_to_generate=NEW, top_k=1))
    InferenceMode.unset_active()  # the engine leaves it on
    return [
        [*prompt, *torch.as_tensor(request.generated_tokens).tolist()]
        for prompt, request in zip(PROMPTS, requests, strict=True)
    ]


def forward(session: harness.Session, sequence: list[int]) -> torch.Tensor:
    """Logits [s, vocabulary] of an ordinary forward."""
    tokens = torch.tensor([sequence]).cuda()
    length = tokens.shape[1]
    mask = harness.causal_mask()[..., :length, :length]
    with torch.no_grad():
        logits = session.models[0](tokens, torch.arange(length).cuda()[None], mask)
        if logits.shape[-1] != VOCABULARY:
            logits = gather_from_tensor_model_parallel_region(logits, session.groups.tp)
    return logits[0]


def _one_token_at_a_time(session: harness.Session, sequence: list[int]) -> float:
    """Norm-relative difference of logits between decoding every token of a sequence and one full forward."""
    context = StaticInferenceContext(1, SEQUENCE)
    context.enable_decode_mode()
    logits = []
    with torch.no_grad(), InferenceMode.active():
        for position, token in enumerate(sequence):
            one, where = torch.tensor([[token]]).cuda(), torch.tensor([[position]]).cuda()
            out = session.models[0](one, where, None, inference_context=context, runtime_gather_output=True)
            context.sequence_len_offset += 1
            logits.append(out[0, -1])
    expected = forward(session, sequence)
    return ((torch.stack(logits) - expected).norm() / expected.norm()).item()
