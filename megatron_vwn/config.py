"""The one place where a virtual width is described and where impossible combinations are refused.

``VirtualWidthConfig`` says what the residual stream looks like; ``check_model`` and ``check_parallel`` say whether a
given Megatron model and parallel layout can carry it. Everything raises ``VirtualWidthError`` with one sentence: what
is wrong, and what to change. Nothing here imports torch or Megatron, so every room may import it.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

Connection = Literal["dynamic", "static"]
Gate = Literal["tanh", "sigmoid"]
Carry = Literal["full", "identity", "doubly-stochastic"]
Embedding = Literal["wide", "projected", "tiled"]
Linear = Literal["scaled", "plain"]
Partition = Literal["sequence", "width", "replicated"]
Kernels = Literal["auto", "triton", "torch"]

# Fields that say how a run computes, not what: no checkpoint has them, and a run may change them when it resumes.
OF_THE_RUN = ("partition", "recompute_block", "kernels", "log_interval")
# Of --seed: numpy takes seeds below 2^32 = 4,294,967,296, and Megatron adds something to it by rank and epoch.
LARGEST_SEED = 4_000_000_000


class VirtualWidthError(ValueError):
    """A refusal: one sentence that says what is wrong and what to change."""


@dataclass(frozen=True, kw_only=True)
class VirtualWidthConfig:
    """A residual stream of n segments of width E = D/m around a backbone of hidden size D.

    Args:
        m: fraction rate, the number of segments that one backbone vector is cut into.
        n: number of segments of the over-width state, n >= m; the virtual width factor is r = n/m.
        connection: "dynamic" (DGHC: coefficients depend on the token) or "static" (GHC: A and B alone).
        gate: "tanh": A(H) = S o tanh(logits) + A; "sigmoid": A(H) = A o 2 sigmoid(S o logits).
        carry: "full": C = A_carry^T H; "identity": C = H; "doubly-stochastic": A_carry with rows and columns that sum
            to one, by Sinkhorn iterations on exp(8 I + what "full" would add to the identity).
        embedding: "wide" (table [vocab, D']), "projected" (table [vocab, D] and W_expand) or "tiled" (copies);
            None picks the paper's choice: projected above r = 2, wide up to there.
        reduce_norm: group RMS norm with groups of D before the reduction; None turns it on exactly when n is a
            multiple of m and n > 2m.
        linear: how W_expand and W_reduce are stored: "scaled": the deviation from tiling or averaging times the square
            root of what it sums over, so that an optimizer that moves every entry by the learning rate does not bury
            them; "plain": the deviation itself, as in the paper.
        partition: how tensor-parallel ranks split the stream; None picks "sequence" with sequence parallelism and
            "width" without.
        kernels: what reads and writes the stream: "triton" (fused kernels), "torch", or "auto" for the kernels wherever
            they can run.
        recompute_block: sublayers that share one stored state, from which the backward pass rebuilds theirs; None
            keeps whatever autograd keeps.
        log_interval: steps between two that are monitored; None monitors nothing.
        ngrams: lengths of the n-grams of tokens whose hashed embeddings are added to the over-width embedding.
        ngram_vocab: rows of the table of each length; given exactly when ``ngrams`` is.
        document_end: the token id that ends a document, which no n-gram crosses; the training entry point takes it
            from the tokenizer.

    Raises:
        VirtualWidthError: for values that no model can have.
    """

    m: int
    n: int
    connection: Connection = "dynamic"
    gate: Gate = "tanh"
    carry: Carry = "full"
    embedding: Embedding | None = None
    reduce_norm: bool | None = None
    linear: Linear = "scaled"
    partition: Partition | None = None
    recompute_block: int | None = None
    log_interval: int | None = None
    kernels: Kernels = "auto"
    ngrams: tuple[int, ...] = ()
    ngram_vocab: int | None = None
    document_end: int | None = None

    def __post_init__(self) -> None:
        for name, optional in (("m", False), ("n", False), ("recompute_block", True), ("log_interval", True)):
            value = getattr(self, name)
            if optional and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                flag = f"--vwn-{name.replace('_', '-')}"
                raise VirtualWidthError(f"{flag} is {value!r}: give a whole number of at least 1.")
        if self.n < self.m:
            raise VirtualWidthError(
                f"--vwn-n {self.n} is smaller than --vwn-m {self.m}: the stream needs at least the m segments of one "
                f"backbone vector, so raise n to {self.m} or more, or lower m."
            )
        for name, choices, optional in (
            ("connection", Connection, False),
            ("gate", Gate, False),
            ("carry", Carry, False),
            ("embedding", Embedding, True),
            ("linear", Linear, False),
            ("partition", Partition, True),
            ("kernels", Kernels, False),
        ):
            value = getattr(self, name)
            if value not in get_args(choices) and not (optional and value is None):
                raise VirtualWidthError(f"--vwn-{name} is {value!r}: choose one of {', '.join(get_args(choices))}.")
        if self.reduce_norm and self.n % self.m != 0:
            raise VirtualWidthError(
                f"--vwn-reduce-norm normalises groups of m = {self.m} segments, but n = {self.n} is no multiple of m, "
                "so the last group would be short: pass --no-vwn-reduce-norm or choose n as a multiple of m."
            )
        if any(length < 2 for length in self.ngrams) or len(set(self.ngrams)) < len(self.ngrams):
            raise VirtualWidthError(
                f"--vwn-ngrams is {','.join(map(str, self.ngrams))}: give different lengths of at least 2, such as 2,3."
            )
        if bool(self.ngrams) != (self.ngram_vocab is not None) or (self.ngrams and self.ngram_vocab < 1):
            raise VirtualWidthError(
                "--vwn-ngrams and --vwn-ngram-vocab belong together: give lengths such as 2,3 and the rows of each "
                "length's table, or neither."
            )
        if self.embedding is None:
            object.__setattr__(self, "embedding", "projected" if self.n > 2 * self.m else "wide")
        if self.reduce_norm is None:
            object.__setattr__(self, "reduce_norm", self.n % self.m == 0 and self.n > 2 * self.m)

    @property
    def expansion(self) -> Fraction:
        """Virtual width factor r = n/m, exact."""
        return Fraction(self.n, self.m)

    @property
    def dynamic(self) -> bool:
        """Whether coefficients depend on the token."""
        return self.connection == "dynamic"

    @property
    def num_carry(self) -> int:
        """Columns of A that carry the stream: n, or 0 where the carry is the identity and has no parameters."""
        return 0 if self.carry == "identity" else self.n

    @property
    def norm_group(self) -> int:
        """Segments of one group of a group norm: m, or all n where n is no multiple of m."""
        return self.m if self.n % self.m == 0 else self.n

    def linear_divisor(self, fan_in: int) -> float:
        """What the stored deviation of W_expand or W_reduce, which sums over so many channels, is divided by."""
        return fan_in**0.5 if self.linear == "scaled" else 1.0

    def segment_size(self, hidden_size: int) -> int:
        """E = D/m in channels."""
        return hidden_size // self.m

    def over_width(self, hidden_size: int) -> int:
        """D' = rD = nE in channels."""
        return self.n * self.segment_size(hidden_size)

    def resolve_partition(self, *, tensor_parallel_size: int, sequence_parallel: bool) -> Partition:
        """The partition of the stream for one layout; with one tensor-parallel rank they are all the same."""
        if tensor_parallel_size == 1:
            return "replicated"
        if self.partition is not None:
            return self.partition
        return "sequence" if sequence_parallel else "width"

    def check_model(self, *, hidden_size: int, tied_embeddings: bool) -> None:
        """Refuse what the backbone cannot carry.

        Args:
            hidden_size: backbone width D.
            tied_embeddings: whether input embedding and output head share one table.
        """
        if hidden_size % self.m != 0:
            raise VirtualWidthError(
                f"--hidden-size {hidden_size} is not divisible by --vwn-m {self.m}: the backbone vector is cut into m "
                "equal segments, so choose an m that divides it."
            )
        if self.embedding == "wide" and tied_embeddings:
            raise VirtualWidthError(
                "a wide embedding table cannot be tied to an output head of the backbone's width: add "
                "--untie-embeddings-and-output-weights or choose --vwn-embedding projected or tiled."
            )

    def check_parallel(self, *, hidden_size: int, tensor_parallel_size: int, sequence_parallel: bool) -> None:
        """Refuse a partition that the tensor-parallel layout cannot have."""
        partition = self.resolve_partition(
            tensor_parallel_size=tensor_parallel_size, sequence_parallel=sequence_parallel
        )
        if tensor_parallel_size == 1:
            return
        if partition == "sequence" and not sequence_parallel:
            raise VirtualWidthError(
                "--vwn-partition sequence splits the stream by token, which needs --sequence-parallel: add it or "
                "choose --vwn-partition width or replicated."
            )
        if partition != "sequence" and sequence_parallel:
            raise VirtualWidthError(
                f"--vwn-partition {partition} keeps every token on every tensor-parallel rank, which "
                "--sequence-parallel contradicts: drop --sequence-parallel or choose --vwn-partition sequence."
            )
        rows = len(self.ngrams) * (self.ngram_vocab or 0)
        if rows % tensor_parallel_size != 0:
            raise VirtualWidthError(
                f"the {rows} rows of --vwn-ngrams times --vwn-ngram-vocab are not divisible by {tensor_parallel_size} "
                "tensor-parallel ranks: choose --vwn-ngram-vocab as a multiple of them."
            )
        segment = self.segment_size(hidden_size)
        if partition == "width" and segment % tensor_parallel_size != 0:
            raise VirtualWidthError(
                f"--vwn-partition width shares each segment of E = {segment} channels among {tensor_parallel_size} "
                "tensor-parallel ranks, which do not divide it: choose another m, fewer ranks, or --vwn-partition "
                "replicated."
            )
