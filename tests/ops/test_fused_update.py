from dataclasses import replace

import pytest
import torch
from sparse_inputs import BACKENDS, LENGTHS, ragged_mask, selection
from tolerances import FUSED_STEP, FUSED_STEP_SHORT_RUN, UNIT_NORM
from torch.utils._python_dispatch import TorchDispatchMode

from fastsae_kernels import (
    BiasState,
    MatrixState,
    aux_k_gradients,
    clip_factor,
    fused_update_,
    fused_update_latents_,
    gradient_norm,
    nested_decode_loss,
    nested_gradient,
    reference,
    sparse_decode_loss,
)
from fastsae_kernels.dispatch import use
from fastsae_kernels.reference import AdamMoments, Gradients
from fastsae_kernels.update import _fused_update_, _gradient_norm, _parts, torch_impl, triton_impl
from fastsae_kernels.update.state import Adam, Batch, Parameters

TOKENS, LATENTS, WIDTH = 130, 11, 20
LEVELS = (2, 7, LATENTS)  # a latent of two chunks and the long one are in the second
EMPTY = len(LENGTHS) + 1  # of the latents, besides the first: selected nowhere
ADAM = {"betas": (0.7, 0.95), "decoder_lr_ratio": 2.0}
FORMS = {
    "whole": {},
    "split": {"split": True},
    "8-bit": {"quantized_moments": True},
    "split 8-bit": {"split": True, "quantized_moments": True},
}


@pytest.fixture(params=BACKENDS)
def device(request, monkeypatch):
    where, implementation = request.param
    if where == "cpu":
        # Fewer, larger steps for the interpreter; the sums are the same in another order.
        monkeypatch.setattr(triton_impl.TUNING, "entries", 16)
    with use(implementation):
        yield torch.device(where)


def start(seed: int = 0) -> tuple[reference.State, torch.Tensor, torch.Tensor]:
    """A state in the middle of training, a batch and a mask with segments of every length."""
    torch.manual_seed(seed)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    W_dec = reference.normalize_rows(torch.randn(LATENTS, WIDTH, dtype=torch.float64))
    params = Gradients(
        torch.randn(WIDTH, LATENTS, dtype=torch.float64),
        torch.randn(LATENTS, dtype=torch.float64),
        W_dec,
        torch.randn(WIDTH, dtype=torch.float64),
    )
    # Moments of the size of the gradients, v far above eps²: an update is a smooth function of them.
    moments = tuple(
        AdamMoments(1e-3 * torch.randn_like(p), 1e-6 * (0.5 + torch.rand_like(p))) for p in params
    )
    since = torch.zeros(LATENTS, dtype=torch.int64)
    mask = ragged_mask(LATENTS, TOKENS, seed).T.contiguous()
    mask[:, EMPTY] = False
    return reference.State(params, moments, since, params.b_dec.new_zeros(()), step=5), x, mask


class Fused:
    """The same state in the kernels' form."""

    def __init__(self, state: reference.State, dtype, device, levels=(LATENTS,), **form):
        to = lambda t: t.to(device, dtype, copy=True).contiguous()
        p, m = state.params, state.moments
        self.W_enc = MatrixState.start(to(p.W_enc.T), **form)
        self.W_dec = MatrixState.start(to(p.W_dec), **form)
        self.b_enc = BiasState(to(p.b_enc), to(m[1].m), to(m[1].v))
        self.b_dec = BiasState(to(p.b_dec), to(m[3].m), to(m[3].v))
        if "quantized_moments" not in form:
            for rows, moments, transpose in ((self.W_enc, m[0], True), (self.W_dec, m[2], False)):
                rows.m.copy_(moments.m.T if transpose else moments.m)
                rows.v.copy_(moments.v.T if transpose else moments.v)
        self.dtype, self.device = dtype, device
        self.count = torch.tensor(state.step, device=device)
        self.levels = torch.tensor(levels, dtype=torch.int32, device=device)

    def inputs(self, x, mask):
        """csr, csc, x and the residual of each level, from the masters."""
        x = x.to(self.device, self.dtype)
        W_enc = self.W_enc.master().T
        pre = reference.pre_activations(x, W_enc, self.b_enc.weight, self.b_dec.weight)
        csr, csc = selection(mask.to(self.device), pre)
        loss = nested_decode_loss(csr, self.W_dec.master(), self.b_dec.weight, x, self.levels)
        return csr, csc, x, loss.residual

    def step(self, inputs, max_norm=None, aux=None, lr=3e-4):
        csr, csc, x, residual = inputs
        aux_gradients = None if aux is None else self.aux_k(x, residual[-1], aux)
        clip, norm, dY = None, None, nested_gradient(residual)
        scale = -2 / (len(x) * len(residual))
        options = {"dY_scale": scale, "aux_gradients": aux_gradients, "levels": self.levels}
        if max_norm is not None:
            norm = gradient_norm(
                self.W_enc, self.W_dec, self.b_dec.weight, csr, csc, x, dY, **options
            )
            clip = clip_factor(norm, max_norm)
        fused_update_(
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            csr,
            csc,
            x,
            dY,
            torch.tensor(lr, dtype=torch.float64, device=self.device),
            self.count,
            clip=clip,
            **ADAM,
            **options,
        )
        return norm

    def aux_k(self, x, residual, state_and_settings):
        state, s = state_and_settings
        since = state.tokens_since_active.to(self.device)
        return aux_k_gradients(
            x,
            residual,
            self.W_enc.master(),
            self.b_enc.weight,
            self.W_dec.master(),
            self.b_dec.weight,
            since,
            dead_after=s.dead_after_tokens,
            max_dead=LATENTS,
            k_aux=s.k_aux,
            normalization=s.aux_normalization,
            coefficient=s.aux_coefficient,
        ).gradients

    def tensors(self):
        """Weights and moments in the reference's order and shapes, in float64 on the CPU."""
        (me, ve), (md, vd) = self.W_enc.moments(), self.W_dec.moments()
        return [
            t.double().cpu()
            for t in (
                *(self.W_enc.master().T, self.b_enc.weight, self.W_dec.master(), self.b_dec.weight),
                *(me.T, ve.T, self.b_enc.m, self.b_enc.v, md, vd, self.b_dec.m, self.b_dec.v),
            )
        ]


def tensors(state: reference.State):
    return [*state.params, *(t for moments in state.moments for t in moments)]


def assert_close(fused: Fused, state: reference.State, tolerance: float):
    for got, expected in zip(fused.tensors(), tensors(state), strict=True):
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dead", [0, 3])
@pytest.mark.parametrize(
    ("max_norm", "levels"),
    [(None, ()), (1e-3, ()), (1e3, ()), (1e-3, LEVELS)],
    ids=["no clip", "clipped", "below clip", "nested"],
)
@pytest.mark.usefixtures("poison")
@pytest.mark.slow_interpreted
def test_one_step_is_the_reference_step(device, max_norm, levels, dead):
    state, x, mask = start()
    since = state.tokens_since_active
    since[:dead] = since[EMPTY] = 100 if dead else 0  # some of the dead are selected, some are not
    settings = reference.Settings(
        **ADAM,
        objective="plain",
        k=4,
        k_aux=LATENTS,
        dead_after_tokens=100,
        max_gradient_norm=max_norm,
        aux_coefficient=0.5,
        levels=levels,
    )
    expected = reference.train_step(state, x, settings, mask)
    fused = Fused(state, torch.float32, device, levels or (LATENTS,))
    norm = fused.step(fused.inputs(x, mask), max_norm, (state, settings) if dead else None)
    assert_close(fused, expected.state, FUSED_STEP)
    if max_norm is not None:
        g = reference.gradients(
            x,
            state.params,
            mask,
            since >= 100,
            aux_coefficient=0.5,
            k_aux=LATENTS if dead else 0,
            objective="plain",
            levels=levels,
        )
        g = g._replace(W_dec=reference.project_gradient(state.params.W_dec, g.W_dec))
        exact = torch.stack([t.norm() for t in g]).norm()
        assert abs(float(norm) / float(exact) - 1) < FUSED_STEP


@pytest.mark.parametrize("max_norm", [None, 1e-2])
def test_one_step_is_autograd_and_torch_adam(max_norm):
    state, x, mask = start(1)
    leaves = [p.clone().requires_grad_() for p in state.params]
    W_enc, b_enc, W_dec, b_dec = leaves
    groups = [{"params": [W_enc, b_enc, b_dec]}, {"params": [W_dec], "lr": 6e-4}]
    optimizer = torch.optim.Adam(groups, lr=3e-4, betas=(0.7, 0.95), eps=1e-8)
    for leaf, moments in zip(leaves, state.moments, strict=True):
        optimizer.state[leaf] = {
            "step": torch.tensor(5.0),
            "exp_avg": moments.m.clone(),
            "exp_avg_sq": moments.v.clone(),
        }
    z = reference.pre_activations(x, W_enc, b_enc, b_dec) * mask
    reference.squared_error(x, reference.decode(z, W_dec, b_dec)).backward()
    W_dec.grad = reference.project_gradient(W_dec.detach(), W_dec.grad)
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(leaves, max_norm)
    optimizer.step()
    with torch.no_grad():
        W_dec.copy_(reference.normalize_rows(W_dec))

    fused = Fused(state, torch.float64, "cpu")
    fused.step(fused.inputs(x, mask), max_norm)
    # clip_grad_norm_ adds 1e-6 to the norm it divides by.
    tolerance = 1e-12 if max_norm is None else 1e-4
    for got, expected in zip(fused.tensors()[:4], leaves, strict=True):
        torch.testing.assert_close(got, expected.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("normalization", "levels"),
    [
        ("residual_variance", ()),
        ("total_variance", ()),
        ("none", ()),
        ("residual_variance", LEVELS),
    ],
)
def test_a_hundred_steps_in_float64_follow_the_reference(normalization, levels):
    state, x, _ = start(2)
    # Latents 0 to 3 are dead from the start and come back as aux-k moves them; Adam starts fresh.
    state.tokens_since_active[:4] = 1000
    moments = tuple(AdamMoments(*(torch.zeros_like(t) for t in m)) for m in state.moments)
    params = state.params._replace(b_enc=torch.zeros_like(state.params.b_enc))
    params.b_enc[:4] = -4
    state = replace(state, params=params, moments=moments, step=0)
    settings = reference.Settings(
        **ADAM,
        objective="plain",
        k=3,
        k_aux=3,
        lr=1e-2,
        dead_after_tokens=1000,
        max_gradient_norm=0.05,
        aux_normalization=normalization,
        aux_coefficient=0.5,
        levels=levels,
    )
    fused = Fused(state, torch.float64, "cpu", levels or (LATENTS,))
    ever_dead = 0
    for step in range(100):
        torch.manual_seed(step)
        x = torch.randn(40, WIDTH, dtype=torch.float64)
        result = reference.train_step(state, x, settings)
        fused.step(fused.inputs(x, result.mask), 0.05, (state, settings), lr=1e-2)
        ever_dead += int((state.tokens_since_active >= 1000).sum())
        state = result.state
    assert ever_dead > 100
    assert_close(fused, state, FUSED_STEP_SHORT_RUN)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow_interpreted
def test_every_storage_form_takes_the_same_step(device, form):
    state, x, mask = start(3)
    settings = reference.Settings(**ADAM, k=4, k_aux=0, objective="plain", aux_coefficient=0)
    fused = Fused(state, torch.float32, device, **FORMS[form])
    if "8-bit" in form:
        # From zero moments the first update is that of exact moments: they round when they are stored.
        moments = tuple(
            AdamMoments(torch.zeros_like(m.m), torch.zeros_like(m.v)) for m in state.moments
        )
        state = replace(state, moments=(moments[0], state.moments[1], moments[2], state.moments[3]))
    expected = reference.train_step(state, x, settings, mask).state
    fused.step(fused.inputs(x, mask))
    got = fused.tensors()
    for ours, theirs in zip(got[:4], expected.params, strict=True):
        # Where v is tiny Adam divides by it: signs of gradients that cancel are not determined.
        limit = 1e-4 if "8-bit" in form else FUSED_STEP * theirs.abs().max()
        assert (ours - theirs).abs().max() <= limit
    if "8-bit" in form:
        for ours, theirs in zip(got[4:], tensors(expected)[4:], strict=True):
            assert (ours - theirs).abs().max() <= 0.1 * theirs.abs().max()
    norms = fused.W_dec.master().double().norm(dim=1)
    assert (norms - 1).abs().max() < UNIT_NORM


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with the interpreter")
@pytest.mark.parametrize("form", ["split", "split 8-bit"])
def test_kernels_store_what_torch_stores(form):
    """Splitting, rounding and coding, bit by bit: with a zero step and gradient only they remain."""
    state, x, mask = start(4)
    m, v = torch.randn(LATENTS, WIDTH).mul(60).clamp(-127, 127), torch.rand(LATENTS, WIDTH) * 255
    both = []
    for implementation in ("torch", "triton"):
        fused = Fused(state, torch.float32, "cpu", **FORMS[form])
        fused.W_enc.m.copy_(m)
        fused.W_enc.v.copy_(v)
        if "8-bit" in form:
            fused.W_enc.m_scale.fill_(1e-3)
            fused.W_enc.v_scale.fill_(1e-6)
        with use(implementation):
            fused.step(fused.inputs(x, torch.zeros_like(mask)), lr=0.0)
        both.append(fused.W_enc)
    for name, a, b in zip(MatrixState._fields, *both, strict=True):
        if a is not None and name in ("weight", "remainder"):
            assert torch.equal(a, b), name
        elif a is not None and name in ("m", "v") and "8-bit" in form:
            # The same random bits: only a ratio within rounding of its threshold may differ.
            assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < 0.01
            assert len(a.unique()) > 50


@pytest.mark.parametrize("form", ["whole", "split 8-bit"])
@pytest.mark.slow_interpreted
def test_parts_of_the_dictionary_become_what_they_become_in_the_whole(device, form):
    """Bit by bit; 8-bit moments hash the latent of the whole. And together they give b_dec's gradient."""
    state, x, mask = start(14)
    state.tokens_since_active[[1, 3, 8]] = 100
    settings = reference.Settings(k=4, k_aux=3, dead_after_tokens=100, aux_coefficient=0.5)
    whole = Fused(state, torch.float32, device, **FORMS[form])
    csr, csc, x, residual = whole.inputs(x, mask)
    aux = whole.aux_k(x, residual[0], (state, settings))
    b_dec, lr = whole.b_dec.weight.clone(), torch.tensor(3e-4, device=device)
    step = torch.tensor(state.step + 1, device=device)
    parts, db_dec = [], residual[0].sum(0) * -0.01
    # Four rows are a multiple of every vector's length: torch's Adam rounds a remainder otherwise.
    for at in (slice(0, 4), slice(4, 8), slice(8, LATENTS)):
        part = Fused(state, torch.float32, device, **FORMS[form])
        W_enc, W_dec, b_enc = (
            type(own)(*(None if t is None else t[at].clone() for t in own))
            for own in (part.W_enc, part.W_dec, part.b_enc)
        )
        here = csr.dense(LATENTS)[:, at].contiguous()
        own = selection(mask.to(device)[:, at], here)
        slots = aux._replace(slots=aux.slots[at].contiguous())
        db_dec += fused_update_latents_(
            W_enc, b_enc, W_dec, b_dec, *own, x, residual[0], lr, step,
            dY_scale=-0.01, aux_gradients=slots, first_row=at.start, **ADAM,
        )  # fmt: skip
        parts.append([t for own in (W_enc, W_dec) for t in own if t is not None] + [*b_enc])
    moment = whole.b_dec.m.clone()
    fused_update_(
        whole.W_enc, whole.b_enc, whole.W_dec, whole.b_dec, csr, csc, x, residual[0], lr, step - 1,
        dY_scale=-0.01, aux_gradients=aux, **ADAM,
    )  # fmt: skip
    rows = [t for own in (whole.W_enc, whole.W_dec) for t in own if t is not None]
    *matrices, weight, m, v = (torch.cat(got) for got in zip(*parts, strict=True))
    assert all(got.equal(expected) for got, expected in zip(matrices, rows, strict=True))
    for got, expected in zip((weight, m, v), whole.b_enc, strict=True):
        assert (got - expected).abs().max() <= FUSED_STEP * expected.abs().max()
    gradient = (whole.b_dec.m - 0.7 * moment) / 0.3
    assert (db_dec - gradient).abs().max() <= FUSED_STEP * gradient.abs().max()


def test_latents_without_actives_follow_their_momentum(device):
    state, x, mask = start(5)
    expected = reference.train_step(
        state,
        x,
        reference.Settings(**ADAM, k=4, k_aux=0, objective="plain", aux_coefficient=0),
        mask * 0,
    ).state
    fused = Fused(state, torch.float32, device)
    before = fused.W_enc.weight.clone()
    fused.step(fused.inputs(x, mask * False))
    assert_close(fused, expected, FUSED_STEP)
    assert (fused.W_enc.weight != before).any(1).all()


@pytest.mark.slow_interpreted
def test_zero_rows_stay_finite(device):
    state, x, mask = start(6)
    state.params.W_dec[7] = 0
    zero = AdamMoments(*(t.clone() for t in state.moments[2]))
    zero.m[7], zero.v[7] = 0, 0
    mask[:, 7] = False
    state = replace(state, moments=(*state.moments[:2], zero, state.moments[3]))
    fused = Fused(state, torch.float32, device)
    fused.step(fused.inputs(x, mask))
    assert all(t.isfinite().all() for t in fused.tensors())
    assert not fused.W_dec.weight[7].any()


@pytest.mark.slow_interpreted
def test_runs_are_bitwise_equal(device):
    runs = []
    for _ in range(2 if device.type == "cpu" else 100):
        state, x, mask = start(7)
        fused = Fused(state, torch.float32, device, LEVELS, split=True, quantized_moments=True)
        fused.step(fused.inputs(x, mask), 1e-3)
        runs.append(fused.tensors())
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_rows_stay_on_the_sphere():
    state, x, mask = start(8)
    fused = Fused(state, torch.float32, "cpu")
    for _ in range(200):
        fused.step(fused.inputs(x, mask), lr=1e-2)
    assert (fused.W_dec.weight.double().norm(dim=1) - 1).abs().max() < UNIT_NORM


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow_interpreted
def test_low_precision_inputs_are_read_as_they_are(device, dtype):
    """The result is that of the rounded inputs in float32, since everything is computed in it."""
    state, x, mask = start(9)
    results = []
    for read_as in (dtype, torch.float32):
        fused = Fused(state, torch.float32, device, split=True)
        csr, csc, x32, residual = fused.inputs(x, mask)
        rounded = [t.to(dtype).to(read_as) for t in (csr.values, x32, residual)]
        fused.step((csr._replace(values=rounded[0]), csc, *rounded[1:]))
        results.append(fused.tensors())
    for low, full in zip(*results, strict=True):
        torch.testing.assert_close(low, full, rtol=FUSED_STEP, atol=FUSED_STEP)


def flat_arguments(device="cpu"):
    state, x, mask = start(10)
    fused = Fused(state, torch.float32, device, split=True, quantized_moments=True)
    csr, csc, x, residual = fused.inputs(x, mask)
    lr, step = torch.tensor(1e-3, device=device), torch.tensor(0, device=device)
    W_enc, W_dec = _parts(fused.W_enc), _parts(fused.W_dec)
    parameters = (*W_enc, [*fused.b_enc], *W_dec, [*fused.b_dec], None)
    inputs = ([csr.values, *csc, x, residual], -0.1, [])
    matrices = fused.W_enc, fused.W_dec
    weights, remainders = [rows.weight for rows in matrices], [rows.remainder for rows in matrices]
    norm = (weights, remainders, fused.b_dec.weight, *inputs)
    return (*parameters, *inputs, lr, step, None, 0.7, 0.95, 1e-8, 2.0), norm


def test_operations_are_well_registered():
    update, norm = flat_arguments()
    torch.library.opcheck(_gradient_norm, norm)
    # Not test_aot_dispatch_dynamic: it compares with float tolerances what rounds stochastically.
    torch.library.opcheck(
        _fused_update_,
        update,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_whole_without_recompiling_between_steps():
    state, x, mask = start(11)
    plain, compiled = (Fused(state, torch.float32, "cpu") for _ in range(2))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(W_enc, b_enc, W_dec, b_dec, csr, csc, x, residual, lr, count):
        parameters = (W_enc, b_enc, W_dec, b_dec)
        fused_update_(*parameters, csr, csc, x, residual[0], lr, count, dY_scale=-0.01)

    lrs = [torch.tensor(lr) for lr in (1e-3, 2e-3)]
    counts = (5, 6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lr, count in zip(lrs, counts, strict=True):
            for fused, run in ((plain, step._torchdynamo_orig_callable), (compiled, step)):
                parameters = fused.W_enc, fused.b_enc, fused.W_dec, fused.b_dec
                count_here = torch.tensor(count)
                run(*parameters, *fused.inputs(x, mask), lr, count_here)
                assert count_here == count + 1
    for got, expected in zip(compiled.tensors(), plain.tensors(), strict=True):
        assert torch.equal(got, expected)


def test_no_dense_gradient_is_ever_allocated(monkeypatch):
    monkeypatch.setattr(torch_impl, "BLOCK_LATENTS", 2)
    state, x, mask = start(12)
    fused = Fused(state, torch.float32, "cpu")
    inputs = fused.inputs(x[:9], mask[:9])  # fewer tokens than latents: [B, D] is not [F, D]
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t._base is None and not t.is_sparse_csr:
                    sizes.append(t.numel())
            return out

    csr, csc, x, residual = inputs
    with Sizes():
        torch_impl.fused_update(
            Parameters(fused.W_enc, fused.b_enc, fused.W_dec, fused.b_dec.weight, fused.b_dec[1:]),
            None,
            Batch(csr.values, csc, x, residual, -0.1, None),
            Adam(torch.tensor(1e-3), torch.tensor(0), None, 0.7, 0.95, 1e-8, 2.0),
        )
    assert sizes and max(sizes) < LATENTS * WIDTH


def test_refusals_come_before_anything_is_written():
    state, x, mask = start(13)
    fused = Fused(state, torch.float32, "cpu")
    csr, csc, x, residual = fused.inputs(x, mask)
    before = fused.tensors()
    with pytest.raises(ValueError, match=r"dY: expected shape \[1, 130, 20\], got \[1, 129, 20\]"):
        fused.step((csr, csc, x, residual[:, 1:]))
    with pytest.raises(ValueError, match=r"x: expected a contiguous tensor, got strides"):
        fused.step((csr, csc, x.T.contiguous().T, residual))
    with pytest.raises(ValueError, match=r"csc.offsets: expected shape"):
        fused.step((csr, csc._replace(offsets=csc.offsets[1:]), x, residual))
    fused.W_enc = fused.W_enc._replace(weight=fused.W_enc.weight.double())
    with pytest.raises(
        ValueError, match=r"W_enc.weight: expected torch.float32 .* got torch.float64"
    ):
        fused.step((csr, csc, x, residual))
    fused.W_enc = fused.W_enc._replace(weight=fused.W_enc.weight.float())
    fused.b_enc = fused.b_enc._replace(m=fused.b_enc.m[1:])
    with pytest.raises(ValueError, match=r"b_enc.m: expected shape \[11\], got \[10\]"):
        fused.step((csr, csc, x, residual))
    fused.b_enc = fused.b_enc._replace(m=state.moments[1].m.float())
    assert all(torch.equal(a, b) for a, b in zip(fused.tensors(), before, strict=True))


@pytest.mark.parametrize(("norm", "factor"), [(0.5, 1.0), (1.0, 1.0), (4.0, 0.25), (0.0, 1.0)])
def test_clip_factor(norm, factor):
    assert clip_factor(torch.tensor(norm), 1.0) == factor


@pytest.mark.parametrize("width", [WIDTH, 12], ids=["as wide", "narrower"])
@pytest.mark.parametrize("max_norm", [None, 1e-3])
@pytest.mark.slow_interpreted
def test_one_step_of_a_transcoder_is_the_reference_step(device, max_norm, width):
    """A bias of the output alone, and an input of another width; aux-k included."""
    state, x, mask = start(8)
    torch.manual_seed(9)
    target = torch.randn(TOKENS, width, dtype=torch.float64)
    W_dec = reference.normalize_rows(torch.randn(LATENTS, width, dtype=torch.float64))
    params = Gradients(*state.params[:2], W_dec, torch.randn(width, dtype=torch.float64))
    moments = tuple(
        AdamMoments(1e-3 * torch.randn_like(p), 1e-6 * (0.5 + torch.rand_like(p))) for p in params
    )
    since = torch.zeros(LATENTS, dtype=torch.int64)
    since[:3] = 100
    state = replace(state, params=params, moments=moments, tokens_since_active=since)
    settings = reference.Settings(
        **ADAM,
        objective="plain", k=4, k_aux=LATENTS, dead_after_tokens=100, max_gradient_norm=max_norm,
        aux_coefficient=0.5,
    )  # fmt: skip
    expected = reference.train_step(state, x, settings, mask, target).state

    fused = Fused(state, torch.float32, device)
    read, y = (t.to(device, torch.float32) for t in (x, target))
    nothing = torch.zeros_like(read[0])
    pre = reference.pre_activations(read, fused.W_enc.master().T, fused.b_enc.weight, nothing)
    csr, csc = selection(mask.to(device), pre)
    decoder = fused.W_dec.master(), fused.b_dec.weight
    residual = sparse_decode_loss(csr, *decoder, y).residual
    aux = aux_k_gradients(
        read, residual, fused.W_enc.master(), fused.b_enc.weight, fused.W_dec.master(), nothing,
        since.to(device), dead_after=100, max_dead=LATENTS, k_aux=LATENTS, coefficient=0.5, target=y,
    ).gradients  # fmt: skip
    options = {"dY_scale": -2 / TOKENS, "aux_gradients": aux, "tied": False}
    batch, clip = (csr, csc, read, residual), None
    if max_norm is not None:
        norm = gradient_norm(fused.W_enc, fused.W_dec, fused.b_dec.weight, *batch, **options)
        clip = clip_factor(norm, max_norm)
    fused_update_(
        fused.W_enc, fused.b_enc, fused.W_dec, fused.b_dec, *batch,
        torch.tensor(3e-4, device=device), torch.tensor(state.step, device=device),
        clip=clip, **ADAM, **options,
    )  # fmt: skip
    assert_close(fused, expected, FUSED_STEP)


def test_what_a_gpu_should_decide_is_read_at_each_launch(monkeypatch):
    before = triton_impl.decoder_blocks(1536), triton_impl.encoder_blocks(1536, False)
    monkeypatch.setattr(triton_impl.TUNING, "decoder_elements", 8)
    monkeypatch.setattr(triton_impl.TUNING, "encoder_elements", 4)
    after = triton_impl.decoder_blocks(1536), triton_impl.encoder_blocks(1536, False)
    for fewer, more in zip(before, after, strict=True):
        assert more == {"BLOCK_D": fewer["BLOCK_D"], "num_warps": 2 * fewer["num_warps"]}
