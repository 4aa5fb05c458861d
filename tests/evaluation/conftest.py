"""A small real corpus of videos of bars."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bars import TASKS, WIDTH, BarReader, course, video

from rbm.corpus import Corpus, CorpusWriter
from rbm.trajectory import Quality, Trajectory


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """4 tasks × (4 clean and 2 messy successes, 4 suboptimal, 4 failures), 9 to 30 frames."""
    path: Path = tmp_path_factory.mktemp("corpus") / "bars"
    rng = np.random.default_rng(0)
    plan = [(Quality.SUCCESSFUL, False)] * 4 + [(Quality.SUCCESSFUL, True)] * 2
    plan += [(Quality.SUBOPTIMAL, False)] * 4 + [(Quality.FAILURE, False)] * 4
    with CorpusWriter(path, codec="jpeg") as writer:
        writer.add_source("bars")
        for number, task in enumerate(TASKS):
            writer.add_task(task)
            for place, (quality, messy) in enumerate(plan):
                n = int(rng.integers(9, 31))
                progress = course(quality, messy, n, rng)
                frames = video(progress, number)
                frames[:, 17:19, 4 * place : 4 * place + 4] = 255  # tells attempts apart: no two are copies
                writer.add(
                    Trajectory(
                        id=f"bars/{number}/{place}",
                        task=task.text,
                        source="bars",
                        quality=quality,
                        messy=messy,
                        frame_index=np.arange(n) * 2,
                        timestamp=np.arange(n) / 10,
                        fps=20.0,
                        height=32,
                        width=WIDTH,
                        is_sim=True,
                        done_index=2 * int(np.argmax(progress >= 1)) if quality == Quality.SUCCESSFUL else None,
                        progress=progress.astype(np.float32),
                    ),
                    {"main": frames},
                )
    return Corpus.open(path)


@pytest.fixture
def reader() -> BarReader:
    return BarReader()
