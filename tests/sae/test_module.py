"""The SAE: raw units everywhere, whatever the input scaling."""

import copy

import pytest
import torch

import fastsae
from fastsae_kernels import reference as ref

NORMALIZE = ["scalar", "none", "layer_norm"]


def make_sae(
    normalize: str = "none", seed: int = 0, dtype: torch.dtype = torch.float64
) -> fastsae.SAE:
    g = torch.Generator().manual_seed(seed)
    sae = fastsae.SAE(12, 60, 4, normalize=normalize, dtype=dtype, generator=g)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(60, generator=g))
        sae.b_dec.copy_(torch.randn(12, generator=g))
        sae.W_enc.add_(0.1 * torch.randn(12, 60, generator=g))
        sae.activation.threshold.fill_(0.8)
        if normalize == "scalar":
            sae.scale.fill_(0.37)
    return sae.eval()


def make_x(*shape: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(*shape, 12, dtype=torch.float64, generator=g) + 3


class TestForward:
    @pytest.mark.parametrize("mode", ["topk", "threshold", "batch"])
    def test_is_the_definition(self, mode: str) -> None:
        sae, x = make_sae(), make_x(9)
        pre = ref.pre_activations(x, sae.W_enc, sae.b_enc, sae.b_dec)
        mask = {
            "topk": ref.topk_mask(pre, 4),
            "batch": ref.batch_topk_mask(pre, 36),
            "threshold": pre > sae.activation.threshold,
        }[mode]
        z = pre * mask
        torch.testing.assert_close(sae.encode(x, mode), z)
        torch.testing.assert_close(sae(x, mode), ref.decode(z, sae.W_dec, sae.b_dec))

    @pytest.mark.parametrize("normalize", NORMALIZE)
    def test_leading_dimensions_are_tokens(self, normalize: str) -> None:
        sae, x = make_sae(normalize), make_x(2, 3, 5)
        for mode in ("topk", "threshold", "batch"):
            z, x_hat = sae.encode(x, mode), sae(x, mode)
            assert z.shape == (2, 3, 5, 60) and x_hat.shape == x.shape
            flat = x.reshape(30, 12)
            torch.testing.assert_close(z.reshape(30, 60), sae.encode(flat, mode))
            torch.testing.assert_close(x_hat.reshape(30, 12), sae(flat, mode))
        assert sae.encode(x[0, 0, 0]).shape == (60,)

    def test_layer_norm_is_undone_with_the_tokens_statistics(self) -> None:
        sae, x = make_sae("layer_norm"), make_x(7)
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        plain = copy.deepcopy(sae)
        plain.normalize = "none"
        normed = (x - mean) / (std + 1e-5)
        torch.testing.assert_close(sae.encode(x), plain.encode(normed))
        torch.testing.assert_close(sae(x), plain(normed) * std + mean)
        with pytest.raises(ValueError, match="statistics=sae"):
            sae.decode(sae.encode(x))
        assert plain.token_statistics(x) is None

    def test_encode_sparse_is_encode(self) -> None:
        sae, x = make_sae("scalar"), make_x(3, 4)
        csr = sae.encode_sparse(x)
        z = torch.zeros(12, 60, dtype=torch.float64)
        for token in range(12):
            span = slice(csr.offsets[token], csr.offsets[token + 1])
            assert csr.indices[span].tolist() == sorted(csr.indices[span].tolist())
            z[token, csr.indices[span].long()] = csr.values[span]
        assert z.equal(sae.encode(x).reshape(12, 60))
        assert csr.indices.dtype == csr.offsets.dtype == torch.int32 and len(csr.values) == 48

    def test_wrong_width_is_refused(self) -> None:
        sae = make_sae()
        with pytest.raises(ValueError, match=r"activations \[..., 12\], got \(3, 11\)"):
            sae(torch.zeros(3, 11))
        with pytest.raises(ValueError, match=r"latents \[..., 60\], got \(3, 12\)"):
            sae.decode(torch.zeros(3, 12))

    def test_half_precision_activations_are_read(self) -> None:
        sae = make_sae(dtype=torch.float32)
        x = make_x(5).bfloat16()
        assert sae(x).equal(sae(x.float())) and sae(x).dtype == torch.float32


class TestScaling:
    @pytest.mark.parametrize("mode", ["topk", "threshold", "batch"])
    def test_folding_changes_no_output(self, mode: str) -> None:
        sae, x = make_sae("scalar"), make_x(9)
        z, x_hat, threshold = sae.encode(x, mode), sae(x, mode), sae.threshold
        W_enc, W_dec = sae.W_enc.clone(), sae.W_dec.clone()
        assert sae.fold_scaling().normalize == "none"
        torch.testing.assert_close(sae.encode(x, mode), z, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sae(x, mode), x_hat, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sae.threshold, threshold)
        assert sae.W_enc.equal(W_enc) and sae.W_dec.equal(W_dec)
        sae.fold_scaling()
        torch.testing.assert_close(sae(x, mode), x_hat, rtol=1e-12, atol=1e-12)

    def test_scale_is_really_applied(self) -> None:
        sae, x = make_sae("scalar"), make_x(9)
        unscaled = copy.deepcopy(sae)
        unscaled.normalize = "none"
        torch.testing.assert_close(sae.encode(x), unscaled.encode(0.37 * x) / 0.37)
        torch.testing.assert_close(sae(x), unscaled(0.37 * x) / 0.37)


class TestLoss:
    @pytest.mark.parametrize("normalize", NORMALIZE)
    def test_is_the_definition_after_scaling(self, normalize: str) -> None:
        sae, x = make_sae(normalize).train(), make_x(9)
        dead = torch.arange(60) % 2 == 0
        scaled = {
            "none": x,
            "scalar": 0.37 * x,
            "layer_norm": ref.layer_norm(x, ref.token_statistics(x)),
        }[normalize]
        loss = sae.loss(x, dead, aux_coefficient=0.5, k_aux=3)
        pre = ref.pre_activations(scaled, sae.W_enc, sae.b_enc, sae.b_dec)
        x_hat = ref.decode(pre * ref.batch_topk_mask(pre, 36), sae.W_dec, sae.b_dec)
        error = ref.squared_error(scaled, x_hat)
        aux = ref.aux_k_loss(pre, scaled - x_hat, sae.W_dec, dead, 3)
        torch.testing.assert_close(loss.error, error)
        torch.testing.assert_close(loss.aux, aux)
        torch.testing.assert_close(loss.loss, error.log() + 0.5 * aux)
        plain = sae.loss(x, dead, objective="plain", aux_coefficient=0.5, k_aux=3)
        torch.testing.assert_close(plain.loss, error + 0.5 * aux)
        assert aux > 0
        torch.testing.assert_close(loss.reconstruction, sae.eval()(x, "batch"))
        torch.testing.assert_close(loss.latents, sae.encode(x, "batch"))

    @pytest.mark.parametrize(("objective", "weight"), [("log", 18.75), ("plain", 0.0625)])
    def test_gradients_are_the_written_out_ones(self, objective: str, weight: float) -> None:
        sae, x = make_sae().train(), make_x(30)
        dead = torch.arange(60) % 2 == 0
        loss = sae.loss(x, dead, objective=objective, k_aux=3)
        loss.loss.backward()
        expected = ref.gradients(
            x, ref.Gradients(sae.W_enc.detach(), sae.b_enc.detach(), sae.W_dec.detach(), sae.b_dec.detach()),
            loss.latents > 0, dead, aux_coefficient=weight, k_aux=3, objective=objective,
        )  # fmt: skip
        for name, gradient in expected._asdict().items():
            torch.testing.assert_close(getattr(sae, name).grad, gradient, msg=name)

    def test_nothing_dead_means_no_aux(self) -> None:
        sae, x = make_sae().train(), make_x(9)
        assert sae.loss(x).aux == 0
        assert sae.loss(x, torch.zeros(60, dtype=torch.bool)).aux == 0

    def test_bf16_operands_are_rounded_and_accumulated_in_fp32(self) -> None:
        sae, x = make_sae(dtype=torch.float32), make_x(9).float()
        sae.precision = "bf16"
        centred = (x - sae.b_dec).bfloat16().double()
        pre = (centred @ sae.W_enc.bfloat16().double()).float() + sae.b_enc
        expected = torch.where(ref.topk_mask(pre, 4), pre, 0)
        torch.testing.assert_close(sae.encode(x), expected)
        assert not sae.encode(x).equal(make_sae(dtype=torch.float32).encode(x))


class TestConstruction:
    def test_start(self) -> None:
        sae = fastsae.SAE(12, 60, 4, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(60))
        assert sae.W_enc.equal(sae.W_dec.T / 4) and not sae.b_enc.any() and not sae.b_dec.any()
        assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
        again = fastsae.SAE(12, 60, 4, generator=torch.Generator().manual_seed(3))
        assert again.W_dec.equal(sae.W_dec)

    def test_both_matrices_stay_feature_major(self) -> None:
        sae = fastsae.SAE(12, 60, 4)
        other = fastsae.SAE(12, 60, 4)
        other.load_state_dict(sae.state_dict())
        for each in (sae, copy.deepcopy(sae), other, sae.double()):
            assert each.W_enc.shape == (12, 60) and each.W_enc.T.is_contiguous()
            assert each.W_dec.shape == (60, 12) and each.W_dec.is_contiguous()

    def test_state_dict_has_the_fields_names(self) -> None:
        assert {"W_enc", "W_dec", "b_enc", "b_dec"} < set(fastsae.SAE(12, 60, 4).state_dict())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"d_in": 0, "d_sae": 5, "k": 1}, "at least 1"),
            ({"d_in": 5, "d_sae": 4, "k": 5}, "k = 5 is more than d_sae = 4"),
            ({"d_in": 5, "d_sae": 4, "k": 0}, "k must be a finite number above 0"),
            ({"d_in": 5, "d_sae": 4}, "needs k"),
            ({"d_in": 5, "d_sae": 4, "k": 1, "normalize": "rms"}, "'rms'"),
        ],
    )
    def test_impossible_sizes(self, arguments: dict, message: str) -> None:
        with pytest.raises(fastsae.ConfigError, match=message):
            fastsae.SAE(**arguments)

    def test_an_activation_that_knows_one_way_refuses_another(self) -> None:
        sae = fastsae.SAE(12, 60, activation=fastsae.JumpReLU(torch.full((60,), 0.5)))
        assert sae.k is None and sae.inference is None
        assert (sae.encode(make_x(4).float()) > 0).any()
        with pytest.raises(fastsae.ConfigError, match="selects by JumpReLU"):
            sae.encode(torch.zeros(1, 12), "topk")
        with pytest.raises(fastsae.ConfigError, match="one way to select"):
            sae.inference = "topk"


class TestParts:
    @pytest.mark.parametrize(("latents", "width"), [(2 * 1024 + 3, 3), (1040, 1), (7, 5), (3, 2)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_begin_as_in_the_whole_which_is_one_draw(
        self, latents: int, width: int, dtype: torch.dtype
    ) -> None:
        g = torch.Generator().manual_seed(3)
        rows = ref.normalize_rows(torch.randn(latents, width, generator=g).to(dtype))

        def drawn(part: range | None) -> fastsae.SAE:
            g = torch.Generator().manual_seed(3)
            return fastsae.SAE(width, latents, 2, part=part, dtype=dtype, generator=g)

        assert drawn(None).W_dec.equal(rows) and drawn(None).W_enc.equal(rows.T / 4)
        for part in (range(latents // 3), range(latents // 3, latents), range(1, 1)):
            sae = drawn(part)
            assert sae.W_dec.equal(rows[part.start : part.stop])
            assert sae.W_enc.equal(sae.W_dec.T / 4) and sae.W_enc.T.is_contiguous()
            assert sae.d_sae == len(sae.b_enc) == len(part)

    def test_k_is_of_the_whole(self) -> None:
        assert fastsae.SAE(4, 40, 30, part=range(10)).k == 30
        with pytest.raises(fastsae.ConfigError, match="k = 41 is more than d_sae = 40"):
            fastsae.SAE(4, 40, 41, part=range(10))
