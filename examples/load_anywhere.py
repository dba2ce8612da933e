"""Write one SAE in every format, and load each file in the library it is for.

    python examples/load_anywhere.py FOLDER

Prints how far each library's reconstructions are from ours; what is not installed is left out.
"""

import os
import sys
from pathlib import Path

import torch

import fastsae

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its Triton decoder needs a GPU


def saelens(folder: Path):
    from sae_lens import SAE

    return SAE.load_from_disk(folder)


def dictionary_learning(folder: Path):
    from dictionary_learning.utils import load_dictionary

    return load_dictionary(str(folder), device="cpu")[0]


def sparsify(folder: Path):
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder, device="cpu")
    return lambda x: sae(x).sae_out


@torch.no_grad()
def main(folder: str) -> dict[str, float]:
    x = torch.randn(4096, 8) @ torch.randn(8, 32) + 1  # activations [tokens, width]
    sae = fastsae.train(x.split(256), fastsae.TrainConfig(d_sae=128, k=8, lr=1e-3, tokens=4096))
    found = {}
    for load in (saelens, dictionary_learning, sparsify):
        name = load.__name__
        written = fastsae.save(sae, Path(folder) / name, format=name)
        assert torch.equal(fastsae.load(written)(x), sae(x))
        try:
            theirs = load(written)
        except ImportError as error:
            print(f"{name:20} {error}")
            continue
        found[name] = float((theirs(x) - sae(x)).abs().max() / x.abs().max())
        print(f"{name:20} largest difference {found[name]:.1e} of the largest activation")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
