"""Who is trained on and who is not: one split, read by training and by evaluation.

Rules, in order:

1. Every trajectory of a held-out task, or of a task of a held-out scene, is on the side `newtask`.
2. Within each other task × outcome the trajectories are ordered by a hash of (seed, id). The first
   `heldout_per_quality` go to `heldout`, the next `validation_per_quality` to `validation`, the rest to `train`.
3. Copies (trajectories with the same frames, by their content hash) count as one, with the hash of the first of
   them in the corpus, and stay together: a copy that is added later moves none of the older ones. Copies that the
   rules put on different sides (the same film filed under two tasks) stay only on the side furthest from training:
   newtask, heldout, validation, train; the others are left out of every side and listed in `dropped`.
   Copies are told by their stored bytes: the same film stored by two codecs is two. Where the first copy is removed or
   replaced, the next one decides for the others; pin a selection to keep a side.

The hash knows nothing of the rest of the corpus. With a number below 1 (a fraction) the hash alone decides,
and nothing ever moves. With a whole number the first so-many count, and as the corpus grows a trajectory can
only move towards training (a newcomer takes its place), never from training to validation or held-out: what a
model was trained on stays out of every later test.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rbm.assets import bundled_corpus
from rbm.corpus.location import Location
from rbm.corpus.reader import Corpus
from rbm.corpus.selection import Selection
from rbm.errors import UserError

TRAIN, VALIDATION, HELDOUT, NEWTASK = range(4)


@dataclass(frozen=True)
class Split:
    """Numbers of the trajectories on each side: rising int64 arrays, no two with a member in common.

    Attributes:
        train, validation, heldout: of the tasks that are trained on.
        newtask: all trajectories of the held-out tasks and scenes.
        dropped: copies of trajectories on another side (rule 3), used nowhere.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    heldout: NDArray[np.int64]
    newtask: NDArray[np.int64]
    dropped: NDArray[np.int64]


def split_rows(
    ids: Sequence[str],
    task: ArrayLike,
    quality: ArrayLike,
    heldout_tasks: Sequence[int] | NDArray[np.integer] = (),
    heldout_per_quality: float = 4,
    validation_per_quality: float = 2,
    seed: int = 0,
    content: ArrayLike | None = None,
    rows: ArrayLike | None = None,
) -> Split:
    """The split of N trajectories, by the rules above. O(N log N), a million in some two seconds.

    Args:
        ids: N unique ids.
        task, quality: int (N,), the task number and `Quality.rank` of each.
        heldout_tasks: task numbers that nothing is trained on.
        heldout_per_quality, validation_per_quality: how many of each task × outcome (whole numbers), or which
            share of them (below 1).
        content: uint64 (N,), hashes of the frames, 0 where unknown; none where all are.
        rows: only these are split, int (n,); none for all.

    Raises:
        UserError: a negative number, or fractions that leave nothing for training.
    """
    sizes = (heldout_per_quality, validation_per_quality)
    if min(sizes) < 0:
        raise UserError(f"heldout_per_quality and validation_per_quality must not be negative, got {sizes}")
    if sum(size for size in sizes if size < 1) >= 1:
        raise UserError(f"held-out and validation fractions {sizes} leave nothing for training")
    chosen = np.arange(len(ids)) if rows is None else np.unique(np.asarray(rows, np.int64))
    first = chosen if content is None else _first_copies(np.asarray(content, np.uint64))[chosen]
    hashes = _hashes(seed, ids, first)

    task = np.asarray(task, np.int64)[chosen]
    side = _sides(task * 3 + np.asarray(quality, np.int64)[chosen], hashes, *sizes)
    side[np.isin(task, np.asarray(heldout_tasks, np.int64))] = NEWTASK

    _, group = np.unique(hashes, return_inverse=True)  # copies share a hash
    furthest = np.zeros(len(hashes), np.int8)
    np.maximum.at(furthest, group, side)
    kept = side == furthest[group]
    return Split(
        train=chosen[kept & (side == TRAIN)],
        validation=chosen[kept & (side == VALIDATION)],
        heldout=chosen[kept & (side == HELDOUT)],
        newtask=chosen[kept & (side == NEWTASK)],
        dropped=chosen[~kept],
    )


def _first_copies(content: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Of each row the first one with the same frames, itself where they are unknown: int64 (N,)."""
    _, first, group = np.unique(content, return_index=True, return_inverse=True)
    return np.where(content == 0, np.arange(len(content)), first[group])


def _hashes(seed: int, ids: Sequence[str], rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64-bit hashes of (seed, id) of these rows: uint64 (n,)."""
    wanted, place = np.unique(rows, return_inverse=True)
    names = ids if len(wanted) == len(ids) else (ids[row] for row in wanted.tolist())
    prefix = f"{seed}\x00".encode()
    digests = b"".join(blake2b(prefix + name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8").astype(np.uint64)[place]


def _sides(
    stratum: NDArray[np.int64], hashes: NDArray[np.uint64], heldout: float, validation: float
) -> NDArray[np.int8]:
    """Side of each trajectory by its hash within its stratum (task × outcome); equal hashes (copies) count as one."""
    order = np.lexsort((hashes, stratum))
    ordered, rising = stratum[order], hashes[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(order)]
    new = begins | np.concatenate([[True], rising[1:] != rising[:-1]])[: len(order)]
    number = np.cumsum(new) - 1  # of each trajectory among the distinct ones
    which = (np.cumsum(begins) - 1)[new]  # of each distinct one: its stratum, and its place in it
    place = np.arange(len(which)) - np.flatnonzero(begins[new])[which]
    share = rising[new] / 2.0**64
    held = share < heldout if heldout < 1 else place < heldout
    # A count takes the next ones; a fraction the far end of the hash, so that a held-out count does not shift it.
    n_held = np.bincount(which, held)[which]
    checked = place < n_held + validation if validation >= 1 else share >= 1 - validation
    side = np.empty(len(order), np.int8)
    side[order] = np.where(held, HELDOUT, np.where(checked, VALIDATION, TRAIN))[number]
    return side


def split_corpus(
    corpus: Corpus,
    heldout_tasks: Sequence[str] = (),
    heldout_per_quality: float = 4,
    validation_per_quality: float = 2,
    seed: int = 0,
    heldout_scenes: Sequence[str] = (),
    rows: NDArray[np.integer] | None = None,
) -> Split:
    """`split_rows` of a corpus (of these `rows` of it), with the held-out tasks and scenes by their names.

    Raises:
        UserError: a held-out task or scene that the corpus does not have, and as `split_rows`.
    """
    columns = corpus.columns
    return split_rows(
        corpus.ids,
        columns.task,
        columns.quality,
        heldout_numbers(corpus, heldout_tasks, heldout_scenes),
        heldout_per_quality,
        validation_per_quality,
        seed,
        columns.content,
        rows,
    )


def heldout_numbers(corpus: Corpus, tasks: Sequence[str], scenes: Sequence[str] = ()) -> NDArray[np.int64]:
    """Numbers of these tasks and of all tasks of these scenes, rising.

    Raises:
        UserError: a task or scene that the corpus does not have.
    """
    numbers = []
    for text in tasks:
        try:
            numbers.append(corpus.task_number(text))
        except UserError as error:
            raise UserError(
                f"{error}. It is held out by data.heldout_tasks: name tasks of this corpus, or say data=corpus, which "
                "holds out none"
            ) from error
    for name in scenes:
        if name not in corpus.scenes:
            close = difflib.get_close_matches(name, corpus.scenes, n=3) or list(corpus.scenes)[:5]
            hint = "there are " + ", ".join(map(repr, close)) if close else "its tasks name none"
            raise UserError(f"corpus {corpus.location}: no scene {name!r}; {hint}")
        numbers += np.flatnonzero(corpus.task_scene == corpus.scenes.index(name)).tolist()
    return np.unique(np.array(numbers, np.int64))


def open_rows(
    place: str | None, snapshot: str | None = None, selection: str | None = None
) -> tuple[Corpus, NDArray[np.int64] | None]:
    """The corpus that a configuration names, and the rows of it that are used (none: all).

    Args:
        place: path or URL; none for the selection's corpus, or without a selection the bundled one.
        snapshot: id or tag; none for the selection's, or without a selection the newest.
        selection: file of a saved selection (`rbm corpus select`); none for the whole corpus.

    Raises:
        UserError: there is none; the corpus or snapshot is not the one that the selection was made of.
    """
    if selection is None:
        return Corpus.open(place or bundled_corpus(), snapshot), None
    corpus, rows = Selection.load(selection).open()
    if place is not None and Location.parse(place) != corpus.location:
        raise UserError(
            f"selection {selection} is of the corpus {corpus.location}, not of {place}: give the one or the other"
        )
    if snapshot is not None and Corpus.open(corpus.location, snapshot).snapshot != corpus.snapshot:
        raise UserError(
            f"selection {selection} is of snapshot {corpus.snapshot}, not of {snapshot}: leave the snapshot out, or "
            "select again"
        )
    return corpus, rows
