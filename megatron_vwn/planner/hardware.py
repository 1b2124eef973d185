"""Rates that the planner calculates with: peaks from data sheets, and what share of them is assumed to be reached.

None of these is measured here. All are printed with a plan, and each number can be given on the command line. The
kernels of the virtual width have predictions of their own (``planner.kernel_times``).
"""

from dataclasses import dataclass, fields, replace

from megatron_vwn.config import VirtualWidthError


@dataclass(frozen=True, kw_only=True)
class Rates:
    """One kind of GPU, how it is wired, and what is assumed of it.

    Attributes:
        memory_gb: 10^9 bytes of the GPU.
        memory_margin: share of it that a layout must leave, for the CUDA context, NCCL, fragmentation and what the
            formulas miss.
        matrix_tflops: dense bf16 products, 10^12 FLOPs per second.
        memory_gbs: HBM, 10^9 bytes per second, reads and writes together.
        nvlink_gbs: one GPU to the others of its node, one direction, 10^9 bytes per second.
        network_gbs: one GPU to other nodes, one direction, 10^9 bytes per second.
        matrix_share: of ``matrix_tflops`` reached by dense products.
        expert_share: the same for grouped products of experts.
        attention_share: the same for fused attention.
        memory_share: of ``memory_gbs`` reached by kernels that only move data, connections apart.
        link_share: of both link rates reached by collectives.
        data_overlap: part of the data-parallel communication that may hide behind the passes beside it.
        imbalance: tokens of the fullest expert-parallel rank over the mean: its experts take longer, it sends and
            receives more, and keeps more.
        connections: the GPU whose predicted kernels are taken; None for kernels that only move data.
    """

    memory_gb: float
    matrix_tflops: float
    memory_gbs: float
    nvlink_gbs: float
    network_gbs: float = 50.0
    matrix_share: float = 0.55
    expert_share: float = 0.40
    attention_share: float = 0.45
    memory_share: float = 0.80
    link_share: float = 0.75
    data_overlap: float = 0.80
    # A guess: losses that balance experts leave single ones far above the mean, and a rank has several.
    imbalance: float = 1.1
    memory_margin: float = 0.10
    connections: str | None = None

    @property
    def usable(self) -> float:
        """Bytes of the GPU that a layout may need."""
        return 1e9 * self.memory_gb * (1 - self.memory_margin)

    @property
    def matrix(self) -> float:
        """FLOPs per second of dense products."""
        return self.matrix_tflops * 1e12 * self.matrix_share

    @property
    def expert(self) -> float:
        """FLOPs per second of experts' products."""
        return self.matrix_tflops * 1e12 * self.expert_share

    @property
    def attention(self) -> float:
        """FLOPs per second of the core of attention."""
        return self.matrix_tflops * 1e12 * self.attention_share

    @property
    def memory(self) -> float:
        """Bytes per second of kernels that only move data."""
        return self.memory_gbs * 1e9 * self.memory_share

    def link(self, within_node: bool) -> float:
        """Bytes per second that one GPU sends."""
        return (self.nvlink_gbs if within_node else self.network_gbs) * 1e9 * self.link_share


# The SXM modules, products without sparsity; NVIDIA states NVLink as the sum of both directions, 900 and 1800 GB/s.
# From public pages that quote these documents:
#   h100: "NVIDIA H100 Tensor Core GPU" (data sheet: 80 GB, 3.35 TB/s, 1979 TFLOP/s of bf16 with sparsity)
#   h200: "NVIDIA H200 Tensor Core GPU" (data sheet: 141 GB, 4.8 TB/s, else as h100)
#   b200: "NVIDIA DGX B200" (data sheet, of 8 GPUs: 1440 GB, 64 TB/s, 72 PFLOP/s of fp8 with sparsity, 14.4 TB/s of
#         NVLink); bf16 is half of fp8
# network: one ConnectX-7 of 400 Gb/s per GPU ("NVIDIA DGX H100/H200 User Guide", "NVIDIA DGX B200 User Guide").
# connections: nobody has modelled a B200, whose kernels are taken to reach the same share of their floor as on an H200.
HARDWARE = {
    "h100": Rates(memory_gb=80, matrix_tflops=989, memory_gbs=3350, nvlink_gbs=450, connections="h100"),
    "h200": Rates(memory_gb=141, matrix_tflops=989, memory_gbs=4800, nvlink_gbs=450, connections="h200"),
    "b200": Rates(memory_gb=180, matrix_tflops=2250, memory_gbs=8000, nvlink_gbs=900, connections="h200"),
}
SHARES = ("matrix_share", "expert_share", "attention_share", "memory_share", "link_share", "data_overlap")


def rates(hardware: str, overrides: dict[str, float | None]) -> Rates:
    """The rates of a kind of GPU with some of them replaced.

    Raises:
        VirtualWidthError: unknown hardware, or a rate that cannot be.
    """
    if hardware not in HARDWARE:
        raise VirtualWidthError(f"there are no rates of {hardware}: choose one of {', '.join(HARDWARE)}.")
    given = {name: value for name, value in overrides.items() if value is not None}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        lowest = {"data_overlap": 0, "memory_margin": 0, "imbalance": 1}.get(name)
        if not value < float("inf") or (value <= 0 if lowest is None else value < lowest):
            wanted = "more than 0" if lowest is None else f"at least {lowest}"
            raise VirtualWidthError(f"{flag} is {value:g}: give a number of {wanted}.")
        if name in SHARES and value > 1:
            raise VirtualWidthError(f"{flag} is {value:g}: give a share of at most 1.")
        if name == "memory_margin" and value >= 1:
            raise VirtualWidthError(f"{flag} is {value:g}: give a share of less than 1.")
    return replace(HARDWARE[hardware], **given)


def rate_names() -> list[str]:
    """Everything that can be overridden: the numbers."""
    return [field.name for field in fields(Rates) if field.type is float]
