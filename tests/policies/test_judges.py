"""Where scores come from: a model in this process and real servers, also servers that die."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from picture_env import TASK, SquareEnv
from running import Running, free_port, serving

from policies import judges, vector
from policies.judges import BadFrame, BadScore, JudgeGone, LocalJudge, RemoteJudge, make_judge
from policies.wrapper import RewardModelWrapper
from rbm.errors import UserError
from rbm.scoring import Scorer
from rbm.scoring.client import Client


def clip(seed: int, count: int) -> np.ndarray:
    """uint8 (count, 40, 56, 3)."""
    env, rng = SquareEnv((count,)), np.random.default_rng(seed)
    frames = [env.reset(seed=seed)[0]["picture"]]
    while len(frames) < count:
        frames.append(env.step(rng.uniform(-1, 1, 2))[0]["picture"])
    return np.stack(frames)


@pytest.fixture(scope="module")
def server(judge_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("server") / "log", checkpoint=judge_checkpoint) as running:
        yield running
        assert "Traceback" not in running.log.read_text()


def test_attempts_together_score_as_alone(judge_scorer, server):
    tasks = [TASK, "open the drawer", TASK]
    videos = [clip(seed, 9) for seed in range(3)]
    expected = [judge_scorer.score(video, task, every=1) for video, task in zip(videos, tasks, strict=True)]
    with Client(server.url) as client:
        for judge in (make_judge(judge_scorer), make_judge(client), make_judge(server.url)):
            watches = [judge.open(task) for task in tasks]
            for t in range(9):
                scores = judge.push([(watch, video[t]) for watch, video in zip(watches, videos, strict=True)])
                for score, whole in zip(scores, expected, strict=True):
                    found = [score.progress, score.progress_std, score.success]
                    whole_t = [whole.progress[t], whole.progress_std[t], whole.success[t]]
                    np.testing.assert_allclose(found, whole_t, atol=1e-5)
            judge.close()
        assert client.health()["ready"]  # a client that was given is not closed


@pytest.mark.parametrize("where", ["here", "server"])
def test_a_reset_forgets_and_may_change_the_task(judge_scorer, server, where):
    judge = make_judge(judge_scorer if where == "here" else server.url)
    watch, video = judge.open(TASK), clip(1, 5)
    judge.push([(watch, frame) for frame in clip(2, 7)])
    for task in (None, "open the drawer"):
        watch.reset(task)
        found = [score.progress for score in judge.push([(watch, frame) for frame in video])]
        assert watch.task == (task or TASK)
        np.testing.assert_allclose(found, judge_scorer.score(video, watch.task, every=1).progress, atol=1e-5)
    watch.close()
    judge.close()


def test_a_server_that_dies_in_an_episode_is_waited_for(judge_checkpoint, judge_scorer, tmp_path, monkeypatch):
    """Killed twice, while one attempt has just begun, one is long enough for a snapshot, and one was just reset."""
    monkeypatch.setattr(judges, "REMEMBERED", 8)
    port, tasks = free_port(), [TASK, "open the drawer", TASK]
    videos = [clip(5, 20), clip(6, 31), clip(7, 20)]
    shown = [0, 11, 0]
    found: list[list[float]] = [[], [], []]
    with contextlib.closing(make_judge(f"http://127.0.0.1:{port}", patience_seconds=60)) as judge:
        assert isinstance(judge, RemoteJudge)
        watches = [judge.open(task) for task in tasks]

        def push(steps: int) -> None:
            for _ in range(steps):
                scores = judge.push([(watch, video[t]) for watch, video, t in zip(watches, videos, shown, strict=True)])
                for i, score in enumerate(scores):
                    found[i].append(score.progress)
                    shown[i] += 1

        def serve(number: int) -> Iterator[Running]:
            return serving(tmp_path / f"log{number}", f"port={port}", checkpoint=judge_checkpoint)

        with serve(0) as running:
            found[1] = [score.progress for score in judge.push([(watches[1], frame) for frame in videos[1][:11]])]
            assert len(watches[1]._since) <= 8
            push(3)
            watches[2].reset()
            shown[2], found[2] = 0, []
            running.process.send_signal(signal.SIGKILL)
            running.process.wait(20)
        back = threading.Event()

        def start() -> None:
            time.sleep(1)
            with serve(1) as again:
                back.set()
                stop.wait(60)
                again.process.send_signal(signal.SIGKILL)
                again.process.wait(20)

        stop, thread = threading.Event(), threading.Thread(target=start)
        thread.start()
        push(6)  # the first of these waits
        assert back.is_set()
        stop.set()
        thread.join(60)
        with serve(2):
            push(11)
            for watch in watches:
                watch.close()
    for video, task, progress in zip(videos, tasks, found, strict=True):
        expected = judge_scorer.score(video[: len(progress)], task, every=1).progress
        np.testing.assert_allclose(progress, expected, atol=1e-5)
    assert [len(progress) for progress in found] == [20, 31, 17]
    for watch in watches:
        assert len(watch._since) <= 8


def test_a_session_that_the_server_gave_up_is_opened_again(judge_checkpoint, judge_scorer, tmp_path):
    """As when a policy is trained for minutes between two episodes' halves."""
    video = clip(3, 12)
    with serving(tmp_path / "log", "limits.session_seconds=1", checkpoint=judge_checkpoint) as running:
        judge = make_judge(running.url)
        watch = judge.open(TASK)
        found = judge.push([(watch, frame) for frame in video[:5]])
        time.sleep(3)
        found += judge.push([(watch, frame) for frame in video[5:]])
        judge.close()
    expected = judge_scorer.score(video, TASK, every=1).progress
    np.testing.assert_allclose([score.progress for score in found], expected, atol=1e-5)


def test_a_server_that_stays_away_ends_the_wait():
    port = free_port()
    judge = make_judge(f"http://127.0.0.1:{port}", patience_seconds=1)
    watches = [judge.open(TASK) for _ in range(2)]
    began = time.monotonic()
    with pytest.raises(JudgeGone, match=rf"127\.0\.0\.1:{port} has been away for 1 s .*; start it again"):
        judge.push([(watch, clip(1, 1)[0]) for watch in watches])
    assert 1 <= time.monotonic() - began < 10
    judge.close()


def test_wrappers_go_on_after_the_server_died(judge_checkpoint, judge_scorer, tmp_path):
    port, action = free_port(), np.zeros((2, 2), np.float32)

    def wrapped(source: Scorer | str) -> vector.RewardModelWrapper:
        envs = vector.SyncVectorEnv([lambda: SquareEnv((20,)), lambda: SquareEnv((3, 20))])
        return vector.RewardModelWrapper(envs, source, TASK)

    broken, unbroken = wrapped(f"http://127.0.0.1:{port}"), wrapped(judge_scorer)
    unbroken.reset(seed=4)
    expected = [unbroken.step(action)[1] for _ in range(10)]
    with serving(tmp_path / "log", f"port={port}", checkpoint=judge_checkpoint) as running:
        broken.reset(seed=4)
        found = [broken.step(action)[1] for _ in range(5)]
        running.process.send_signal(signal.SIGKILL)
        running.process.wait(20)
    with serving(tmp_path / "log", f"port={port}", checkpoint=judge_checkpoint):
        found += [broken.step(action)[1] for _ in range(5)]
        broken.close()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_episode_that_lost_its_judge_does_not_go_on():
    env = RewardModelWrapper(SquareEnv(), f"http://127.0.0.1:{free_port()}", TASK, patience_seconds=0)
    with pytest.raises(JudgeGone):
        env.reset(seed=1)
    with pytest.raises(UserError, match="no episode is running"):
        env.step(np.zeros(2, np.float32))
    env.close()


# what is refused


def test_frames_that_are_none(judge_scorer, server):
    video = clip(1, 3)
    for source in (judge_scorer, server.url):
        judge = make_judge(source)
        watches = [judge.open(TASK) for _ in range(2)]
        judge.push([(watch, video[0]) for watch in watches])
        wrong = [
            (video[1, :-3], "attempt 1: the frame is 56×37 and those before it in the episode were 56×40"),
            (video[1] / 255, "attempt 1: the frame is float64; give uint8"),
            (np.full((40, 56, 3), np.nan, np.float32), "attempt 1: the frame is float32 and holds NaN"),
            (video[:1], r"attempt 1: the frame has shape \(1, 40, 56, 3\)"),
            (video[1, :0], r"attempt 1: the frame has shape \(0, 56, 3\)"),
        ]
        for frame, said in wrong:
            with pytest.raises(BadFrame, match=said) as caught:
                judge.push([(watches[0], video[1]), (watches[1], frame)])
            assert caught.value.request == 1
        # nothing was pushed meanwhile
        found = [score.progress for score in judge.push([(watches[0], frame) for frame in video[1:]])]
        np.testing.assert_allclose(found, judge_scorer.score(video, TASK, every=1).progress[1:], atol=1e-5)
        judge.close()


def test_several_views_are_not_sent_to_a_server(server):
    judge = make_judge(server.url)
    with pytest.raises(BadFrame, match="a session on a server takes one view: give one picture"):
        judge.push([(judge.open(TASK), {"near": clip(1, 1)[0]})])
    judge.close()


def test_scores_that_are_no_numbers(blind_scorer):
    judge = make_judge(blind_scorer)
    watches = [judge.open(TASK) for _ in range(2)]
    with pytest.raises(BadScore, match=r"attempt 0: the score is not a finite number \(progress nan"):
        judge.push([(watch, clip(1, 1)[0]) for watch in watches])


def test_empty_tasks(judge_scorer, server):
    for source in (judge_scorer, server.url):
        judge = make_judge(source)
        with pytest.raises(UserError, match=r"the task \(instruction\) is empty"):
            judge.open(" ")
        watch = judge.open(TASK)
        with pytest.raises(UserError, match=r"the task \(instruction\) is empty"):
            watch.reset("")
        judge.close()


def test_what_a_server_refuses_is_said_at_once(server):
    judge = make_judge(server.url)
    with pytest.raises(UserError, match=rf"the scoring server at {server.url} refuses: "):
        judge.push([(judge.open("word " * 1000), clip(1, 1)[0])])
    judge.close()


def test_sources(judge_checkpoint, judge_scorer):
    judge = make_judge(judge_checkpoint)
    assert isinstance(judge, LocalJudge)
    assert make_judge(judge) is judge
    assert isinstance(make_judge(str(judge_checkpoint)), LocalJudge)
    shipped = make_judge()
    assert isinstance(shipped, LocalJudge)
    assert shipped.scorer.context_frames == Scorer.from_pretrained().context_frames
    with pytest.raises(UserError, match="scores cannot come from int: give a Scorer, a Client, a checkpoint or http"):
        make_judge(3)
    with pytest.raises(UserError):
        make_judge("no/such/folder")
    with pytest.raises(UserError, match="patience_seconds=-1 must be 0 or more"):
        make_judge("http://127.0.0.1:9", patience_seconds=-1)


def test_the_judge_of_the_documented_runs_can_be_loaded():
    judge = Scorer.from_pretrained(Path(__file__).parents[2] / "docs" / "rl" / "judge", device="cpu")
    scores = judge.score(np.zeros((3, 96, 96, 3), np.uint8), "close the window")
    assert np.all((scores.progress >= 0) & (scores.progress <= 1))
