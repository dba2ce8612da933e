"""The processes of one run, and the few things they exchange; most runs are one process.

A run is cut into parts that the number of processes does not touch: lanes of text, shards of latents. The
processes host parts, consecutive ones each. What crosses between processes is moved, and integers are added;
floats are never added by the communication library, whose order of addition is its own. So a run has the
same bits on any number of processes.
"""

from __future__ import annotations

import atexit
import datetime
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import errors
from .errors import ConfigError, FastsaeError, Interrupted, PeerLostError

T = TypeVar("T")

PATIENCE = datetime.timedelta(minutes=15)
"""A process that says nothing for so long is taken for lost. Longer than a lost network is waited for."""


class Team:
    """The processes that train together; made by :func:`join`.

    Every method but ``hosted`` is to be called by all processes at the same place. Each raises PeerLostError
    where another process is gone.

    Attributes: ``rank`` of this process among ``size``; ``received``: bytes that came from other processes,
    by purpose.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.received: Counter[str] = Counter()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def hosted(self, parts: int, rank: int | None = None) -> range:
        """Which of ``parts`` parts this process hosts, or that of ``rank``; of a single part, the first."""
        rank = self.rank if rank is None else rank
        first, last = (-(-each * parts // self.size) for each in (rank, rank + 1))
        return range(first, last)

    def counts(self, parts: int) -> list[int]:
        """How many of ``parts`` parts each process hosts."""
        return [len(self.hosted(parts, rank)) for rank in range(self.size)]

    # --- tensors ---

    def add_integers_(self, tensor: Tensor, purpose: str) -> Tensor:
        """``tensor``, of any integer dtype, becomes its sum over the processes."""
        assert not tensor.is_floating_point()
        if self.size > 1:
            with _peers():
                dist.all_reduce(tensor)
            self.received[purpose] += added_bytes(tensor.nbytes, self.size)
        return tensor

    def gather(self, mine: Tensor, counts: Sequence[int], purpose: str) -> Tensor:
        """The rows of all processes in their order, ``counts[r]`` from process r."""
        if self.size == 1:
            return mine
        most, padded = max(counts), mine.contiguous()
        if len(mine) < most:
            padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
        rows = mine.new_empty(self.size * most, *mine.shape[1:])
        with _peers():
            # PyTorch 2.13 has it under another name.
            getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(rows, padded)
        self.received[purpose] += gathered_bytes(counts, padded[:1].nbytes)
        if min(counts) == most:
            return rows
        parts = rows.split(most)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def exchange(
        self, mine: Tensor, rows: Sequence[int], pieces: Sequence[int], purpose: str
    ) -> Tensor:
        """Everyone's pieces of this process's rows.

        ``mine [p, B, D]`` are this process's pieces for the rows of all, ``rows[r]`` of process r, which
        has ``pieces[r]`` of them. Returns ``[sum(pieces), rows[rank], D]``.
        """
        if self.size == 1:
            return mine
        own, width = rows[self.rank], mine.shape[2]
        sent = torch.cat([part.reshape(-1) for part in mine.split(list(rows), dim=1)])
        sizes = [count * own * width for count in pieces]
        got = mine.new_empty(sum(sizes))
        with _peers():
            dist.all_to_all_single(got, sent, sizes, [len(mine) * n * width for n in rows])
        self.received[purpose] += (sum(sizes) - sizes[self.rank]) * got.element_size()
        return got.view(sum(pieces), own, width)

    # --- what the host agrees on ---

    def agree(self, *values: int, purpose: str = "agreement") -> list[list[int]]:
        """The ``values`` of every process, in their order. Seen at once where a process is gone."""
        if self.size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64)[None]
        return self.gather(mine, [1] * self.size, purpose).tolist()

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.agree(0)

    def tell(self, value: T, source: int = 0) -> T:
        """``value`` of the process ``source``, which JSON can hold; what the others give is not looked at."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.rank == source else b""
        size = self.agree(len(text))[source][0]
        content = torch.zeros(size, dtype=torch.uint8)
        if text:
            content = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        with _peers():
            dist.broadcast(content, source)
        self.received["agreement"] += 0 if self.rank == source else size
        return json.loads(content.numpy().tobytes())

    def share(self, value: T) -> list[T]:
        """The ``value`` of every process, which JSON can hold, in their order."""
        return [self.tell(value, rank) for rank in range(self.size)]

    def on_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the first process, for JSON, or the error of the user that it raises
        there, on all of them."""
        if self.size == 1:
            return function()
        answer: dict[str, Any] = {}
        mended: FastsaeError | None = None
        if self.is_first:
            try:
                answer["value"] = function()
            except FastsaeError as error:
                mended, answer["error"] = error, [type(error).__name__, str(error)]
        answer = self.tell(answer)
        if mended is not None:
            raise mended
        if "error" in answer:
            name, message = answer["error"]
            raise getattr(errors, name)(message)
        return answer["value"]

    def require_same(self, what: dict[str, Any]) -> None:
        """Raise ConfigError, on all processes, if ``what`` is not the same on each of them."""
        first = self.tell(what)
        own = json.loads(json.dumps(what))
        differing = sorted(name for name in first | own if first.get(name) != own.get(name))
        said = self.agree(len(differing))
        for rank, (count,) in enumerate(said):
            if count:
                names = self.tell([[name, own.get(name)] for name in differing], rank)
                raise ConfigError(
                    f"process {rank} of {self.size} was started with something else than process 0: "
                    + "; ".join(
                        f"{name} = {value!r}, not {first.get(name)!r}" for name, value in names
                    )
                    + ". Start all processes with one command, in the same environment"
                )

    def says(self) -> bool:
        """Whether this process is the first to ask: of several that fail, one says why. Never fails; not
        to be called by all."""
        if self.size == 1 or _store is None:
            return True
        try:
            return _store.add("said", 1) == 1
        except RuntimeError:  # whoever was to be asked is gone
            return True


ALONE = Team()
"""A single process, whether or not there are others."""

_meeting: tuple[Any, int, int] | None = None
_groups = 0
_store: Any = None  # one of torch.distributed's, as the one of the meeting
_current: Team | None = None


def is_launched() -> bool:
    """Whether this process was started as one of several (by torchrun, or with its variables)."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def join(patience: datetime.timedelta = PATIENCE) -> Team:
    """The team of this process: that of ``torchrun``, or of a process group that exists; else it is alone.

    Raises PeerLostError if the others do not come.
    """
    global _store, _current, _meeting, _groups
    if _current is not None:
        return _current
    if not is_launched() and not (dist.is_available() and dist.is_initialized()):
        return Team()
    if not dist.is_initialized():
        with _peers():
            if _meeting is None:
                _meeting = next(dist.rendezvous("env://", timeout=patience))  # pyright: ignore
            store, rank, size = _meeting
            # The store outlives a restart by torchrun, and a group that has been left: without a name of its
            # own the new group would dial the addresses of the old one.
            _groups += 1
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = _store = dist.PrefixStore(f"attempt-{attempt}-{_groups}", store)  # pyright: ignore
            store.set_timeout(patience)
            # Its functions keep, as a default argument, the group that exists when it is first imported: a
            # group that they hold outlives `leave`, and with it the threads that may abort the process.
            import torch.distributed.nn.functional

            cuda = torch.cuda.is_available() and dist.is_nccl_available()
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=store, rank=rank, world_size=size, timeout=patience,
            )  # fmt: skip
    _current = Team(dist.get_rank(), dist.get_world_size())
    atexit.register(leave)
    return _current


def leave() -> None:
    """End this process's membership, if there is one; after that it is alone."""
    global _store, _current
    if (
        _store is not None and dist.is_initialized()
    ):  # a group that was there before join is not ours
        # Without this, threads of the library now and then abort the process at its end.
        dist.destroy_process_group()
    _current = _store = None


@contextmanager
def membership() -> Iterator[Team]:
    """The team of this process, until the context ends.

    An error says which process it is of; where another process has said what is wrong, its ``told`` is
    True, where none has, False.
    """
    team = join()
    try:
        yield team
    except (FastsaeError, Interrupted) as error:
        error.told = not team.says()
        if team.rank:
            error.add_note(f"(process {team.rank} of {team.size})")
        if team.is_first and _store is not None:
            # Those that fail of the same may ask this very process who says why.
            deadline = time.monotonic() + 2
            with suppress(RuntimeError):  # whoever has the store is gone
                while _store.add("said", 0) < team.size and time.monotonic() < deadline:
                    time.sleep(0.05)
        if isinstance(error, PeerLostError):
            # Whoever ended by itself is to be seen ending first: its exit code says why.
            time.sleep(1)
        raise
    finally:
        leave()


@contextmanager
def _peers() -> Iterator[None]:
    """Errors of the communication, as what they nearly always are."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).strip().splitlines() or [repr(error)]
        reason = re.sub(r"^\[[^]]*\] ", "", said[0]).split(". ")[0]
        raise PeerLostError(
            f"another process of this run has ended, or did not answer ({reason}). What the last checkpoint "
            f"holds is safe: give the same command again, or let torchrun do so with --max-restarts 3"
        ) from error


# --- one order of addition, whatever the number of processes ---

Node = tuple[int, int]
"""Shards ``[first, last)`` whose partial sums are added before they are added to those of others: a node of
the binary tree over all shards, which halves them as evenly as it can, the larger half first."""


def split_node(node: Node) -> tuple[Node, Node]:
    """The two halves of a node of more than one shard."""
    middle = (node[0] + node[1] + 1) // 2
    return (node[0], middle), (middle, node[1])


def cover(node: Node, hosted: range) -> list[Node]:
    """The largest nodes below ``node`` that lie inside ``hosted``, from left to right."""
    first, last = node
    if hosted.start <= first and last <= hosted.stop:
        return [node]
    if last <= hosted.start or hosted.stop <= first or not len(hosted):
        return []
    left, right = split_node(node)
    return cover(left, hosted) + cover(right, hosted)


def tree_sum(node: Node, value: Callable[[Node], Tensor | None]) -> Tensor:
    """The sum over a node's shards; ``value`` gives a node's, or None where its halves are to be added."""
    found = value(node)
    if found is not None:
        return found
    left, right = split_node(node)
    return tree_sum(left, value) + tree_sum(right, value)


# --- the bytes that a process receives ---


def added_bytes(nbytes: int, size: int) -> int:
    """Of ``nbytes`` of integers that ``size`` processes add, as a ring moves them."""
    return 2 * (size - 1) * nbytes // size


def gathered_bytes(counts: Sequence[int], row_bytes: int) -> int:
    """Of rows that all processes gather: as many from each as the one with the most has."""
    return (len(counts) - 1) * max(counts) * row_bytes
