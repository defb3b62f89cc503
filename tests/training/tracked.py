"""What trackers have kept, read from their own files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any


def records(path: Path) -> list[Any]:
    """What W&B has kept of a run offline: records in LevelDB's form, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, found, part = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # too short for a record's head
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return found
