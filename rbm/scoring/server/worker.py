"""A process that holds the model and the live sessions of one device, and answers what the front sends it.

One thread reads; the main thread takes what waits and answers it in as few forwards as possible:

1. What live sessions asked for comes first: all their new frames in one `SessionPool.push`. Requests of one session
   keep their order.
2. Then clips, comparisons and rankings: all clips in one `Scorer.predict`, all pairs in one `Scorer.prefer`.
3. Then a piece of a clip that is scored frame by frame (`every`): long ones take turns, and hold nobody up.
4. A request that fails in company is tried again alone, so that its neighbours do not notice.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch

from rbm.errors import UserError
from rbm.scoring.scorer import Scorer, best_first, scores_of, worth_of_pairs
from rbm.scoring.scores import ClipScores, Scores
from rbm.scoring.server.pipes import Fields, Pipe
from rbm.scoring.server.refusal import POOL_FULL, UNKNOWN_SESSION, Refusal, busy, internal
from rbm.scoring.sessions import PoolFull, Session, SessionPool
from rbm.video import Frames, StoredClip

log = logging.getLogger(__name__)

LIVE = {"open", "push", "fork", "reset", "close", "snapshot", "restore", "stats"}
"""What comes before clips: robots wait for it."""

MOST_FRAMES = 1024
"""Frames of live sessions that are taken together, so that their pixels stay small beside the model."""

MOST_CLIPS = 64
"""Clips after which live sessions have their turn again."""


@dataclass(frozen=True)
class Request:
    """What the front asked for: `parts` are frames, or a snapshot."""

    fields: Fields
    parts: list[bytearray]

    @property
    def id(self) -> int:
        return int(self.fields["id"])

    @property
    def op(self) -> str:
        return str(self.fields["op"])

    def clip(self, i: int) -> Frames | StoredClip:
        """Clip i: frames that the client sent, or what the decoder made of a file."""
        clip = self.fields["clips"][i]
        frames = np.frombuffer(self.parts[i], np.uint8).reshape(clip["shape"])
        if clip["decoded"] is None:
            return frames
        index, timestamp, fps, n_frames = clip["decoded"]
        return StoredClip(frames, np.array(index, np.int32), np.array(timestamp, np.float32), fps, n_frames)


@dataclass(frozen=True)
class Look:
    """The clips of a request as the model reads them."""

    request: Request
    clips: list[StoredClip]

    @property
    def task(self) -> str:
        return str(self.request.fields["task"])


@dataclass(eq=False)
class Long:
    """A clip that is scored frame by frame, a piece at a time."""

    request: Request
    steps: Generator[int, None, Scores] | None = None


class Worker:
    """Answers requests.

    Args:
        pipe: to the front.
        scorer: the model.
        batch: requests that are answered together at most.
        wait: seconds that the first of them waits for company.
        session_bytes: budget of the live sessions.
    """

    def __init__(self, pipe: Pipe, scorer: Scorer, batch: int, wait: float, session_bytes: int) -> None:
        self.pipe, self.scorer, self.batch, self.wait = pipe, scorer, batch, wait
        self.pool = SessionPool(scorer, session_bytes)
        self.sessions: dict[int, Session] = {}
        self._come: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._live: deque[Request] = deque()
        self._clips: deque[Request] = deque()
        self._long: deque[Long] = deque()

    def run(self) -> None:
        """Works until the front is gone."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            self.turn()

    def turn(self) -> None:
        """Answers what waits: live sessions first, then clips, then a piece of a long one."""
        self._gather()
        self._answer(self._take(self._live), self._advance)
        self._answer(self._take(self._clips), self._look)
        self._go_on()

    def _read(self) -> None:
        while (message := self.pipe.read()) is not None:
            self._come.put(Request(*message))
        os._exit(0)  # the front is gone; nobody waits for what the main thread does

    def _gather(self) -> None:
        """Everything that waits; waits itself where there is nothing."""
        if not self._live and not self._clips and not self._long:
            self._sort(self._come.get())
        until = time.monotonic() + self.wait
        while True:
            left = until - time.monotonic()
            full = len(self._live) >= self.batch or len(self._clips) >= self.batch
            try:
                self._sort(self._come.get(timeout=left) if left > 0 and not full else self._come.get_nowait())
            except queue.Empty:
                return

    def _sort(self, request: Request) -> None:
        if request.op in LIVE:
            self._live.append(request)
        elif request.fields.get("every") is None:
            self._clips.append(request)
        else:
            self._long.append(Long(request))

    def _take(self, waiting: deque[Request]) -> list[Request]:
        taken: list[Request] = []
        frames = clips = 0
        while waiting and len(taken) < self.batch and frames < MOST_FRAMES and clips < MOST_CLIPS:
            frames += waiting[0].fields["shape"][0] if waiting[0].op == "push" else 0
            clips += len(waiting[0].parts) if waiting is self._clips else 0
            taken.append(waiting.popleft())
        return taken

    def _answer(self, requests: list[Request], work: Callable[[list[Request]], list[Fields]]) -> list[Fields]:
        if not requests:
            return []
        began = time.perf_counter()
        answers = work(requests)
        self.pipe.write({"answers": answers, "busy": time.perf_counter() - began, "batch": len(answers)})
        return answers

    # live sessions

    def _advance(self, requests: list[Request]) -> list[Fields]:
        answers: list[Fields] = []
        pushes: list[Request] = []
        pushed: set[int] = set()
        for request in requests:
            if request.op == "push":
                pushes.append(request)
                pushed.add(request.fields["session"])
                continue
            if (
                request.fields.get("from", request.fields.get("session")) in pushed
            ):  # what it asks for stands on the frames before it
                answers += _together(pushes, self._push)
                pushes, pushed = [], set()
            answers += _together([request], self._manage)
        return answers + _together(pushes, self._push)

    def _push(self, requests: Sequence[Request]) -> list[Fields]:
        items = []
        for request in requests:
            session = self._session(request)
            frames = np.frombuffer(request.parts[0], np.uint8).reshape(request.fields["shape"])
            items += [(session, frame) for frame in frames]
        scores = iter(self.pool.push(items))
        answers = []
        for request in requests:
            own = [next(scores) for _ in range(request.fields["shape"][0])]
            answers.append(
                {
                    "id": request.id,
                    "progress": [score.progress for score in own],
                    "progress_std": [score.progress_std for score in own],
                    "success": [score.success for score in own],
                    "remaining": None if own[-1].remaining is None else [score.remaining for score in own],
                    "context": self._session(request).context.tolist(),
                }
            )
        return answers

    def _manage(self, requests: Sequence[Request]) -> list[Fields]:
        """All that is no push."""
        (request,) = requests
        fields, op = request.fields, request.op
        answer: Fields = {"id": request.id}
        if op == "open":
            self.sessions[fields["session"]] = self.pool.open(fields["task"])
        elif op == "restore":
            self.sessions[fields["session"]] = self._restored(bytes(request.parts[0]))
        elif op == "fork":
            self.sessions[fields["session"]] = self._session(request, "from").fork()
        elif op == "reset":
            self._session(request).reset(fields["task"])
        elif op == "close":
            session = self.sessions.pop(fields["session"], None)
            if session is not None:
                session.close()
        elif op == "snapshot":
            answer["snapshot"] = self._session(request).snapshot()
        else:
            answer |= {"sessions": self.pool.stats(), "memory": memory(self.scorer.device)}
        return [answer]

    def _restored(self, snapshot: bytes) -> Session:
        try:
            return self.pool.restore(snapshot)
        except UserError:
            raise
        except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            log.warning("a snapshot could not be read", exc_info=True)
            raise UserError("this is no snapshot of a session, or it is damaged") from error

    def _session(self, request: Request, key: str = "session") -> Session:
        session = self.sessions.get(request.fields[key])
        if session is None:
            raise Refusal("there is no such session; open one", 404, UNKNOWN_SESSION)
        return session

    # clips

    def _look(self, requests: list[Request]) -> list[Fields]:
        answers: list[Fields] = []
        looks: list[Look] = []
        for request in requests:
            try:
                clips = [self.scorer.context_clip(request.clip(i)) for i in range(len(request.parts))]
            except Exception as error:
                answers.append(_refused(request, error))
            else:
                looks.append(Look(request, clips))
        return answers + _together(looks, self._predict)

    def _go_on(self) -> None:
        """A piece of a clip that is scored frame by frame; these take turns."""
        if not self._long:
            return
        long = self._long.popleft()
        answers = self._answer([long.request], lambda _: self._piece(long))
        if not answers:
            self._long.append(long)

    def _piece(self, long: Long) -> list[Fields]:
        """Its answer, if that was the last."""
        fields = long.request.fields
        try:
            if long.steps is None:
                long.steps = self.scorer.score_gradually(long.request.clip(0), fields["task"], fields["every"])
            next(long.steps)
        except StopIteration as done:
            return [{"id": long.request.id, "scores": [_plain(done.value)]}]
        except Exception as error:
            return [_refused(long.request, error)]
        return []

    def _predict(self, looks: Sequence[Look]) -> list[Fields]:
        predicted = iter(self.scorer.predict([(clip.frames, look.task) for look in looks for clip in look.clips]))
        scored = [[next(predicted) for _ in look.clips] for look in looks]
        pairs = [self._pairs(look) for look in looks]
        better = iter(
            self.scorer.prefer(
                [
                    (look.clips[a].frames, look.clips[b].frames, look.task)
                    for look, own in zip(looks, pairs, strict=True)
                    for a, b in own
                ]
            ).tolist()
        )
        answers = []
        for look, clips, own in zip(looks, scored, pairs, strict=True):
            preferred = [next(better) for _ in own]
            answer: Fields = {
                "id": look.request.id,
                "scores": [
                    _plain(scores_of(clip, scores, look.task)) for clip, scores in zip(look.clips, clips, strict=True)
                ],
            }
            if look.request.op == "compare":
                answer["p"] = preferred[0]
            elif look.request.op == "rank":
                answer["order"] = _order(clips, own, preferred)
            answers.append(answer)
        return answers

    def _pairs(self, look: Look) -> list[tuple[int, int]]:
        """Which clips of a request have to be compared."""
        if look.request.op == "compare":
            return [(0, 1)]
        joint = look.request.op == "rank" and self.scorer.model.preference == "joint"
        return list(combinations(range(len(look.clips)), 2)) if joint else []


def _together(requests: Sequence[Any], work: Callable[[Sequence[Any]], list[Fields]]) -> list[Fields]:
    """Answers; where the whole fails, each request by itself."""
    if not requests:
        return []
    try:
        return work(requests)
    except Exception as error:
        if len(requests) == 1:
            return [_refused(requests[0], error)]
        return [answer for request in requests for answer in _together([request], work)]


def _refused(asked: Request | Look, error: Exception) -> Fields:
    request = asked.request if isinstance(asked, Look) else asked
    if isinstance(error, Refusal):
        refusal = error
    elif isinstance(error, PoolFull):
        refusal = busy(f"{error}", POOL_FULL, 5.0)
    elif isinstance(error, UserError):
        refusal = Refusal(str(error))
    elif isinstance(error, torch.OutOfMemoryError | MemoryError):
        log.exception("out of memory")
        refusal = busy("this does not fit into the memory now; send less at once, or try again later")
    else:
        log.exception("%s failed", request.op)
        refusal = internal()
    return {"id": request.id, **refusal.fields()}


def _order(clips: Sequence[ClipScores], pairs: Sequence[tuple[int, int]], preferred: Sequence[float]) -> list[int]:
    """Positions, best first, as `Scorer.rank` says: by utility, else by the mean preference over all others."""
    if pairs or len(clips) == 1:
        return best_first(worth_of_pairs(len(clips), pairs, preferred))
    return best_first([scores.utility for scores in clips])


def _plain(scores: Scores) -> Fields:
    """Scores as they go to the front; `rbm.scoring.server.engine` reads them."""
    arrays = ("progress", "progress_std", "success", "frame_index", "timestamp")
    return {
        **{name: getattr(scores, name).tolist() for name in arrays},
        "task": scores.task,
        "fps": scores.fps,
        "n_frames": scores.n_frames,
        "remaining": None if scores.remaining is None else scores.remaining.tolist(),
    }


def memory(device: torch.device) -> dict[str, Any]:
    """Of the device that the model is on: bytes used and there, none where it is the CPU."""
    if device.type != "cuda":
        return {"device": str(device), "name": None, "used_bytes": None, "total_bytes": None}
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    return {"device": str(device), "name": name, "used_bytes": total - free, "total_bytes": total}


def device_of(name: str, number: int) -> str:
    """Workers share out the GPUs: worker n takes the n-th, from the start again where there are more workers."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{number % torch.cuda.device_count()}"
    return name


def facts(scorer: Scorer, checkpoint: str | None) -> Fields:
    """What the model is."""
    model = scorer.model
    return {
        "model": model.backbone.name,
        "checkpoint": checkpoint or "nano (shipped)",
        "weights": scorer.fingerprint(),
        "context_frames": scorer.context_frames,
        "views": list(scorer.views),
        "preference": model.preference,
        "remaining": model.remaining,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": str(scorer.device),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the front decides when to end
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    pipe = Pipe(int(sys.argv[1]))
    first = pipe.read()
    if first is None:
        return
    settings = first[0]
    torch.set_num_threads(settings["threads"])
    try:
        scorer = Scorer.from_pretrained(
            settings["checkpoint"], device_of(settings["device"], settings["number"]), settings["dtype"]
        )
    except UserError as error:
        pipe.write({"event": "refused", "error": str(error)})
        return
    worker = Worker(pipe, scorer, settings["batch"], settings["wait"], settings["session_bytes"])
    pipe.write({"event": "ready", "facts": facts(scorer, settings["checkpoint"])})
    worker.run()


if __name__ == "__main__":
    main()
