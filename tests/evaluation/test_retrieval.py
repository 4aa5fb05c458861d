"""Retrieval: the order by hand, the same from memory and from a folder, what goes wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from rbm.corpus import Corpus, Selection
from rbm.errors import UserError
from rbm.evaluation.attempts import scored_folder
from rbm.evaluation.bulk_sources import CorpusSource
from rbm.evaluation.retrieval import (
    Pool,
    QuerySource,
    near_tasks,
    nearness,
    read_pool,
    relevant_rows,
    retrieve,
    score_pool,
)
from rbm.evaluation.uses_cli import retrieve_command
from rbm.frames import pick_frames
from rbm.scoring import Scorer

QUERY = "open the drawer"


def silent(trajectories: int, frames: int) -> None: ...


@pytest.fixture(scope="module")
def scorer(tiny_checkpoint: Path) -> Scorer:
    return Scorer.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def pool(corpus: Corpus, scorer: Scorer) -> Pool:
    return score_pool(corpus, QUERY, scorer)


def by_hand(corpus: Corpus, worth: list[float]) -> Pool:
    """The first trajectories of the corpus with these progress and success values."""
    values = np.array(worth)
    ids = tuple(corpus.ids[row] for row in range(len(worth)))
    return Pool(QUERY, ids, np.arange(len(worth)), values, values, -values)


def test_every_trajectory_is_scored_under_the_query(corpus: Corpus, scorer: Scorer, pool: Pool) -> None:
    assert len(pool) == len(corpus)
    for row in (0, 17, 40):
        frames = corpus[row].frames()
        said = scorer.predict([(frames[pick_frames(len(frames), scorer.context_frames)], QUERY)])[0]
        assert pool.ids[row] == corpus.ids[row]
        assert pool.progress[row] == pytest.approx(said.progress[-3:].mean(), abs=2e-5)
        assert pool.success[row] == pytest.approx(said.success[-3:].mean(), abs=2e-5)
        assert pool.utility[row] == pytest.approx(said.utility, abs=1e-4)


@pytest.mark.parametrize("workers", [None, 2])
def test_a_folder_says_the_same_as_memory(
    workers: int | None, corpus: Corpus, tiny_checkpoint: Path, pool: Pool, tmp_path: Path
) -> None:
    source = QuerySource(corpus, None, None, QUERY)
    ticked: list[int] = []
    out = tmp_path / "scores"
    for _ in range(2):  # the second time nothing is left to do
        with scored_folder(
            source, out, lambda n, frames: ticked.append(frames), str(tiny_checkpoint), "cpu", None, workers
        ):
            found = read_pool(out)
    assert sum(ticked) == sum(min(8, record.n_frames) for record in corpus)
    assert found.ids == pool.ids
    for name in ("rows", "progress", "success", "utility"):
        np.testing.assert_allclose(getattr(found, name), getattr(pool, name), atol=2e-5, err_msg=name)


def test_the_best_by_hand(corpus: Corpus) -> None:
    """Rows 0 to 5 are successes of the query's task, 6 to 9 suboptimal, 10 to 13 failures."""
    pool = by_hand(corpus, [0.9, 0.2, 0.8, 0.2, 0.2, 0.2, 0.85, 0.2, 0.2, 0.2, 0.1])
    found = retrieve(pool, corpus, 4)
    assert found.rows.tolist() == [0, 6, 2, 1]  # equals in the order of the corpus
    assert found.values.tolist() == [0.9, 0.85, 0.8, 0.2]
    assert found.outcomes == ("successful", "suboptimal", "successful", "successful")
    assert (found.precision, found.relevant, found.of) == (0.75, 6, 11)
    assert retrieve(pool, corpus, 1, "utility").rows.tolist() == [10]
    assert retrieve(replace(pool, progress=1 - pool.progress), corpus, 1, "progress").rows.tolist() == [10]
    told = found.to_json()
    assert told["found"][1] == {
        "trajectory": "bars/0/6",
        "row": 6,
        "value": 0.85,
        "task": QUERY,
        "outcome": "suboptimal",
    }
    left = pool.among(np.array([2, 10]))
    assert (left.ids, left.rows.tolist(), left.utility.tolist()) == (("bars/0/2", "bars/0/10"), [2, 10], [-0.8, -0.1])


def test_relevant_are_successes_of_the_task_in_any_wording(corpus: Corpus) -> None:
    expected = corpus.select(task=QUERY, quality="successful").tolist()
    for text in (QUERY, "pull the drawer open"):
        found = relevant_rows(corpus, text)
        assert found is not None
        assert found.tolist() == expected
    assert relevant_rows(corpus, "make tea") is None
    assert retrieve(replace(by_hand(corpus, [0.1]), query="make tea"), corpus, 1).precision is None


def test_nearness_of_words_by_hand(corpus: Corpus) -> None:
    assert nearness("open the drawer", "Open the door!") == pytest.approx(4 / 6)
    assert nearness("open the drawer", "open drawer") == pytest.approx(4 / 5)
    assert nearness("open", "close") == 0
    assert np.unique(corpus.columns.task[near_tasks(corpus, QUERY, 1)]).tolist() == [0]
    assert np.unique(corpus.columns.task[near_tasks(corpus, "push the drawer shut", 1)]).tolist() == [1]  # a paraphrase
    two = near_tasks(corpus, QUERY, 2)  # "close the drawer" and "open the door" are as near: the first
    assert np.unique(corpus.columns.task[two]).tolist() == [0, 1]
    assert (np.diff(two) > 0).all()
    assert len(near_tasks(corpus, QUERY, 99)) == len(corpus)


def test_bad_input_is_a_sentence(
    corpus: Corpus, scorer: Scorer, pool: Pool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"k=500 is more than the pool holds: it has {len(corpus)}"):
        retrieve(pool, corpus, 500)
    with pytest.raises(UserError, match="k=0 retrieves nothing"):
        retrieve(pool, corpus, 0)
    with pytest.raises(UserError, match="not by 'luck'"):
        retrieve(pool, corpus, 1, "luck")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has no utility"):
        retrieve(replace(pool, utility=pool.utility * np.nan), corpus, 1, "utility")
    with pytest.raises(UserError, match="the pool is empty"):
        score_pool(corpus, QUERY, scorer, np.zeros(0, np.int64))
    with pytest.raises(UserError, match="instruction"):
        score_pool(corpus, " ", scorer)
    with pytest.raises(UserError, match="0 tasks leave nothing"):
        near_tasks(corpus, QUERY, 0)
    with scored_folder(CorpusSource(corpus), tmp_path / "own", silent, str(tiny_checkpoint), "cpu"):
        pass
    with pytest.raises(UserError, match="under their own instructions"):
        read_pool(tmp_path / "own")
    with pytest.raises(UserError, match="is no folder of scores"):
        read_pool(tmp_path)


def run(*args: object) -> Result:
    return CliRunner().invoke(retrieve_command, [str(arg) for arg in args])


def test_the_command(corpus: Corpus, tiny_checkpoint: Path, pool: Pool, tmp_path: Path) -> None:
    scores, ids = tmp_path / "scores", tmp_path / "ids.txt"
    base = (corpus.location, "--task", QUERY, "--checkpoint", tiny_checkpoint, "-k", 5)
    told = []
    for more in (("--near", 0, "--out", ids), ("--near", 0, "--scores", scores), ("--near", 0, "--scores", scores)):
        done = run(*base, *more, "--json", "-")
        assert done.exit_code == 0, done.exception or done.output
        told.append(json.loads(done.stdout))
    assert told[1:] == [told[0], told[0]]
    expected = retrieve(pool, corpus, 5)
    assert [entry["trajectory"] for entry in told[0]["found"]] == list(expected.ids)
    assert ids.read_text().splitlines() == list(expected.ids)
    done = run(*base, "--json", "-")  # filed under the nearest words
    found = json.loads(done.stdout)
    assert {entry["task"] for entry in found["found"]} == {QUERY}
    assert (found["pool"], found["relevant"]) == (14, 6)
    done = run(corpus.location, "--task", QUERY, "-k", 15)
    assert "k=15 is more than the pool holds: 14" in str(done.exception)
    done = run(*base, "--scores", scores)
    assert "holds the scores of another run: selection was" in str(done.exception)


def test_ids_go_into_a_selection(corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path) -> None:
    from rbm.corpus.cli import corpus as commands

    ids, saved = tmp_path / "ids.txt", tmp_path / "found.json"
    run(corpus.location, "--task", QUERY, "--checkpoint", tiny_checkpoint, "-k", 3, "--out", ids)
    done = CliRunner().invoke(commands, ["select", str(corpus.location), "--ids-from", str(ids), "-o", str(saved)])
    assert done.exit_code == 0, done.output
    assert sorted(Selection.load(saved).ids) == sorted(ids.read_text().split("\n")[:-1])
