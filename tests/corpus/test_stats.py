import json

import numpy as np
import pytest
from attempts import TASKS, attempt
from damage import flip

from rbm.corpus import Corpus, CorpusWriter
from rbm.corpus.stats import Group, corpus_stats
from rbm.trajectory import Quality, Task


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Seven attempts, so few that every number can be counted by hand."""
    path = tmp_path_factory.mktemp("stats") / "c"
    with CorpusWriter(path) as writer:
        writer.add_task(Task(TASKS[0], scene="drawer"))
        writer.add_task(Task("hang the cup", scene="kitchen"))
        good = {"quality": Quality.SUCCESSFUL, "task": TASKS[0], "source": "lab", "embodiment": "panda"}
        writer.add(*attempt(0, n_frames=4, **good, messy=True))
        writer.add(*attempt(1, n_frames=8, **good, done_index=10, progress=np.linspace(0, 1, 8)))
        bad = good | {"quality": Quality.FAILURE, "embodiment": "sawyer"}
        writer.add(*attempt(2, n_frames=6, **bad))
        record, clips = attempt(2, n_frames=6, **bad | {"id": "copy of 2", "partial_success": 0.5})
        writer.add(record, clips)
        middling = {"quality": Quality.SUBOPTIMAL, "task": TASKS[1], "source": "web", "is_sim": True}
        writer.add(*attempt(4, n_frames=2, **middling, views=("front", "wrist")))
        writer.add(*attempt(5, n_frames=2, **middling, is_robot=False))
        writer.add(*attempt(6, n_frames=6, **middling))
    return Corpus.open(path)


def test_counts(corpus):
    found = corpus_stats(corpus)
    size = corpus.columns.length.tolist()
    assert (found.trajectories, found.frames, found.bytes) == (7, 34, sum(size))
    assert found.outcomes == (2, 3, 2)
    assert (found.dense, found.messy, found.partial, found.done_known) == (1, 1, 1, 1)
    assert (found.robot, found.sim) == (6, 3)
    assert found.sources == (
        Group("lab", 4, 24, sum(size[:4]), (2, 0, 2)),
        Group("web", 3, 10, sum(size[4:]), (0, 3, 0)),
    )
    assert [(group.name, group.trajectories) for group in found.embodiments] == [("", 3), ("panda", 2), ("sawyer", 2)]
    assert [(group.name, group.trajectories) for group in found.tasks] == [(TASKS[0], 4), (TASKS[1], 3)]
    assert [(group.name, group.trajectories) for group in found.scenes] == [("drawer", 4), ("", 3)]
    assert found.unused_tasks == ("hang the cup",)
    assert found.one_outcome == (TASKS[1],)


def test_quantiles(corpus):
    found = corpus_stats(corpus)
    assert found.n_frames == pytest.approx((2, 2, 3, 6, 6, 7.4, 8))  # of 2 2 4 6 6 6 8
    assert found.bytes_each[0] == corpus.columns.length.min()
    assert found.bytes_each[-1] == corpus.columns.length.max()


def test_copies_of_the_same_frames(corpus):
    copies = corpus_stats(corpus).duplicates
    assert (copies.groups, copies.surplus, copies.unknown) == (1, 1, 0)
    assert copies.examples == (("tests/0002-é", "copy of 2"),)


def test_what_only_the_heads_tell(corpus):
    sample = corpus_stats(corpus).sample
    frames = corpus.columns.n_frames
    assert (sample.heads, sample.damaged, sample.views) == (7, 0, {1: 6, 2: 1})
    assert sample.seconds == pytest.approx(((frames - 1) * 3 / 30).sum(), rel=1e-5)
    some = corpus_stats(corpus, sample=3).sample
    assert some.heads == sum(some.views.values()) == 3
    assert some == corpus_stats(corpus, sample=3).sample


def test_json_and_a_damaged_head(corpus):
    flip(corpus, 1, 20)
    found = corpus_stats(corpus)
    assert (found.sample.heads, found.sample.damaged) == (7, 1)
    facts = json.loads(json.dumps(found.to_json()))
    assert facts["sources"][0]["name"] == "lab"
    assert facts["duplicates"]["surplus"] == 1
    flip(corpus, 1, 20)


def test_an_empty_corpus(tmp_path):
    with CorpusWriter(tmp_path / "c") as writer:
        writer.add_task(Task("open the door"))
    found = corpus_stats(Corpus.open(tmp_path / "c"))
    assert (found.trajectories, found.frames, found.n_frames, found.sources) == (0, 0, (), ())
    assert found.unused_tasks == ("open the door",)
    assert found.sample.seconds == 0
