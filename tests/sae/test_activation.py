"""BatchTopK, TopK and JumpReLU as people use them."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsae
from fastsae_kernels import reference as ref

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_pre(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class TestBatchTopK:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40), (40,), (1, 33), (2, 2, 2, 31)])
    def test_training_keeps_the_largest_of_the_batch(
        self, shape: tuple, dtype: torch.dtype
    ) -> None:
        pre = random_pre(*shape, dtype=dtype)
        z = fastsae.BatchTopK(3)(pre)
        assert z.shape == pre.shape and z.dtype == pre.dtype
        rows = pre.reshape(-1, shape[-1])
        mask = ref.batch_topk_mask(rows, ref.num_selected(3, *rows.shape)).reshape(shape)
        assert z.equal(torch.where(mask, pre, 0))
        assert mask.any()

    @pytest.mark.parametrize("quota", [0.3, 1.0])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_quota_of_k_goes_first_to_each_latents_largest(
        self, dtype: torch.dtype, quota: float
    ) -> None:
        pre = random_pre(4, 5, 40, dtype=dtype)
        module = fastsae.BatchTopK(2.5, latent_quota=quota)
        z = module(pre)
        rows = pre.reshape(20, 40)
        mask = ref.batch_topk_mask(rows, 50, quota)
        assert z.reshape(20, 40).equal(torch.where(mask, rows, 0))
        others = rows[mask & ~ref.peaks(rows, int(50 * quota))]
        assert float(module.threshold) == pytest.approx(float(others.min()), rel=1e-6)
        if quota == 1:
            assert (z.reshape(20, 40) > 0).any(0).all()
        # Inference has no quota, even over a batch, and the threshold stays what it is.
        threshold = module.threshold.clone()
        plain = fastsae.BatchTopK(2.5)(pre)
        assert module(pre, "batch").equal(plain) and module.eval()(pre, "batch").equal(plain)
        assert module.threshold.equal(threshold)
        module.train().latent_quota = 0.0
        assert module(pre).equal(plain)

    @given(st.floats(0.01, 60), st.integers(1, 9), st.integers(0, 999))
    @settings(max_examples=50)
    def test_budget_of_any_k(self, k: float, tokens: int, seed: int) -> None:
        pre = (
            random_pre(tokens, 20, seed=seed).abs() + 0.1
        )  # all positive: the budget is met exactly
        assert int((fastsae.BatchTopK(k)(pre) > 0).sum()) == min(int(k * tokens), pre.numel())

    def test_training_and_eval_differ_as_documented(self) -> None:
        pre = random_pre(50, 30).abs()
        pre[0] += 100  # one loud token takes what it can of the batch's budget
        module = fastsae.BatchTopK(4)
        counts = (module(pre) > 0).sum(1)
        assert counts[0] == 30 and counts.sum() == 200
        assert ((module.eval()(pre) > 0).sum(1) == 4).all()

    def test_inference_modes(self) -> None:
        pre = random_pre(20, 30)
        module = fastsae.BatchTopK(2.6).eval()
        module.threshold.fill_(1.5)
        assert module.k_per_token == 3
        assert module(pre, "threshold").equal(torch.where(pre > 1.5, pre, 0))
        assert int((module(pre, "batch") > 0).sum()) == 52
        assert module(pre, "topk").equal(module(pre))
        module.inference = "threshold"
        assert module(pre).equal(torch.where(pre > 1.5, pre, 0))

    def test_k_below_a_half_keeps_one_per_token_in_eval(self) -> None:
        assert (fastsae.BatchTopK(0.2).eval()(random_pre(9, 30).abs()) > 0).sum(1).tolist() == [
            1
        ] * 9

    def test_a_zero_threshold_never_keeps_zeros_or_negatives(self) -> None:
        module = fastsae.BatchTopK(2, "threshold").eval()
        module.threshold.fill_(-1)
        assert module(torch.tensor([[-0.5, 0.0, 0.5]])).tolist() == [[0, 0, 0.5]]

    def test_gradient_reaches_kept_entries_alone(self) -> None:
        pre = random_pre(5, 20).requires_grad_()
        z = fastsae.BatchTopK(2)(pre)
        (z * torch.arange(1.0, 101).reshape(5, 20)).sum().backward()
        expected = torch.where(z > 0, torch.arange(1.0, 101).reshape(5, 20), 0)
        assert pre.grad is not None and pre.grad.equal(expected)

    @pytest.mark.parametrize("quota", [0.0, 0.5])
    def test_gradcheck(self, quota: float) -> None:
        pre = random_pre(4, 10, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(fastsae.BatchTopK(2, latent_quota=quota), pre)

    def test_threshold_follows_the_definition(self) -> None:
        module = fastsae.BatchTopK(2)
        threshold, updates = torch.zeros(()), 0
        for seed in range(30):
            pre = random_pre(8, 20, seed=seed) - (
                100 if seed % 7 == 0 else 0
            )  # some select nothing
            z = module(pre)
            threshold, updates = ref.update_threshold(threshold, updates, z[z > 0])
            assert module.threshold.item() == pytest.approx(threshold.item(), rel=1e-6)
            assert int(module.threshold_updates) == updates
        assert updates == 25

    def test_threshold_gives_k_on_held_out_tokens(self) -> None:
        """design: within 3 % of k."""
        module = fastsae.BatchTopK(8)
        for seed in range(300):
            module(random_pre(64, 200, seed=seed))
        l0 = (module.eval()(random_pre(2000, 200, seed=10**6), "threshold") > 0).sum() / 2000
        assert abs(float(l0) - 8) < 0.03 * 8

    def test_nothing_is_tracked_outside_training(self) -> None:
        module = fastsae.BatchTopK(2)
        module(random_pre(8, 20))
        before = copy.deepcopy(module.state_dict())
        for mode in ("topk", "threshold", "batch"):
            module(random_pre(8, 20, seed=1), mode)  # in training mode, but asked for inference
            module.eval()(random_pre(8, 20, seed=1), mode)
            module(random_pre(8, 20, seed=1))
            module.train()
        after = module.state_dict()
        assert all(after[name].equal(value) for name, value in before.items())
        module(random_pre(8, 20, seed=1))
        assert not module.threshold.equal(before["threshold"])

    def test_state_dict_and_pickle_carry_the_threshold(self) -> None:
        module = fastsae.BatchTopK(3)
        module(random_pre(8, 20))
        other = fastsae.BatchTopK(3)
        other.load_state_dict(module.state_dict())
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for copied in (other, copy.deepcopy(module), torch.load(file, weights_only=False)):
            assert copied.threshold.equal(module.threshold) and copied.threshold > 0
            assert int(copied.threshold_updates) == 1

    @pytest.mark.parametrize("mode", ["train", "quota", "topk", "threshold", "batch"])
    def test_compiles_without_a_graph_break(self, mode: str) -> None:
        module = fastsae.BatchTopK(3, latent_quota=0.5 if mode == "quota" else 0.0)
        if mode not in ("train", "quota"):
            module.inference = mode
            module.eval()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for tokens in (6, 9):
            pre = random_pre(tokens, 20, seed=tokens)
            expected = copy.deepcopy(module)(pre)
            assert compiled(pre).equal(expected)

    @pytest.mark.parametrize("k", [0, -1, float("nan"), float("inf"), "4", True])
    def test_impossible_k(self, k: object) -> None:
        with pytest.raises(fastsae.ConfigError, match="k must be a finite number above 0"):
            fastsae.BatchTopK(k)

    @pytest.mark.parametrize("quota", [-0.1, 1.5, float("nan")])
    def test_impossible_quota(self, quota: float) -> None:
        with pytest.raises(fastsae.ConfigError, match="latent_quota must be a share between 0 and"):
            fastsae.BatchTopK(4, latent_quota=quota)

    def test_unknown_inference_mode(self) -> None:
        with pytest.raises(fastsae.ConfigError, match="'jump' is not one of"):
            fastsae.BatchTopK(2, inference="jump")
        with pytest.raises(fastsae.ConfigError, match="'jump' is not one of"):
            fastsae.BatchTopK(2)(torch.zeros(1, 2), inference="jump")

    @pytest.mark.parametrize("mode", ["train", "topk", "threshold", "batch"])
    def test_empty_batch(self, mode: str) -> None:
        module = fastsae.BatchTopK(2)
        z = module(torch.empty(0, 5)) if mode == "train" else module.eval()(torch.empty(0, 5), mode)
        assert z.shape == (0, 5)
        assert int(module.threshold_updates) == 0


class TestTopK:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_keeps_k_per_token_in_both_modes(self, dtype: torch.dtype) -> None:
        pre = random_pre(3, 4, 30, dtype=dtype)
        module = fastsae.TopK(5)
        expected = torch.where(ref.topk_mask(pre.reshape(12, 30), 5).reshape(pre.shape), pre, 0)
        assert module(pre).equal(expected)
        assert module.eval()(pre).equal(expected)
        assert expected.dtype == dtype and ((expected > 0).sum(-1) == 5).all()

    def test_k_beyond_the_latents_is_a_relu(self) -> None:
        pre = random_pre(5, 6)
        assert fastsae.TopK(99)(pre).equal(pre.relu())

    @pytest.mark.parametrize("k", [0, -2, 2.5, True])
    def test_impossible_k(self, k: object) -> None:
        with pytest.raises(fastsae.ConfigError, match="whole number of at least 1"):
            fastsae.TopK(k)

    def test_gradcheck_and_compile(self) -> None:
        pre = random_pre(4, 10, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(fastsae.TopK(3), pre)
        compiled = torch.compile(fastsae.TopK(3), fullgraph=True, backend="aot_eager")
        assert compiled(pre).equal(fastsae.TopK(3)(pre))


def test_jumprelu_thresholds_each_latent() -> None:
    module = fastsae.JumpReLU(torch.tensor([0.0, 1.0, -1.0]))
    pre = torch.tensor([[0.5, 0.5, -0.5], [0.0, 1.0, 0.0], [2.0, 2.0, 2.0]])
    assert module(pre).tolist() == [[0.5, 0, 0], [0, 0, 0], [2, 2, 2]]
