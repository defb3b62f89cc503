"""PyTorch's pickles cost time and memory in proportion to their files, or are refused unread."""

from __future__ import annotations

import collections
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fresh import run

from vggtorch.weights import pickles


def plain(value: object) -> bytes:
    """The instructions for a plain value, without head and end."""
    return pickle.dumps(value, 2)[2:-1]


def zipped(path: Path, instructions: bytes) -> Path:
    """A file of today's form with these instructions in its pickle, and four bytes of values."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + instructions + b".")
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/data/0", bytes(4))
        archive.writestr("a/version", "3\n")
    return path


def legacy(path: Path, instructions: bytes) -> Path:
    """The same of the form before PyTorch 1.6."""
    head = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({}, 2)]
    instructions = instructions.replace(b"tQ", b"NtQ")  # no view of another storage
    object_, keys = (
        b"\x80\x02" + instructions + b".",
        pickle.dumps(["0"] if b"tQ" in instructions else [], 2),
    )
    path.write_bytes(b"".join([*head, object_, keys, struct.pack("<q", 1), bytes(4)]))
    return path


def doubled(times: int, first: bytes, join: bytes) -> bytes:
    """A value that holds the one before twice, and so on: 2**times values in a few bytes."""
    return first + b"".join(b"q%ch%c" % (i, i) + join for i in range(times))


def storage(count: int, kind: bytes = b"FloatStorage", key: str = "0") -> bytes:
    named = plain("storage") + b"ctorch\n" + kind + b"\n" + plain(key) + plain("cpu")
    return b"(" + named + plain(count) + b"tQ"


def tensor(count: int, shape: tuple, stride: tuple) -> bytes:
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(count)
    rest = plain(0) + plain(shape) + plain(stride) + plain(False)
    return head + rest + b"ccollections\nOrderedDict\n)RtR"


PAIRS = b"\x86"  # TUPLE2
HOSTILE: dict[str, tuple[bytes, str]] = {
    "a key of tuples": (b"}" + doubled(40, b")", PAIRS) + b"K\x01s", "refers to its own parts"),
    "a key of few tuples": (b"})K\x01s", "a dict's key in it is a tuple"),
    "a value of tuples": (doubled(40, b")", PAIRS), "refers to its own parts so often"),
    "a value of lists": (
        b"]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(40)),
        "refers to its own parts so often",
    ),
    "a long name, many times": (
        plain("n" * 10**5) + b"q\x00]q\x01(" + b"h\x00" * 10**5 + b"e",
        "refers to its own parts so often",
    ),
    "a list in itself": (b"]q\x00h\x00a", "grows after it became part of another"),
    "a dict in a tuple in itself": (b"}q\x00K\x01h\x00\x85s", "grows after it became part"),
    "a list that grows later": (b"]q\x00\x85q\x01h\x00K\x01a", "grows after it became part"),
    "deep tuples": (b")" + b"\x85" * 10**5, "nested more than 64 deep"),
    "keys of one hash": (
        b"}(" + b"".join(plain(k * (2**61 - 1)) + b"N" for k in range(1, 9)) + b"u",
        "a dict's key in it is too large a number",
    ),
    "a bytearray": (b"c__builtin__\nbytearray\n" + plain(10**12) + b"\x85R", "'__builtin__.bytear"),
    "a storage": (b"ctorch.storage\nUntypedStorage\n" + plain(10**12) + b"\x85R", "broken"),
    "a tensor of a size": (b"ctorch\nTensor\n" + plain(10**9) + b"\x85R", "for 'torch.Tensor'"),
    "code": (b"cos\nsystem\nX\x04\x00\x00\x00true\x85R", "it asks for 'os.system'"),
    "an object": (b"cargparse\nNamespace\n)\x81", "asks for 'argparse.Namespace'"),
    "a name without end": (b"c" + b"x" * 10**5 + b"\ny\n", "it asks for 'xxxx"),
    "a large storage": (storage(10**9), "its tensors claim more values than are stored"),
    "many storages": (
        b"]" + b"".join(storage(1000, key=str(i)) + b"a" for i in range(1000)),
        "its tensors claim more values than are stored",
    ),
    "a tensor larger than its storage": (tensor(1, (2,), (1,)), "claims more values than"),
    "a tensor beyond its storage": (tensor(5, (2, 2), (9, 9)), "claims more values than"),
    "a tensor of one value, shown often": (tensor(1, (10**12,), (0,)), "claims more values than"),
    "a tensor of many dimensions": (tensor(1, (1,) * 99, (1,) * 99), "claims more values than"),
    "a tensor shown by many": (
        b"]" + (tensor(1000, (1000,), (1,)) + b"a") * 1000,
        "share their values more than 4 times",
    ),
    "a counter of no dict": (b"ccollections\nCounter\n]\x85R", "Counter of what is no dict"),
    "a set of lists": (b"cbuiltins\nset\n]]a\x85R", "a dict's key in it is a list"),
    "an OrderedDict of tuples": (
        b"ccollections\nOrderedDict\n]](" + doubled(15, b")", PAIRS) + b"K\x01ea\x85R",
        "a dict's key in it is a tuple",
    ),
    "attributes of a tensor": (tensor(1, (1,), (1,)) + b"}b", "takes a tensor for a ordered"),
    "an instruction of protocol 4": (b"\x94", "the instruction MEMOIZE"),
    "a text instruction": (b"I01\n", "the instruction INT"),
    "what is not there": (b"h\x07", "its pickle is broken"),
    "more than there is": (b"\x86", "its pickle is broken"),
    "a storage of no type": (plain(("storage", "t", "0", "cpu", 1)) + b"Q", "no storage"),
    "a size of names": (tensor(1, ("a",), (1,)), "no number where torch.save writes one"),
}  # fmt: skip


@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(
    tmp_path: Path, name: str, write: Callable[[Path, bytes], Path]
) -> None:
    instructions, message = HOSTILE[name]
    with pytest.raises(ValueError, match=message) as caught:
        pickles.unpickled(write(tmp_path / "a.pth", instructions))
    assert len(str(caught.value)) < 300


_BOUNDED = """
import resource, time
from pathlib import Path
from vggtorch.training import checkpoints
from vggtorch.weights import sources

gc.enable()
used = resource.getrusage(resource.RUSAGE_SELF)
seconds = used.ru_utime + used.ru_stime
space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (space + (1 << 28), -1))
for path in sys.argv[1:]:
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 12, -1))
    for read in (sources.read, checkpoints.read):
        try:
            read(Path(path))
        except ValueError as error:
            print(len(str(error)))
"""


@pytest.mark.slow
def test_the_worst_files_cost_little_time_and_memory(tmp_path: Path) -> None:
    """Each file, of at most 400 kB, takes less than 12 s and 256 MB in both readers together."""
    refused = [
        write(tmp_path / f"{i}{write.__name__}.pth", instructions)
        for i, (instructions, _) in enumerate(HOSTILE.values())
        for write in (zipped, legacy)
    ]
    # What passes and asks for as much as may be had.
    names = plain("n" * 60) + b"q\x00]q\x01(" + b"h\x00" * 30_000 + b"e"
    keys = b"}(" + b"".join(plain(k) + b"N" for k in range(8_000)) + b"u"
    slots = b"}(" + b"".join(plain(k << 40) + b"N" for k in range(1 << 12)) + b"u"
    tuples = b"]q\x00(" + plain(tuple(range(99)))[:-2] + b"q\x01" + b"h\x01" * 25_000 + b"e"
    marks, lists = b"(" * 40_000, b"]" * 40_000
    allowed = [
        write(tmp_path / f"allowed{i}{write.__name__}.pth", instructions)
        for i, instructions in enumerate((names, keys, slots, tuples, marks, lists))
        for write in (zipped, legacy)
    ]
    assert all(path.stat().st_size < 400_000 for path in (*refused, *allowed))
    done = run(_BOUNDED, arguments=(*refused, *allowed))
    assert done.returncode == 0, done.stderr
    lengths = [int(line) for line in done.stdout.split()]
    assert len(lengths) == 2 * len(refused) + 2 * len(allowed)
    assert max(lengths) < 1000


def same(found: object, expected: object) -> bool:
    """Whether two structures are of the same types and values."""
    if type(found) is not type(expected):
        return False
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(found, dict) and isinstance(expected, dict):
        return same(list(found.items()), list(expected.items()))
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def checkpoint() -> dict:
    """What training scripts save: a state_dict, an optimizer's, a schedule's, settings."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.rand(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    milestones = schedule.state_dict()["milestones"]
    assert type(milestones) is collections.Counter
    base = torch.arange(12.0)
    return {
        "state_dict": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "milestones": milestones,
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "views": [base[2:4], base.reshape(3, 4).t(), base.half(), torch.zeros(0, 3)],
        "scalar": torch.tensor(3),
        "kinds": [torch.ones(2, dtype=d) for d in (torch.bfloat16, torch.bool, torch.complex64)],
        "plain": (None, True, -1, 1 << 40, 2.5, "\u00e9\u20ac", b"\x00\xff", (), [], {}, {1, 2}),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        3: "a number as key",
    }


@pytest.mark.parametrize("new", [True, False])
def test_what_training_scripts_save_is_read_as_torch_does(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "a.pth"
    torch.save(checkpoint(), path, _use_new_zipfile_serialization=new)
    expected = torch.load(path, weights_only=True)
    assert same(pickles.unpickled(path), expected)
    assert same(pickles.unpickled(path, mmap=True), expected)
    assert expected["state_dict"]._metadata == pickles.unpickled(path)["state_dict"]._metadata


def test_pairs_as_python_2_wrote_them(tmp_path: Path) -> None:
    pairs = plain([["a", 1], ["b", 2]])
    path = legacy(tmp_path / "a.pth", b"ccollections\nOrderedDict\n" + pairs + b"\x85R")
    assert list(pickles.unpickled(path).items()) == [("a", 1), ("b", 2)]


def test_archives_that_two_parsers_could_understand_differently(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(2)}, path)
    content = path.read_bytes()
    path.write_bytes(content + b"PK")
    with pytest.raises(ValueError, match="more stands behind the end of the archive"):
        pickles.unpickled(path)
    for extra, message in (
        ("a/b/data.pkl", "which hold one data.pkl"),
        ("a/constants.pkl", "TorchScript"),
    ):
        path.write_bytes(content)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(extra, b"\x80\x02).")
        with pytest.raises(ValueError, match=message):
            pickles.unpickled(path)
    zipped(path, b")")
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as other, zipfile.ZipFile(path) as first:
        other.writestr("b/version", "3\n")  # whose folder torch takes for the archive's
        for name in first.namelist():
            other.writestr(name, first.read(name))
    with pytest.raises((ValueError, RuntimeError), match=r"data\.pkl|two ways"):
        pickles.unpickled(tmp_path / "b.pth")


def test_an_archive_whose_pickle_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "LARGEST_PICKLE", 1000)
    for write in (zipped, legacy):
        path = write(tmp_path / "a.pth", b"]" + b"Na" * 1000)
        with pytest.raises(ValueError, match=r"its pickle has .* 1000"):
            pickles.unpickled(path)


def test_a_tar_archive_that_is_also_a_pickle(tmp_path: Path) -> None:
    import tarfile

    path = tmp_path / "a.pth"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    content = bytearray(path.read_bytes())
    content[:2] = b"\x80\x02"
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    path.write_bytes(content)
    with pytest.raises(ValueError, match="it is a tar archive"):
        pickles.unpickled(path)
