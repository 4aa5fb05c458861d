"""Which views of a trajectory a model is shown: those that it names, as far as they are there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rbm.corpus import Corpus, CorruptPayload
from rbm.errors import UserError
from rbm.frames import pick_frames

LOOKED_AT = 16
"""So many trajectories of each source are looked at before training: a header each."""


class NoView(UserError):
    """A trajectory has none of the views that the model is shown.

    Attributes:
        trajectory: its id. what: is wrong with it.
    """

    def __init__(self, trajectory: str, what: str) -> None:
        super().__init__(f"trajectory {trajectory!r}: {what}")
        self.trajectory, self.what = trajectory, what

    def __reduce__(self) -> tuple[type[NoView], tuple[str, str]]:
        return type(self), (self.trajectory, self.what)


def read_views(
    corpus: Corpus, row: int, frames: NDArray[np.integer], views: tuple[str, ...], min_side: int | None = None
) -> list[NDArray[np.uint8] | None]:
    """Stored frames `frames` int64 (n,) of each view, uint8 (n, H, W, 3), none for one that the trajectory lacks.

    Without names the first view. `min_side` as in `Corpus.frames`.

    Raises:
        CorruptPayload: names the trajectory and the frame. NoView: it has none of them.
    """
    if not views:
        return [corpus.frames(row, frames, min_side=min_side)]
    payload = corpus.payload(row)
    there = payload.head.trajectory.views
    if not set(there) & set(views):
        raise NoView(corpus.ids[row], f"it has none of the views {', '.join(views)}, only {', '.join(there)}")
    return [payload.frames(frames, view, min_side) if view in there else None for view in views]


def check_views(corpus: Corpus, rows: NDArray[np.integer], views: tuple[str, ...]) -> None:
    """Look at a few of these trajectories of each source, spread evenly.

    A name that none of them has is a slip of the pen, and a source without any of the views could not be trained on.
    One trajectory of a source may lack them all: a pair with it is replaced when it comes, and counted.

    Raises:
        UserError: one of the two; says which views there are.
    """
    if not views:
        return
    source = corpus.columns.source[rows]
    found: set[str] = set()
    for number, name in enumerate(corpus.sources):
        members = rows[source == number]
        if not len(members):
            continue
        there: set[str] = set()
        for row in members[pick_frames(len(members), LOOKED_AT)].tolist():
            try:
                there |= set(corpus[row].views)
            except CorruptPayload:
                continue  # named and counted when it is drawn
        if there and not there & set(views):
            raise UserError(
                f"source {name!r} has the views {', '.join(sorted(there))}, the model reads {', '.join(views)}: name "
                "its views in model.backbone.views, or leave the source out by data.selection"
            )
        found |= there
    if missing := [view for view in views if view not in found]:
        raise UserError(
            f"no trajectory looked at has the view {' or '.join(map(repr, missing))} of model.backbone.views; there "
            f"are: {', '.join(sorted(found)) or 'none'}"
        )
