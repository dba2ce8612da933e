"""Every tolerance of the test suite, with the reason for its size."""

OTHER_PROGRAM = 1e-5
"""Of the largest value: what a reader of our files, or we of theirs, may differ by in fp32.

Both sides compute the same formula; folding a constant into a bias and another order of the sums of a
matrix product each cost a few units in the last place (1.2e-7) of the largest term.
"""

FOLDED_FLOAT64 = 1e-12
"""Of the largest value: the same in fp64, where a unit in the last place is 2.2e-16."""
