"""A CUDA device that is not there: tensors that say they are on it and hold their values in host memory.

All is computed, so that a training takes its course; an operation of ``fastsae_kernels`` by its code for
CPUs, after its code for CUDA ran down to the launches, which compute nothing. Noted is what a GPU would
see: every launch, checked for what only shows there; every wait of the host; what a graph holds, which is
replayed as it was captured; and memory that one stream touches while another may still be at it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastsae_kernels import dispatch, encoder, segments

aten = torch.ops.aten
OURS = tuple(str(Path(__file__).parents[1] / room) for room in ("fastsae", "kernels"))
# What reads a result back to the host; a product of these with CPU tensors is the same without.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_unique2",
    "unique_dim", "repeat_interleave",
}  # fmt: skip
GRID = (2**31 - 1, 65535, 65535)


class OnCuda(torch.Tensor):
    """A tensor on the device; ``held`` are its values, ``memory`` what views of it share.

    To torch's C++ it is a tensor without data, for which no device need exist.
    """

    held: Tensor
    place: torch.device
    memory: Memory

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device, memory: Memory) -> OnCuda:
        meta = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
        self = torch.Tensor._make_subclass(cls, meta, False)
        self.held, self.place, self.memory = held, place, memory
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a tensor on a device that is gone")

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"OnCuda({self.held})"

    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    device = property(lambda self: self.place)

    def get_device(self) -> int:
        return self.place.index

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()


# --- streams ---


@dataclass
class Memory:
    """Who touched a piece of the device's memory last: streams, and at which of their moments."""

    written: tuple[Stream, int] | None = None
    read: dict[Stream, int] = field(default_factory=dict)
    rows: dict[int, Memory] = field(default_factory=dict)  # where single rows were touched

    def parts(self) -> list[Memory]:
        return [self, *self.rows.values()]

    def at(self, index: Tensor) -> list[Memory]:
        return [self.rows.setdefault(row, Memory()) for row in index.tolist()]


class Stream:
    """Work in order. ``seen``: how far other streams had come when this one goes on."""

    def __init__(self, device: torch.device, log: Log) -> None:
        self.device, self._log = device, log
        self.now, self.seen = 0, {}

    def sees(self, other: Stream | Event) -> None:
        for stream, moment in [*other.seen.items(), (getattr(other, "stream", other), other.now)]:
            self.seen[stream] = max(moment, self.seen.get(stream, 0))

    wait_stream = wait_event = sees

    def synchronize(self) -> None:
        self._log.wait("Stream.synchronize")
        self._log.host.sees(self)


class Event:
    def __init__(self, log: Log) -> None:
        self._log = log

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self._log.stream
        self.now, self.seen = self.stream.now, dict(self.stream.seen)

    def synchronize(self) -> None:
        # What was recorded some steps ago is no wait.
        if self.stream.now - self.now < self._log.LONG_AGO:
            self._log.wait("Event.synchronize")
        self._log.host.sees(self)


# --- what is noted ---


@dataclass(frozen=True)
class Wait:
    what: str
    where: tuple[str, ...]  # the functions of this package that led there, the innermost first


class Log:
    """What happened on the device since the last :meth:`clear`, and how far the host knows of it."""

    LONG_AGO = 100  # launches

    def __init__(self, device: torch.device) -> None:
        self.launches: list[str] = []  # kernels by name, torch's as ``aten.name``
        self.waits: list[Wait] = []
        self.faults: list[str] = []
        self.host, self.stream = Stream(device, self), Stream(device, self)
        self.capturing: Graph | None = None

    def clear(self) -> None:
        self.launches.clear()
        self.waits.clear()

    def fault(self, what: str) -> None:
        self.faults.append(f"{what} in {' <- '.join(_where()[:3])}")

    def wait(self, what: str) -> None:
        if self.capturing is not None:
            self.fault(f"{what} while a graph is captured")
        self.waits.append(Wait(what, _where()))

    def touch(self, what: str, reads: list[Memory], writes: list[Memory]) -> None:
        """Note a launch on the current stream, and whether it may run before what it depends on."""
        stream = self.stream
        stream.sees(self.host)
        known = lambda of: of is None or of[0] is stream or stream.seen.get(of[0], 0) >= of[1]
        for memory in [*reads, *writes]:
            if not known(memory.written):
                self.fault(f"{what} does not wait for the stream that writes what it touches")
        for memory in writes:
            if not all(map(known, memory.read.items())):
                self.fault(f"{what} writes what another stream may still read")
        stream.now += 1
        for memory in reads:
            memory.read[stream] = stream.now
        for memory in writes:
            memory.written, memory.read = (stream, stream.now), {}


def _where() -> tuple[str, ...]:
    """The functions of this package on the stack."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            found.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return tuple(found)


# --- graphs ---


class Graph:
    """Launches in order, with the tensors they were captured with."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._tape: list[tuple[Callable[[], Any], str, Any, list[Memory], list[Memory], int]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def pool(self) -> Graph:
        return self

    def add(
        self, again, name: str, result: Any, reads: list[Memory], writes: list[Memory], launches=1
    ) -> None:
        self._tape.append((again, name, result, reads, writes, launches))

    def keep(self, tensor: Tensor) -> None:
        """What is written to while capturing: it only happens at each replay."""
        self._before.append((tensor, tensor.clone()))

    def undo(self) -> None:
        for tensor, before in reversed(self._before):
            tensor.copy_(before)

    def replay(self) -> None:
        log = self._device.log
        log.launches.append("graph")
        with torch.utils._python_dispatch._disable_current_modes():
            for again, name, result, reads, writes, launches in self._tape:
                log.stream.now += launches - 1
                log.touch(name, reads, writes)
                for old, new in zip(_held(result), _held(again()), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _held(result: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    return [leaf.held if isinstance(leaf, OnCuda) else leaf for leaf in leaves]


# --- the device ---


class Device(TorchDispatchMode):
    """The stand-in, while it is entered; the tensors must not be used afterwards. ``failing``: no capture ends well."""

    def __init__(self, index: int = 1, count: int = 2, failing: bool = False) -> None:
        super().__init__()
        self.failing = failing
        self.place, self.count = torch.device("cuda", index), count
        self.current = 0
        self.log = Log(self.place)
        self._pinned: list[Tensor] = []
        self._arriving: list[tuple[Tensor, Stream, int]] = []
        self._variants: set[Any] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func.namespace == "fastsae":
            return self._operation(func, args, given)
        name = func._schema.name.removeprefix("aten::")
        if name == "_pin_memory" or kwargs.pop("pin_memory", False):
            result = args[0].clone() if name == "_pin_memory" else func(*args, **kwargs)
            self._pinned.append(result)
            return result
        ours = [t for t in given if isinstance(t, OnCuda)]
        wanted = kwargs.pop("device", None)
        place = self.place if wanted is not None and wanted.type in ("cuda", "meta") else None
        if name == "_to_copy" and ours and place and kwargs.get("dtype") in (None, ours[0].dtype):
            return ours[0]
        if wanted is None and ours:
            place = args[0].place if isinstance(args[0], OnCuda) else ours[0].place
        if name == "copy_":
            place = args[0].place if isinstance(args[0], OnCuda) else None
        if not ours and place is None:
            self._require_arrived(given, name)
            return func(*args, **kwargs) if wanted is None else func(*args, **kwargs, device=wanted)
        waits = self._waits(name, args, kwargs, given, place)
        if waits is not None:
            self.log.wait(waits)
        return self._run(func, name, args, kwargs, place, waits is not None)

    def _waits(self, name: str, args, kwargs, given: list[Tensor], place) -> str | None:
        """What the host waits for, if it does; tensors that are not where the others are, are faults."""
        copies = name in ("copy_", "_to_copy")
        elsewhere = [t for t in given if not isinstance(t, OnCuda)]
        if copies:
            source = args[1] if name == "copy_" else args[0]
            host = args[0] if name == "copy_" else None
            crosses = isinstance(source, OnCuda) != (place is not None)
            pinned = crosses and self._is_pinned(source if place is not None else host)
            # A copy to a new tensor in host memory that does not block is to pinned memory.
            pinned |= place is None and name == "_to_copy"
            later = bool(kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
            if crosses and not (later and pinned):
                return "copy from the device" if place is None else "copy to the device"
        elif any(t.dim() for t in elsewhere) and not name.startswith("index"):
            self.log.fault(f"{name} of tensors on the device and in host memory")
        elif name.startswith("index") and not name.startswith(("index_", "indices")):
            indices = [t for t in tree_leaves(args[1]) if isinstance(t, Tensor)]
            if any(t.dtype == torch.bool or not isinstance(t, OnCuda) for t in indices):
                return name
        return name if name in WAITING else None

    def _run(self, func, name: str, args, kwargs, place, waits: bool) -> Any:
        log, schema = self.log, func._schema
        written = [
            value for argument, value in zip(schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ] + [value for value in [kwargs.get("out")] if value is not None]  # fmt: skip
        touched = [t for t in tree_leaves((args, kwargs)) if isinstance(t, OnCuda)]
        views = not written and any(a.alias_info is not None for a in schema.arguments)
        launched = not views and not name.startswith(("empty", "new_empty", "_unsafe_view"))
        reads = [part for t in touched for part in t.memory.parts()]
        writes = [part for t in written if isinstance(t, OnCuda) for part in t.memory.parts()]
        if name in ("index_select", "index_copy_") and args[1] == 0:
            # Of a pool, streams touch other rows at the same time.
            rows = args[0].memory.at(_value(args[2]))
            reads = [t.memory for t in touched] + rows
            writes = rows if written else []
        if log.capturing is not None and launched:
            for t in written:
                log.capturing.keep(t.held)
        again = lambda: _on_host(func, *tree_map_only(OnCuda, _value, (args, kwargs)))
        result = again()
        wrapped = tree_map_only(Tensor, lambda t: self._wrap(t, touched, place), result)
        made = [t.memory for t in tree_leaves(wrapped) if isinstance(t, OnCuda)]
        if launched:
            log.launches.append(f"aten.{name}")
            log.touch(name, reads, writes + [m for m in made if m not in reads])
            if log.capturing is not None:
                log.capturing.add(again, name, wrapped, reads, writes + made)
            if place is None and isinstance(wrapped, Tensor) and name in ("copy_", "_to_copy"):
                self._arriving.append((wrapped, log.stream, log.stream.now))
        if waits:
            log.host.sees(log.stream)
        return wrapped

    def _wrap(self, held: Tensor, touched: list[OnCuda], place) -> Tensor:
        """``held`` as a tensor of the device; itself if it is one's already; views share its memory."""
        if place is None:
            return held
        address = held.untyped_storage().data_ptr()
        for t in touched:
            if t.held is held:
                return t
        for t in touched:
            if address and t.held.untyped_storage().data_ptr() == address:
                return OnCuda(held, t.place, t.memory)
        return OnCuda(held, place, Memory())

    def _is_pinned(self, tensor: Any) -> bool:
        known = {each.untyped_storage().data_ptr() for each in self._pinned}
        return isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in known

    def _require_arrived(self, given: list[Tensor], name: str) -> None:
        seen = self.log.host.seen
        self._arriving = [a for a in self._arriving if seen.get(a[1], 0) < a[2]]
        for tensor, _, _ in self._arriving:
            address = tensor.untyped_storage().data_ptr()
            if any(t.untyped_storage().data_ptr() == address for t in given):
                self.log.fault(f"{name} of a copy that has not arrived")

    # --- our operations ---

    def _operation(self, func, args, given: list[Tensor]) -> Any:
        """Its launches, then its results by torch's code."""
        log = self.log
        ours = [t for t in given if isinstance(t, OnCuda)]
        if not ours:
            return func(*args)
        if len(ours) < len(given):
            log.fault(f"{func} of tensors on the device and in host memory")
        body = torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn
        capturing, log.capturing = log.capturing, None
        written = [
            tensor for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value) if isinstance(tensor, OnCuda)
        ]  # fmt: skip
        before, launched = [t.held.clone() for t in written], len(log.launches)
        with self._as_if(capturing), self:
            dry = body(*args)
        for t, values in zip(written, before, strict=True):
            t.held.copy_(
                values
            )  # what follows the launches may have written what they did not compute
        log.capturing = capturing
        log.touch(str(func), [], [t.memory for t in written])
        if capturing is not None:
            for t in written:
                capturing.keep(t.held)
        again = lambda: _on_host(func, tree_map_only(OnCuda, _value, args), {})
        result = tree_map_only(Tensor, lambda t: self._wrap(t, [], ours[0].place), again())
        alike = lambda t: (t.shape, t.dtype, t.stride())
        if [*map(alike, _held(dry))] != [*map(alike, _held(result))]:
            log.fault(f"{func}: results on CUDA have other shapes or types than on a CPU")
        made = [t.memory for t in tree_leaves(result) if isinstance(t, OnCuda)]
        for memory in made:
            memory.written = (log.stream, log.stream.now)
        if capturing is not None:
            reads, writes = [t.memory for t in ours], [t.memory for t in written] + made
            capturing.add(again, str(func), result, reads, writes, len(log.launches) - launched)
        return result

    @contextmanager
    def _as_if(self, capturing: Graph | None) -> Iterator[None]:
        """Waits inside count as those of the capture, but what is inside is not put on its tape."""
        waits, self._inside = len(self.log.waits), capturing is not None
        yield
        self._inside = False
        if capturing is not None:
            for wait in self.log.waits[waits:]:
                self.log.fault(f"{wait.what} while a graph is captured")

    def launch(self, kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        """Note the launch of a Triton kernel; nothing is computed."""
        name, log = kernel.__name__, self.log
        if callable(grid):
            grid = grid(arguments)
        sizes = (*grid, 1, 1)[:3]
        if not all(0 < size <= most for size, most in zip(sizes, GRID, strict=True)):
            log.fault(f"{name}: grid {grid}")
        variant, tensors = [name], []
        for argument, value in arguments.items():
            base = getattr(value, "base", None)  # of a tensor descriptor
            value = base if isinstance(base, Tensor) and not isinstance(value, Tensor) else value
            if isinstance(value, OnCuda):
                tensors.append(value)
                variant.append((argument, value.dtype, value.data_ptr() % 16 == 0))
            elif isinstance(value, Tensor):
                log.fault(f"{name}: {argument} is in host memory")
            elif isinstance(value, int) and not isinstance(value, bool) and argument.islower():
                variant.append((argument, value == 1, value % 16 == 0, abs(value) < 2**31))
            else:
                variant.append((argument, repr(value)))
        if {t.place.index for t in tensors} != {self.current}:
            log.fault(f"{name} launched on cuda:{self.current} with tensors of another device")
        if self._inside and tuple(variant) not in self._variants:
            log.fault(f"{name} is loaded for the first time while a graph is captured")
        self._variants.add(tuple(variant))
        log.launches.append(name)
        log.touch(name, [t.memory for t in tensors], [])

    _inside = False

    # --- torch.cuda ---

    @contextmanager
    def installed(self) -> Iterator[Log]:
        """Enter the device: ``torch.cuda`` and the kernels' launches are its own."""
        log, cuda = self.log, torch.cuda

        def exchange(index: int) -> int:
            before, self.current = self.current, index if index >= 0 else self.current
            return before

        @contextmanager
        def on_stream(stream: Stream) -> Iterator[None]:
            before, log.stream = log.stream, stream
            try:
                yield
            finally:
                log.stream = before

        @contextmanager
        def captured(graph: Graph, pool: Any = None, capture_error_mode: str = "global"):
            log.wait("capture")
            if capture_error_mode == "global":
                log.fault("a capture that another thread's use of the device breaks")
            if self.current != self.place.index:
                log.fault("a graph is captured on another device than its tensors'")
            log.capturing = graph
            try:
                yield
            finally:
                log.capturing = None
                graph.undo()
            if self.failing:
                log.stream = Stream(
                    self.place, log
                )  # torch leaves the capture's as the current one
                raise RuntimeError("operation not permitted")

        def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
            made = real_tensor(data, **options)
            return made if device is None else made.to(device)

        def run(kernel: Any, *, grid: Any, warmup: bool, **arguments: Any) -> None:
            self.launch(kernel, grid, arguments)

        real_tensor = torch.tensor
        none = lambda *_, **__: None
        stand_ins = {
            "is_available": lambda: True, "device_count": lambda: self.count, "_lazy_init": none,
            "current_device": lambda: self.current, "set_device": lambda d: exchange(_index(d)),
            "_exchange_device": exchange, "_maybe_exchange_device": exchange,
            "Stream": lambda device=None, priority=0: Stream(device or self.place, log),
            "Event": lambda **_: Event(log), "CUDAGraph": lambda: Graph(self), "graph": captured,
            "current_stream": lambda device=None: log.stream, "stream": on_stream,
            "synchronize": lambda device=None: log.stream.synchronize(), "empty_cache": none,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_name": lambda device=None: "a device that is not there",
            "max_memory_allocated": lambda device=None: 0,
            "get_device_properties": lambda device=None: SimpleNamespace(
                total_memory=2**36, multi_processor_count=132
            ),
        }  # fmt: skip
        kernels = type(segments.long_segments_kernel)
        with ExitStack() as scope:
            for name, value in stand_ins.items():
                scope.enter_context(mock.patch.object(cuda, name, value))
            scope.enter_context(mock.patch.object(torch, "tensor", tensor))
            for module in (dispatch, encoder):
                scope.enter_context(mock.patch.object(module, "INTERPRETED", False))
            scope.enter_context(mock.patch.object(kernels, "run", run))
            before = torch._C._only_lift_cpu_tensors()
            scope.callback(torch._C._set_only_lift_cpu_tensors, before)
            torch._C._set_only_lift_cpu_tensors(True)
            scope.enter_context(self)
            yield log


def _value(tensor: OnCuda) -> Tensor:
    return tensor.held


def _index(device: Any) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0


def _on_host(func, args, kwargs) -> Any:
    if func is aten.mm.dtype:  # which CPUs have not
        return args[0].to(args[2]) @ args[1].to(args[2])
    return func(*args, **kwargs)
