"""Every tolerance of the test suite, with its reason. Selections have none: they are compared exactly."""

import torch

# A sum of n products in float32, in any order, has rounding errors that add up like a random walk:
# about sqrt(n) half-units of the sum of magnitudes. 4 of them leave room for the unlucky entry among
# thousands and for matrix units, which align products before they add.
FLOAT32_UNIT = torch.finfo(torch.float32).eps / 2


def summation_bound(length: int) -> float:
    """Error of a float32 sum of ``length`` products, relative to the sum of their magnitudes."""
    return 4 * max(length, 1) ** 0.5 * FLOAT32_UNIT


# Gradients of the encoder in bfloat16 operands: the incoming gradient is rounded to 8 bits (2^-9), and
# the library rounds the result to 8 bits again; float16 rounds to 11 bits.
ENCODER_GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

OTHER_PROGRAM = 1e-5
"""Of the largest value: what a reader of our files, or we of theirs, may differ by in fp32.

Both sides compute the same formula; folding a constant into a bias and another order of the sums of a
matrix product each cost a few units in the last place (1.2e-7) of the largest term.
"""

FOLDED_FLOAT64 = 1e-12
"""Of the largest value: the same in fp64, where a unit in the last place is 2.2e-16."""


# Rounding to nearest, once, at a store: half a unit in the last place, relative.
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# Gradients of the decoder, relative to the largest. float32: sums of up to 150 products. The others:
# the residual is stored rounded, its products and the gradient are rounded once more each.
GRADIENT_OF_ROUNDED_INPUT = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}

# One fused step in float32, relative to the largest element: gradients are sums of up to 130 + 11
# products (1e-6), and Adam, with v kept far above eps², passes relative errors on unamplified.
FUSED_STEP = 4e-6

# A hundred steps in float64 against the reference, relative: 100 · 1e-16 per step, amplified where a
# v near zero divides.
FUSED_STEP_SHORT_RUN = 1e-9

# A thousand steps in float64 with the dictionary in shards beside the whole one, of the largest value: two
# sums of at most 64 terms run in another order.
SHARDS = 1e-9

# Tens of steps of the same in float32, where a v near zero divides.
SHARDS_FLOAT32 = 2e-4

# The threshold's average, relative: in float32, 1 - 0.99^n loses seven bits for n = 1.
THRESHOLD_AVERAGE = 2e-5

# A float32 row divided by its own norm: the error of the norm's sum and of one division.
UNIT_NORM = 4e-7

# Aux-k, relative to the largest element: three chained sums of at most 24 products. In 16 bits each
# operand of each product is rounded once.
AUX_K = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 2**-5,
    torch.float16: 2**-8,
}

# A product with dequantized weights in float16 beside bitsandbytes's kernel for CPUs, relative to its
# norm: that one rounds the blocks' scales, weights, inputs and outputs to bfloat16 (2^-9 each).
NF4_DEQUANTIZED = 2**-7

# A document's residuals beside those of the document alone, relative to their norm: the same
# products, summed in another order behind a mask. "none" is float32; NF4 keeps the residual in bfloat16, whose
# roundings (2^-9, several a layer) add up over eight layers.
SEPARATE_DOCUMENTS = {"none": 1e-4, "nf4-dequantized": 2**-4}

# A compiled float32 model, of the largest value: fused operations round at other places.
COMPILED = 1e-4

# Explained variance after 1000 free steps, one way beside another: the order of sums parts single weights
# by 1e-2, and what was learnt by a tenth of that.
FREE_STEPS = 0.002
