"""What is made from parameters once, and whether they still are what it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# Numbers of eight bytes in a row of a large tensor, whose rows are added up. It is prime, so that
# no channels of usual sizes that change places leave the sums as they were.
ROW = 2039
# A tensor with so many rows is large.
ROWS = 16


def parameter_versions(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Of each tensor its version, which writing to it counts up, and its address."""
    return [(0 if p.is_inference() else p._version, p.data_ptr()) for p in tensors]


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
        self.whole: list[Tensor] = []  # bytes of what is compared as it is
        self.rows: list[Tensor] = []  # of large tensors
        self.scattered: list[Tensor] = []  # what lies in memory with gaps between
        for tensor in tensors:
            alias = tensor.detach()
            if _is_dense(alias):
                self._add(alias.as_strided((alias.numel(),), (1,)).view(torch.uint8))
            else:
                self.scattered.append(alias)
        self.kept = self._read()

    def _add(self, flat: Tensor) -> None:
        """Look at these bytes too, which lie one after the other."""
        count = len(flat) // (8 * ROW) if flat.storage_offset() % 8 == 0 else 0
        if count >= ROWS:
            self.rows.append(flat[: count * 8 * ROW].view(torch.int64).view(count, ROW))
            flat = flat[count * 8 * ROW :]
        self.whole.append(flat)

    def _read(self) -> Tensor:
        found = [
            *self.whole,
            *(x.resolve_neg().contiguous().view(-1).view(torch.uint8) for x in self.scattered),
            *(rows.sum(0).view(torch.uint8) for rows in self.rows),
        ]
        # In whole numbers of eight bytes: torch takes as long to compare each, whatever its size.
        rest = torch.zeros(-sum(map(len, found)) % 8, dtype=torch.uint8, device="cpu")
        return torch.cat([*found, rest]).view(torch.int64)

    @torch.no_grad()
    def is_same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors and hold what they held."""
        return self.versions == parameter_versions(tensors) and torch.equal(self._read(), self.kept)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its numbers lie one after the other in memory, in some order, as they are."""
    return torch.ops.aten.is_non_overlapping_and_dense(tensor) and not tensor.is_neg()


class ParameterCache:
    """What is made from the parameters and buffers of modules, made anew when one of them changes.

    Args:
        make: makes it, of whatever the cache is called with besides the settings.
        parameters: what it is made from.

    Attributes:
        call: what stands for the present call of a network, in which the parameters are looked at
            once; None where they are at every use.
    """

    def __init__(self, make: Callable[..., Any], parameters: Callable[[], list[Tensor]]) -> None:
        self.make, self.parameters = make, parameters
        self.settings: Any = None
        self.snapshot: Snapshot | None = None
        self.made: Any = None
        self.call: object = None
        self.looked_at_in: object = None

    def __call__(self, settings: Any, *args: Any) -> Any:
        """What is made with these settings of the parameters as they are now."""
        call = self.call  # which another thread may begin meanwhile
        snapshot = self.snapshot if self.settings == settings else None
        if snapshot is not None and self.looked_at_in is call is not None:
            return self.made
        tensors = self.parameters()
        if snapshot is None or not snapshot.is_same(tensors):
            # First, so that what is written meanwhile is noticed at the next call.
            self.settings, self.snapshot = settings, Snapshot(tensors)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                self.made = self.make(*args)
        self.looked_at_in = call
        return self.made


class AllParameters:
    """A look at the parameters of many caches at once, in place of each cache's own.

    Args:
        at_once: False where something that isn't known runs between, and may write to parameters:
            then each cache looks at its own.
    """

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once
        self.snapshot: Snapshot | None = None

    def look(self, caches: Sequence[ParameterCache]) -> None:
        """Begin a call of the network that they belong to.

        As long as all are what they were, it counts as the same call, in which each cache looks
        at its own parameters once.
        """
        call: object = object()
        if self.at_once:
            tensors = [tensor for cache in caches for tensor in cache.parameters()]
            if self.snapshot is None or not self.snapshot.is_same(tensors):
                self.snapshot = Snapshot(tensors)
            call = self.snapshot
        for cache in caches:
            cache.call = call
