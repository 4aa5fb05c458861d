"""Attempts of policies, played again: what was seen then is seen again, in the real simulator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dataset_builder.pipeline import build
from dataset_builder.sources.base import Episode, Skipped, Source
from dataset_builder.sources.metaworld_attempts import MetaworldAttempts, read_attempts
from policies.metaworld import MetaWorld
from rbm.config import compose, instantiate
from rbm.corpus import Corpus
from rbm.errors import UserError
from rbm.trajectory import Quality

STEPS, REPEAT = 25, 8


def tried(world: MetaWorld, seed: int, expert: bool) -> tuple[dict, list[np.ndarray], int | None]:
    """An attempt as it is written, the pictures that were seen, and the action in which the task was done."""
    rng = np.random.default_rng(seed)
    policy = world.simulator.expert()
    seen, _ = world.reset(seed=seed)
    pictures, done, over = [world.render()], None, False
    while not over:
        action = policy.get_action(seen.astype(np.float64)) if expert else rng.uniform(-0.3, 0.3, 4)
        seen, _, terminated, truncated, info = world.step(np.asarray(action, np.float32))
        pictures.append(world.render())
        if done is None and info["success"]:
            done = len(pictures) - 1
        over = terminated or truncated
    return world.attempt(), pictures, done


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """A folder with the attempts of one run: three successes and three failures; and what was seen."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    world = MetaWorld("faucet-open", max_steps=STEPS, action_repeat=REPEAT, size=48)
    made = [tried(world, seed, expert=seed % 2 == 0) for seed in range(6)]
    world.close()
    (folder / "attempts.jsonl").write_text("".join(json.dumps(attempt) + "\n" for attempt, _, _ in made))
    return folder, made


def collected(source: MetaworldAttempts, skip: frozenset[str] = frozenset()) -> list[Episode | Skipped]:
    return [item for unit in source.units() for item in source.collect(unit, skip)]


def test_the_same_pictures_and_the_same_outcomes(run) -> None:
    folder, made = run
    source = MetaworldAttempts(str(folder.parent), size=48)
    assert isinstance(source, Source)
    assert source.units() == ["first"]
    assert [task.text for task in source.tasks()] == ["open the faucet"]
    episodes = collected(source)
    assert [one.trajectory.id[:-11] for one in episodes] == [f"policies/first/{number:05d}" for number in range(6)]
    assert len({one.trajectory.id[-10:] for one in episodes}) == 6  # of what was done, not of where it lies
    for number, (episode, (_, pictures, done)) in enumerate(zip(episodes, made, strict=True)):
        record, frames = episode.trajectory, episode.frames["near"]
        assert (record.quality is Quality.SUCCESSFUL) == (done is not None) == (number % 2 == 0)
        if done is None:
            assert record.done_index is None
            assert np.array_equal(frames, np.stack(pictures))
            assert record.frame_index.tolist() == list(range(0, STEPS * REPEAT + 1, REPEAT))
            continue
        assert record.messy
        assert (done - 1) * REPEAT < record.done_index <= done * REPEAT  # it came within that action
        assert 3 <= record.frame_index[-1] - record.done_index <= 25
        whole = min(len(frames) - 1, len(pictures))  # the last frame lies between two actions
        assert np.array_equal(frames[:whole], np.stack(pictures)[:whole])
        assert np.all(record.progress[record.frame_index >= record.done_index] == 1)
        assert record.progress[0] < 0.3


def test_a_policy_that_stopped_at_its_success_holds_still(run, tmp_path: Path) -> None:
    _, made = run
    attempt, pictures, done = made[0]
    cut = {**attempt, "actions": attempt["actions"][:done]}
    (tmp_path / "attempts.jsonl").write_text(json.dumps(cut) + "\n")
    source = MetaworldAttempts(str(tmp_path), size=48)
    assert source.units() == [tmp_path.name]  # the folder of one run, not of several
    (episode,) = collected(source)
    record = episode.trajectory
    assert record.quality is Quality.SUCCESSFUL
    assert np.array_equal(episode.frames["near"][: done + 1], np.stack(pictures)[: done + 1])
    assert 3 <= record.frame_index[-1] - record.done_index <= 25


def test_so_many_of_a_kind_even_over_the_run_and_going_on(run) -> None:
    folder, _ = run
    source = MetaworldAttempts(str(folder), {"successful": 2, "failure": 1, "suboptimal": 0}, size=48)
    ids = [one.trajectory.id for one in collected(source)]
    assert [identity[-16:-11] for identity in ids] == [
        "00000",
        "00001",
        "00004",
    ]  # first and last success, first failure
    left = collected(source, skip=frozenset(ids[:2]))
    assert [one.trajectory.id for one in left] == ids[2:]


def test_a_success_that_is_lost_is_left_out_and_counted(tmp_path: Path) -> None:
    world = MetaWorld("reach", max_steps=STEPS, action_repeat=REPEAT, size=48, terminate_on_success=True)
    attempts = [tried(world, seed, expert=True)[0] for seed in range(4)]
    world.close()
    for attempt in attempts:
        attempt["actions"] += [[-1.0, -1.0, 1.0, 0.0]] * 4  # there, and away again
    (tmp_path / "attempts.jsonl").write_text("".join(json.dumps(attempt) + "\n" for attempt in attempts))
    found = collected(MetaworldAttempts(str(tmp_path), size=48))
    assert [one.reason for one in found if isinstance(one, Skipped)] == ["success lost"]
    kept = [one for one in found if isinstance(one, Episode)]
    assert f"{4 - len(kept)} of 4 attempts" in found[-1].what
    assert len(kept) < 4


def test_builds_a_corpus_by_its_configuration(run, tmp_path: Path) -> None:
    folder, _ = run
    config = compose("build", ["source=metaworld_attempts", f"source.runs={folder.parent}", "source.size=48"])
    build(instantiate(config.source), str(tmp_path / "corpus"), workers=1, progress=False)
    corpus = Corpus.open(tmp_path / "corpus")
    assert len(corpus) == 6
    assert {str(record.quality) for record in corpus} == {"successful", "failure"}


ROW = {"env": "faucet-open", "scene": 1, "action_repeat": 8, "actions": [[0, 0, 0, 0]]}


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "line 1"),
        ("[1]", "nothing else"),
        (json.dumps({**ROW, "env": "dishwasher"}), "unknown Meta-World environment"),
        (json.dumps({**ROW, "scene": -1}), "scene=-1"),
        (json.dumps({**ROW, "scene": True}), "scene=True"),
        (json.dumps({**ROW, "action_repeat": 0}), "action_repeat=0"),
        (json.dumps({**ROW, "actions": []}), "one at least"),
        (json.dumps({**ROW, "actions": [[0, 0, 0]]}), "rows of four"),
        (json.dumps({**ROW, "actions": [[0, 0, 0, 2]]}), "from -1 to 1"),
        (json.dumps({**ROW, "actions": [[0, 0, 0, float("nan")]]}), "from -1 to 1"),
        (json.dumps({**ROW, "actions": "left"}), "no rows of numbers"),
        (json.dumps({**ROW, "more": 1}), "nothing else"),
    ],
)
def test_bad_lines_are_named(line: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=r"line 1.*leave the line out") as caught:
        read_attempts(path)
    assert word in str(caught.value)


def test_bad_settings_are_refused(run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no attempts\.jsonl"):
        MetaworldAttempts(str(tmp_path))
    with pytest.raises(UserError, match="per_quality: good=1"):
        MetaworldAttempts(str(run[0]), {"good": 1})
    with pytest.raises(UserError, match="failure=many"):
        MetaworldAttempts(str(run[0]), {"failure": "many"})
    with pytest.raises(UserError, match="size=0 must be 8 to"):
        MetaworldAttempts(str(run[0]), size=0)
    with pytest.raises(UserError, match="successful=-1"):
        MetaworldAttempts(str(run[0]), {"successful": -1})
