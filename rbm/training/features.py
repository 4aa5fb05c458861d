"""Features of stored frames, made once by a tower that is not trained, and kept beside the corpus.

    FOLDER/                  by default CORPUS.features/<fingerprint of the tower>
      meta.json              format, version, dtype, and of which tower
      index.npy              a row for every view of every trajectory, rising by key
      features-00000.bin …   numbers end to end, at most a gibibyte a file (or one clip)
      writer.lock            while one process writes

A clip is found by what its frames are (`Columns.content`), not by its place in a snapshot: features stay good for later
snapshots, copies and selections of a corpus. Numbers are written first, then the index: what it names is whole, and
what a killed writer left behind it is cut off by the next one. Byte table in docs/training.md.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rbm.corpus import Corpus, CorruptPayload
from rbm.corpus.ahead import in_order, threads_for
from rbm.corpus.lock import hold
from rbm.errors import UserError
from rbm.model import RewardModel
from rbm.model.backbones.base import Backbone
from rbm.output import whole_file
from rbm.training.views import NoView

FORMAT = "rbm-features"
VERSION = 1
META, INDEX, LOCK = "meta.json", "index.npy", "writer.lock"

FILE_BYTES = 1 << 30
COMMIT_SECONDS = 1.0
"""So much work a killed writer loses."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ROW = np.dtype(
    [("key", "<u8"), ("offset", "<i8")]
    + [(name, "<i4") for name in ("file", "frames", "levels", "rows", "columns", "width")]
)
DAMAGED = -1
"""Stands for the file of a clip whose frames could not be decoded."""

_NOT_ENCODING = {"prompt", "pooling", "pool_temperature", "views", "view_tags", "text_architecture", "hidden", "layers",
                 "heads", "words", "max_words", "dropout"}  # fmt: skip
"""Options of backbones on which `encode` depends not, or only in the shape of weights. One that is not here counts."""

_NOT_VISION = {"text_config", "tie_word_embeddings", "vocab_size", "use_cache"}


class Entry(NamedTuple):
    """A row of the index without its key. Bytes from `offset` of `file`: (frames, levels, rows, columns, width)."""

    offset: int
    file: int
    frames: int
    levels: int
    rows: int
    columns: int
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self[2:]


def encoding(backbone: Backbone) -> dict[str, Any]:
    """What `Backbone.encode` depends on besides the tower's weights, JSON-able."""
    facts = {name: value for name, value in backbone.config().items() if name not in _NOT_ENCODING}
    if "architecture" in facts:
        parts = facts["architecture"].items()
        facts["architecture"] = {
            name: value for name, value in parts if name not in _NOT_VISION and not name.endswith("_token_id")
        }
    facts |= {"backbone": backbone.name, "preprocessor": repr(backbone.preprocessor)}
    found: dict[str, Any] = json.loads(json.dumps(facts))
    return found


def weights_digest(backbone: Backbone) -> str:
    """Of names and numbers of the tower's weights: the same in float32 as in the precision they were stored in."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(backbone.tower.state_dict().items()):
        values = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}\n".encode())
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def tower_facts(model: RewardModel) -> dict[str, Any]:
    """Which tower it is: `fingerprint` (hexadecimal), and of what it is made: `weights`, `encoding`."""
    weights, how = weights_digest(model.backbone), encoding(model.backbone)
    whole = blake2b(json.dumps([weights, how], sort_keys=True).encode(), digest_size=8)
    return {"fingerprint": whole.hexdigest(), "weights": weights, "encoding": how}


def default_folder(corpus: Corpus, fingerprint: str) -> Path | None:
    """`CORPUS.features/FINGERPRINT` beside a local corpus; none for a remote one."""
    place = corpus.location.local
    return None if place is None else place.with_name(f"{place.name}.features") / fingerprint


def keys_of(content: NDArray[np.uint64], view: str | None) -> NDArray[np.uint64]:
    """Keys of clips: the content hash for the first view, for a view by its name that and the hash of the name."""
    name = 0 if view is None else int.from_bytes(blake2b(view.encode(), digest_size=8).digest(), "little")
    return np.asarray(content, np.uint64) ^ np.uint64(name)


def contents(corpus: Corpus, rows: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint64]:
    """Content hashes of trajectories, uint64 (n,), never 0: those that the index lacks come from their heads.

    Raises:
        CorruptPayload: it is not in the index, and the head is damaged.
    """
    found: NDArray[np.uint64] = corpus.columns.content[np.asarray(rows, np.int64)]
    for place in np.flatnonzero(found == 0).tolist():
        found[place] = corpus.payload(int(rows[place])).head.content
    return found


class FeatureCache:
    """Features that were cached, read-only; make it with `open`. Pickling carries the folder.

    Attributes:
        folder: where it is. meta: content of its `meta.json`. dtype: of the features.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.meta = folder, read_meta(folder)
        self.dtype = DTYPES[self.meta["dtype"]]
        self._index = read_index(folder)
        self._keys = np.ascontiguousarray(self._index["key"])
        self._files: dict[int, FileIO] = {}
        self._check_files()

    @classmethod
    def open(cls, folder: str | os.PathLike[str], model: RewardModel) -> FeatureCache:
        """The features in a folder, which must be those that this model's tower makes.

        Raises:
            UserError: there are none, of another tower or of a newer version, or files are gone or cut short.
        """
        cache = cls(Path(folder))
        cache.check_tower(tower_facts(model))
        return cache

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path]]:
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self._index)

    def check_tower(self, tower: dict[str, Any]) -> None:
        """Raises UserError: the features are of another tower than the one that `tower_facts` gave."""
        old = self.meta["tower"]
        if old["fingerprint"] == tower["fingerprint"]:
            return
        names = old["encoding"].keys() | tower["encoding"].keys()
        what = sorted(name for name in names if old["encoding"].get(name) != tower["encoding"].get(name))
        what += ["weights"] if old["weights"] != tower["weights"] else []
        raise UserError(
            f"features {self.folder} were made by another tower than this model's (differs in: {', '.join(what)}): "
            "run `rbm cache-features` with the model that training starts from, and give the folder that it names"
        )

    def check_rows(
        self, corpus: Corpus, rows: NDArray[np.integer], views: Sequence[str] = (), options: Sequence[str] = ()
    ) -> None:
        """See that these trajectories are there, decodable or not.

        Args:
            corpus, rows: the trajectories.
            views: names; empty: the first view of each.
            options: words for `rbm cache-features` that say which trajectories of the corpus are meant.

        Raises:
            UserError: some are not; it names the command that makes them.
        """
        wanted, content = [], []
        for row in rows.tolist():
            try:
                content.append(int(contents(corpus, [row])[0]))
            except CorruptPayload:  # the loader will find that out too, and take another
                continue
            wanted.append(row)
        hashes = np.array(content, np.uint64)
        missing: set[int] = set()
        for view in views or (None,):
            places = np.flatnonzero(self._find(keys_of(hashes, view)) < 0).tolist()
            missing |= {wanted[place] for place in places if view is None or _has_view(corpus, wanted[place], view)}
        if missing:
            command = shlex.join(["rbm", "cache-features", *self.meta["model"], str(corpus.location)])
            raise UserError(
                f"features {self.folder} lack {len(missing)} of {len(rows)} trajectories of corpus {corpus.location} "
                f"(the first: {corpus.ids[min(missing)]!r}): `{command} --out {shlex.quote(str(self.folder))}"
                f"{''.join(f' {shlex.quote(word)}' for word in options)}` adds them"
            )

    def views_of(
        self, corpus: Corpus, row: int, frames: NDArray[np.integer], views: Sequence[str]
    ) -> list[Tensor | None]:
        """Features of stored frames of each view, none for one that the trajectory lacks; without names of the first.

        Raises:
            CorruptPayload: its frames could not be decoded when features were made. NoView: it has none of the views.
            UserError: it is not in here.
        """
        if not views:
            return [self._of_row(corpus, row, frames, None)]
        there = corpus[row].views
        if not set(there) & set(views):
            raise NoView(corpus.ids[row], f"it has none of the views {', '.join(views)}, only {', '.join(there)}")
        return [self._of_row(corpus, row, frames, view) if view in there else None for view in views]

    def get(self, content: int, frames: NDArray[np.integer] | None = None, view: str | None = None) -> Tensor:
        """Features of stored frames of a trajectory: (n, levels, rows, columns, d), in the order asked for.

        Args:
            content: hash of its frames (`contents`).
            frames: their numbers, int (n,); none for all.
            view: its name; none for the first.

        Raises:
            KeyError: it is not in here. IndexError: it has no such frame.
            CorruptPayload: its frames could not be decoded when features were made (named by its hash).
        """
        place = int(self._find(keys_of(np.array([content], np.uint64), view))[0])
        if place < 0:
            raise KeyError(f"{content:016x}" if view is None else f"{content:016x} {view}")
        entry = Entry(*self._index[place].item()[1:])
        if entry.file == DAMAGED:
            raise CorruptPayload(f"{content:016x}", "its frames could not be decoded when its features were cached")
        wanted = np.arange(entry.frames) if frames is None else np.asarray(frames, np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= entry.frames):
            raise IndexError(f"{entry.frames} frames are stored, asked for {wanted.tolist()}")
        found = torch.empty((len(wanted), *entry.shape[1:]), dtype=self.dtype)
        raw = found.view(torch.uint8).numpy().reshape(-1)
        size, begin = prod(entry.shape[1:]) * self.dtype.itemsize, 0
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1):  # neighbours are read at once
            if len(run):
                end = begin + len(run) * size
                self._read(entry.file, entry.offset + int(run[0]) * size, raw[begin:end].data)
                begin = end
        return found

    def _of_row(self, corpus: Corpus, row: int, frames: NDArray[np.integer], view: str | None) -> Tensor:
        try:
            return self.get(int(contents(corpus, [row])[0]), frames, view)
        except CorruptPayload as error:
            raise CorruptPayload(corpus.ids[row], error.what, str(corpus.location)) from error
        except KeyError as error:
            raise UserError(
                f"features {self.folder} lack trajectory {corpus.ids[row]!r}" + (f", view {view!r}" if view else "")
            ) from error

    def _find(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Rows of the index, -1 where there is none: int64 (n,)."""
        if not len(self._keys):
            return np.full(len(keys), -1, np.int64)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, place, -1)

    def _read(self, number: int, offset: int, into: memoryview) -> None:
        """Bytes of a file from `offset` on. It is not mapped: of a mapping the system would hold far more pages."""
        if number not in self._files:
            self._files[number] = (self.folder / file_name(number)).open("rb", buffering=0)
        while into:
            size = os.preadv(self._files[number].fileno(), [into], offset)
            if not size:
                raise UserError(
                    f"features {self.folder}: {file_name(number)} was cut short meanwhile: cache them again"
                )
            into, offset = into[size:], offset + size

    def entries(self) -> dict[int, Entry]:
        """All that is there, by key."""
        return {key: Entry(*rest) for key, *rest in self._index.tolist()}

    def _check_files(self) -> None:
        for number, end in ends(self._index, self.dtype.itemsize).items():
            path = self.folder / file_name(number)
            if not path.is_file() or path.stat().st_size < end:
                raise UserError(
                    f"features {self.folder}: {path.name} is {'cut short' if path.is_file() else 'missing'}: delete "
                    "the folder and run `rbm cache-features` again"
                )


def _has_view(corpus: Corpus, row: int, view: str) -> bool:
    """False where its head is damaged, too."""
    try:
        return view in corpus[row].views
    except CorruptPayload:
        return False


def file_name(number: int) -> str:
    return f"features-{number:05d}.bin"


def ends(index: NDArray[Any], width: int) -> dict[int, int]:
    """File -> bytes of it that an index names."""
    kept = index[index["file"] != DAMAGED]
    size = np.full(len(kept), width, np.int64)
    for name in ("frames", "levels", "rows", "columns", "width"):
        size *= kept[name]
    return {
        int(number): int((kept["offset"] + size)[kept["file"] == number].max()) for number in np.unique(kept["file"])
    }


def read_meta(folder: Path) -> dict[str, Any]:
    """Raises UserError: there are no features here, or of a newer version."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        meta = None
    except (OSError, ValueError) as error:
        raise UserError(f"features {folder}: {META} can not be read: {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"{folder} holds no features: give a folder that `rbm cache-features` made")
    if meta["version"] != VERSION:
        raise UserError(
            f"features {folder} have version {meta['version']}, this rbm reads version {VERSION}: upgrade robot-rbm, "
            "or cache them again"
        )
    return meta


def read_index(folder: Path) -> NDArray[Any]:
    """The index, mapped; an empty one where nothing was finished yet. Raises UserError: it is damaged."""
    try:
        index = np.load(folder / INDEX, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except FileNotFoundError:
        return np.empty(0, ROW)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"features {folder}: {INDEX} can not be read ({error}): delete the folder, and cache again"
        ) from error
    if index.dtype != ROW:
        raise UserError(f"features {folder}: {INDEX} is of another format: delete the folder, and cache again")
    return index


class FeatureWriter:
    """Adds clips to a folder of features; what is finished is kept, whatever happens. A context manager.

    Args:
        folder: made where it is not there.
        model: words that name the model on the command line, for messages.
        tower: of `tower_facts`.
        dtype: a key of `DTYPES`.

    Raises:
        UserError: another process writes to it; it holds something else, or features of another tower or dtype.
    """

    def __init__(self, folder: Path, model: Sequence[str], tower: dict[str, Any], dtype: str) -> None:
        self.folder, self._dtype = folder, DTYPES[dtype]
        self._meta: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype,
            "model": list(model),
            "tower": tower,
        }
        self._entries: dict[int, Entry] = {}
        self._number = self._at = 0
        self._changed, self._committed = False, time.monotonic()

    def __enter__(self) -> Self:
        with self._named():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock, _ = hold(self.folder / LOCK, f"features {self.folder}")
        try:
            with self._named():
                self._begin()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.commit()
            self._file.close()
        finally:
            self._unlock()

    def has(self, keys: Iterable[int]) -> bool:
        """Whether features of all these keys are there."""
        return all(key in self._entries and self._entries[key].file != DAMAGED for key in keys)

    def add(self, keys: Iterable[int], features: Tensor) -> None:
        """A clip (T, levels, rows, columns, d) that is found by any of these keys."""
        values = features.to(self._dtype).cpu().contiguous()
        raw = values.view(torch.uint8).numpy().reshape(-1)
        with self._named():
            if self._at and self._at + len(raw) > FILE_BYTES:
                self._next_file()
            rest = raw.data
            while rest:  # not buffered: what a full disk took is there, and nothing waits to be written again
                rest = rest[self._file.write(rest) :]
        entry = Entry(self._at, self._number, *values.shape)
        self._at += len(raw)
        self._note(keys, entry)

    def add_damaged(self, keys: Iterable[int]) -> None:
        """A clip that could not be decoded."""
        self._note(keys, Entry(0, DAMAGED, 0, 0, 0, 0, 0))

    def commit(self) -> None:
        """Make what was added count."""
        if self._changed:
            with self._named():
                os.fsync(self._file.fileno())
            index = np.array([(key, *entry) for key, entry in sorted(self._entries.items())], ROW)
            with whole_file(self.folder / INDEX) as path, path.open("wb") as file:
                np.save(file, index, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        self._changed, self._committed = False, time.monotonic()

    def _note(self, keys: Iterable[int], entry: Entry) -> None:
        self._entries |= dict.fromkeys(keys, entry)
        self._changed = True
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def _begin(self) -> None:
        check_folder(self.folder, self._meta["tower"], self._meta["dtype"])
        if not (self.folder / META).exists():
            with whole_file(self.folder / META) as path:
                path.write_text(json.dumps(self._meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        index = read_index(self.folder)
        self._entries = {key: Entry(*rest) for key, *rest in index.tolist()}
        kept = ends(index, self._dtype.itemsize)
        for path in self.folder.glob(".writing-*"):  # what a killed writer did not finish
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("features-*.bin"):
            number = int(path.stem.partition("-")[2])
            if number not in kept:
                path.unlink()
            elif path.stat().st_size > kept[number]:
                os.truncate(path, kept[number])
        self._number = max(kept, default=0)
        self._open()

    def _open(self) -> None:
        self._file = (self.folder / file_name(self._number)).open("ab", buffering=0)
        self._at = self._file.seek(0, os.SEEK_END)

    def _next_file(self) -> None:
        self.commit()
        self._file.close()
        self._number += 1
        self._open()

    def _named(self) -> _Named:
        return _Named(self.folder)

    def _unlock(self) -> None:
        (self.folder / LOCK).unlink(missing_ok=True)
        os.close(self._lock)


class _Named:
    """Turns errors of the system into a sentence."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            hint = "free some space" if error.errno == errno.ENOSPC else "see that the folder can be written"
            raise UserError(
                f"features {self.folder}: can not be written ({error.strerror or error}): {hint}, then run the same "
                "command again, which goes on"
            ) from error


def check_folder(folder: Path, tower: dict[str, Any], dtype: str) -> None:
    """Raises UserError: this folder holds something else than features by this tower, of this dtype."""
    if not folder.exists() or all(path.name == LOCK or path.name.startswith(".writing-") for path in folder.iterdir()):
        return
    cache = FeatureCache(folder)
    cache.check_tower(tower)
    if cache.meta["dtype"] != dtype:
        raise UserError(
            f"features {folder} are {cache.meta['dtype']}, not {dtype}: give --dtype {cache.meta['dtype']} to add to "
            "them, or another --out"
        )


@dataclass(frozen=True)
class Work:
    """A clip to be encoded: one view (none: the first) of a trajectory; `keys` under which it is found.

    `shape`: of its features, (T, levels, rows, columns, d).
    """

    row: int
    view: str | None
    keys: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        trajectories: distinct ones that are asked for.
        work: clips that are not there yet.
        kept: clips that are there already.
        frames, bytes: of both together; new_bytes: of `work`.
        damaged: trajectories (id, what is wrong) whose heads could not be read, and their keys.
        complete: all was looked at; else what was found by then is over the limit.
    """

    trajectories: int
    work: list[Work]
    kept: int = 0
    frames: int = 0
    bytes: int = 0
    new_bytes: int = 0
    damaged: list[tuple[str, str, tuple[int, ...]]] | None = None
    complete: bool = True


class Encoder:
    """A model's tower on a device, and how its features are stored."""

    def __init__(self, model: RewardModel, device: torch.device, dtype: str, batch_frames: int = 64) -> None:
        model.eval().backbone.tower.to(device)
        self.model, self.device, self.dtype, self.batch_frames = model, device, dtype, batch_frames
        self._shapes: dict[tuple[int, int], tuple[int, ...]] = {}

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype].itemsize

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """(levels, rows, columns, d) of frames of this size: one is encoded to see."""
        if (height, width) not in self._shapes:
            black = self.model.preprocess(np.zeros((1, height, width, 3), np.uint8))
            self._shapes[height, width] = tuple(self(black).shape[1:])
        return self._shapes[height, width]

    def __call__(self, frames: Tensor) -> Tensor:
        """Preprocessed frames -> features on the CPU, as they are stored.

        Raises:
            UserError: numbers that are not finite, or too large for float16.
        """
        stored = DTYPES[self.dtype]
        with torch.inference_mode():
            parts = [
                self.model.backbone.encode(part.to(self.device)).to(stored).cpu()
                for part in frames.split(self.batch_frames)
            ]
        features = torch.cat(parts)
        if not bool(torch.isfinite(features).all()):
            hint = "give --dtype bfloat16" if self.dtype == "float16" else "the model's weights are damaged"
            raise UserError(f"the tower makes numbers that are not finite in {self.dtype}: {hint}")
        return features


def plan_features(
    encoder: Encoder,
    corpus: Corpus,
    rows: NDArray[np.integer],
    folder: Path,
    limit: int | None = None,
) -> Plan:
    """Look at the heads of trajectories (at as many as it takes to pass `limit` bytes), and at what is there already.

    Features are made of the views that the model names, and where it names none, of the first view.
    """
    views: tuple[str | None, ...] = encoder.model.backbone.views or (None,)
    cache = FeatureCache(folder) if (folder / META).exists() else None
    known = {} if cache is None else cache.entries()
    plan = Plan(len(rows), [], damaged=[])
    assert plan.damaged is not None
    seen: set[int] = set()

    def look(row: int) -> tuple[int, tuple[int, list[tuple[str, int, int]]] | CorruptPayload]:
        try:
            return row, _head(corpus, row, named)
        except CorruptPayload as error:
            return row, error

    named = views != (None,)
    for row, head in in_order(look, rows.tolist(), threads_for(corpus.location)):
        content = int(corpus.columns.content[row])
        if isinstance(head, CorruptPayload):
            keys = [keys_of(np.array([content], np.uint64), view).item() for view in views] if content else []
            plan.damaged.append((head.trajectory, head.what, tuple(keys)))
            continue
        content, sizes = head
        for view in views:
            found = [size for size in sizes if size[0] == view] if view is not None else sizes[:1]
            if not found:
                continue
            name, height, width = found[0]
            alias = [None, name] if name == sizes[0][0] else [name]
            keys = [keys_of(np.array([content], np.uint64), key).item() for key in alias]
            if keys[0] in seen:
                continue
            seen.update(keys)
            shape = (int(corpus.columns.n_frames[row]), *encoder.shape(height, width))
            size = prod(shape) * encoder.width
            plan.frames, plan.bytes = plan.frames + shape[0], plan.bytes + size
            if all(key in known and known[key].file != DAMAGED for key in keys):
                plan.kept += 1
            else:
                plan.work.append(Work(row, view, tuple(keys), shape))
                plan.new_bytes += size
        if limit is not None and plan.bytes > limit:
            share = plan.frames / int(corpus.columns.n_frames[rows].sum(dtype=np.int64)) / len(views)
            plan.frames, plan.bytes = round(plan.frames / share), round(plan.bytes / share)
            plan.complete = False
            break
    return plan


def _head(corpus: Corpus, row: int, named: bool) -> tuple[int, list[tuple[str, int, int]]]:
    """Content hash, and name, height and width of each view (of the first, unless `named`)."""
    content = int(corpus.columns.content[row])
    if content and not named:  # takes a few bytes of a remote corpus, not the whole payload
        record = corpus[row]
        return content, [(record.views[0], record.height, record.width)]
    head = corpus.payload(row).head
    return head.content, [(view.name, view.height, view.width) for view in head.views]


@dataclass(frozen=True)
class Done:
    """What was done: clips encoded now, frames of these, and trajectories (id, why) that could not be decoded."""

    clips: int
    frames: int
    damaged: list[tuple[str, str]]


def make_features(
    encoder: Encoder, corpus: Corpus, plan: Plan, writer: FeatureWriter, advance: Callable[[int], None]
) -> Done:
    """Encode what a plan lists; `advance` hears of every clip's frames. Trajectories that are damaged are left out."""

    def read(work: Work) -> tuple[Work, Tensor | CorruptPayload]:
        try:
            return work, encoder.model.preprocess(corpus.frames(work.row, view=work.view))
        except CorruptPayload as error:
            return work, error

    damaged = []
    for id, what, keys in plan.damaged or []:
        damaged.append((id, what))
        writer.add_damaged(keys)
    clips = frames = 0
    for work, pixels in in_order(read, _missing(plan.work, writer), threads_for(corpus.location)):
        if isinstance(pixels, CorruptPayload):
            damaged.append((pixels.trajectory, pixels.what))
            writer.add_damaged(work.keys)
        else:
            writer.add(work.keys, encoder(pixels))
            clips, frames = clips + 1, frames + len(pixels)
        advance(work.shape[0])
    return Done(clips, frames, damaged)


def _missing(work: Iterable[Work], writer: FeatureWriter) -> Iterator[Work]:
    return (item for item in work if not writer.has(item.keys))


def free_space(folder: Path) -> int:
    """Bytes that are free where the folder is or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
