"""Clean simulator frames for `rbm bench corpus codecs --frames FILE`: expert attempts at six Meta-World tasks.

    python tests/benchmarks/render_frames.py FILE.npy

Writes uint8 (6, 64, 240, 320, 3), not compressed. Needs the simulator (`make sim`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dataset_builder.metaworld.simulator import Simulator
from rbm.frames import pick_frames

HEIGHT, WIDTH, N_FRAMES, STEPS = 240, 320, 64, 96
VIEWS = {
    "drawer-open": "near",
    "push": "corner2",
    "door-close": "near",
    "assembly": "corner",
    "basketball": "near",
    "shelf-place": "corner3",
}


def clip(task: str, view: str) -> NDArray[np.uint8]:
    """uint8 (64, 240, 320, 3): square frames, cut to the middle rows."""
    simulator = Simulator(task)
    expert = simulator.expert()
    moments = [simulator.reset(7)]
    while len(moments) < STEPS:
        action = np.clip(expert.get_action(moments[-1].obs.copy()), -1, 1).astype(np.float32)
        moments.append(simulator.step(action))
    physics = [moments[i].physics for i in pick_frames(STEPS, N_FRAMES)]
    frames = simulator.render(physics, (view,), WIDTH)[view]
    simulator.close()
    top = (WIDTH - HEIGHT) // 2
    return frames[:, top : top + HEIGHT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    np.save(file, np.stack([clip(task, view) for task, view in VIEWS.items()]))


if __name__ == "__main__":
    main()
