"""Small SAEs with nothing left at its initial value, and the baseline that larger ones are held to."""

import torch
from torch import Tensor

from fastsae import SAE
from fastsae.evaluation.covariance import RunningCovariance

MODEL = {
    "model_name": "some/model",
    "model_class_name": "AutoModelForCausalLM",
    "hook_name": "model.layers.3",
    "context_size": 128,
    "prepend_bos": True,
    "dataset_path": "some/text",
}


def small_sae(
    d_in: int = 12,
    d_sae: int = 40,
    k: float = 3.6,
    normalize: str = "none",
    inference: str = "topk",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **settings,
) -> SAE:
    """A BatchTopK SAE with random biases, scaling and threshold, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    settings.setdefault("metadata", MODEL)
    sae = SAE(d_in, d_sae, k, normalize=normalize, generator=generator, **settings)
    with torch.no_grad():
        sae.W_enc += 0.1 * torch.randn(d_in, d_sae, generator=generator)
        sae.b_enc.normal_(generator=generator)
        sae.b_dec.normal_(generator=generator)
        if normalize == "scalar":
            sae.scale.fill_(0.3 + float(torch.rand((), generator=generator)))
        if "activation" not in settings:
            sae.inference = inference
            sae.activation.threshold.fill_(0.5 + float(torch.rand((), generator=generator)))
            sae.activation.threshold_updates.fill_(123)
    return sae.to(dtype).eval()


def activations(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Raw activations of norm about 3 sqrt(D) with an offset, as residual streams have."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=dtype) + 1


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, relative to the largest expected value."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


def pca_explained_variance(x: Tensor, components: int) -> float | None:
    """That of ``RunningCovariance`` for activations ``x [N, D]``, each row a document."""
    covariance = RunningCovariance(x.shape[1], x.device)
    covariance.add(x, torch.arange(len(x)))
    return covariance.pca_explained_variance(components)
