"""What is made from parameters once, and whether they still are what it was made from."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# Numbers of eight bytes in a row of a large tensor, whose rows are added up. It is prime, so that
# no channels of usual sizes that change places leave the sums as they were.
ROW = 2039
# A tensor with so many rows is large.
ROWS = 16


def parameter_versions(tensors: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    """Of each tensor its version, which writing to it counts up, its address and its size."""
    return [(0 if p.is_inference() else p._version, p.data_ptr(), p.nbytes) for p in tensors]


class Snapshot:
    """What tensors on the CPU hold, to be compared with what they hold later.

    A version says that a tensor was written to, an address that its storage was replaced, and
    torch.func.functional_call puts another tensor in its place for one call. Writing through
    `.data` shows in none of them, so the numbers are compared too, all at once, because one look at
    each of hundreds of tensors takes longer than their network. Of a large tensor, which is read
    once so, it is sums of its bits, in which a change of any number shows.
    """

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.versions = parameter_versions(tensors)
        self.aliases = [tensor.detach() for tensor in tensors]  # which hold the memory below
        self.whole: list[memoryview] = []  # what is compared as it is
        self.rows: list[Tensor] = []  # of large tensors
        self.scattered: list[Tensor] = []  # what lies in memory with gaps between
        for alias in self.aliases:
            if _is_dense(alias):
                self._add(alias.as_strided((alias.numel(),), (1,)).view(torch.uint8))
            else:
                self.scattered.append(alias)
        # Copied to the same place each time: to get memory anew takes longer than to fill it.
        self.copy = bytearray(sum(map(len, self.whole)))
        ends = list(itertools.accumulate(map(len, self.whole), initial=0))
        room = memoryview(self.copy)
        self.places = [room[i:j] for i, j in itertools.pairwise(ends)]
        self.kept = bytes(self._copied()), self._added_up()

    def _add(self, flat: Tensor) -> None:
        """Look at these bytes too, which lie one after the other."""
        count = len(flat) // (8 * ROW) if flat.storage_offset() % 8 == 0 else 0
        if count >= ROWS:
            self.rows.append(flat[: count * 8 * ROW].view(torch.int64).view(count, ROW))
            flat = flat[count * 8 * ROW :]
        # Not as a numpy array: a storage that has been one can't be resized any more.
        array = (ctypes.c_char * len(flat)).from_address(flat.data_ptr())
        self.whole.append(memoryview(array).cast("B"))

    def _copied(self) -> bytearray:
        """What is compared as it is. Python does that for small arrays much faster than torch."""
        for place, bytes_now in zip(self.places, self.whole, strict=True):
            place[:] = bytes_now
        return self.copy

    def _added_up(self) -> bytes:
        """The sums of rows, and what doesn't lie in memory in a row."""
        found = [rows.sum(0) for rows in self.rows]
        found += [x.resolve_neg().contiguous() for x in self.scattered]
        arrays: list[Any] = [x.view(-1).view(torch.uint8).numpy() for x in found]
        return b"".join(arrays)

    @torch.no_grad()
    def is_same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors and hold what they held."""
        return (
            self.versions == parameter_versions(tensors)  # else the memory may be gone
            and self._copied() == self.kept[0]
            and self._added_up() == self.kept[1]
        )


def _is_dense(tensor: Tensor) -> bool:
    """Whether its numbers lie one after the other in memory, in some order, as they are."""
    return torch.ops.aten.is_non_overlapping_and_dense(tensor) and not tensor.is_neg()


def product_modes() -> tuple[Any, ...]:
    """What decides how a product on the CPU is computed, besides what is multiplied."""
    cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return cast, torch.backends.mkldnn.enabled


class _Call(threading.local):
    """The present call of a network, of which each thread may run another."""

    now: object = None


class ParameterCache:
    """What is made from the parameters and buffers of modules, made anew when one of them changes.

    Threads may ask it at once, each for other settings.

    Args:
        make: makes it, of whatever the cache is called with besides the settings.
        parameters: what it is made from.

    Attributes:
        call: its `now` stands for the present call of a network, in which the parameters are looked
            at once; None where they are at every use.
    """

    def __init__(self, make: Callable[..., Any], parameters: Callable[[], list[Tensor]]) -> None:
        self.make, self.parameters = make, parameters
        self.call = _Call()
        # Settings, a snapshot, what was made, and the call that looked last: in one, for threads.
        self.kept: tuple[Any, Snapshot | None, Any, object] = None, None, None, None

    @property
    def made(self) -> Any:
        """What was made last."""
        return self.kept[2]

    def __call__(self, settings: Any, *args: Any) -> Any:
        """What is made with these settings of the parameters as they are now."""
        call = self.call.now
        of, snapshot, made, looked_at_in = self.kept
        if of != settings:
            snapshot = None
        if snapshot is not None and looked_at_in is call is not None:
            return made
        tensors = self.parameters()
        if snapshot is None or not snapshot.is_same(tensors):
            # First, so that what is written meanwhile is noticed at the next call.
            snapshot = Snapshot(tensors)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                made = self.make(*args)
        self.kept = settings, snapshot, made, call
        return made


class AllParameters:
    """A look at the parameters of many caches at once, in place of each cache's own.

    Args:
        caches: those of a network.
        at_once: False where something that isn't known runs between, and may write to parameters:
            then each cache looks at its own.
    """

    def __init__(self, caches: Sequence[ParameterCache], at_once: bool) -> None:
        self.caches, self.at_once = caches, at_once
        self.kept: tuple[Snapshot | None, Any] = None, None  # and the modes

    def look(self) -> None:
        """Begin a call of the network.

        As long as all are what they were, and so are the modes that a product asks for, it counts
        as the same call, in which each cache looks at its own parameters once.
        """
        call: object = object()
        if self.at_once:
            tensors = [tensor for cache in self.caches for tensor in cache.parameters()]
            (snapshot, of), modes = self.kept, product_modes()
            if snapshot is None or modes != of or not snapshot.is_same(tensors):
                snapshot = Snapshot(tensors)
                self.kept = snapshot, modes
            call = snapshot
        for cache in self.caches:
            cache.call.now = call
