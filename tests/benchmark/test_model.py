"""The parts of a prediction on small texts, worked out by hand; session_benchmark_compile.py compiles a kernel."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import torch

from megatron_vwn.benchmark.prediction import model, predict
from megatron_vwn.benchmark.prediction.sass import Code, Instruction, _instructions
from megatron_vwn.benchmark.prediction.ttgir import Access, Loop, Program, read_program
from megatron_vwn.config import VirtualWidthError

# Rows 4 program + i of x, half of their 64 channels in four chunks, and the same eight of w; rows from T on are masked.
TTGIR = """\
#blocked = #ttg.blocked<{sizePerThread = [1, 1]}>
module attributes {"ttg.num-warps" = 4 : i32} {
  tt.func public @sums(%x_ptr: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x"(#loc)), %w_ptr: !tt.ptr<f32>, \
%y_ptr: !tt.ptr<f32>, %T: i32, %eps: f32) attributes {noinline = false} {
    %cst = arith.constant dense<64> : tensor<4x1xi32, #blocked> loc(#loc1)
    %zero = arith.constant dense<0.000000e+00> : tensor<4xf32, #blocked> loc(#loc1)
    %c0 = arith.constant 0 : i32
    %c4 = arith.constant 4 : i32
    %c8 = arith.constant 8 : i32
    %c32 = arith.constant 32 : i32
    %pid = tt.get_program_id x : i32
    %first = arith.muli %pid, %c4 : i32
    %row = tt.make_range {end = 4 : i32, start = 0 : i32} : tensor<4xi32, #blocked>
    %base = tt.splat %first : i32 -> tensor<4xi32, #blocked>
    %token = arith.addi %base, %row : tensor<4xi32, #blocked>
    %end = tt.splat %T : i32 -> tensor<4xi32, #blocked>
    %alive = arith.cmpi slt, %token, %end : tensor<4xi32, #blocked>
    %column = tt.make_range {end = 8 : i32, start = 0 : i32} : tensor<8xi32, #blocked>
    %total:2 = scf.for %start = %c0 to %c32 step %c8 iter_args(%sum = %zero, %again = %c0) -> (f32, i32) : i32 {
      %s = tt.splat %start : i32 -> tensor<8xi32, #blocked>
      %e = arith.addi %s, %column : tensor<8xi32, #blocked>
      %t1 = tt.expand_dims %token {axis = 1 : i32} : tensor<4xi32, #blocked> -> tensor<4x1xi32, #blocked>
      %t2 = arith.muli %t1, %cst : tensor<4x1xi32, #blocked>
      %t3 = tt.broadcast %t2 : tensor<4x1xi32, #blocked> -> tensor<4x8xi32, #blocked>
      %e1 = tt.expand_dims %e {axis = 0 : i32} : tensor<8xi32, #blocked> -> tensor<1x8xi32, #blocked>
      %e2 = tt.broadcast %e1 : tensor<1x8xi32, #blocked> -> tensor<4x8xi32, #blocked>
      %place = arith.addi %t3, %e2 : tensor<4x8xi32, #blocked>
      %x0 = tt.splat %x_ptr : !tt.ptr<bf16> -> tensor<4x8x!tt.ptr<bf16>, #blocked>
      %x1 = tt.addptr %x0, %place : tensor<4x8x!tt.ptr<bf16>, #blocked>, tensor<4x8xi32, #blocked>
      %m1 = tt.expand_dims %alive {axis = 1 : i32} : tensor<4xi1, #blocked> -> tensor<4x1xi1, #blocked>
      %m2 = tt.broadcast %m1 : tensor<4x1xi1, #blocked> -> tensor<4x8xi1, #blocked>
      %token_0 = ttg.async_copy_global_to_local %x1, %buffer mask %m2 other %zero : \
tensor<4x8x!tt.ptr<bf16>, #blocked> -> <4x8>
      %w0 = tt.splat %w_ptr : !tt.ptr<f32> -> tensor<8x!tt.ptr<f32>, #blocked>
      %w1 = tt.addptr %w0, %column : tensor<8x!tt.ptr<f32>, #blocked>, tensor<8xi32, #blocked>
      %w = tt.load %w1 : tensor<8x!tt.ptr<f32>, #blocked> loc(#loc2)
      %part = "tt.reduce"(%w) <{axis = 0 : i32}> ({
      ^bb0(%a: f32 loc(#loc3), %b: f32 loc(#loc3)):
        %c = arith.addf %a, %b : f32 loc(#loc3)
        tt.reduce.return %c : f32 loc(#loc3)
      }) : (tensor<8xf32, #blocked>) -> f32 loc(#loc3)
      scf.yield %sum, %start : tensor<4xf32>, i32 loc(#loc4)
    } {tt.num_stages = 3 : i32} loc(#loc4)
    %y0 = tt.splat %y_ptr : !tt.ptr<f32> -> tensor<4x!tt.ptr<f32>, #blocked>
    %y1 = tt.addptr %y0, %token : tensor<4x!tt.ptr<f32>, #blocked>, tensor<4xi32, #blocked>
    tt.store %y1, %total#0, %alive : tensor<4x!tt.ptr<f32>, #blocked>
    tt.return
  }
}
"""


@pytest.mark.parametrize("tokens,rows", [(100, 4), (3, 3)])
def test_what_a_program_touches(tokens, rows):
    program = read_program(TTGIR, {"T": tokens}, (25,))
    assert program.loops == [Loop(trips=4, upper=32, step=8)]
    # A row of x is 64 elements of two bytes, of which half are loaded: 16 bytes at a time, in sectors of 32.
    x, w, y = (program.accesses[f"{name}_ptr"] for name in "xwy")
    assert x == Access(copied=4 * rows * 32, unique_loads=2 * rows * 32)
    assert w == Access(loaded=4 * 32, unique_loads=32)
    assert y == Access(stored=32, unique_stores=32, stored_first=True)


def test_addresses_out_of_memory_are_refused():
    text = TTGIR.replace("tt.addptr %y0, %token", "tt.addptr %y0, %total#0")
    with pytest.raises(VirtualWidthError, match="follows an address out of memory"):
        read_program(text, {"T": 100}, (25,))
    with pytest.raises(VirtualWidthError, match="the bound %c32 of a loop depends on memory"):
        read_program(TTGIR.replace("%c32 = arith.constant 32 : i32", ""), {"T": 100}, (25,))


def line(number, text, control=0):
    """Two lines of nvdisasm for an instruction whose control bits are given."""
    return [f"        /*{16 * number:04x}*/    {text} ;   /* 0x0 */", f"    /* 0x{control << 41:016x} */"]


def lines(*texts):
    found = []
    for number, text in enumerate(texts):
        label, _, rest = text.rpartition(": ")
        found += [f".L_x_{label}:"] * bool(label) + line(number, rest)
    return found


def test_instructions():
    (x,) = _instructions(line(0, "@!P1 LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", 5 | 2 << 5 | 7 << 8 | 0b11 << 11))
    assert (x.stall, x.sets, x.frees, x.waits) == (5, 2, 7, 3)
    assert (x.kind, x.bytes, x.predicate) == ("global", 512, "!P1")
    kinds = {
        "HMMA.16816.F32.BF16 R4, R8, R12, R4": ("mma", 0, 2048),
        "HMMA.1688.F32.TF32 R4, R8, R12, R4": ("mma", 0, 1024),
        "HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0": ("wgmma", 1024, 32768),
        "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0": ("wgmma", 3072, 32768),
        "LDSM.16.MT88.4 R4, [R2]": ("shared", 512, 0),
        "STS.64 [R2], R4": ("shared", 256, 0),
        "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]": ("copy", 512, 0),
        "SHFL.BFLY PT, R1, R2, 0x1, 0x1f": ("shuffle", 0, 0),
        "MUFU.EX2 R1, R2": ("special", 0, 0),
        "R2UR UR4, R2": ("uniform", 0, 0),
        "NOP": ("other", 0, 0),
    }
    found = _instructions(lines(*kinds))
    assert [(x.kind, x.bytes, x.multiplies) for x in found] == list(kinds.values())
    assert [model._cycles(x) for x in found[:4]] == pytest.approx([4 / 0.62, 4 / 0.62, 16, 24])


def code(*texts):
    return Code(_instructions(lines(*texts)), 32, 0, 0)


COUNTED = ("NOP", "1: FFMA R1, R1, R1, R1", "FADD R1, R1, R1", "ISETP.GE.U32.AND P0, PT, R2, 0x1e0, PT", "NOP",
           "@!P0 BRA `(.L_x_1)", "EXIT", "2: BRA `(.L_x_2)")  # fmt: skip


def test_loops_are_expanded():
    one = code(*COUNTED)
    assert one.loops() == [(1, 5)]
    indices, times = one.sequence([Loop(3, 512, 32)])
    assert indices == [0, *[1, 2, 3, 4, 5] * 3, 6] and times == 1
    # One of two loops of the program was unrolled: that which ends at 480 is left.
    indices, _ = one.sequence([Loop(2, 64, 32), Loop(4, 512, 32)])
    assert indices.count(1) == 4
    assert one.sequence([Loop(4, 512, 32), Loop(2, 64, 32)])[0].count(1) == 4
    with pytest.raises(VirtualWidthError, match="has loops that the program has not"):
        one.sequence([])
    # Of very many iterations some stand for all.
    indices, times = one.sequence([Loop(100_000, 512, 32)])
    assert len(indices) < 25_000 and len(indices) * times == pytest.approx(5 * 100_000 + 3, rel=0.001)
    # Of a loop around another one an iteration.
    outer = code("0: NOP", *COUNTED[:6], "NOP", "@!P0 BRA `(.L_x_0)", "EXIT")
    indices, times = outer.sequence([Loop(7, 7, 1), Loop(3, 512, 32)])
    assert indices == [0, 1, *[2, 3, 4, 5, 6] * 3, 7, 8, 9] and times == 7


def kernel(instructions, accesses, *, programs=132 * 20, warps=4, registers=64, shared=0, sizes=None, loops=()):
    sizes = sizes or dict.fromkeys(accesses, 1 << 40)
    return model.Kernel(
        Code(instructions, registers, 0, 0), Program(list(loops), accesses), programs, warps, shared, sizes
    )


H200 = model.GPUS["h200"]


def test_traffic_is_every_tensor_once_each_way():
    accesses = {
        "h": Access(copied=2048, unique_loads=1024),
        "out": Access(stored=1024, copied=1024, unique_loads=1024, unique_stores=1024, stored_first=True),
        "gradient": Access(loaded=512, stored=512, unique_loads=512, unique_stores=512),
        "weight": Access(copied=4096, unique_loads=4096),
    }
    sizes = {"h": 10 * 1024, "out": 10 * 1024, "gradient": 10 * 512, "weight": 4096}
    this = kernel([], accesses, programs=10, sizes=sizes)
    assert model.traffic(this) == (10 * 1024 + 10 * 512 + 4096, 10 * 1024 + 10 * 512)
    assert model._l2_bytes(this, 1, H200) == 2048 + 2048 + 1024 + 4096
    # Loads of what all programs load hit L1 as far as shared memory leaves room.
    accesses["weight"] = Access(loaded=4096, unique_loads=4096)
    assert model._l2_bytes(this, 1, H200) == 2048 + 2048 + 1024
    full = replace(this, shared=H200.l1_bytes // 2 - 1024 - 1024)
    assert model._l2_bytes(full, 2, H200) == 2048 + 2048 + 1024 + 4096 * 0.5
    # 132 programs hold more of h than L2 and load a half of it again.
    huge = {"h": Access(copied=2e6, unique_loads=1e6)}
    again = model._read_again(kernel([], huge, programs=132), 1, H200)
    assert again == pytest.approx(132e6 * (1 - 50 / 132))


def instructions(*texts):
    return _instructions(lines(*texts, "EXIT"))


def test_a_kernel_of_arithmetic_is_bound_by_what_issues():
    """200 of them in each of 16 warps, four a scheduler and one a cycle; 20 programs of four warps a multiprocessor."""
    found = model.predict(kernel(instructions(*["FFMA R1, R2, R3, R4"] * 200), {}), H200)
    cycles = 20 * 201
    assert found.bounds["issue"] == pytest.approx(cycles / H200.hertz)
    assert found.limit == "issue" and found.resident == 8
    assert found.seconds == pytest.approx(cycles / H200.hertz + H200.launch, rel=0.25)


def test_a_kernel_of_copies_is_bound_by_memory():
    loads = [f"LDG.E.128 R{4 * i}, desc[UR4][R2.64]" for i in range(32)]
    accesses = {"x": Access(loaded=4 * 32 * 512, unique_loads=4 * 32 * 512)}
    found = model.predict(kernel(instructions(*loads), accesses), H200)
    moved = 132 * 20 * 4 * 32 * 512
    assert found.traffic == moved and found.limit == "DRAM"
    assert moved / H200.dram / 0.92 <= found.seconds - H200.launch <= 1.3 * moved / H200.dram / 0.92
    assert model.predict(kernel(instructions(*loads), accesses), model.GPUS["h100"]).seconds > found.seconds


def test_a_kernel_that_waits_is_bound_by_latency():
    """One warp, each of whose loads waits for the one before."""
    chain = [x for i in range(16) for x in line(i, "LDG.E R4, desc[UR4][R4.64]", 1 | 0 << 5 | 7 << 8 | 1 << 11)]
    chain = _instructions([*chain, *line(16, "EXIT", 1 | 7 << 5 | 7 << 8)])
    found = model.predict(kernel(chain, {"x": Access(loaded=2048, unique_loads=2048)}, programs=132, warps=1), H200)
    assert found.limit == "latency" and found.simulated > 15 * model._L2_LATENCY / H200.hertz


def test_operations_of_torch_between_launches():
    with predict._Recorded() as recorded:
        a, b = torch.empty(64, 512, device="meta"), torch.empty(512, 16, device="meta")
        c = (a @ b).view(-1)
        c.sum()
    assert [each.name for each in recorded.found] == ["mm", "sum"]
    product, total = recorded.found
    assert product.flops == 2 * 64 * 512 * 16 and product.moved == 4 * (64 * 512 + 512 * 16 + 64 * 16)
    assert product.small(H200) and product.seconds(H200) == H200.small_operation and total.flops == 0
    large = predict.Library("mm", 10**9, 0)
    assert large.seconds(H200) == 10**9 / 4.8e12 / 0.8 and not large.small(H200)


def test_kinds_that_the_assembler_may_add_are_only_issued():
    assert Instruction("BRANDNEW.X", "BRANDNEW.X R1", None, 1, 7, 7, 0).kind == "other"
