"""What scoring costs: a push against a forward, one forward against one for every prefix, pools of sessions.

The model is a Qwen3-VL with random weights (`rbm.bench.dims`); `nano` is the one that is shipped. Ratios are of calls
that take turns in one run. What is compared is compared for equality first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rbm.bench.device import device_named, now, random_model, threads, versions
from rbm.bench.measure import machine, medians, one_core
from rbm.bench.training import FRAME, visual_tokens
from rbm.frames import session_context
from rbm.model import RewardModel
from rbm.scoring import Scorer, SessionPool

TASK = "put the yellow cup on the other cup"
WARM_UP = 2
"""Pushes of a pool that are not counted."""

NANO_SIDE = 96
"""Pixels of the frames that the nano model is given (those of the bundled corpus)."""


def run(
    dims: str = "small",
    device: str = "auto",
    frames: int = 32,
    rounds: int = 7,
    sessions: Sequence[int] = (1, 8, 64),
    pushes: int = 12,
    torch_threads: int | None = 1,
) -> dict[str, Any]:
    """All figures of `rbm bench score`.

    Args:
        frames: of the clip whose last push and whose prefixes are timed.
        rounds: of each call; the median counts.
        sessions: how many advance together.
        pushes: of each session in a pool, timed.

    Raises:
        UserError: a device that is not there, or dimensions that are too large for it.
    """
    place = device_named(device, dims)
    kind = torch.float32 if place.type == "cpu" else torch.bfloat16
    with threads(torch_threads):
        torch.manual_seed(0)
        model = random_model(dims, place, kind, context_frames=frames).eval()
        scorer = Scorer(model, place)
        facts: dict[str, Any] = {
            "machine": machine(),
            "device": torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
            "threads": torch.get_num_threads(),
            "dtype": str(kind).removeprefix("torch."),
            "dims": dims,
            "visual_tokens_a_frame": visual_tokens(dims),
            "versions": versions(),
            "clip": _clip(scorer, _pictures(frames, *FRAME[dims]), rounds),
            "episode": _episode(model, place, _pictures(100, *FRAME[dims])),
        }
        model.context_frames = 8
        facts["pools"] = [_pool(scorer, count, pushes, FRAME[dims]) for count in sessions]
        facts["nano"] = _nano()
    return facts


def _pictures(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """A square that wanders over noise: uint8 (count, height, width, 3)."""
    rng = np.random.default_rng(0)
    found = np.repeat(rng.integers(0, 256, (1, height, width, 3), dtype=np.uint8), count, 0)
    for i in range(count):
        y, x = rng.integers(0, height - 40), rng.integers(0, width - 40)
        found[i, y : y + 40, x : x + 40] = rng.integers(0, 256, 3)
    return found


def _clip(scorer: Scorer, frames: NDArray[np.uint8], rounds: int) -> dict[str, Any]:
    """The last push of a clip against one forward over it, and that against one forward for every prefix."""
    T = len(frames)
    session = scorer.stream(TASK)
    before = session.push_many(frames[:-1])
    with session.fork() as fork:
        said = [*before, fork.push(frames[-1])]
    (whole,) = scorer.predict([(frames, TASK)])
    off = max(
        float(np.abs(np.array([getattr(score, name) for score in said]) - getattr(whole, name)).max())
        for name in ("progress", "progress_std", "success")
    )

    def one(_: int) -> None:
        scorer.predict([(frames, TASK)])
        now(scorer.device)

    def prefixes(_: int) -> None:
        for stop in range(1, T + 1):
            scorer.predict([(frames[:stop], TASK)])
        now(scorer.device)

    spent: list[float] = []
    forward: list[float] = []
    for number in range(rounds):
        with session.fork() as fork:
            start = now(scorer.device)
            fork.push(frames[-1])
            spent.append(now(scorer.device) - start)
        start = now(scorer.device)
        one(number)
        forward.append(time.perf_counter() - start)
    push_seconds, forward_seconds = float(np.median(spent)), float(np.median(forward))
    both = medians({"one_forward": one, "a_forward_a_prefix": prefixes}, max(1, rounds // 3))
    return {
        "frames": T,
        "difference": off,
        "forward_ms": 1e3 * forward_seconds,
        "last_push_ms": 1e3 * push_seconds,
        "forward_over_push": forward_seconds / push_seconds,
        "forwards_for_all_prefixes_ms": 1e3 * both["a_forward_a_prefix"],
        "prefixes_over_one_forward": both["a_forward_a_prefix"] / both["one_forward"],
    }


def _episode(model: RewardModel, device: torch.device, frames: NDArray[np.uint8]) -> dict[str, Any]:
    """An episode in a session, against a query for every step, as servers without sessions are asked."""
    context, model.context_frames = model.context_frames, 8
    scorer = Scorer(model, device)
    start = now(device)
    session = scorer.stream(TASK)
    said = [session.push(frame).progress for frame in frames]
    pushed = now(device) - start
    start = now(device)
    at_once = scorer.stream(TASK).push_many(frames)
    together = now(device) - start
    start = now(device)
    asked = [scorer.predict([(frames[session_context(t, 8)], TASK)])[0].progress[-1] for t in range(len(frames))]
    queried = now(device) - start
    model.context_frames = context
    off = np.abs(np.array([said, [score.progress for score in at_once]]) - np.array(asked)).max()
    return {
        "frames": len(frames),
        "context_frames": 8,
        "difference": float(off),
        "session_s": pushed,
        "push_many_s": together,
        "a_query_a_step_s": queried,
        "queries_over_session": queried / pushed,
        "queries_over_push_many": queried / together,
    }


def _pool(scorer: Scorer, count: int, pushes: int, size: tuple[int, int]) -> dict[str, Any]:
    """Frames a second of sessions that advance together, and how long a push takes."""
    frames = _pictures(8, *size)
    pool = SessionPool(scorer)
    opened = [pool.open(TASK) for _ in range(count)]
    for number, session in enumerate(opened):  # not all at the same place of their stride
        session.push_many(frames[: 1 + number % 8])
    spent = []
    for number in range(-WARM_UP, pushes):
        start = now(scorer.device)
        pool.push([(session, frames[(number + i) % len(frames)]) for i, session in enumerate(opened)])
        spent.append(now(scorer.device) - start)
    spent = spent[WARM_UP:]
    facts = {
        "sessions": count,
        "frames_per_s": count * pushes / sum(spent),
        "push_ms_median": 1e3 * float(np.median(spent)),
        "push_ms_worst": 1e3 * max(spent),
        "bytes": pool.bytes,
    }
    for session in opened:
        session.close()
    return facts


def _nano(count: int = 64, pushes: int = 60) -> dict[str, Any]:
    """The shipped model on one core."""
    with one_core(), threads(1):
        scorer = Scorer.from_pretrained(device="cpu")
        size = (NANO_SIDE, NANO_SIDE)
        return {"frame": size, "pools": [_pool(scorer, n, pushes, size) for n in (1, 8, count)]}
