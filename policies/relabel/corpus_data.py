"""A corpus as data for a learner from states: its side arrays, with rewards of a model, in one .npz file.

Read are `state` (L, D) and `action` (L, A) at full rate, and where they are there `env_reward` and `success` (L,):
row i is moment i, the last action was not carried out. Stored frame j shows moment `frame_index[j]`. No attempt is
terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.relabel.offline_labels import Episode, Flat, Labelling, Labels, joined
from policies.relabel.offline_scores import Unusable
from rbm.corpus import Corpus
from rbm.errors import UserError
from rbm.output import check_target
from rbm.trajectory import Quality, Trajectory


class CorpusData:
    """Trajectories of a corpus.

    Args:
        place: its folder or URL.
        task: the instruction of all; none: what each has.
    """

    kind = "corpus"
    transitions = False  # they are what is written

    def __init__(self, place: str, task: str | None = None) -> None:
        self.corpus = Corpus.open(place)
        self._task, self._view = task, ""

    @property
    def cameras(self) -> Sequence[str]:
        for row in range(len(self.corpus)):
            with suppress(UserError):  # a damaged one is told where it is scored
                return list(self.corpus[row].views)
        return []

    def __len__(self) -> int:
        return len(self.corpus)

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "snapshot": self.corpus.snapshot, "task": self._task}

    def show(self, camera: str) -> None:
        self._view = camera

    def name(self, number: int) -> str:
        return str(self.corpus.ids[number])

    def episode(self, number: int) -> Episode:
        record, flat = self._read(number)
        arrays = _arrays(record, ("env_reward", "success"))
        own, success = arrays.get("env_reward"), arrays.get("success")
        for array in arrays.values():
            if array.shape != (len(flat.states),):
                raise Unusable("its side arrays are of different lengths")
        if self._view not in record.views:
            raise Unusable(f"it has no view {self._view!r}, only {', '.join(record.views)}")
        moments = record.frame_index.astype(np.int64)
        if moments[-1] >= len(flat.states):
            raise Unusable(f"its last frame shows moment {moments[-1]}, there are {len(flat.states)} states")
        return Episode(
            name=record.id,
            task=self._task or record.task,
            steps=len(flat.actions),
            pictures=partial(_frames, record, self._view),
            moments=moments,
            env_rewards=None if own is None else own[1:].astype(np.float32),
            success=record.quality is Quality.SUCCESSFUL if success is None else bool(success.any()),
        )

    def target(self, out: str) -> Path:
        target = Path(out)
        check_target(target, (".npz",))
        return target

    def write(self, target: Path, labels: Mapping[int, Labels], labelling: Labelling) -> None:
        joined({number: self.flat(number) for number in labels}, labels).save(target)

    def flat(self, number: int) -> Flat:
        return self._read(number)[1]

    def _read(self, number: int) -> tuple[Trajectory, Flat]:
        try:
            record = self.corpus[number]
            arrays = _arrays(record, ("state", "action"))
        except UserError as error:
            raise Unusable(str(error)) from error
        if missing := [name for name in ("state", "action") if name not in arrays]:
            raise Unusable(f"it has no side array {' and no '.join(missing)}; build the corpus with them")
        state, action = (arrays[name] for name in ("state", "action"))
        if state.ndim != 2 or action.ndim != 2 or len(state) != len(action):
            raise Unusable(f"its states {state.shape} and actions {action.shape} are no rows of the same moments")
        return record, Flat(state.astype(np.float32), action[:-1].astype(np.float32))


def _arrays(record: Trajectory, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    return {name: record.array(name) for name in names if name in record.array_names}


def _frames(record: Trajectory, view: str, positions: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
    try:
        yield from record.frames(positions, view)
    except UserError as error:
        raise Unusable(str(error)) from error
