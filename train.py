"""Train a BatchTopK sparse autoencoder on the residual stream of a language model: `fastsae train`.

    python train.py --demo                            any machine, about a minute
    python train.py --layer 17 --k 64                 Gemma 4 E2B on FineWeb-Edu: the recipe
    python train.py --model DIR --text-files a.txt --layer 10 --k 32 --quantization none

A run that was stopped goes on when the same command is given again.
"""

import sys

from fastsae.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]], prog="train.py"))
