"""A server with the tiny model of the tests, shared by the tests of a file that do it no harm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from bombs import jpeg, mp4, npy
from running import Running, ask, hello, serving
from siege import OVERRIDES, TASK, TOKEN, Siege

from rbm.scoring import Scorer


@pytest.fixture(scope="session")
def tiny(checkpoints: dict[str, Path]) -> Path:
    """Folder of the model."""
    return checkpoints["utility"]


@pytest.fixture(scope="session")
def own(tiny: Path) -> Scorer:
    """The same model in this process."""
    return Scorer.from_pretrained(tiny, device="cpu")


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("server") / "log", checkpoint=tiny) as running:
        yield running
        assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="module")
def siege(
    tiny: Path, own: Scorer, clip_of: Callable[..., np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Siege]:
    """A server with narrow limits, which has done a little of everything."""
    frames = clip_of(1, 5)
    progress = own.predict([(frames, TASK)])[0].progress.tolist()
    log = tmp_path_factory.mktemp("siege") / "log"
    with (
        serving(log, *OVERRIDES, checkpoint=tiny, token=TOKEN) as running,
        httpx.Client(base_url=running.url, headers={"connection": "close"}, timeout=60) as http,
    ):
        besieged = Siege(running, frames, progress, http)
        for _ in range(3):
            besieged.works()
            besieged.upload(mp4(jpeg(32, 24), 32, 24, 9)).raise_for_status()
            besieged.upload(npy(np.zeros((9, 600, 900, 3), np.uint8)), every="1").raise_for_status()
            besieged.upload(mp4(jpeg(320, 240), 320, 240, 140), every="1").raise_for_status()  # the most there may be
            besieged.post("/evaluate_batch", json={"samples": []})
            with besieged.stream() as socket:
                hello(socket)
                number = ask(socket, "open", task=TASK)["session"]
                ask(socket, "push", session=number, frames=frames)
        yield besieged
