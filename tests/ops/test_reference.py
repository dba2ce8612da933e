"""The executable mathematics against brute force, autograd and PyTorch's own Adam."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsae_kernels import reference as ref

F64 = torch.float64


def brute_force_selection(
    pre: torch.Tensor, num_selected: int, quota: float = 0
) -> set[tuple[int, int]]:
    """Sort every positive entry in Python, by value descending and then flat index ascending; the first
    of each latent, as far as the quota goes, then come before the others."""
    B, F = pre.shape
    entries = [(-pre[b, f].item(), b * F + f) for b in range(B) for f in range(F)]
    ranked = sorted(entry for entry in entries if -entry[0] > 0)  # NaN compares false
    first = {index % F: index for _, index in reversed(ranked)}
    peaks = [index for _, index in ranked if first[index % F] == index]
    peaks = peaks[: math.floor(quota * num_selected)]
    others = [index for _, index in ranked if index not in peaks]
    return {divmod(index, F) for index in (peaks + others)[:num_selected]}


def selected(mask: torch.Tensor) -> set[tuple[int, int]]:
    return {(int(b), int(f)) for b, f in mask.nonzero()}


# Few distinct values, so that ties, zeros of both signs, denormals, NaN and infinities meet often.
awkward = st.sampled_from(
    [0.0, -0.0, 1.0, 1.0, 2.0, -1.0, 1e-45, -1e-45, 1e-40, math.inf, -math.inf, math.nan, 0.5, 3.5]
)


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    B, F = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    values = draw(st.lists(awkward, min_size=B * F, max_size=B * F))
    return torch.tensor(values).reshape(B, F)


class TestSelection:
    @given(matrices(), st.integers(0, 250), st.sampled_from([0, 0.2, 0.5, 1]))
    def test_batch_topk_is_brute_force(
        self, pre: torch.Tensor, num_selected: int, quota: float
    ) -> None:
        num_selected = min(num_selected, pre.numel())
        assert selected(ref.batch_topk_mask(pre, num_selected, quota)) == brute_force_selection(
            pre, num_selected, quota
        )

    @given(matrices(), st.integers(1, 45))
    def test_topk_is_brute_force_per_token(self, pre: torch.Tensor, k: int) -> None:
        expected = {
            (b, f) for b in range(len(pre)) for _, f in brute_force_selection(pre[b : b + 1], k)
        }
        assert selected(ref.topk_mask(pre, k)) == expected

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
    def test_every_dtype_with_massive_ties(self, dtype: torch.dtype) -> None:
        pre = (
            torch.randn(8, 100, generator=torch.Generator().manual_seed(0)).mul(4).round().to(dtype)
        )
        for num_selected in (1, 37, 400, 800):
            assert selected(ref.batch_topk_mask(pre, num_selected)) == brute_force_selection(
                pre, num_selected
            )

    @pytest.mark.parametrize(
        ("pre", "num_selected", "expected"),
        [
            (torch.ones(2, 3), 4, {(0, 0), (0, 1), (0, 2), (1, 0)}),  # all equal: token-major
            (-torch.ones(2, 3), 4, set()),
            (torch.zeros(2, 3), 4, set()),
            (torch.tensor([[1.0, 0, 0], [9, 8, 7]]), 3, {(1, 0), (1, 1), (1, 2)}),  # one hot token
            (
                torch.tensor([[9.0, 1], [8, 1], [7, 1]]),
                3,
                {(0, 0), (1, 0), (2, 0)},
            ),  # one hot latent
            (torch.tensor([[math.nan, math.inf, 1.0]]), 1, {(0, 1)}),
            (torch.tensor([[-0.0, 0.0, 1e-45]]), 3, {(0, 2)}),
            (torch.tensor([[3.0, 2.0]]), 0, set()),
        ],
    )
    def test_known_cases(self, pre: torch.Tensor, num_selected: int, expected: set) -> None:
        assert selected(ref.batch_topk_mask(pre, num_selected)) == expected

    @pytest.mark.parametrize(
        ("num_selected", "quota", "expected"),
        [
            (4, 0, {(1, 0), (0, 0), (1, 1), (0, 1)}),
            (4, 1, {(1, 0), (1, 1), (0, 2), (0, 0)}),  # 9, 7 and 1 are peaks; 8 is the next
            (4, 0.5, {(1, 0), (1, 1), (0, 0), (0, 1)}),  # two peaks, 9 and 7; then 8 and 6
            (3, 1, {(1, 0), (1, 1), (0, 2)}),
            (2, 1, {(1, 0), (1, 1)}),  # the larger peaks
            (2, 0.5, {(1, 0), (0, 0)}),
        ],
    )
    def test_known_quotas(self, num_selected: int, quota: float, expected: set) -> None:
        pre = torch.tensor(
            [[8.0, 6, 1, -1], [9, 7, 1, math.nan]]
        )  # of equal peaks the first token's
        assert selected(ref.batch_topk_mask(pre, num_selected, quota)) == expected

    @pytest.mark.parametrize(
        ("k", "tokens", "latents", "num_selected"),
        [
            (64, 1024, 24576, 65536),
            (2.5, 3, 10, 7),
            (0.1, 5, 10, 0),
            (1e9, 3, 10, 30),
            (1, 1, 1, 1),
        ],
    )
    def test_num_selected(self, k: float, tokens: int, latents: int, num_selected: int) -> None:
        assert ref.num_selected(k, tokens, latents) == num_selected

    @given(matrices(), st.integers(1, 60))
    def test_csr_and_csc_hold_the_same_entries(self, pre: torch.Tensor, num_selected: int) -> None:
        mask = ref.batch_topk_mask(pre, min(num_selected, pre.numel()))
        csr, csc = ref.to_csr(pre, mask), ref.to_csc(mask)
        by_token = [
            (b, int(csr.indices[i]))
            for b in range(len(pre))
            for i in range(csr.offsets[b], csr.offsets[b + 1])
        ]
        by_latent = [
            (int(csc.rows[i]), f)
            for f in range(pre.shape[1])
            for i in range(csc.offsets[f], csc.offsets[f + 1])
        ]
        assert by_token == sorted(selected(mask))
        assert by_latent == sorted(selected(mask), key=lambda entry: (entry[1], entry[0]))
        assert [by_token[p] for p in csc.positions.tolist()] == by_latent
        assert csr.values.tolist() == [pre[entry].item() for entry in by_token]


def small_problem(
    seed: int, B: int = 24, D: int = 6, F: int = 40
) -> tuple[ref.State, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    state = ref.initial_state(
        torch.randn(F, D, dtype=F64, generator=g), torch.randn(D, dtype=F64, generator=g)
    )
    p = state.params
    # Off the tied start, so that no gradient agrees by symmetry.
    p = p._replace(
        W_enc=p.W_enc + 0.3 * torch.randn(D, F, dtype=F64, generator=g),
        b_enc=0.1 * torch.randn(F, dtype=F64, generator=g),
    )
    dead = torch.arange(F) % 3 == 0
    x = torch.randn(B, D, dtype=F64, generator=g) * 2 + 1
    return replace(state, params=p, tokens_since_active=torch.where(dead, 10**9, 0)), x


def autograd(
    state: ref.State, x: torch.Tensor, mask: torch.Tensor, s: ref.Settings
) -> ref.Gradients:
    params = ref.Gradients(*(p.clone().requires_grad_() for p in state.params))
    pre = ref.pre_activations(x, params.W_enc, params.b_enc, params.b_dec)
    z, levels = pre * mask, s.levels or (len(params.W_dec),)
    x_hats = [ref.decode(z[:, :m], params.W_dec[:m], params.b_dec) for m in levels]
    x_hat = x_hats[-1]
    dead = state.tokens_since_active >= s.dead_after_tokens
    given = ref.pre_activations(x, params.W_enc, params.b_enc, params.b_dec.detach())
    aux = ref.aux_k_loss(given, x - x_hat, params.W_dec, dead, s.k_aux, s.aux_normalization, x)
    error = torch.stack([ref.squared_error(x, each) for each in x_hats]).mean()
    loss = (error.log() if s.objective == "log" else error) + s.aux_coefficient * aux
    return ref.Gradients(*torch.autograd.grad(loss, list(params)))


@pytest.mark.parametrize("kind", ["log", "plain"])
def test_the_objective_has_one_finite_gradient(kind: str) -> None:
    error, aux = torch.tensor(0.3, dtype=F64, requires_grad=True), torch.tensor(2.0, dtype=F64)
    value = ref.objective(error, aux, 0.5, kind)
    assert value.item() == pytest.approx((math.log(0.3) if kind == "log" else 0.3) + 1.0, rel=1e-15)
    (gradient,) = torch.autograd.grad(value, error)
    assert gradient == (ref.error_weight(error) if kind == "log" else 1)
    nothing = torch.zeros((), dtype=F64, requires_grad=True)
    value = ref.objective(nothing, aux, 0.5, kind)
    assert value == 1 and torch.autograd.grad(value, nothing)[0] == (0 if kind == "log" else 1)


class TestGradients:
    @pytest.mark.parametrize("normalization", ["residual_variance", "total_variance", "none"])
    @pytest.mark.parametrize("k_aux", [1, 3, 30])
    @pytest.mark.parametrize("objective", ["log", "plain"])
    @pytest.mark.parametrize("levels", [(), (3, 17, 40)])
    def test_written_out_gradients_are_autograds(
        self, normalization: str, k_aux: int, objective: str, levels: tuple[int, ...]
    ) -> None:
        state, x = small_problem(0)
        s = ref.Settings(
            k=4,
            k_aux=k_aux,
            aux_coefficient=0.7,
            aux_normalization=normalization,
            objective=objective,
            levels=levels,
        )
        pre = ref.pre_activations(x, state.params.W_enc, state.params.b_enc, state.params.b_dec)
        mask = ref.batch_topk_mask(pre, 4 * len(x))
        written = ref.gradients(
            x, state.params, mask, state.tokens_since_active > 0,
            aux_coefficient=0.7, k_aux=k_aux, normalization=normalization, objective=objective,
            levels=levels,
        )  # fmt: skip
        for name, a, b in zip(
            ref.Gradients._fields, written, autograd(state, x, mask, s), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14, msg=name)

    def test_aux_k_reaches_encoder_and_decoder_of_dead_latents_alone(self) -> None:
        state, x = small_problem(1)
        dead = state.tokens_since_active > 0
        params = [p.clone().requires_grad_() for p in state.params]
        pre = ref.pre_activations(x, params[0], params[1], params[3])
        aux = ref.aux_k_loss(pre, x - x.mean(0), params[2], dead, 3)
        g = ref.Gradients(*torch.autograd.grad(aux, params, allow_unused=True))
        used = ref.topk_mask(torch.where(dead, pre.detach(), 0), 3).any(0)
        assert used.any() and not (used & ~dead).any()
        assert (g.W_enc.norm(dim=0) > 0).equal(used)
        assert (g.W_dec.norm(dim=1) > 0).equal(used)
        assert (g.b_enc.abs() > 0).equal(used)

    @pytest.mark.parametrize("objective", ["log", "plain"])
    def test_aux_k_leaves_the_shared_bias_alone(self, objective: str) -> None:
        state, x = small_problem(1)
        mask = torch.rand(len(x), 40, generator=torch.Generator().manual_seed(1)) < 0.1
        dead = state.tokens_since_active > 0
        none, strong = (
            ref.gradients(
                x, state.params, mask, dead, aux_coefficient=c, k_aux=3, objective=objective
            )
            for c in (0.0, 10.0)
        )
        assert none.b_dec.equal(strong.b_dec) and none.b_dec.any()
        assert not none.b_enc.equal(strong.b_enc)

    def test_aux_target_is_detached(self) -> None:
        state, x = small_problem(2)
        residual = x.clone().requires_grad_()
        pre = ref.pre_activations(x, *state.params[:2], state.params.b_dec).requires_grad_()
        ref.aux_k_loss(
            pre, residual, state.params.W_dec, state.tokens_since_active > 0, 3
        ).backward()
        assert residual.grad is None and pre.grad is not None

    def test_gradcheck_of_the_smooth_parts(self) -> None:
        state, x = small_problem(3, B=5, D=3, F=8)
        mask = ref.batch_topk_mask(
            ref.pre_activations(x, *state.params[:2], state.params.b_dec), 10
        )

        def loss(*params: torch.Tensor) -> torch.Tensor:
            W_enc, b_enc, W_dec, b_dec = params
            pre = ref.pre_activations(x, W_enc, b_enc, b_dec)
            return ref.squared_error(x, ref.decode(pre * mask, W_dec, b_dec))

        assert torch.autograd.gradcheck(loss, [p.clone().requires_grad_() for p in state.params])

    @pytest.mark.parametrize("case", ["nothing dead", "no variance", "nothing positive"])
    def test_aux_k_is_zero_not_nan(self, case: str) -> None:
        state, x = small_problem(4)
        dead = state.tokens_since_active > 0
        pre = ref.pre_activations(x, *state.params[:2], state.params.b_dec)
        residual = x
        if case == "nothing dead":
            dead = torch.zeros_like(dead)
        elif case == "no variance":
            residual = torch.zeros_like(x)
            pre = -pre.abs()  # 0 / 0
        else:
            pre = -pre.abs()
        aux = ref.aux_k_loss(pre, residual, state.params.W_dec, dead, 3)
        assert aux.isfinite()
        assert (aux == 0) == (case != "nothing positive")

    @pytest.mark.parametrize("normalization", ["residual_variance", "total_variance"])
    def test_a_batch_without_variance_has_no_aux_gradient(self, normalization: str) -> None:
        """One token has no variance to divide by: no NaN may reach the weights."""
        state, x = small_problem(6, B=1)
        s = ref.Settings(k=4, k_aux=3, aux_coefficient=0.7, aux_normalization=normalization)
        mask = torch.ones(1, 40, dtype=torch.bool)
        plain = autograd(state, x, mask, replace(s, aux_coefficient=0.0))
        written = ref.gradients(
            x, state.params, mask, state.tokens_since_active > 0,
            aux_coefficient=0.7, k_aux=3, normalization=normalization,
        )  # fmt: skip
        for a, b, c in zip(autograd(state, x, mask, s), plain, written, strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(c, b)

    def test_aux_k_scale_and_normalization(self) -> None:
        """By hand: one dead latent of two wanted halves the loss; the denominators are what they say."""
        pre = torch.tensor([[1.0, 5.0], [2.0, 5.0]], dtype=F64)
        W_dec = torch.eye(2, dtype=F64)
        residual = torch.tensor([[3.0, 0.0], [1.0, 0.0]], dtype=F64)
        x = torch.tensor([[4.0, 4.0], [0.0, 0.0]], dtype=F64)
        dead = torch.tensor([True, False])
        error = ((1 - 3) ** 2 + (2 - 1) ** 2) / 2
        for normalization, denominator in (
            ("none", 1),
            ("residual_variance", 2 / 2),
            ("total_variance", 8),
        ):
            aux = ref.aux_k_loss(pre, residual, W_dec, dead, 2, normalization, x)
            assert aux.item() == pytest.approx(0.5 * error / denominator, rel=1e-14)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("normalization", ["residual_variance", "total_variance", "none"])
@pytest.mark.parametrize("objective", ["log", "plain"])
def test_gradients_of_a_transcoder_are_autograds(
    skip: bool, normalization: str, objective: str
) -> None:
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, dtype=F64, generator=g)
    x, target, dead = new(24, 6), new(24, 5) + 1, torch.arange(40) % 3 == 0
    own = (new(6, 40), 0.1 * new(40), new(40, 5), new(5))
    params = ref.SkipGradients(*own, new(5, 6)) if skip else ref.Gradients(*own)
    leaves = type(params)(*(p.clone().requires_grad_() for p in params))
    pre = x @ leaves.W_enc + leaves.b_enc
    mask = ref.batch_topk_mask(pre.detach(), 100)
    y_hat = ref.decode(pre * mask, leaves.W_dec, leaves.b_dec)
    if skip:
        y_hat = y_hat + x @ leaves.W_skip.T
    aux = ref.aux_k_loss(pre, target - y_hat, leaves.W_dec, dead, 3, normalization, target)
    loss = ref.objective(ref.squared_error(target, y_hat), aux, 0.7, objective)
    written = ref.gradients(
        x, params, mask, dead, aux_coefficient=0.7, k_aux=3, normalization=normalization,
        objective=objective, target=target,
    )  # fmt: skip
    assert type(written) is type(params)
    for name, a, b in zip(
        params._fields, written, torch.autograd.grad(loss, list(leaves)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14, msg=name)


class TestUpdate:
    def test_projection_leaves_nothing_along_the_row(self) -> None:
        g = torch.Generator().manual_seed(0)
        W = 3 * torch.randn(9, 5, dtype=F64, generator=g)  # not unit norm on purpose
        gradient = torch.randn(9, 5, dtype=F64, generator=g)
        projected = ref.project_gradient(W, gradient)
        assert (projected * W).sum(1).abs().max() < 1e-14
        along = gradient - projected
        cosine = torch.nn.functional.cosine_similarity(along, W)
        torch.testing.assert_close(cosine.abs(), torch.ones(9, dtype=F64))
        torch.testing.assert_close(ref.project_gradient(W, projected), projected)

    def test_zero_rows_survive(self) -> None:
        zero = torch.zeros(2, 3, dtype=F64)
        assert ref.normalize_rows(zero).equal(zero)
        assert ref.project_gradient(zero, torch.ones(2, 3, dtype=F64)).equal(
            torch.ones(2, 3, dtype=F64)
        )

    @pytest.mark.parametrize(
        ("clip", "levels"), [(None, ()), (0.05, ()), (1e6, ()), (0.05, (5, 40))]
    )
    def test_whole_steps_are_autograd_projection_clip_adam_renormalisation(
        self, clip: float | None, levels: tuple[int, ...]
    ) -> None:
        state, x = small_problem(5)
        s = ref.Settings(
            k=3.3, k_aux=3, lr=0.01, dead_after_tokens=60, max_gradient_norm=clip, aux_coefficient=18.75,
            levels=levels, betas=(0.7, 0.95), decoder_lr_ratio=2.0,
        )  # fmt: skip
        params = [p.clone().requires_grad_() for p in state.params]
        groups = [{"params": params[:2] + params[3:]}, {"params": [params[2]], "lr": 2 * s.lr}]
        optimizer = torch.optim.Adam(groups, lr=s.lr, betas=s.betas)
        g = torch.Generator().manual_seed(9)
        for _ in range(25):
            x = torch.randn(x.shape, dtype=F64, generator=g) + 1
            result = ref.train_step(state, x, s)
            # The other way to the same place, with PyTorch's machinery.
            gradients = autograd(replace(state, params=ref.Gradients(*params)), x, result.mask, s)
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            W_dec = params[2]
            along = (W_dec.grad * W_dec).sum(1, keepdim=True)
            W_dec.grad = W_dec.grad - (along * W_dec).detach()
            if clip is not None:
                norm = torch.cat([p.grad.flatten() for p in params]).norm()
                for p in params:
                    p.grad *= min(1.0, clip / norm.item())
            optimizer.step()
            with torch.no_grad():
                W_dec /= W_dec.norm(dim=1, keepdim=True)
            state = result.state
            for name, a, b in zip(ref.Gradients._fields, state.params, params, strict=True):
                torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-11, msg=name)
        assert (state.tokens_since_active >= s.dead_after_tokens).any(), (
            "no latent died: aux was not tested"
        )

    def test_long_dead_latents_revive(self) -> None:
        """Latents pushed out of the selection come back through aux-k, and only through aux-k."""

        def alive_after(aux_coefficient: float) -> int:
            g = torch.Generator().manual_seed(0)
            directions = ref.normalize_rows(torch.randn(24, 12, dtype=F64, generator=g))
            rows = ref.normalize_rows(torch.randn(24, 12, dtype=F64, generator=g))
            state = ref.initial_state(rows, torch.zeros(12, dtype=F64), W_enc=rows.T)
            # The second half is seldom selected to begin with.
            b_enc = torch.where(torch.arange(24) < 12, 0.0, -1.0).to(F64)
            state = replace(state, params=state.params._replace(b_enc=b_enc))
            s = ref.Settings(
                k=2, k_aux=6, lr=0.01, dead_after_tokens=300, aux_coefficient=aux_coefficient
            )
            for _ in range(400):
                z = torch.rand(64, 24, dtype=F64, generator=g) * (
                    torch.rand(64, 24, generator=g) < 0.08
                )
                state = ref.train_step(state, 3 * z @ directions, s).state
            return int((state.tokens_since_active < 1000).sum())

        assert alive_after(300.0) >= alive_after(0.0) + 3


class TestCountersAndThreshold:
    def test_tokens_since_active(self) -> None:
        mask = torch.tensor([[True, False, False], [True, False, True]])
        counter = ref.update_tokens_since_active(torch.tensor([7, 7, 7]), mask)
        assert counter.tolist() == [0, 9, 0]

    @given(st.lists(st.floats(0.01, 100), min_size=1, max_size=50))
    def test_threshold_is_the_bias_corrected_average(self, smallest: list[float]) -> None:
        threshold, updates = torch.zeros((), dtype=F64), 0
        raw = 0.0
        for n, value in enumerate(smallest, 1):
            picked = torch.tensor([value, value + 1], dtype=F64)
            threshold, updates = ref.update_threshold(threshold, updates, picked)
            raw = 0.99 * raw + 0.01 * value
            assert threshold.item() == pytest.approx(raw / (1 - 0.99**n), rel=1e-9)
        unchanged = ref.update_threshold(threshold, updates, torch.empty(0, dtype=F64))
        assert unchanged == (threshold, updates)


class TestScalingAndMetrics:
    def test_scale_constant(self) -> None:
        x = torch.randn(500, 16, dtype=F64) * 7
        center = ref.geometric_median(x)
        scaled = ref.scale_constant(x, center) * (x - center)
        assert scaled.norm(dim=1).mean().item() == pytest.approx(1, rel=1e-12)

    def test_layer_norm_round_trip_is_saelens(self) -> None:
        x = torch.randn(5, 8, dtype=F64) * 3 + 2
        statistics = ref.token_statistics(x)
        normed = ref.layer_norm(x, statistics)
        expected = (x[0] - x[0].mean()) / (x[0].var(unbiased=True).sqrt() + 1e-5)
        torch.testing.assert_close(normed[0], expected)
        back = ref.undo_layer_norm(normed, statistics)
        torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
        # The 1e-5 stays out of the inverse, as in SAELens, so the round trip is off by that much.
        torch.testing.assert_close(back - x, -1e-5 * normed, rtol=1e-6, atol=1e-12)

    def test_geometric_median(self) -> None:
        g = torch.Generator().manual_seed(0)
        x = torch.cat(
            [torch.randn(90, 3, dtype=F64, generator=g), torch.full((10, 3), 1e3, dtype=F64)]
        )
        median = ref.geometric_median(x, 200)
        # At the median the unit vectors towards the points cancel.
        pull = ((x - median) / (x - median).norm(dim=1, keepdim=True)).sum(0)
        assert pull.norm() < 1e-3
        assert median.norm() < 1  # ten outliers do not drag it along, as they do the mean (100)
        assert ref.geometric_median(x[:1].repeat(4, 1)).isfinite().all()

    def test_explained_variance(self) -> None:
        x = torch.randn(50, 4, dtype=F64)
        assert ref.explained_variance(x, x) == 1
        assert ref.explained_variance(x, x.mean(0).expand_as(x)).abs() < 1e-12
