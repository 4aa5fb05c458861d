"""Live sessions as bytes, to go on elsewhere: instruction, count of frames, and the frames that are held, as PNG."""

from __future__ import annotations

from collections.abc import Sequence

from rbm.errors import UserError
from rbm.frames import session_stride
from rbm.scoring import wire
from rbm.scoring.held import Held, read_png
from rbm.scoring.scorer import Scorer

SNAPSHOT = 1
"""Version of the format."""


def write_snapshot(task: str, count: int, context_frames: int, held: Sequence[Held]) -> bytes:
    """What `read_snapshot` reads."""
    return wire.pack(
        {
            "snapshot": SNAPSHOT,
            "task": task,
            "count": count,
            "context_frames": context_frames,
            "frames": [[frame.number, list(frame.png())] for frame in held],
        }
    )


def read_snapshot(snapshot: bytes, scorer: Scorer) -> tuple[str, int, list[tuple[int, tuple[bytes | None, ...]]]]:
    """Instruction, count and held frames (number, PNG a view) of a snapshot, all of it checked."""
    damaged = UserError("this is no snapshot of a session, or it is damaged")
    try:
        content = wire.unpack(snapshot)
        version, task, count = content["snapshot"], content["task"], content["count"]
        frames = [(number, tuple(views)) for number, views in content["frames"]]
        context_frames = content["context_frames"]
    except (UserError, ValueError, TypeError, KeyError) as error:
        raise damaged from error
    if version != SNAPSHOT:
        raise UserError(f"a snapshot of version {version!r}; this release reads version {SNAPSHOT}")
    if context_frames != scorer.context_frames:
        raise UserError(
            f"a snapshot of a model that reads {context_frames} frames; this one reads {scorer.context_frames}"
        )
    if not (isinstance(task, str) and isinstance(count, int) and 0 <= count < 2**40):
        raise damaged
    scorer.check(task)
    numbers = [*range(0, count, session_stride(max(0, count - 1), context_frames))]
    if [number for number, _ in frames] != numbers:
        raise damaged
    for _, views in frames:
        pictures = [png for png in views if png is not None]
        if (
            not pictures
            or len(views) > max(1, len(scorer.views))
            or not all(isinstance(png, bytes) for png in pictures)
        ):
            raise damaged
        for png in pictures:
            pixels = read_png(png)
            if scorer.model.preprocess(pixels[None]).shape[1:] != pixels.shape:
                raise UserError("a snapshot of a model that takes frames of another size")
    return task, count, list(zip(numbers, (views for _, views in frames), strict=True))
