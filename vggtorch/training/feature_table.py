"""The features of any number of images as a Parquet data set, and the nearest images by them.

The data set is a folder of shards, which pandas, pyarrow, polars and DuckDB read as one table. Each
shard is written whole or not at all, so that a run that was stopped goes on where it was; a shard
of images that have been written anew since is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from vggtorch import files, surgery
from vggtorch.checks import whole
from vggtorch.models import data_config
from vggtorch.paths import as_path
from vggtorch.training.folders import stamp_of
from vggtorch.training.identity import network_digest
from vggtorch.training.prediction import batches, image_files

MANIFEST = "_manifest.json"  # readers of Parquet pass over what begins with an underscore
OTHERS = (".csv", ".tsv", ".json", ".jsonl", ".npy", ".npz", ".h5", ".pt", ".pth", ".safetensors")
Pooling = Literal["avg", "max", "none"]


def write_features(
    model: keras.Model,
    images: Iterable[str | Path],
    path: str | Path,
    *,
    layer: str,
    pooling: Pooling = "avg",
    batch_size: int = 32,
    shard_size: int = 1024,
    process: int = 0,
    processes: int = 1,
    advance: Callable[[int], None] = lambda images: None,
) -> list[tuple[Path, str]]:
    """Write what a layer puts out for each image, as a Parquet data set; it goes on where it was.

    Args:
        model: remembers what it expects of an image.
        images: files, folders and patterns.
        path: of the data set, a folder. Its columns are `path` and `features`, float32.
        layer: whose output is taken.
        pooling: of feature maps: their mean (`avg`), maximum (`max`), or none: all their values.
        batch_size: images at a time, which bounds the memory with `shard_size`.
        shard_size: images in one file.
        process: the number of this process, from 0, of `processes` that share the work.
        processes: how many there are.
        advance: is told how many more images are done.

    Returns:
        The images that could not be read, and why, of this process.

    Raises:
        ValueError: no images or no such layer; a folder with features of another model or images.
        ImportError: pyarrow isn't installed.
        OSError: a file can't be written.

    Example:
        >>> import tempfile, vggtorch as vt
        >>> from PIL import Image
        >>> from vggtorch.models import remember_
        >>> vgg = vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for colour in ("red", "darkred", "blue"):
        ...         Image.new("RGB", (40, 40), colour).save(f"{folder}/{colour}.png")
        ...     problems = vt.write_features(
        ...         remember_(vgg, "imagenet"), [folder], f"{folder}/features", layer="block2_pool"
        ...     )
        ...     table = vt.read_features(f"{folder}/features")
        >>> table.values.shape, problems
        ((3, 128), [])
    """
    arrow, parquet = _pyarrow()
    if pooling not in ("avg", "max", "none"):
        raise ValueError(f"Received pooling={pooling!r}; expected 'avg', 'max' or 'none'.")
    shard_size, batch_size = whole("shard_size", shard_size), whole("batch_size", batch_size)
    process, processes = whole("process", process, least=0), whole("processes", processes)
    if process >= processes:
        raise ValueError(f"Received process={process} of {processes}; expected a number below.")
    folder = as_path(path)
    if folder.suffix.lower() in OTHERS:
        raise ValueError(
            f"Received {str(path)!r}; expected the name of a folder for Parquet files, such as "
            f"features.parquet."
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Received {str(path)!r}, which is a file; expected a folder's name.")
    paths = image_files(images)
    part = pooled(surgery.truncate(model, layer), pooling)
    folder.mkdir(parents=True, exist_ok=True)
    _check_manifest(folder, part, model, paths, layer, pooling, shard_size)
    schema = arrow.schema([("path", arrow.string()), ("features", arrow.list_(arrow.float32()))])
    unreadable: list[tuple[Path, str]] = []
    for number in range(process, -(-len(paths) // shard_size), processes):
        chunk = paths[number * shard_size : (number + 1) * shard_size]
        target, looks = folder / f"part-{number:06d}.parquet", _looks(chunk)
        if target.exists():
            with _whole(target):
                kept = parquet.read_metadata(target).metadata or {}
            if kept.get(b"files") == looks:
                problems = json.loads(kept.get(b"unreadable", b"[]"))
                unreadable += [(Path(name), reason) for name, reason in problems]
                advance(len(chunk))
                continue
        names: list[str] = []
        values: list[np.ndarray] = []
        problems = []
        for batch in batches(model, chunk, batch_size):
            if batch.paths:
                found = keras.ops.convert_to_numpy(part.predict_on_batch(batch.images))
                names += map(_as_text, batch.paths)
                values += list(found.reshape(len(found), -1).astype(np.float32))
            problems += [(str(bad), reason) for bad, reason in batch.problems]
            advance(len(batch.paths) + len(batch.problems))
        about = {b"unreadable": json.dumps(problems).encode(), b"files": looks}
        described = schema.with_metadata(about)
        table = arrow.table({"path": names, "features": values}, schema=described)
        with files.atomic(target) as temporary:
            parquet.write_table(table, temporary)
        unreadable += [(Path(name), reason) for name, reason in problems]
    return unreadable


def _looks(paths: Sequence[Path]) -> bytes:
    """What changes where one of the files is written anew: a hash of their sizes and times."""
    digest = hashlib.sha256()
    for path in paths:
        with contextlib.suppress(OSError):
            digest.update("{} {}".format(*stamp_of(path)).encode())
        digest.update(b"\n")
    return digest.hexdigest().encode()


def _as_text(path: Path) -> str:
    """A path as Parquet has it, in UTF-8: other bytes of its name stand as escape sequences."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def pooled(model: keras.Model, pooling: Pooling) -> keras.Model:
    """A model whose feature maps, if it ends in such, are pooled."""
    if len(model.output_shape) != 4 or pooling == "none":
        return model
    layers = keras.layers
    pool = layers.GlobalAveragePooling2D if pooling == "avg" else layers.GlobalMaxPooling2D
    return surgery.stack(model, pool(name=f"features_{pooling}"))


def _check_manifest(
    folder: Path,
    part: keras.Model,
    model: keras.Model,
    paths: Sequence[Path],
    layer: str,
    pooling: str,
    shard_size: int,
) -> None:
    """See that what the folder has is of the same run, or say what this run is."""
    listed = hashlib.sha256(b"\0".join(map(os.fsencode, paths))).hexdigest()
    now = {
        "layer": layer,
        "pooling": pooling,
        "model": network_digest(part, values=True),
        "data_config": data_config(model).as_dict(),
        "images": len(paths),
        "paths": listed,
        "shard_size": shard_size,
    }
    manifest = folder / MANIFEST
    if manifest.exists():
        with _whole(manifest):
            before = json.loads(manifest.read_text(encoding="utf-8"))
        if other := [name for name in now if before.get(name) != now[name]]:
            raise ValueError(
                f"{folder} has features of another run, with other {', '.join(other)}. Choose "
                f"another path, or delete that folder."
            )
        return
    if any(folder.iterdir()) and not list(folder.glob(f".*{MANIFEST}")):
        raise ValueError(
            f"{folder} exists and holds something else than features. Choose another path."
        )
    files.write_text(manifest, json.dumps(now, indent=2))


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Inside, a file that can't be read as what it is becomes an error that says what to do."""
    try:
        yield
    except ValueError as error:  # pyarrow's errors of content are such, and json's
        raise ValueError(
            f"{path} is damaged ({files.first_line(error)}). Delete it; the same call makes it "
            f"again."
        ) from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "Features are written as Parquet, which needs pyarrow: pip install 'vggtorch[features]'"
        ) from error
    return pyarrow, parquet


@dataclass(frozen=True)
class FeatureTable:
    """Features of images.

    Attributes:
        paths: the images.
        values: (images, features), float32.
    """

    paths: tuple[str, ...]
    values: np.ndarray

    def nearest(self, queries: np.ndarray, k: int = 5) -> list[list[tuple[str, float]]]:
        """The most similar images of each query, by the cosine of their features, best first.

        Args:
            queries: (N, features), as `values` are.
            k: how many; all where there are fewer.

        Raises:
            ValueError: another number of features, NaN among them, or k below 1.

        Example:
            >>> import numpy as np
            >>> from vggtorch.training import FeatureTable
            >>> table = FeatureTable(("a.jpg", "b.jpg"), np.array([[1.0, 0.0], [0.6, 0.8]]))
            >>> table.nearest(np.array([[0.0, 2.0]]), k=1)
            [[('b.jpg', 0.8)]]
        """
        queries = np.atleast_2d(queries)
        if queries.dtype.kind not in "biuf":
            raise ValueError(f"Received queries of dtype {queries.dtype}; expected numbers.")
        if queries.ndim != 2 or queries.shape[1] != self.values.shape[1]:
            raise ValueError(
                f"Received queries of shape {queries.shape}; expected (N, {self.values.shape[1]})."
            )
        if not np.isfinite(queries).all():
            raise ValueError("Received queries with NaN or infinite values; expected numbers.")
        k = whole("k", k)
        cosine = _unit(queries) @ _unit(self.values).T
        k = min(k, len(self.paths))
        best = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        return [
            [(self.paths[i], float(row[i])) for i in order]
            for row, order in zip(cosine, best, strict=True)
        ]


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def read_features(path: str | Path) -> FeatureTable:
    """The features that `write_features` wrote, all in memory.

    >>> import vggtorch as vt
    >>> vt.read_features("nowhere.parquet")
    Traceback (most recent call last):
    ...
    ValueError: nowhere.parquet has no features. Expected a folder that write_features wrote.

    Args:
        path: the folder of shards.

    Raises:
        ValueError: no such data set, or one without features.
        ImportError: pyarrow isn't installed.
    """
    _, parquet = _pyarrow()
    shards = sorted(as_path(path).glob("part-*.parquet"))
    if not shards:
        raise ValueError(f"{path} has no features. Expected a folder that write_features wrote.")
    paths: list[str] = []
    values: list[np.ndarray] = []
    for shard in shards:
        with _whole(shard):
            table = parquet.read_table(shard)
        paths += table["path"].to_pylist()
        flat = table["features"].combine_chunks()
        if len(flat):
            values.append(flat.flatten().to_numpy().reshape(len(flat), -1))
    if not values:
        raise ValueError(f"{path} has no features: none of its images could be read.")
    return FeatureTable(tuple(paths), np.concatenate(values))
