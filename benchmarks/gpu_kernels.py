"""Times of each kernel at the recipe's shape, beside the machine's ceilings and torch's equivalents.

``ENTRIES`` lists the kernels: a name, and a function that builds the problem at one batch size. Nothing
is timed whose result was not found right first.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from gpu import Report, measure

from fastsae_kernels import batch_topk, csr_to_csc, encode_with_group_max, group_max, topk

DEVICE = "cuda"
BATCHES = (1024, 4096, 16384)
D, F, k = 1536, 24576, 64
VARIANTS = 2  # sets of inputs that a measurement goes round


@dataclass(frozen=True)
class Problem:
    """One kernel at one size."""

    providers: dict[
        str, Callable[[int], object]
    ]  # the first is ours; called with the input set's number
    check: Callable[[], None]  # raises AssertionError where ours is wrong
    bytes_moved: int  # the fewest our algorithm moves; counted against `roof`
    flops: int = 0
    roof: str = "copy"  # the ceiling that bounds it: copy, gather, gemm


@dataclass(frozen=True)
class Entry:
    name: str
    build: Callable[[int], Problem]


# --- ceilings -----------------------------------------------------------------------------------


@triton.jit
def _gather_kernel(table_ptr, index_ptr, out_ptr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.program_id(1) * 512 + tl.arange(0, 512)
    total = tl.zeros([512], tl.float32)
    for i in range(ROWS):
        row = tl.load(index_ptr + tl.program_id(0) * ROWS + i).to(tl.int64)
        total += tl.load(table_ptr + row * WIDTH + column).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0) * WIDTH + column, total)


def ceilings(report: Report) -> dict[str, float]:
    """GB/s of a device copy (reads and writes) and of gathered 3 KB rows, FLOP/s of a matrix product."""
    found = {}

    def add(name: str, amount: int, unit: str, call, variants: int = 1) -> None:
        timed = measure(call, variants)
        found[name] = amount / timed["us"] * 1e6
        shown = found[name] / (1e9 if unit == "GB/s" else 1e12)
        report.add(ceiling=name, value=shown, unit=unit, **timed)

    buffers = torch.randn(2, 2**28, device=DEVICE)
    add("copy", buffers.nbytes, "GB/s", lambda i: buffers[0].copy_(buffers[1]))
    factors = torch.randn(2, 8192, 8192, device=DEVICE).bfloat16()
    add("gemm", 2 * 8192**3, "TFLOP/s", lambda i: factors[0] @ factors[1])
    out = torch.empty(1024, D, device=DEVICE)
    for name, rows in (("gather", F), ("gather, 3 MB table", 1024)):
        table = torch.randn(rows, D, device=DEVICE, dtype=torch.bfloat16)
        index = torch.randint(rows, (2, 1024 * k), device=DEVICE)
        add(
            name,
            1024 * k * D * 2,
            "GB/s",
            lambda i, table=table, index=index: _gather_kernel[(1024, D // 512)](
                table, index[i], out, ROWS=k, WIDTH=D
            ),
            variants=2,
        )
    return found


# --- problems -----------------------------------------------------------------------------------


def _inputs(make: Callable[[], object]) -> list:
    torch.manual_seed(0)
    return [make() for _ in range(VARIANTS)]


def _pre(B: int) -> list[torch.Tensor]:
    return _inputs(lambda: torch.randn(B, F, device=DEVICE))


def _close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def _group_max(B: int) -> Problem:
    pre = _pre(B)

    def dense(p):
        return p.unflatten(1, (-1, 32)).amax(-1).clamp_min(0)

    def check():
        assert torch.equal(group_max(pre[0]).values, dense(pre[0]))

    compiled = torch.compile(dense)
    return Problem(
        {
            "fastsae": lambda i: group_max(pre[i]),
            "eager": lambda i: dense(pre[i]),
            "compiled": lambda i: compiled(pre[i]),
        },
        check,
        B * F * 4 + B * F // 8,
    )


def _batch_topk(B: int) -> Problem:
    pre, K = _pre(B), B * k
    maxima = [group_max(p) for p in pre]

    def check():
        csr = batch_topk(pre[0], K).csr
        expected = pre[0].flatten().topk(K)
        assert torch.equal(csr.values.sort(descending=True).values, expected.values)
        place = csr.tokens() * F + csr.indices
        assert (place.diff() > 0).all() and torch.equal(pre[0].flatten()[place], csr.values)

    return Problem(
        {
            "fastsae": lambda i: batch_topk(pre[i], K, maxima[i]),
            "fastsae with group_max": lambda i: batch_topk(pre[i], K),
            "torch.topk": lambda i: pre[i].flatten().topk(K, sorted=False),
        },
        check,
        B * F // 32 * 4 * 6 + K * 128 * 6 + K * 8,
    )


def _csr_to_csc(B: int) -> Problem:
    csrs = [batch_topk(p, B * k).csr for p in _pre(B)]

    def check():
        csc = csr_to_csc(csrs[0], F)
        expected = csrs[0].indices.sort(stable=True)
        assert torch.equal(csc.positions, expected.indices.int())
        assert torch.equal(csc.rows, csrs[0].tokens()[expected.indices].int())

    return Problem(
        {
            "fastsae": lambda i: csr_to_csc(csrs[i], F),
            "torch.sort": lambda i: csrs[i].indices.sort(stable=True),
        },
        check,
        B * k * 4 * 10,
    )


def _topk(B: int) -> Problem:
    pre = _pre(B)

    def check():
        csr = topk(pre[0], k)
        expected = pre[0].topk(k).indices.sort().values
        assert torch.equal(csr.indices.view(B, k), expected.int())

    return Problem(
        {
            "fastsae": lambda i: topk(pre[i], k),
            "torch.topk": lambda i: pre[i].topk(k, sorted=False),
        },
        check,
        B * F * 4 + B * k * (128 * 5 + 8),
    )


def _encode(B: int) -> Problem:
    x = _inputs(lambda: torch.randn(B, D, device=DEVICE).bfloat16())
    weight = torch.randn(F, D, device=DEVICE).div(D**0.5).bfloat16()
    bias = torch.randn(F, device=DEVICE)

    def dense(x):
        pre = (x @ weight.T).float() + bias
        return pre, pre.unflatten(1, (-1, 32)).amax(-1).clamp_min(0)

    def check():
        pre, maxima = encode_with_group_max(x[0], weight.T, bias)
        _close(pre, torch.addmm(bias, x[0].float(), weight.float().T), 1e-5)
        assert torch.equal(maxima.values, group_max(pre).values)

    compiled = torch.compile(dense)
    return Problem(
        {
            "fastsae": lambda i: encode_with_group_max(x[i], weight.T, bias),
            "eager": lambda i: dense(x[i]),
            "compiled": lambda i: compiled(x[i]),
            "product alone": lambda i: x[i] @ weight.T,
        },
        check,
        (B * D + F * D) * 2 + B * F * 4,
        2 * B * D * F,
        "gemm",
    )


def _sparse_decode(B: int) -> Problem:
    from fastsae_kernels.sparse_decoder import sparse_decode

    csrs = [batch_topk(p, B * k).csr for p in _pre(B)]
    W_dec = torch.nn.functional.normalize(torch.randn(F, D, device=DEVICE)).bfloat16()
    b_dec = torch.randn(D, device=DEVICE)
    dense_z = [csr.dense(F).bfloat16() for csr in csrs]

    def dense(z):
        return (z @ W_dec).float() + b_dec

    def check():
        expected = csrs[0].dense(F) @ W_dec.float() + b_dec
        _close(sparse_decode(csrs[0], W_dec, b_dec), expected, 2**-8)

    compiled = torch.compile(dense)
    return Problem(
        {
            "fastsae": lambda i: sparse_decode(csrs[i], W_dec, b_dec),
            "eager": lambda i: dense(dense_z[i]),
            "compiled": lambda i: compiled(dense_z[i]),
        },
        check,
        B * k * (D * 2 + 8) + B * D * 4,
        2 * B * k * D,
        "gather",
    )


def _fused_update(B: int) -> Problem:
    from fastsae_kernels import BiasState, MatrixState, fused_update_

    csrs = [batch_topk(p, B * k).csr for p in _pre(B)]
    cscs = [csr_to_csc(csr, F) for csr in csrs]
    x, dY = (_inputs(lambda: torch.randn(B, D, device=DEVICE).bfloat16()) for _ in range(2))
    W = torch.nn.functional.normalize(torch.randn(F, D, device=DEVICE))
    lr = torch.tensor(3e-4, device=DEVICE)
    step = torch.ones((), dtype=torch.int64, device=DEVICE)
    state = [MatrixState.start(W.clone(), copy_dtype=torch.bfloat16) for _ in range(2)]
    vectors = [BiasState.start(torch.zeros(n, device=DEVICE)) for n in (F, D)]

    def ours(i):
        fused_update_(
            state[0], vectors[0], state[1], vectors[1], csrs[i], cscs[i], x[i], dY[i], lr, step
        )

    dense_state = [W.clone().requires_grad_() for _ in range(2)]
    adam = torch.optim.Adam(dense_state, lr=lr, fused=True, capturable=DEVICE == "cuda")
    dense_z = [csr.dense(F).bfloat16() for csr in csrs]

    def dense(i):
        z = dense_z[i]
        W_enc, W_dec = dense_state
        dz = (dY[i] @ W_dec.detach().bfloat16().T) * (z > 0)
        W_enc.grad = (dz.T @ x[i]).float()
        gradient = (z.T @ dY[i]).float()
        w = W_dec.detach()
        W_dec.grad = gradient - (gradient * w).sum(1, keepdim=True) * w
        adam.step()
        w.div_(w.norm(dim=1, keepdim=True))

    def check():
        ours(0)
        dense(0)
        # Adam's first step is the gradient's sign: the weights move by lr, compared to a tenth of it.
        for row, other in zip(state, dense_state, strict=True):
            moved = (row.master() - W).flatten(), (other.detach() - W).flatten()
            agree = torch.nn.functional.cosine_similarity(*moved, dim=0).item()
            assert agree > 0.95, f"the updates' cosine is {agree:.3f}"

    return Problem(
        {"fastsae": ours, "dense": dense},
        check,
        2 * D * F * (24 + 2) + B * k * D * 4,
        8 * B * k * D,
    )


def _aux_k(B: int) -> Problem:
    from fastsae_kernels import aux_k_gradients
    from fastsae_kernels.reference import aux_k_loss

    x = _inputs(lambda: torch.randn(B, D, device=DEVICE).bfloat16())
    residual = torch.randn(B, D, device=DEVICE)
    W = torch.nn.functional.normalize(torch.randn(F, D, device=DEVICE)).bfloat16()
    b_enc, b_dec = torch.zeros(F, device=DEVICE), torch.zeros(D, device=DEVICE)
    since = torch.zeros(F, dtype=torch.int64, device=DEVICE)
    since[:: F // 2048] = 1
    options = {"dead_after": 1, "max_dead": 2048, "k_aux": D // 2}

    def ours(i):
        return aux_k_gradients(x[i], residual, W, b_enc, W, b_dec, since, **options).loss

    def dense(i):
        pre = (x[i] @ W.T).float().requires_grad_()
        loss = aux_k_loss(pre, residual, W.float().requires_grad_(), since > 0, D // 2)
        loss.backward()
        return loss.detach()

    def check():
        _close(ours(0), dense(0), 1e-2)

    return Problem(
        {
            "fastsae": ours,
            "eager": dense,
        },
        check,
        20 * B * 2048 + 4 * 2048 * D * 2,
        10 * B * 2048 * D,
        "gemm",
    )


ENTRIES = [
    Entry("group_max", _group_max),
    Entry("batch_topk", _batch_topk),
    Entry("csr_to_csc", _csr_to_csc),
    Entry("topk", _topk),
    Entry("encode_with_group_max", _encode),
    Entry("sparse_decode", _sparse_decode),
    Entry("fused_update", _fused_update),
    Entry("aux_k", _aux_k),
]


def time_entry(report: Report, entry: Entry, B: int, roofs: dict[str, float]) -> None:
    """One row a provider; one row saying why where there is no time."""
    try:
        problem = entry.build(B)
    except ImportError as error:
        report.add(kernel=entry.name, B=B, missing=f"not part of this version: {error}")
        return
    problem.check()
    for number, (provider, call) in enumerate(problem.providers.items()):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed = measure(call, VARIANTS)
        row = {
            "kernel": entry.name,
            "B": B,
            "D": D,
            "F": F,
            "k": k,
            "provider": provider,
            **timed,
            "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20,
            "gflops": problem.flops / timed["us"] / 1e3,
        }
        if number == 0:  # bytes and roof are those of our algorithm
            work = problem.flops if problem.roof == "gemm" else problem.bytes_moved
            row["gbytes_per_s"] = problem.bytes_moved / timed["us"] / 1e3
            row["roof"] = problem.roof
            row["share"] = work / timed["us"] * 1e6 / roofs[problem.roof]
        report.add(**({"roof": "", "share": ""} | row))


def run(report: Report) -> None:
    roofs = ceilings(report)
    for B in BATCHES:
        for entry in ENTRIES:
            if report.out_of_time():
                report.add(kernel=entry.name, B=B, missing="out of time")
                continue
            try:
                time_entry(report, entry, B, roofs)
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                reason = f"{type(error).__name__}: {str(error)[:500]}"
                report.add(kernel=entry.name, B=B, failed=reason)
            torch.cuda.empty_cache()
