"""The process that scores for a training process (`policies.relabel.labeller`): frames come in, scores go back.

All frames of a message are scored in one push. It ends with the training process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
import torch

from policies.judges import BadFrame, BadScore, Judge, JudgeGone, Watch, make_judge
from policies.relabel.async_line import End
from rbm.errors import UserError

_LOOK_S = 0.5


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which ends this one
    line = End(int(sys.argv[1]))
    settings = line.read()
    if settings is None:
        return
    threading.Thread(target=_end_with, args=(settings["parent"],), daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(settings["nice"])
    torch.set_num_threads(settings["threads"])
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        try:
            judge = make_judge(settings["source"], **settings["judge"])
        except UserError as error:
            line.write({"failed": str(error), "kind": "start", "item": None})
            return
        line.write({"ready": True})
        _work(line, judge)


def _work(line: End, judge: Judge) -> None:
    watches: dict[int, Watch] = {}
    idle: list[Watch] = []
    while (message := line.read()) is not None:
        try:
            requests = []
            for number, task, frame in message["frames"]:
                if number not in watches:
                    watches[number] = _opened(judge, idle, task)
                requests.append((watches[number], frame))
            scores = judge.push(requests)
        except UserError as error:
            line.write(_failure(error))
            return
        told = np.array([(score.progress, score.progress_std, score.success) for score in scores], np.float64)
        line.write({"scores": told.reshape(-1, 3)})
        idle += [watches.pop(number) for number in message["ended"] if number in watches]


def _opened(judge: Judge, idle: list[Watch], task: str) -> Watch:
    if not idle:
        watch: Watch = judge.open(task)
        return watch
    watch = idle.pop()
    watch.reset(task)
    return watch


def _failure(error: UserError) -> dict[str, Any]:
    if isinstance(error, BadScore | BadFrame):
        kind = "score" if isinstance(error, BadScore) else "frame"
        return {"failed": error.reason, "kind": kind, "item": error.request}
    return {"failed": str(error), "kind": "gone" if isinstance(error, JudgeGone) else "other", "item": None}


def _end_with(parent: int) -> None:
    """The line tells of the training process's end while it is read; this does while a server is waited for."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(0)


if __name__ == "__main__":
    main()
