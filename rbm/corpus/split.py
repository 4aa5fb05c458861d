"""Who is trained on and who is not: one split, read by training and by evaluation.

Rules, in order:

1. Every trajectory of a held-out task is on the side `newtask`.
2. Within each other task × outcome the trajectories are ordered by a hash of (seed, content), where content
   is the content hash of the frames, or the id where none is known. The first `heldout_per_quality` go to
   `heldout`, the next `validation_per_quality` to `validation`, the rest to `train`.
3. Copies (equal content) count as one and stay together. Copies that the rules put on different sides (the
   same film filed under two tasks) stay only on the side furthest from training: newtask, heldout,
   validation, train; the others are left out of every side and listed in `dropped`.

The hash knows nothing of the rest of the corpus. With a number below 1 (a fraction) the hash alone decides,
and nothing ever moves. With a whole number the first so-many count, and as the corpus grows a trajectory can
only move towards training (a newcomer takes its place), never from training to validation or held-out: what a
model was trained on stays out of every later test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rbm.corpus.reader import Corpus
from rbm.errors import UserError

TRAIN, VALIDATION, HELDOUT, NEWTASK = range(4)


@dataclass(frozen=True)
class Split:
    """Numbers of the trajectories on each side: rising int64 arrays, no two with a member in common.

    Attributes:
        train, validation, heldout: of the tasks that are trained on.
        newtask: all trajectories of the held-out tasks.
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
    heldout_tasks: Sequence[int] = (),
    heldout_per_quality: float = 4,
    validation_per_quality: float = 2,
    seed: int = 0,
    content: Sequence[str] | None = None,
) -> Split:
    """The split of N trajectories, by the rules above.

    Args:
        ids: N unique ids.
        task, quality: int (N,), the task number and `Quality.rank` of each.
        heldout_tasks: task numbers that nothing is trained on.
        heldout_per_quality, validation_per_quality: how many of each task × outcome (whole numbers), or which
            share of them (below 1).
        content: N content hashes of the frames, "" where unknown.

    Raises:
        UserError: a negative number, or fractions that leave nothing for training.
    """
    sizes = (heldout_per_quality, validation_per_quality)
    if min(sizes) < 0:
        raise UserError(f"heldout_per_quality and validation_per_quality must not be negative, got {sizes}")
    if sum(size for size in sizes if size < 1) >= 1:
        raise UserError(f"held-out and validation fractions {sizes} leave nothing for training")
    tasks, ranks = np.asarray(task, np.int64), np.asarray(quality, np.int64)
    keys = [key or name for key, name in zip(content, ids, strict=True)] if content is not None else list(ids)
    hashes = np.fromiter((_hash(seed, key) for key in keys), np.uint64, len(keys))

    side = np.full(len(keys), TRAIN, np.int8)
    for stratum in np.unique(tasks * 3 + ranks):
        members = np.flatnonzero(tasks * 3 + ranks == stratum)
        side[members] = _sides(hashes[members], heldout_per_quality, validation_per_quality)
    side[np.isin(tasks, np.asarray(heldout_tasks, np.int64))] = NEWTASK

    _, group = np.unique(hashes, return_inverse=True)  # copies share a key and so a hash
    furthest = np.zeros(group.max() + 1 if len(group) else 0, np.int8)
    np.maximum.at(furthest, group, side)
    kept = side == furthest[group]

    def rows(which: int) -> NDArray[np.int64]:
        return np.flatnonzero(kept & (side == which)).astype(np.int64)

    return Split(
        train=rows(TRAIN),
        validation=rows(VALIDATION),
        heldout=rows(HELDOUT),
        newtask=rows(NEWTASK),
        dropped=np.flatnonzero(~kept).astype(np.int64),
    )


def _sides(hashes: NDArray[np.uint64], heldout: float, validation: float) -> NDArray[np.int8]:
    """Sides of one task × outcome, from its members' hashes; equal hashes (copies) count as one."""
    distinct, number = np.unique(hashes, return_inverse=True)
    share = distinct / 2.0**64
    place = np.arange(len(distinct))
    held = share < heldout if heldout < 1 else place < heldout
    # A count takes the next ones; a fraction the far end of the hash, so that a held-out count does not shift it.
    checked = place < held.sum() + validation if validation >= 1 else share >= 1 - validation
    return np.where(held, HELDOUT, np.where(checked, VALIDATION, TRAIN)).astype(np.int8)[number]


def _hash(seed: int, key: str) -> int:
    return int.from_bytes(blake2b(f"{seed}\x00{key}".encode(), digest_size=8).digest(), "little")


def split_corpus(
    corpus: Corpus,
    heldout_tasks: Sequence[str] = (),
    heldout_per_quality: float = 4,
    validation_per_quality: float = 2,
    seed: int = 0,
) -> Split:
    """`split_rows` of a whole corpus, with the held-out tasks named by their instructions.

    Raises:
        UserError: a held-out task that the corpus does not have, and as `split_rows`.
    """
    numbers = [corpus.task_number(text) for text in heldout_tasks]
    columns = corpus.columns
    return split_rows(
        list(corpus.ids), columns.task, columns.quality, numbers, heldout_per_quality, validation_per_quality, seed
    )
