"""The bytes that a process receives from the others in one step, from the sizes alone."""

from __future__ import annotations

from ..team import Team, added_bytes, cover, gathered_bytes


def received_bytes(
    *,
    rank: int,
    size: int,
    d_in: int,
    d_sae: int,
    shards: int,
    lanes: int,
    tokens: int,
    budget: int,
    quota: float,
    k_aux: int | None,
    aux_runs: bool = True,
    activation_bytes: int = 2,
    bytes_each: int = 4,
) -> dict[str, int]:
    """What process ``rank`` of ``size`` receives in a step of :class:`ShardedUpdate` and for its batch, by purpose
    as :attr:`Team.received` has it; exactly. Nothing if it is alone.

    Args:
        tokens: of the batch, dealt to the ``lanes``.
        budget: entries that are selected, a ``quota`` of them as peaks.
        k_aux: dead latents per token in aux-k; None if its weight is 0.
        aux_runs: whether any latent is dead.
        activation_bytes: of a number as activations wait to be trained on.
        bytes_each: of a number of the SAE's.
    """
    if size == 1:
        return {}
    team = Team(rank, size)
    by_lane = [tokens // lanes + (lane < tokens % lanes) for lane in range(lanes)]
    from_lanes = [sum(by_lane[lane] for lane in team.hosted(lanes, r)) for r in range(size)]
    # Of what is split by tokens, whichever lane they came from.
    rows, hosted = team.counts(tokens), team.counts(shards)
    pieces = [len(cover((0, shards), team.hosted(shards, r))) for r in range(size)]
    one = [1] * size  # from each process

    def exchanged(parts: list[int], width: int) -> int:
        return (sum(parts) - parts[rank]) * rows[rank] * width * bytes_each

    aux = 0
    if k_aux is not None:
        aux = gathered_bytes(hosted, 8)  # how many are dead
        if aux_runs:
            aux += exchanged(hosted, k_aux) + gathered_bytes(rows, (1 + shards) * bytes_each)
            aux += exchanged(pieces, d_in) + gathered_bytes(rows, d_in * bytes_each)
    return {
        "activations": gathered_bytes(from_lanes, d_in * activation_bytes),
        "agreement": gathered_bytes(one, 8 * max(team.counts(lanes))) + gathered_bytes(one, 8),
        "selection": _selection_bytes(size, d_sae, shards, tokens, budget, quota, bytes_each),
        "partial sums": exchanged(pieces, d_in),
        "gradients": gathered_bytes(rows, d_in * bytes_each),
        "scalars": gathered_bytes(hosted, d_in * bytes_each),
        **({} if k_aux is None else {"aux-k": aux}),
    }


def _selection_bytes(
    size: int, d_sae: int, shards: int, tokens: int, budget: int, quota: float, bytes_each: int
) -> int:
    """As ``select_across`` says."""
    digits = [2**15, *[2**16] * (bytes_each // 2 - 1), tokens + 1, shards]
    once = sum(added_bytes(4 * values, size) for values in digits)
    most_peaks = int(quota * min(budget, tokens * d_sae))
    if most_peaks == 0:
        return once
    return once + (once if most_peaks < d_sae else added_bytes(8, size))
