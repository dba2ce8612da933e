"""The emulator: it finds what is planted, computes as a GPU documents it, and sees nothing where nothing is.

Kernels run in a process of their own, where Triton compiles instead of interpreting.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastsae_kernels as kernels
from fastsae_kernels import aux_k, dispatch, sparse_decoder
from fastsae_kernels.update import triton_impl

pytest.importorskip("triton")
np = pytest.importorskip("numpy", minversion="2.0")

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "kernels"))

from emulator import arithmetic, ptx  # noqa: E402

PLANTED = '''
import json, os
os.environ["TRITON_INTERPRET"] = "0"
import torch, triton, triton.language as tl
from emulator.driver import Emulator, Fault

@triton.jit
def exchange_kernel(p, q, BARRIER: tl.constexpr):
    """Threads read what others wrote."""
    i = tl.arange(0, 1024)
    tl.store(p + i, i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(q + i, tl.load(p + (1023 - i)))

@triton.jit
def neighbour_kernel(p):
    """A program reads what the one before it wrote."""
    i = tl.program_id(0)
    tl.store(p + i + 1, tl.load(p + i) + 1)

@triton.jit
def total_kernel(p, SAME: tl.constexpr):
    """Programs write to one place."""
    tl.store(p, 7 if SAME else tl.program_id(0))

@triton.jit
def counter_kernel(p, ATOMIC: tl.constexpr):
    """Programs count in one place."""
    if ATOMIC:
        tl.atomic_add(p, 1)
    else:
        tl.store(p, tl.load(p) + 1)

@triton.jit
def last_kernel(p, n):
    """One past the end."""
    i = tl.arange(0, 64)
    tl.store(p + i, i, mask=i <= n)

@triton.jit
def before_kernel(p, n):
    i = tl.arange(0, 64)
    tl.store(p + i - 4096, i)

@triton.jit
def unaligned_kernel(p, q, where):
    """Says of a place that it is a multiple of 16, and it is not."""
    i = tl.arange(0, 512)
    tl.store(q + i, tl.load(p + tl.multiple_of(tl.load(where), 16) + i))

@triton.jit
def root_kernel(p, q):
    i = tl.arange(0, 128)
    tl.store(q + i, tl.sqrt(tl.load(p + i)))

found = {}
emulator = Emulator("reversed")
emulator.install()
new = lambda n=1024: torch.zeros(n, dtype=torch.int32)

def run(name, launch):
    emulator.races.found.clear()
    try:
        launch()
        found[name] = sorted({kind for _, kind, _ in emulator.races.found})
    except Fault as fault:
        found[name] = str(fault)

run("missing barrier", lambda: exchange_kernel[(1,)](new(), new(), False))
run("barrier", lambda: exchange_kernel[(1,)](new(), new(), True))
run("neighbours", lambda: neighbour_kernel[(8,)](new()))
run("one place", lambda: total_kernel[(8,)](new(), False))
run("one value", lambda: total_kernel[(8,)](new(), True))
run("count", lambda: counter_kernel[(8,)](new(), False))
run("atomic count", lambda: counter_kernel[(8,)](new(), True))
run("past the end", lambda: last_kernel[(1,)](new(40), 40))
run("within", lambda: last_kernel[(1,)](new(40), 39))
run("before the start", lambda: before_kernel[(1,)](new(), 40))
run("unaligned", lambda: unaligned_kernel[(1,)](new(), new(512), new(1) + 5))
run("aligned", lambda: unaligned_kernel[(1,)](new(), new(512), new(1) + 16))

chain = {}
for order in ("normal", "reversed"):
    emulator.order = order
    p = new(9)
    neighbour_kernel[(8,)](p)
    chain[order] = p.tolist()
found["orders"] = chain

x, exact, off = torch.rand(128), torch.empty(128), torch.empty(128)
root_kernel[(1,)](x, exact)
expected = x.double().sqrt()
found["exact root"] = torch.equal(exact, expected.float())
from emulator import arithmetic
arithmetic.noise = 1.0
root_kernel[(1,)](x, off)
error = float(((off - expected).abs() / expected).max())
found["inexact root"] = error
print(json.dumps(found))
'''


def run_python(code: str, folder: Path, name: str) -> dict:
    # From a file: Triton reads the source of kernels.
    path = folder / f"{name}.py"
    path.write_text(code, encoding="utf-8")
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), str(ROOT / "tests")])
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(path)],
        env=environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_what_is_planted_is_found_and_nothing_else(tmp_path):
    found = run_python(PLANTED, tmp_path, "planted")
    assert found["missing barrier"] == ["a warp reads what another wrote, without a barrier"]
    assert "a program reads what another wrote" in found["neighbours"] or (
        "a program writes what another read" in found["neighbours"]
    )
    assert found["one place"] == ["two programs write"]
    assert found["one value"] == ["two programs write the same value"]
    assert "two programs write" in found["count"]
    for right in ("barrier", "atomic count", "within", "aligned"):
        assert found[right] == [], right
    assert "0 past the end of p" in found["past the end"]
    assert "before every tensor" in found["before the start"] or "past the end" in found["before the start"]  # fmt: skip
    assert "not aligned" in found["unaligned"]
    assert found["orders"] == {"normal": [*range(9)], "reversed": [0] + [1] * 8}
    assert found["exact root"]
    assert 2**-24 < found["inexact root"] <= 2**-22


def test_kernels_on_wide_rows(request, monkeypatch):
    """Where no warp holds what another does, nothing races but programs that store the same True."""
    plugin = request.config.pluginmanager.get_plugin("emulation")
    if plugin is None:
        pytest.skip("kernels/emulator/run.py runs this")
    for name in ("decoder_elements", "encoder_elements"):  # so that a row takes four warps
        monkeypatch.setattr(triton_impl.TUNING, name, 4)
    B, D, F, K = 160, 512, 12, 700  # a latent has more tokens than a chunk
    g = torch.Generator().manual_seed(0)
    x, pre = torch.randn(B, D, generator=g), torch.randn(B, F, generator=g)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=g))
    z, bias = torch.randn(5, 1500, generator=g).split((4, 1))
    pre[:, 0] += 9
    races = plugin.emulator.races.found
    before, results = races.copy(), []
    for how in ("torch", "triton"):
        with dispatch.use(how):
            csr = kernels.batch_topk(pre, K, quota=0.01).csr
            csc = kernels.csr_to_csc(csr, F)
            found = [csr.indices, csc.positions]
            run = aux_k._run(z, 1)
            found.append(run.keep_largest(z.clone(), 9, bias[0], torch.tensor(1400), z.dtype))
            found.append(sparse_decoder._value_gradients(x, *csr, rows))
            aux = kernels.aux_k_gradients(
                x, x, rows, torch.zeros(F), rows, torch.zeros(D), torch.arange(F),
                dead_after=3, max_dead=F, k_aux=4,
            )  # fmt: skip
            found += [aux.loss, *(gradient[: F - 3] for gradient in aux.gradients[:3])]
            for form in ({}, {"split": True, "quantized_moments": True}):
                low = torch.bfloat16 if form else torch.float32
                W_enc, W_dec = (kernels.MatrixState.start(rows.clone(), **form) for _ in range(2))
                b_enc, b_dec = (kernels.BiasState.start(torch.zeros(n)) for n in (F, D))
                decoded = kernels.sparse_decode_loss(csr, rows.to(low), b_dec.weight, x)
                kernels.fused_update_(
                    W_enc, b_enc, W_dec, b_dec, csr, csc, x.to(low), decoded.residual.to(low),
                    torch.tensor(1e-3), torch.tensor(1), dY_scale=-2 / B,
                )  # fmt: skip
                found += [decoded.residual, W_enc.master(), W_dec.master()]
                found += [b_enc.weight, b_dec.weight]
            results.append(found)
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max())
        )
    assert all("same value" in kind for _, kind, _ in races - before)
    assert "decoder_chunks_kernel" in plugin.emulator.counts


# --- single instructions ---

u32, u64 = np.uint32, np.uint64


def bits(*values: int) -> np.ndarray:
    return np.array(values, np.int64).astype(u32)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32).view(u32)


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("add.s32", (bits(2**31 - 1), u32(1)), bits(-(2**31))),
        ("sub.s32", (bits(3), u32(5)), bits(-2)),
        ("div.s32", (bits(-7, 7), bits(2, -2)), bits(-3, -3)),
        ("rem.s32", (bits(-7, 7), bits(2, -2)), bits(-1, 1)),
        ("div.u32", (bits(-1), bits(2)), bits(2**31 - 1)),
        ("mul.hi.u32", (bits(-1), bits(-1)), bits(2**32 - 2)),
        ("mul.hi.s32", (bits(-1), bits(-1)), bits(0)),
        ("shl.b32", (bits(1, 1), bits(31, 32)), bits(2**31, 0)),
        ("shr.u32", (bits(-1, -1), bits(31, 40)), bits(1, 0)),
        ("shr.s32", (bits(-8, -8), bits(1, 40)), bits(-4, -1)),
        ("bfe.u32", (bits(0xABCD), u32(4), u32(8)), bits(0xBC)),
        ("bfe.s32", (bits(0xABCD), u32(4), u32(8)), bits(0xBC - 256)),
        ("popc.b32", (bits(0, -1, 0b1011),), bits(0, 32, 3)),
        ("prmt.b32", (bits(0x33221100), bits(0x77665544), u32(0x7520)), bits(0x77552200)),
        ("min.f32", (floats(float("nan"), 2), floats(1, 3)), floats(1, 2)),
        ("max.s32", (bits(-1, 1), bits(0, 0)), bits(0, 1)),
        ("max.relu.s32", (bits(-1, 1), bits(-2, -2)), bits(0, 1)),
        ("min.relu.s32", (bits(-1, 3), bits(2, 2)), bits(0, 2)),
        ("fma.rn.f32", (floats(2), floats(3), floats(4)), floats(10)),
        ("neg.f32", (floats(1.5),), floats(-1.5)),
        ("cvt.rn.f32.s32", (bits(-3),), floats(-3)),
        ("cvt.rzi.s32.f32", (floats(-1.7, 3e9, float("nan")),), bits(-1, 2**31 - 1, 0)),
        ("cvt.rmi.f32.f32", (floats(-1.5),), floats(-2)),
        ("sqrt.approx.ftz.f32", (floats(4, 1e-39),), floats(2, 0)),
    ],
)  # fmt: skip
def test_an_instruction_is_what_is_documented(opcode, operands, expected):
    with np.errstate(all="ignore"):
        found = arithmetic.operation(opcode)(*operands)
    assert found.dtype == u32 and found.tolist() == expected.tolist()


def test_a_byte_is_extended_to_the_width_of_a_register():
    byte = arithmetic.operation("cvt.s8.s32")(bits(0x1FF))
    assert byte.dtype == np.uint16
    assert arithmetic.operation("cvt.rn.f32.s16")(byte).tolist() == floats(-1).tolist()


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("setp.lt.f32", [True, False, False]),
        ("setp.ltu.f32", [True, False, True]),
        ("setp.ne.f32", [True, False, False]),
        ("setp.neu.f32", [True, False, True]),
        ("setp.nan.f32", [False, False, True]),
        ("setp.num.f32", [True, True, False]),
    ],
)
def test_comparisons_know_nan(opcode, expected):
    a, b = floats(1, 2, float("nan")), floats(2, 2, 1)
    assert arithmetic.operation(opcode)(a, b).tolist() == expected


def test_bfloat16_is_rounded_to_even():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x[:2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # ties
    expected = x.bfloat16().view(torch.uint16).numpy()
    low = arithmetic.operation("cvt.rn.bf16.f32")(x.numpy().view(u32))
    assert low.tolist() == expected.tolist()
    pair = arithmetic.operation("cvt.rn.bf16x2.f32")(floats(1), floats(-2))
    assert pair.tolist() == [0x3F80C000]


def test_unknown_instructions_are_told():
    with pytest.raises(arithmetic.Unknown, match=r"brev\.b32"):
        arithmetic.operation("brev.b32")


def test_a_kernel_is_read_with_its_blocks_and_lines():
    text = """.visible .entry one(
    .param .u64 .ptr .global .align 1 one_param_0,
    .param .u32 one_param_1
)
.reqntid 128
{
    .reg .pred %p<2>;
    .reg .b32 %r<3>;
    ld.param.b32 %r1, [one_param_1];
    @!%p1 bra $L__BB0_2;
    {
    .reg .b32 %r1;
    mov.b32 %r1, 5;
    }
$L__BB0_2:
    ret;
}"""
    kernel = ptx.parse(text)
    assert (kernel.name, kernel.threads) == ("one", 128)
    assert kernel.parameters == ("one_param_0", "one_param_1")
    load, branch, move, label, _ = kernel.code
    assert load.operands == ("%r1", "[one_param_1]") and load.line == 9
    assert (branch.guard, branch.negated, branch.opcode) == ("%p1", True, "bra")
    assert move.operands[0] != "%r1" and kernel.bits(move.operands[0]) == 32
    assert label == "$L__BB0_2" and kernel.bits("%p1") == 1
