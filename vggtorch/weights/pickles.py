"""PyTorch's pickles, read only after a look at every instruction in them.

`torch.load(weights_only=True)` runs no foreign code, but a pickle of 200 bytes can keep it busy for
ever, or take all memory: tuples that hold themselves twice, forty times over, as the key of a dict;
a bytearray of a terabyte; a tensor that claims more values than there are. So the instructions are
walked through first, by a machine that only counts. What passes it

- has at most `LARGEST_PICKLE` bytes of instructions,
- makes dicts, lists, tuples, sets, names, numbers and plain tensors, and nothing else,
- has dicts whose keys are names and numbers,
- is at most `DEEPEST` levels deep, and holds no container that is inside itself,
- has, with all that it refers to twice written out twice, at most `UNFOLDED` times the pickle's
  bytes and `ALLOWANCE` more,
- has storages that together are no larger than the file, tensors none of which is larger than its
  storage, and that together are at most `SHARED` times as large as the file.

So reading takes time and memory in proportion to the file, whatever the file holds: measured, at
most 6 microseconds for each byte of the pickle, and what reading its values takes.
"""

from __future__ import annotations

import math
import pickletools
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from vggtorch.weights import archives
from vggtorch.weights.state_dicts import UnsupportedError

LARGEST_PICKLE = 1 << 22  # bytes; that of a VGG has 3,000, with an optimizer's state 30,000
DEEPEST = 64
UNFOLDED = 64
ALLOWANCE = 1 << 20
SHARED = 4
_DIMENSIONS = 64  # of a tensor, at most; torch itself has this limit
_LARGEST_KEY = 1 << 60  # larger numbers can be chosen so that Python's dicts become slow

_STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Half": torch.half,
        "BFloat16": torch.bfloat16,
        "Float": torch.float,
        "Double": torch.double,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
        "Bool": torch.bool,
        "Byte": torch.uint8,
        "Char": torch.int8,
        "Short": torch.int16,
        "Int": torch.int32,
        "Long": torch.int64,
    }.items()
}
_STORAGES["torch.storage UntypedStorage"] = torch.uint8  # of the dtypes that have none of their own
_DTYPES = {
    f"torch {str(dtype).removeprefix('torch.')}": dtype
    for dtype in (
        *_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn,
        torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    )
}  # fmt: skip


def unpickled(path: Path, *, mmap: bool = False) -> Any:
    """What torch.save wrote to a file, on the CPU, as far as it is tensors and plain values.

    Args:
        path: a file of `torch.save`, of today's form (zip) or of that before PyTorch 1.6.
        mmap: map the tensors from the file instead of reading them; for the zip form.

    Raises:
        ValueError: it holds anything else, or more than its size allows; the message names no file.
        Exception: whatever torch.load makes of a damaged file.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            with zipfile.ZipFile(path) as archive:
                _check_archive(path, archive)
        else:
            _check_legacy(path, file)
            mmap = False
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    names = archives.check_members(path, archive)
    pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError("it isn't one of torch.save's archives, which hold one data.pkl")
    member = archive.getinfo(pickles[0])
    if member.file_size > LARGEST_PICKLE:
        raise ValueError(f"its pickle has {member.file_size} bytes, expected {LARGEST_PICKLE}")
    # torch has a parser of archives of its own. It must see the bytes that are checked here.
    reader: Any = torch._C.PyTorchFileReader(str(path))
    seen = reader.get_record_offset("data.pkl")
    with path.open("rb") as file:
        file.seek(seen)
        content = file.read(member.file_size)
    if content != archive.read(member):
        raise ValueError("its archive can be understood in two ways")
    with archive.open(member) as stream:
        _Machine(path.stat().st_size, member.file_size).run(stream)


def _check_legacy(path: Path, file: IO[bytes]) -> None:
    """The five pickles at the head of the older form, behind which the values stand."""
    file.seek(0)
    try:
        tarfile.TarInfo.frombuf(file.read(512), "utf-8", "replace")
    except tarfile.TarError:
        pass
    else:
        raise ValueError("it is a tar archive, as torch wrote them before 2017")
    file.seek(0)
    size = path.stat().st_size
    for _ in ("magic number", "version", "system", "object", "keys of the storages"):
        _Machine(size, min(size, LARGEST_PICKLE)).run(file)


@dataclass(slots=True, eq=False)
class _Value:
    """What stands on the machine's stack for a value of the pickle.

    Attributes:
        kind: `plain` (None, numbers, names, bytes), `tuple`, `list`, `dict`, `ordered`, `set`,
            `global`, `storage` or `tensor`.
        content: a plain value itself; the items of tuples and lists; a global's name; the number of
            elements of a storage, and the bytes of each.
        size: bytes of the value, with everything in it written out.
        depth: containers in containers.
        inside: it is part of another value, which has counted it. So it may not grow any more.
    """

    kind: str
    content: Any = None
    size: int = 1
    depth: int = 0
    inside: bool = False


class _Machine:
    """Walks through a pickle as torch's unpickler does, and counts instead of making values."""

    def __init__(self, file_size: int, pickle_size: int) -> None:
        self.file_size, self.pickle_size = file_size, pickle_size
        self.most = UNFOLDED * pickle_size + ALLOWANCE
        self.stack: list[_Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Value] = {}
        self.storages: dict[Any, int] = {}  # key -> bytes
        self.stored = self.tensors = 0  # bytes, together

    def run(self, stream: IO[bytes]) -> None:
        """Check one pickle; the stream stands behind it afterwards.

        Raises:
            ValueError: what torch.load shall not see.
        """
        begin = None
        try:
            for opcode, argument, position in pickletools.genops(stream):
                begin = position if begin is None else begin
                if position is not None and position - (begin or 0) > LARGEST_PICKLE:
                    raise ValueError(f"its pickle has more than {LARGEST_PICKLE} bytes")
                self._step(opcode.name, argument)
        except (IndexError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("its pickle is broken") from error

    def _step(self, name: str, argument: Any) -> None:
        if name in _PLAIN:
            self.stack.append(_plain(_CONSTANTS.get(name, argument)))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in _EMPTY:
            self.stack.append(_Value(_EMPTY[name], []))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            items = self._popped(int(name[5:]) if name[5:] else None)
            self.stack.append(self._grown(_Value("tuple", []), items, items))
        elif name in ("APPEND", "APPENDS"):
            items = self._popped(1 if name == "APPEND" else None)
            self._grown(self._target("list"), items, items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._popped(2 if name == "SETITEM" else None)
            if len(items) % 2:
                raise ValueError("its pickle is broken")
            _check_keys(items[::2])
            self._grown(self._target("dict", "ordered"), items)
        elif name == "GLOBAL":
            if argument not in _CALLS and argument not in _STORAGES and argument not in _DTYPES:
                raise UnsupportedError(  # a whole nn.Module, say
                    f"it asks for {argument.replace(' ', '.')[:70]!r}, and only plain tensors, "
                    f"names and numbers are read. Save the state_dict alone, "
                    f"torch.save(model.state_dict(), path), or pass what torch makes of the file, "
                    f"if you trust it: torch.load(path, weights_only=False)"
                )
            self.stack.append(_Value("global", argument))
        elif name == "REDUCE":
            function, arguments = self._popped(2)
            if function.kind != "global" or arguments.kind != "tuple":
                raise ValueError("its pickle calls what is no function")
            made = _CALLS[function.content](self, arguments.content)
            self.stack.append(self._grown(made, [arguments]))
        elif name == "BUILD":
            (state,) = self._popped(1)
            if state.kind != "dict":
                raise ValueError("its pickle sets attributes of what has none")
            self._grown(self._target("ordered"), [state])
        elif name == "BINPERSID":
            self.stack.append(self._storage(*self._popped(1)))
        elif name not in ("PROTO", "STOP"):
            raise UnsupportedError(
                f"its pickle has the instruction {name}, which torch.save doesn't write. Read it "
                f"by what wrote it, if you trust it, and pass the dict of tensors"
            )

    def _popped(self, count: int | None) -> list[_Value]:
        """The last values of the stack, as many as asked for or all that are behind the last mark.

        Those asked for are behind the mark too.
        """
        mark = self.marks[-1] if self.marks else 0
        begin = self.marks.pop() if count is None else len(self.stack) - count
        if begin < mark:
            raise ValueError("its pickle is broken")
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def _target(self, *kinds: str) -> _Value:
        target = self.stack[-1]
        if target.kind not in kinds:
            raise ValueError(f"its pickle takes a {target.kind} for a {kinds[0]}")
        return target

    def _grown(self, target: _Value, items: list[_Value], keep: Iterable[_Value] = ()) -> _Value:
        """Count items into a value, which they have become part of."""
        for item in items:
            item.inside = True
            target.size += item.size
            target.depth = max(target.depth, item.depth + 1)
        if target.inside:
            raise ValueError("a container in it grows after it became part of another")
        if target.depth > DEEPEST:
            raise ValueError(f"its containers are nested more than {DEEPEST} deep")
        if target.size > self.most:
            raise ValueError(
                f"it refers to its own parts so often that {self.pickle_size} bytes would become "
                f"more than {self.most}"
            )
        if isinstance(target.content, list):
            target.content.extend(keep)
        return target

    def _storage(self, identity: _Value) -> _Value:
        """The storage that a persistent id names."""
        parts = identity.content if identity.kind == "tuple" else []
        fits = len(parts) in (5, 6) and parts[0].content == "storage"
        fits = fits and parts[1].kind == "global" and parts[1].content in _STORAGES
        fits = fits and all(part.kind == "plain" for part in parts[2:])
        if not fits or (parts[5:] and parts[5].content is not None):
            raise ValueError("its pickle refers to what is no storage")
        key, count = parts[2].content, _whole(parts[4])
        itemsize = _STORAGES[parts[1].content].itemsize
        before = self.storages.get(key, 0)
        self.storages[key] = max(before, count * itemsize)
        self.stored += self.storages[key] - before
        if self.stored > self.file_size:
            raise ValueError("its tensors claim more values than are stored")
        return _Value("storage", (count, itemsize))

    def tensor(self, arguments: list[_Value]) -> _Value:
        """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata)`.

        In `_rebuild_tensor_v3` the dtype of an untyped storage stands before the metadata.
        """
        storage, offset, size, stride, *others = arguments
        if storage.kind != "storage" or {size.kind, stride.kind} != {"tuple"}:
            raise ValueError("its pickle makes a tensor of what is no storage")
        count, itemsize = storage.content
        if itemsize == 1 and others[2:] and others[2].kind == "global":
            itemsize = _DTYPES[others.pop(2).content].itemsize
            count //= itemsize
        if any(value.kind in ("tensor", "storage", "global") for value in others):
            raise ValueError("its pickle gives a tensor more than a tensor has")
        shape, strides = ([_whole(n) for n in axes.content] for axes in (size, stride))
        values = math.prod(shape) if len(shape) <= _DIMENSIONS else count + 1
        end = _whole(offset) + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        self.tensors += values * itemsize
        if values > count or (values and end > count):
            raise ValueError(
                "a tensor in it claims more values than are stored (one that was expanded is to be "
                "saved as .contiguous() has it)"
            )
        if self.tensors > SHARED * self.file_size:
            raise ValueError(f"its tensors share their values more than {SHARED} times")
        return _Value("tensor", "tensor")


def _plain(content: Any) -> _Value:
    size = 1
    if isinstance(content, str | bytes):
        size += len(content)
    elif isinstance(content, int):
        size += content.bit_length() // 8
    return _Value("plain", content, size)


def _whole(value: _Value) -> int:
    """A number that counts something in a file; ValueError for another value."""
    if type(value.content) is not int or not 0 <= value.content < 1 << 63:
        raise ValueError("its pickle has no number where torch.save writes one")
    return value.content


def _check_keys(keys: Iterable[_Value]) -> None:
    """See that looking for keys takes no time; ValueError."""
    for key in keys:
        if key.kind != "plain":
            raise ValueError(f"a dict's key in it is a {key.kind}, expected a name or a number")
        if isinstance(key.content, int) and abs(key.content) >= _LARGEST_KEY:
            raise ValueError("a dict's key in it is too large a number")


def _ordered(_: _Machine, arguments: list[_Value]) -> _Value:
    """`OrderedDict()`, or, as Python 2 wrote it, `OrderedDict([[key, value], ...])`."""
    pairs = [pair for listed in arguments for pair in listed.content]
    if len(arguments) > 1 or any(pair.kind != "list" or len(pair.content) != 2 for pair in pairs):
        raise ValueError("its pickle makes an OrderedDict of what isn't pairs")
    _check_keys(pair.content[0] for pair in pairs)
    return _Value("ordered")


def _made(name: str, of: str) -> Callable[[_Machine, list[_Value]], _Value]:
    """What makes a value of a kind of others, or of nothing."""

    def make(_: _Machine, arguments: list[_Value]) -> _Value:
        if any(value.kind != of for value in arguments):
            raise ValueError(f"its pickle makes a {name} of what is no {of}")
        return _Value(name)

    return make


def _set(_: _Machine, arguments: list[_Value]) -> _Value:
    made = _made("set", "list")(_, arguments)
    _check_keys(item for value in arguments for item in value.content)
    return made


def _bytes(_: _Machine, arguments: list[_Value]) -> _Value:
    """`_codecs.encode(text, "latin1")`, which is how protocol 2 writes bytes."""
    text, encoding = (value.content for value in arguments)
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("its pickle encodes what is no text")
    return _Value("bytes", None, 1 + len(text))


def _parameter(_: _Machine, arguments: list[_Value]) -> _Value:
    """`_rebuild_parameter(data, requires_grad, hooks)`."""
    data, *others = arguments
    if data.kind != "tensor" or len(others) != 2:
        raise ValueError("its pickle makes a parameter of what is no tensor")
    return _Value("tensor")


_CALLS: dict[str, Callable[[_Machine, list[_Value]], _Value]] = {
    "collections OrderedDict": _ordered,
    "collections Counter": _made("Counter", "dict"),
    "builtins set": _set,
    "__builtin__ set": _set,
    "torch Size": _made("Size", "tuple"),
    "torch device": _made("device", "plain"),
    "_codecs encode": _bytes,
    "torch._utils _rebuild_tensor_v2": _Machine.tensor,
    "torch._utils _rebuild_tensor_v3": _Machine.tensor,
    "torch._utils _rebuild_parameter": _parameter,
}
_EMPTY = {"EMPTY_TUPLE": "tuple", "EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PLAIN = {
    *_CONSTANTS, "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
    "SHORT_BINSTRING",
}  # fmt: skip
