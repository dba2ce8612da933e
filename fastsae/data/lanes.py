"""Lanes: the stream in independent parts, each with its own text and pool, hosted by one process or several.

The number of lanes belongs to the run; who hosts them does not touch a single bit: a batch is the rows of
all lanes in their order, on every process.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..config import TrainConfig
from ..errors import CheckpointError, StreamError
from ..lm.held_out import HeldOutText
from ..team import Team
from .buffer import ActivationBuffer, Moment
from .harvest import ChunkSource
from .source import ActivationSource, Batches, IterableSource

log = logging.getLogger(__name__)


def lane_buffer(
    source: ChunkSource,
    config: TrainConfig,
    lane: int = 0,
    lanes: int = 1,
    beside: torch.cuda.Stream | None = None,
) -> ActivationBuffer:
    """The buffer of a lane: its share of the pool and of the rows of a batch, in an order of its own."""
    return ActivationBuffer(
        source,
        batch_size=_share(config.batch_size, lane, lanes),
        pool_tokens=config.pool_tokens // lanes,
        reuse=config.reuse,
        seed=config.resolved_stream_seed * lanes + lane,
        dtype=_pool_dtype(config),
        beside=beside,
    )


def _share(rows: int, lane: int, lanes: int) -> int:
    return rows // lanes + (lane < rows % lanes)


def _pool_dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.activation_dtype == "bf16" else torch.float32


class _OfSeveral(ActivationSource):
    """A source of several processes, and what they tell each other of it.

    Once this process or another one has failed within a batch there is nothing more to be told: the others
    are at another place. Then ``counts`` and ``state_dict`` raise CheckpointError.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self._within = False  # a batch that is begun and not served

    def _from_all(self, content: bytes) -> list[bytes]:
        """The ``content`` of every process, in their order."""
        if self._within and self._team.size > 1:
            raise CheckpointError(
                "a process failed in the middle of a step, so that what all of them hold cannot be put "
                "together; the last checkpoint is whole"
            )
        sizes = [size for (size,) in self._team.agree(len(content))]
        mine = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        parts = self._team.gather(mine, sizes, "state").split(sizes)
        return [part.numpy().tobytes() for part in parts]

    def _told_by_all(self, value: Any) -> list[Any]:
        """The ``value`` of every process, which JSON can hold, in their order."""
        return [json.loads(text) for text in self._from_all(json.dumps(value).encode())]

    def _summed(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The counts of all processes, under the names that any of them has."""
        total = Counter[str]()
        for each in self._told_by_all(counts):
            total.update(each)
        return dict(total)


class Lanes(_OfSeveral):
    """Activations of a language model on a text in ``config.lanes`` lanes.

    Held-out rows are the first of the undivided text, the same for any number of lanes; what is behind them
    is dealt to the lanes. When a lane has no more rows, that batch is the last one.

    ``counts`` and ``state_dict`` are of all lanes, and to be asked for by all processes at the same place,
    as ``next_batch`` is; ``seconds`` are those of this process. A state may be loaded by any number of
    processes.

    Args:
        whole: the undivided source, from which nothing more is to be drawn.
        team: the processes; each hosts some of the lanes, on one language model.
    """

    def __init__(self, whole: ChunkSource, config: TrainConfig, team: Team) -> None:
        super().__init__(team)
        lanes = config.lanes or 1
        self._whole = whole
        self._dtype = _pool_dtype(config)
        self._shares = [_share(config.batch_size, lane, lanes) for lane in range(lanes)]
        self._hosted = [team.hosted(lanes, rank) for rank in range(team.size)]
        self._sources = {lane: whole.lane(lane, lanes) for lane in self._hosted[team.rank]}
        self._buffers: dict[int, ActivationBuffer] = {}
        beside = None
        for lane, source in self._sources.items():
            buffer = self._buffers[lane] = lane_buffer(source, config, lane, lanes, beside)
            beside = buffer.beside  # the harvests of all lanes share it
        self._last: list[int] | None = None  # of the last batch, how many rows each lane gave
        self._before: list[Moment] = []  # of each buffer, before the batch that was begun last

    def next_batch(self) -> Batches | None:
        """``[batch_size, D]`` float32 for each hooked layer, the rows of all lanes, on every process; the
        last batch may be shorter; then None, on every process.

        Where a lane raises, the state is that before the batch.
        """
        if self._last is not None:
            return None
        self._before = [buffer.moment() for buffer in self._buffers.values()]
        self._within = True
        served = [buffer.next_batch() for buffer in self._buffers.values()]
        given = [batches for batches in served if batches is not None]
        rows = self._agreed([0 if batches is None else len(batches[0]) for batches in served])
        counts = [sum(rows[lane] for lane in hosted) for hosted in self._hosted]
        joined = []
        for site, width in enumerate(self._whole.widths):
            none = torch.empty(0, width, device=self._whole.device)
            mine = torch.cat([none, *(batches[site] for batches in given)])
            if self._team.size > 1:  # as the pool has them
                mine = self._team.gather(mine.to(self._dtype), counts, "activations").float()
            joined.append(mine)
        self._within = False
        if rows != self._shares:
            self._last = rows
        return tuple(joined) if any(rows) else None

    def _agreed(self, rows: list[int]) -> list[int]:
        """How many rows each lane gives, of those that this process hosts."""
        most = max(map(len, self._hosted))
        said = self._team.agree(*rows, *[0] * (most - len(rows)))
        return [
            n for own, hosted in zip(said, self._hosted, strict=True) for n in own[: len(hosted)]
        ]

    @property
    def ended(self) -> str | None:
        if self._last is None:
            return None
        pairs = enumerate(zip(self._last, self._shares, strict=True))
        short = [f"lane {i} gave {n:,} of its {share:,}" for i, (n, share) in pairs if n < share]
        return (
            f"{', '.join(short)} rows of the last batch; what the others of {len(self._shares)} lanes have left "
            f"is not read, and is less with fewer --lanes"
        )

    def held_out(self) -> Batches:
        """``[eval_tokens, D]`` float32 for each hooked layer, of the undivided text."""
        return self._whole.held_out()

    def held_out_text(self) -> HeldOutText | None:
        """The text of the held-out rows; None where the activations come from a cache."""
        return self._whole.held_out_text()

    @property
    def metadata(self) -> tuple[dict[str, Any], ...]:
        return self._whole.metadata

    @property
    def counts(self) -> dict[str, int]:
        found = Counter[str]()
        for lane, buffer in self._buffers.items():
            found.update(asdict(buffer.counts) | self._sources[lane].counts)
        return self._summed(found)

    @property
    def seconds(self) -> dict[str, float]:
        found = dict.fromkeys(self._whole.seconds, 0.0)
        for source in (self._whole, *self._sources.values()):
            for stage, seconds in source.seconds.items():
                found[stage] += seconds
        return found | {"harvest": sum(b.harvest_seconds for b in self._buffers.values())}

    def state_dict(self) -> dict[str, Any]:
        tensors: dict[str, Tensor] = {}
        metas: list[Any] = []
        for i, (lane, buffer) in enumerate(self._buffers.items()):
            state = buffer.state_dict(self._before[i] if self._within else None)
            tensors |= {_prefix(lane) + name: t for name, t in state["tensors"].items()}
            metas.append(state["meta"])
        files = self._from_all(safetensors.torch.save(tensors))
        lanes = [meta for told in self._told_by_all(metas) for meta in told]
        whole = self._whole.state_dict()
        tensors = {f"whole.{name}": t for name, t in whole["tensors"].items()}
        for file in files:
            tensors |= safetensors.torch.load(file)
        meta = {"whole": whole["meta"], "lanes": lanes, "last": self._last}
        return {"tensors": tensors, "meta": meta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state``, of all lanes, was taken. Raises CheckpointError if text or model do not
        fit."""
        tensors, meta = state["tensors"], state["meta"]
        whole = {"tensors": _below("whole.", tensors), "meta": meta["whole"]}
        self._whole.load_state_dict(whole)
        for lane, buffer in self._buffers.items():
            own = _below(_prefix(lane), tensors)
            buffer.load_state_dict({"tensors": own, "meta": meta["lanes"][lane]})
        self._last, self._within = meta["last"], False


class IterableLanes(_OfSeveral):
    """The iterables that several processes were given, one each, as one: a batch is the rows of all their
    batches, in the order of the processes, whatever the number of rows in each.

    It ends where the first of them does; what the others gave to that step is counted as ``unmatched``, and
    not trained on. A run goes on with as many processes as it was begun with. ``counts`` and ``state_dict``
    are to be asked for by all processes at the same place.

    Args:
        device: where the batches are to be, the same kind on all processes.
    """

    may_end_early = True
    initialization_batches = 1

    def __init__(self, source: IterableSource, team: Team, device: torch.device) -> None:
        super().__init__(team)
        self._source = source
        self._device = device
        self._unmatched = 0
        self._ended = False
        self._state = source.state_dict()  # behind the last batch that was served

    def next_batch(self) -> Batches | None:
        """As :class:`IterableSource`; raises StreamError if the processes have batches of other widths."""
        if self._ended:
            return None
        self._within = True
        own = self._source.next_batch() or (torch.empty(0, 0),) * self._source.layers
        said = self._team.agree(len(own[0]), *(layer.shape[1] for layer in own))
        rows, widths = [rows for rows, *_ in said], [widths for _, *widths in said]
        if 0 in rows:
            self._ended, self._within, self._unmatched = True, False, sum(rows)
            log.info(
                "the batches of process %d of %d ended; the %d rows that other processes gave to the same "
                "step are not trained on", rows.index(0), self._team.size, sum(rows),
            )  # fmt: skip
            return None
        for rank, found in enumerate(widths):
            if found != widths[0]:
                raise StreamError(
                    f"the batches of process {rank} have width {', '.join(map(str, found))}, those of process "
                    f"0 {', '.join(map(str, widths[0]))}; give all of them activations of the same place"
                )
        self._within, self._state = False, self._source.state_dict()
        return tuple(
            self._team.gather(layer.to(self._device), rows, "activations") for layer in own
        )

    @property
    def counts(self) -> dict[str, int]:
        return self._summed(self._source.counts) | {"unmatched": self._unmatched}

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": {}, "meta": {"processes": self._told_by_all(self._state["meta"])}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Pass over the batches that each process has drawn. Raises CheckpointError if there were more
        processes, or fewer."""
        saved = state["meta"].get("processes", [state["meta"]])
        if len(saved) != self._team.size:
            raise CheckpointError(
                f"the run was begun by {len(saved)} processes, each with batches of its own, and now there are "
                f"{self._team.size}; start as many as then, or anew under another --name"
            )
        self._state = {"tensors": {}, "meta": saved[self._team.rank]}
        self._source.load_state_dict(self._state)


def _prefix(lane: int) -> str:
    return f"lane.{lane:02}."


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
