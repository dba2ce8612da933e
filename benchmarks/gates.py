"""What must be right before anything is timed. Each check raises AssertionError and says by how much.

A trainer of the same mathematics must take the reference's step: the same selection, loss and gradients
(Adam's first moments after one step), at the size that is timed. A trainer of other mathematics (another
aux loss, clipping, an unconstrained decoder, per-token selection) must reconstruct as the reference does
from equal weights, and explain nearly as much as ours after the same steps: none is fast by not training.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from measure import Shape, activations
from torch import Tensor
from trainers import DEAD_AFTER, OURS, TRAINERS, Fastsae, Problem, Trainer, Weights

from fastsae.training.graphs import Graphs
from fastsae_kernels import reference

RELATIVE = {"fp32": 1e-4, "bf16": 2e-2}
"""Of the norm. fp32: sums of F products in another order. bf16: operands of 8 bits in four products."""
COARSE = 0.2
"""Of the gradients' norm, where bf16 rounds the pre-activations before selecting: about 2 % of the selected
are then others, near the threshold, and the error is the square root of that share."""
EIGHT_BITS = 0.05
"""Of the moments' norm, where they are kept in codes 9 % apart, rounded at random: 0.09 / √6 of it."""
REPLAYED_STEPS = 3 * Graphs.EAGER_CALLS  # some eager, one captured, the others replayed
RECONSTRUCTION = 1e-3  # of its norm, in fp32: latents at the threshold may change places
TRAINED, TRAINED_STEPS, TRAINED_LR = Shape(256, 64, 512, 8), 300, 3e-3
CLOSE = 0.1
"""By how much explained variance after ``TRAINED_STEPS`` steps may differ. Peers' schedules are made for
longer runs: this finds what does not train; ``quality.py`` compares which trains best."""


def require_close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    assert error <= tolerance, f"{what}: relative error {error:.2e}, more than {tolerance:.0e}"


def settled(problem: Problem) -> Problem:
    """``problem`` without what rounding alone could decide: of bf16 numbers if low, its k near its own.

    Of the gaps between neighbouring values around the K-th largest, the selection ends at the widest. Not
    far from K: a latent that is a token's only one reconstructs it along its own row, and its gradient is
    nothing but rounding.
    """
    if problem.low:
        batches = [x.bfloat16().float() for x in problem.batches]
        problem = replace(problem, batches=batches, rounded=True)
    weights, x = Weights(problem), problem.batches[0]
    pre = reference.pre_activations(x, weights.W_dec.T, weights.b_enc, weights.b_dec)
    K = problem.shape.K
    search = min(512, K // 4)
    values = pre.flatten().topk(K + search + 1).values[K - search :]
    at = K - search + 1 + int((values[:-1] - values[1:]).argmax())
    return replace(problem, shape=replace(problem.shape, k=(at + 0.5) / len(x)))


@torch.no_grad()
def check_step(trainer_type: type[Trainer], problem: Problem) -> None:
    """One step is the reference's: selection, loss, and both weights' gradients."""
    problem = settled(problem)
    trainer, weights, x = trainer_type(problem), Weights(problem), problem.batches[0]
    with torch.enable_grad():
        trainer.run(1)
    state = reference.initial_state(weights.W_dec, weights.b_dec)
    since = state.tokens_since_active
    if problem.dead is not None:
        since = since.masked_fill(problem.dead, DEAD_AFTER)
    # As given: the reference starts from rows of unit norm to the last bit.
    params = reference.Gradients(weights.W_dec.T, weights.b_enc, weights.W_dec, weights.b_dec)
    state = replace(state, tokens_since_active=since, params=params)
    settings = reference.Settings(
        k=problem.shape.k, k_aux=problem.k_aux, lr=problem.lr, aux_coefficient=18.75
    )
    expected = reference.train_step(state, x, settings)
    if problem.dead is not None:
        assert expected.aux > 0, "the aux loss does not run"
    coarse = problem.low and trainer_type.coarse_selection
    tolerance = COARSE if coarse else RELATIVE[problem.precision]
    of_moments = max(tolerance, EIGHT_BITS) if trainer.rounded_moments else tolerance
    W_enc, _, W_dec, _ = (moment.m for moment in expected.state.moments)
    of_W_enc, of_W_dec = trainer.moments()
    require_close("gradient of W_enc", of_W_enc, W_enc.T, of_moments)
    require_close("gradient of W_dec", of_W_dec, W_dec, of_moments)
    if trainer.counts is not None:
        wrong = int((trainer.counts != expected.mask.sum(0)).sum())
        assert wrong == 0, f"selection: {wrong} latents have other counts than the reference"


def check_replays(
    trainer_type: type[Fastsae], problem: Problem, steps: int = REPLAYED_STEPS
) -> None:
    """``steps`` that replay a graph leave the bits that the same steps leave without one."""
    trainer, eager = trainer_type(problem), trainer_type.eager()(problem)
    for each in (trainer, eager):
        each.run(steps)
    expected = eager.state()
    wrong = [name for name, found in trainer.state().items() if not found.equal(expected[name])]
    assert not wrong, f"replayed steps give another {', '.join(wrong)} than eager ones"


@torch.no_grad()
def check_reconstruction(trainer_type: type[Trainer], problem: Problem) -> None:
    """From equal weights the reference's reconstruction, hence its loss."""
    trainer, weights, x = trainer_type(problem), Weights(problem), problem.batches[0]
    pre = reference.pre_activations(x, weights.W_dec.T, weights.b_enc, weights.b_dec)
    if trainer.per_token:
        mask = reference.topk_mask(pre, int(problem.shape.k))
    else:
        mask = reference.batch_topk_mask(pre, problem.shape.K)
    expected = reference.decode(pre * mask, weights.W_dec, weights.b_dec)
    tolerance = RECONSTRUCTION if problem.precision == "fp32" else RELATIVE["bf16"]
    require_close("reconstruction", trainer.reconstruct(x), expected, tolerance)


def trained_variance(trainer_type: type[Trainer], device: str) -> float:
    """Explained variance after ``TRAINED_STEPS`` steps at a small size, on the data trained on."""
    batches = activations(TRAINED, 16, device)
    trainer = trainer_type(Problem(TRAINED, batches, device, lr=TRAINED_LR))
    trainer.run(TRAINED_STEPS)
    found = torch.cat([trainer.reconstruct(batch) for batch in batches[:4]])
    return float(reference.explained_variance(torch.cat(batches[:4]), found))


def check(name: str, problem: Problem) -> dict[str, float]:
    """All that is asked of trainer ``name`` before its steps of ``problem`` are timed."""
    trainer_type, ours = TRAINERS[name], TRAINERS[OURS]
    if trainer_type.exact:
        check_step(trainer_type, problem)
        if trainer_type.replays(problem.device):
            check_replays(trainer_type, problem)
        if not trainer_type.rounded_moments:
            return {}
    else:
        check_reconstruction(trainer_type, problem)
    found, expected = (trained_variance(each, problem.device) for each in (trainer_type, ours))
    message = f"explained variance after {TRAINED_STEPS} steps: {found:.3f}, ours {expected:.3f}"
    assert abs(expected - found) <= CLOSE, message
    return {"explained_variance": found, "explained_variance_ours": expected}
