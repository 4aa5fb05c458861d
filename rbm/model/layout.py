"""Token layouts: what a sequence is made of, and who may look at whom.

A row is one sequence. In its simplest form it is one clip: the instruction, then the frames, then
(if asked) a read-out token. A pair can be one row in two ways:

    causal   [text | A ... | split | B ... | preference]           one stream, B sees A (the published layout)
    joint    [text | A ... end_a | B ... end_b | preference]       A and B see the text and themselves only

In `joint` (an isolated pair), positions restart after the text for both, and the marker that tells A from B
stands *behind* the frames, where they cannot see it: so a clip has the same hidden states alone, as
first and as second. Only the preference token sees both.

All of that is one rule. Each unit has a segment; unit q may look at unit k when k is not later and
    segment(k) == TEXT  or  segment(k) == segment(q)  or  segment(q) == BOTH.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Kind(IntEnum):
    """What a unit of a row is; all but TEXT and FRAME are learned marker tokens."""

    TEXT = 0
    FRAME = 1
    SPLIT = 2
    END_A = 3
    END_B = 4
    PREFERENCE = 5


N_MARKERS = len(Kind) - 2

TEXT, FIRST, SECOND, BOTH = range(4)
"""Segments. A causal row is all TEXT: one stream."""


@dataclass(frozen=True)
class Row:
    """One sequence of L units.

    Attributes:
        kind: int64 (L,), of `Kind`.
        source: int64 (L,), token id for TEXT, index into the batch's F frames for FRAME, else 0.
        segment: int64 (L,).
        position: int64 (L,), what the positional encoding is given.
    """

    kind: NDArray[np.int64]
    source: NDArray[np.int64]
    segment: NDArray[np.int64]
    position: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.kind)


def _row(*parts: tuple[Kind, NDArray[np.int64] | int, int, int]) -> Row:
    """Parts (kind, sources or number of markers, segment, first position), end to end."""
    kinds, sources, segments, positions = [], [], [], []
    for kind, source, segment, start in parts:
        ids = np.zeros(source, np.int64) if isinstance(source, int) else np.asarray(source, np.int64)
        kinds.append(np.full(len(ids), int(kind), np.int64))
        sources.append(ids)
        segments.append(np.full(len(ids), segment, np.int64))
        positions.append(np.arange(start, start + len(ids), dtype=np.int64))
    return Row(*(np.concatenate(column) for column in (kinds, sources, segments, positions)))


def clip_row(text: NDArray[np.int64], frames: NDArray[np.int64], readout: bool) -> Row:
    """One clip by itself, with a preference read-out at its end if `readout`."""
    start = len(text)
    parts: list[tuple[Kind, NDArray[np.int64] | int, int, int]] = [
        (Kind.TEXT, text, TEXT, 0),
        (Kind.FRAME, frames, FIRST, start),
    ]
    if readout:
        parts.append((Kind.PREFERENCE, 1, FIRST, start + len(frames)))
    return _row(*parts)


def joint_row(text: NDArray[np.int64], first: NDArray[np.int64], second: NDArray[np.int64]) -> Row:
    """An isolated pair with one preference token that sees both clips."""
    start = len(text)
    end_a, end_b = start + len(first), start + len(second)
    return _row(
        (Kind.TEXT, text, TEXT, 0),
        (Kind.FRAME, first, FIRST, start),
        (Kind.END_A, 1, FIRST, end_a),
        (Kind.FRAME, second, SECOND, start),
        (Kind.END_B, 1, SECOND, end_b),
        (Kind.PREFERENCE, 1, BOTH, max(end_a, end_b) + 1),
    )


def causal_row(text: NDArray[np.int64], first: NDArray[np.int64], second: NDArray[np.int64]) -> Row:
    """A pair as one stream: the second clip sees the first, positions run on (the published layout)."""
    a = len(text)
    b = a + len(first) + 1
    end = b + len(second)
    return _row(
        (Kind.TEXT, text, TEXT, 0),
        (Kind.FRAME, first, TEXT, a),
        (Kind.SPLIT, 1, TEXT, b - 1),
        (Kind.FRAME, second, TEXT, b),
        (Kind.PREFERENCE, 1, TEXT, end),
    )


def visible(segment: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The attention mask of a row: bool (L, L), True where the unit of that line may look at that of the column."""
    query, key = segment[:, None], segment[None, :]
    not_later = np.tri(len(segment), dtype=bool)
    return not_later & ((key == TEXT) | (key == query) | (query == BOTH))
