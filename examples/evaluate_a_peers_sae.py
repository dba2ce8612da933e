"""Evaluate an SAE that SAELens made, with intervals and beside PCA.

    python examples/evaluate_a_peers_sae.py

The SAE and the activations are made here: sums of a few of 64 directions, which are the SAE's decoder.
With your own, ``fastsae.load`` takes the folder or the hub's "owner/name/folder".
"""

import tempfile

import torch
from sae_lens import TopKSAE, TopKSAEConfig

import fastsae

WIDTH, LATENTS, ACTIVE = 32, 64, 4


@torch.no_grad()
def main() -> fastsae.Evaluation:
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(LATENTS, WIDTH), dim=1)
    amounts = torch.rand(4096, LATENTS) * (torch.rand(4096, LATENTS) < ACTIVE / LATENTS)
    x = amounts @ directions

    theirs = TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=ACTIVE))
    theirs.W_dec.copy_(directions)
    theirs.W_enc.copy_(directions.T)
    folder = tempfile.mkdtemp()
    theirs.save_model(folder)

    sae = fastsae.load(folder)
    print(sae)
    result = fastsae.evaluate(sae, x)
    scores = result["topk"]
    ev = scores.explained_variance
    print(f"explained variance {ev:.3f}, 95 % interval {ev.low:.3f} to {ev.high:.3f}")
    print(f"PCA with {result.pca_components} components: {result.pca_explained_variance:.3f}")
    print(f"L0 {scores.l0:.2f}; {scores.alive} of {sae.d_sae} latents alive, {scores.dense} dense")
    print(f"differs from SAELens's own output by {float((theirs(x) - sae(x)).abs().max()):.1e}")
    return result


if __name__ == "__main__":
    main()
