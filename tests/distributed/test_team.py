"""What the processes of a run exchange, and what they count of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsae.errors import ConfigError
from fastsae.team import (
    ALONE,
    Team,
    added_bytes,
    cover,
    gathered_bytes,
    join,
    split_node,
    tree_sum,
)
from tests.processes import run_together


def everything(team: Team) -> dict[str, Any]:
    """Every way of exchanging something, with what came of it on this process."""
    found: dict[str, Any] = {"rank": team.rank, "size": team.size}
    rows = [2 + rank for rank in range(team.size)]
    mine = torch.full((rows[team.rank], 3), float(team.rank))
    found["gathered"] = team.gather(mine, rows, "rows")
    found["sum"] = team.add_integers_(torch.arange(6, dtype=torch.int32) * (team.rank + 1), "sum")
    pieces = [1 + (rank == 0) for rank in range(team.size)]
    sent = torch.arange(sum(rows), dtype=torch.float64)[None, :, None].repeat(
        pieces[team.rank], 1, 2
    )
    sent += 100 * team.rank + 1000 * torch.arange(pieces[team.rank])[:, None, None]
    found["exchanged"] = team.exchange(sent, rows, pieces, "pieces")
    found["agreed"] = team.agree(team.rank, 7)
    found["told"] = team.tell({"from": team.rank, "nan": float("nan")}, team.size - 1)
    found["value"] = team.on_first(lambda: [team.rank, "first"])
    for name, function in (("error", _refuse), ("differs", lambda: _differ(team))):
        try:
            if name == "error":
                team.on_first(function)
            else:
                function()
        except ConfigError as error:
            found[name] = str(error)
    team.require_same({"a": 1, "b": [2, None]})
    found["says"] = [team.says()]
    found["received"] = dict(team.received)
    return found


def _refuse() -> None:
    raise ConfigError("no")


def _differ(team: Team) -> None:
    team.require_same({"torch": "2.13.0", "k": 8 + (team.rank == team.size - 1)})


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_exchanged(size: int, tmp_path: Path) -> None:
    found = run_together(size, everything, folder=tmp_path)
    rows = [2 + rank for rank in range(size)]
    owners = torch.tensor([rank for rank in range(size) for _ in range(rows[rank])])
    for rank, each in enumerate(found):
        assert (each["rank"], each["size"]) == (rank, size)
        assert each["gathered"].equal(owners[:, None].expand(-1, 3).float())
        assert each["sum"].equal(torch.arange(6, dtype=torch.int32) * (size * (size + 1) // 2))
        first = sum(rows[:rank])
        own = torch.arange(first, first + rows[rank], dtype=torch.float64)
        pieces = [own, own + 1000, *(own + 100 * other for other in range(1, size))]
        assert each["exchanged"].equal(torch.stack(pieces)[..., None].expand(-1, -1, 2))
        assert each["agreed"] == [[other, 7] for other in range(size)]
        assert each["told"]["from"] == size - 1 and each["told"]["nan"] != each["told"]["nan"]
        assert each["value"] == [0, "first"]
        assert each["error"] == "no"
        assert f"process {size - 1} of {size}" in each["differs"]
        assert "k = 9, not 8" in each["differs"] and "torch" not in each["differs"]
        received = each["received"]
        assert received["rows"] == gathered_bytes(rows, 12) == (size - 1) * max(rows) * 12
        assert received["sum"] == added_bytes(24, size) == 2 * (size - 1) * 24 // size
        others = size + 1 - (2 if rank == 0 else 1)
        assert received["pieces"] == others * rows[rank] * 2 * 8
    assert sum(each["says"][0] for each in found) == 1


def test_one_process_exchanges_nothing() -> None:
    x = torch.ones(3, 2)
    assert ALONE.gather(x, [3], "rows") is x
    assert ALONE.add_integers_(torch.arange(3), "sum").equal(torch.arange(3))
    assert ALONE.agree(1, 2) == [[1, 2]] and ALONE.says()
    assert not ALONE.received
    with pytest.raises(ConfigError, match="no"):
        ALONE.on_first(_refuse)


def test_a_build_of_torch_without_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in ("is_initialized", "rendezvous", "init_process_group"):
        monkeypatch.delattr(torch.distributed, name)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    assert join().size == 1


@given(st.integers(1, 40), st.integers(1, 12))
def test_parts_are_hosted_once_and_in_order(parts: int, size: int) -> None:
    hosted = [part for rank in range(size) for part in Team(rank, size).hosted(parts)]
    assert hosted == list(range(parts))
    assert sum(Team(0, size).counts(parts)) == parts


@given(st.integers(1, 40), st.integers(1, 12), st.randoms())
def test_the_tree_adds_in_one_order(shards: int, size: int, random: Any) -> None:
    """The nodes that processes send are disjoint, cover all, and their sum has the bits of the shards'."""
    values = torch.tensor(
        [random.uniform(-1, 1) * 10 ** random.randint(-6, 6) for _ in range(shards)]
    )

    def leaf(node: tuple[int, int]) -> torch.Tensor | None:
        return values[node[0]] if node[1] - node[0] == 1 else None

    whole = tree_sum((0, shards), leaf)
    sent = {}
    for rank in range(size):
        for node in cover((0, shards), Team(rank, size).hosted(shards)):
            sent[node] = tree_sum(node, leaf)
    assert sorted(i for node in sent for i in range(*node)) == list(range(shards))
    assert tree_sum((0, shards), sent.get).equal(whole)


def test_the_halves_of_a_node() -> None:
    assert split_node((0, 5)) == ((0, 3), (3, 5))
    assert cover((0, 8), range(2, 8)) == [(2, 4), (4, 8)]
    assert cover((0, 8), range(3, 3)) == []
