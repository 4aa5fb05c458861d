"""What goes wrong while a buffer is relabelled: processes that die, servers that go away, pictures that are none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from late_rewards import ACTIONS, paid, plain, play, ready, stopped
from picture_env import TASK, Shown, SquareEnv
from running import free_port, serving, until

from policies.judges import BadFrame, BadScore, JudgeGone
from policies.relabel import FramesInInfo, Labeller, LabellerGone, LabelsLate
from policies.relabel.async_labels import WAITING
from rbm.errors import UserError
from rbm.scoring import Scorer


@pytest.fixture(scope="module")
def judged(judge_checkpoint: Path) -> Iterator[Labeller]:
    with Labeller(judge_checkpoint, wait_seconds=0.02) as made:
        yield made


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# the scoring process


def test_a_process_that_dies_is_started_again_and_scores_again(judge_checkpoint, judge_scorer):
    """Killed in the middle of an episode, while nothing waits and while a frame does."""
    with Labeller(judge_checkpoint, wait_seconds=0.02) as own:
        buffer = plain(own, envs=3)
        play(buffer, (6,), 6, seed=1, env=1)  # ended
        world = FramesInInfo(SquareEnv((20,)))
        world.reset(seed=2)

        def step(number: int) -> None:
            _, reward, terminated, truncated, info = world.step(ACTIONS[number])
            state = np.array([number, 2], np.float32)
            shown = info["frame"], info.get("first_frame")
            buffer.add(state, ACTIONS[number], float(reward), state, terminated, truncated, *shown, env=2)

        for number in range(9):
            step(number)
        buffer.labels.finish()
        for number in range(9, 11):
            if number == 10:
                with stopped(own):
                    step(number)
                    os.kill(own.pid, signal.SIGKILL)
            else:
                os.kill(own.pid, signal.SIGKILL)
                step(number)
            buffer.labels.finish()
        play(buffer, (6,), 6, seed=4, env=0)
        buffer.labels.finish()
        assert own.deaths == 2
        own_steps = buffer.observations[:17, 1] == 2
        np.testing.assert_allclose(buffer.rewards[:17][own_steps], paid(judge_scorer, (20,), 11, seed=2), atol=1e-5)
        np.testing.assert_allclose(buffer.rewards[17:23], paid(judge_scorer, (6,), 6, seed=4), atol=1e-5)
        assert own.waiting == own.waiting_bytes == 0
        assert own.scored == 7 + 12 + 7


def test_a_process_that_dies_again_and_again_stops_the_run(judge_checkpoint, tmp_path):
    own = Labeller(judge_checkpoint)
    buffer = plain(own, save_on_failure=tmp_path / "saved.npz")
    play(buffer, (5,), 3)
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.02):
            own._process._process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(LabellerGone, match=r"died 3 times in a row \(exit code -9\); .* saved to .*saved\.npz$"):
            buffer.sample(2)
    finally:
        over.set()
        killer.join()
    with pytest.raises(LabellerGone, match=r"died 3 times"):
        buffer.add(np.zeros(2), np.zeros(2), 0.0, np.zeros(2), False, False)
    assert not alive(own.pid)
    with np.load(tmp_path / "saved.npz") as saved:
        assert saved["observations"].shape == (3, 2)


def test_history_that_was_given_up_cannot_be_scored_again(judge_checkpoint):
    with Labeller(judge_checkpoint, wait_seconds=0.01, history_bytes=5 * 40 * 56 * 3) as own:
        buffer = plain(own)
        play(buffer, (30,), 10)
        buffer.labels.finish()
        play(buffer, (30,), 10)
        buffer.labels.finish()
        held = sum(len(attempt.frames) for attempt in own._attempts.values())
        assert held <= 5
        os.kill(own.pid, signal.SIGKILL)
        own._process._process.wait(20)
        with pytest.raises(LabellerGone, match=r"the first frames of an attempt are no longer there .* raise history"):
            play(buffer, (30,), 1)


def test_history_is_kept_while_it_is_scored_again(judge_checkpoint):
    frame = np.zeros((40, 56, 3), np.uint8)
    told: list[str] = []
    with Labeller(judge_checkpoint, wait_seconds=0.01, history_bytes=850 * frame.nbytes) as own:
        first = own.open("a", lambda score: told.append("a"))
        second = own.open("b", lambda score: told.append("b"))
        for attempt, count in ((first, 300), (second, 500)):
            for _ in range(count):
                own.push(attempt, frame)
        own.wait(lambda: own.waiting == 0)
        os.kill(own.pid, signal.SIGKILL)
        own._process._process.wait(20)
        for _ in range(60):  # their scores come, and make 860, while most of b is still to be sent again
            own.push(first, frame)
        own.wait(lambda: own.waiting == 0)
        own.push(second, frame)
        own.wait(lambda: own.waiting == 0)
        assert (told.count("a"), told.count("b"), own.deaths) == (360, 501, 1)
        assert sum(len(attempt.frames) for attempt in own._attempts.values()) <= 850


SCRIPT = """
import sys, time
from policies.relabel import PlainBuffer
if __name__ == "__main__":
    buffer = PlainBuffer(10, (2,), (2,), sys.argv[1], "task", wait_seconds=0)
    if sys.argv[2] == "scored":
        import numpy as np
        frame = np.zeros((40, 56, 3), np.uint8)
        buffer.add([0, 0], [0, 0], 0.0, [0, 0], False, False, frame, frame)
        if sys.argv[1].startswith("http"):
            buffer.labeller.wait(lambda: not buffer.labeller._unsent)
            time.sleep(4)
        else:
            buffer.labels.finish()
    print(buffer.labeller.pid, flush=True)
    while sys.argv[3] == "waits":
        buffer.labeller.poll()
        time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("where", "state", "then", "number", "code"),
    [
        ("checkpoint", "scored", "waits", signal.SIGKILL, -signal.SIGKILL),
        ("checkpoint", "scored", "waits", signal.SIGINT, 1),
        ("checkpoint", "started", "waits", signal.SIGKILL, -signal.SIGKILL),
        ("checkpoint", "scored", "ends", None, 0),
        ("server", "scored", "waits", signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_nobody_is_left_behind(judge_checkpoint, tmp_path, where, state, then, number, code):
    """Also not where the process waits for a server that is away."""
    script = tmp_path / "loop.py"
    script.write_text(SCRIPT)
    source = str(judge_checkpoint) if where == "checkpoint" else f"http://127.0.0.1:{free_port()}"
    parent = subprocess.Popen([sys.executable, script, source, state, then], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        if number is not None:
            assert alive(child)
            parent.send_signal(number)
        found = parent.wait(20)
        assert found == code or (number == signal.SIGINT and found == -signal.SIGINT)
        until(lambda: not alive(child), 5)
    finally:
        parent.kill()
        parent.wait(10)


def test_ctrl_c_while_a_batch_is_waited_for(judged):
    """The interrupt comes through, and the buffer works on afterwards."""
    buffer = plain(judged, ready_share=1.0)
    with stopped(judged):
        play(buffer, (5,), 5)
        timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            buffer.sample(3)
        timer.join()
    assert np.isfinite(buffer.sample(50).rewards).all()


def test_no_score_for_too_long(judge_checkpoint, tmp_path):
    own = Labeller(judge_checkpoint, wait_seconds=0.01, timeout_seconds=30)
    buffer = plain(own, save_on_failure=tmp_path / "saved.npz")
    play(buffer, (5,), 5)
    buffer.labels.finish()
    own.timeout_seconds = 0.5
    with stopped(own):
        play(buffer, (5,), 4)
        with pytest.raises(LabelsLate, match=r"for 0\.5 s, and 5 frames wait .*\. The buffer was saved to"):
            buffer.labels.finish()
        assert not alive(own.pid)
    with np.load(tmp_path / "saved.npz") as saved:
        assert np.isfinite(saved["rewards"][:5]).all()
        assert saved["state"].tolist()[5:] == [WAITING] * 4


# scores and servers


def test_scores_that_are_no_numbers(blind_scorer: Scorer, tmp_path):
    blind_scorer.model.save_pretrained(str(tmp_path / "blind"))
    buffer = plain(tmp_path / "blind", save_on_failure=tmp_path / "saved.npz", wait_seconds=60)
    play(buffer, (5,), 5)
    said = r"environment 0, reset: the score is not a finite number \(progress nan.*\. The buffer was saved to .*npz"
    with pytest.raises(BadScore, match=said):
        buffer.sample(3)
    assert len(buffer) == 5
    np.testing.assert_array_equal(np.load(tmp_path / "saved.npz")["observations"][:, 0], range(5))
    buffer.save(tmp_path / "by_hand.npz", wait=False)
    with pytest.raises(BadScore):
        buffer.sample(3)


def test_a_server_that_goes_away_is_waited_for(judge_checkpoint, judge_scorer, tmp_path):
    port = free_port()
    own = Labeller(f"http://127.0.0.1:{port}", wait_seconds=0.02, patience_seconds=60)
    buffer = plain(own)
    with serving(tmp_path / "log0", f"port={port}", checkpoint=judge_checkpoint) as running:
        play(buffer, (12, 5), 12)
        buffer.labels.finish()
        running.process.send_signal(signal.SIGKILL)
        running.process.wait(20)
    play(buffer, (12, 5), 20, seed=8)
    assert buffer.labels.waiting
    assert ready(buffer)[:12] == sorted([*range(12)])
    with serving(tmp_path / "log1", f"port={port}", checkpoint=judge_checkpoint):
        buffer.labels.finish()
    own.close()
    assert own.deaths == 0
    np.testing.assert_allclose(buffer.rewards[:12], paid(judge_scorer, (12, 5), 12), atol=1e-5)
    np.testing.assert_allclose(buffer.rewards[12:32], paid(judge_scorer, (12, 5), 20, seed=8), atol=1e-5)


def test_a_server_that_stays_away_stops_the_run(tmp_path):
    buffer = plain(
        f"http://127.0.0.1:{free_port()}", save_on_failure=tmp_path / "saved.npz", patience_seconds=1, wait_seconds=0
    )
    play(buffer, (5,), 5)
    with pytest.raises(JudgeGone, match=r"has been away for 1 s .*; start it again .*\. The buffer was saved to"):
        buffer.sample(1)
    again = plain(tmp_path / "nowhere", wait_seconds=0)
    again.load(tmp_path / "saved.npz")
    assert len(again) == 5
    with pytest.raises(LabellerGone, match="nowhere"):
        again.labeller.wait(lambda: False)


# what is refused


def test_frames_that_are_none(judged):
    """The loop hears of it at that step; the buffer keeps the others, and goes on with the next episode."""
    frame = SquareEnv((9,)).reset(seed=0)[0]["picture"]
    for wrong, said in (
        (frame[:-3], "environment 0, step 3: the frame is 56×37 and those before it in the episode were 56×40"),
        (np.full((40, 56, 3), np.nan), "environment 0, step 3: the frame is float64 and holds NaN"),
        (None, "environment 0, step 3: there is no frame; give one after every 1 steps"),
        (frame[..., 0], r"environment 0, step 3: the frame has shape \(40, 56\)"),
    ):
        buffer = plain(judged)
        zero = np.zeros(2)
        for step in range(2):
            buffer.add(zero, zero, 0.0, zero, False, False, frame, None if step else frame)
        with pytest.raises(BadFrame, match=said):
            buffer.add(zero, zero, 0.0, zero, False, False, wrong)
        with pytest.raises(UserError, match="must bring the picture after the reset"):
            buffer.add(zero, zero, 0.0, zero, False, False, frame)
        buffer.add(zero, zero, 0.0, zero, False, True, frame, frame)
        buffer.labels.finish()
        assert np.isfinite(buffer.rewards[:5]).tolist() == [True, True, False, False, True]


def test_frames_are_named_by_their_environment(judged):
    buffer = plain(judged, envs=2, task=None)
    world = FramesInInfo(Shown(SquareEnv((9,)), lambda picture, step: picture[: 40 - step]))
    world.reset(seed=0)
    info = world.step(ACTIONS[0])[4]
    zero = np.zeros(2)
    with pytest.raises(UserError, match="environment 1 does not say its task: give task='open the drawer', or infos"):
        buffer.add(zero, zero, 0.0, zero, False, False, info["frame"], info["first_frame"], env=1)
    with pytest.raises(BadFrame, match="environment 1, step 1: the frame is 56×39 and those before it"):
        buffer.add(zero, zero, 0.0, zero, False, False, info["frame"], info["first_frame"], task=TASK, env=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task": " "}, r"the task \(instruction\) is empty"),
        ({"ready_share": 1.5}, r"ready_share=1\.5 must be from 0 to 1"),
        ({"every": 0}, "every=0: give 1"),
        ({"capacity": 0}, "capacity=0 and envs=1 of a buffer must be at least 1"),
        ({"task": [TASK], "envs": 2}, "1 tasks are given for 2 environments"),
        ({"batch": 3}, "a labeller that is given has its own batch"),
    ],
)
def test_options_that_make_no_sense(judged, options, said):
    with pytest.raises(UserError, match=said):
        play(plain(judged, **options), (5,), 1)


def test_labellers_that_make_no_sense(judge_scorer):
    for options, said in (
        ({"batch": 0}, "batch=0 of a labeller must be at least 1"),
        ({"queue_bytes": 0}, "queue_bytes=0 of a labeller must be at least 1"),
        ({"wait_seconds": float("nan")}, "wait_seconds=nan of a labeller must be at least 0"),
        ({"source": judge_scorer}, "a process cannot be given a Scorer: give a checkpoint or http"),
    ):
        with pytest.raises(UserError, match=said):
            Labeller(**options)


def test_closed_labellers(judge_checkpoint):
    with Labeller(judge_checkpoint) as own:
        buffer = plain(own)
    with pytest.raises(UserError, match="the labeller was closed; make a new one"):
        play(buffer, (5,), 1)
    assert not alive(own.pid)


# pictures in info


@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version")
def test_frames_in_info():
    world = FramesInInfo(SquareEnv((7,)), every=3, key="seen")
    _, info = world.reset(seed=1)
    assert set(info) == {"episode_number"}
    first, shown = world.render(), []
    for step in range(1, 8):
        info = world.step(ACTIONS[step])[4]
        assert ("first_seen" in info) == (step == 1)
        if step == 1:
            np.testing.assert_array_equal(info["first_seen"], first)
            assert info["instruction"] == TASK
        if "seen" in info:
            np.testing.assert_array_equal(info["seen"], world.render())
            shown.append(step)
    assert shown == [3, 6, 7]
    by_camera = FramesInInfo(SquareEnv((7,), render_mode=None), camera="picture")
    observation, _ = by_camera.reset(seed=1)
    np.testing.assert_array_equal(by_camera.step(ACTIONS[0])[4]["first_frame"], observation["picture"])
    for options, said in (
        ({"camera": "hand"}, "have no picture 'hand'"),
        ({"every": 0}, "every=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=said):
            FramesInInfo(SquareEnv(), **options)
    with pytest.raises(UserError, match="the environment shows no pictures"):
        FramesInInfo(SquareEnv(render_mode=None))
    check_env(FramesInInfo(SquareEnv()), skip_render_check=True)
