"""Filtering for cloning: what is kept, by hand; ids and selections that other commands take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from rbm.corpus import Corpus, Selection
from rbm.errors import UserError
from rbm.evaluation.attempts import ScoredAttempt, read_attempts, scored_folder, with_outcomes
from rbm.evaluation.bulk_sources import CorpusSource
from rbm.evaluation.filtering import FilterResult, evaluate_filter, filter_trajectories
from rbm.evaluation.successes import SuccessRule
from rbm.evaluation.uses_cli import filter_command


def ends(id: str, progress: float, success: float, task: str = "a", won: bool | None = None) -> ScoredAttempt:
    """Five frames, of which the last three are at these values."""
    return ScoredAttempt(
        id, task, np.arange(5), np.array([0, 0, *[progress] * 3]), np.array([0, 0, *[success] * 3]), won
    )


ATTEMPTS = [
    ends("1", 0.9, 0.8, won=True),  # worth .85
    ends("2", 0.9, 0.4, won=True),  # .65
    ends("3", 0.2, 0.0, won=False),  # .1
    ends("4", 0.6, 0.6, won=False),  # .6
    ends("5", 0.3, 0.1, "b", won=True),  # .2
    ends("6", 0.1, 0.1, "b", won=False),  # .1
]


def kept(**options) -> str:
    return "".join(attempt.id for attempt in filter_trajectories(ATTEMPTS, **options))


def test_what_is_kept_by_hand() -> None:
    assert ATTEMPTS[0].worth == pytest.approx(0.85)
    assert kept() == "14"  # 3 of 5 frames at .5
    assert kept(rule=SuccessRule(2, 2, 0.3)) == "124"
    assert kept(rule=SuccessRule(2, 2, 0.85, "progress")) == "12"
    assert kept(keep=0.25) == "15"  # one of four, one of two (⌈.5⌉)
    assert kept(keep=0.5) == "125"
    assert kept(keep=1.0) == "123456"
    assert kept(keep=0.5, min_worth=0.5) == "12"
    assert kept(min_worth=0.7) == "1"
    assert kept(min_worth=1.0) == ""


def test_equals_keep_their_order() -> None:
    same = [replace(ATTEMPTS[2], id=str(number)) for number in range(4)]
    assert [attempt.id for attempt in filter_trajectories(same, 0.5)] == ["0", "1"]


def test_how_much_better_by_hand() -> None:
    found = evaluate_filter(ATTEMPTS, filter_trajectories(ATTEMPTS))
    assert found == FilterResult(attempts=6, successes=3, kept=2, kept_successes=1)
    told = found.to_json()
    assert (told["successful_before"], told["successful_after"], told["successes_kept"]) == (0.5, 0.5, 0.3333)
    assert FilterResult(2, 0, 0, 0).to_json()["successful_after"] is None
    assert evaluate_filter([replace(ATTEMPTS[0], succeeded=None)], []) is None


def test_bad_input_is_a_sentence() -> None:
    with pytest.raises(UserError, match="nothing to filter"):
        filter_trajectories([])
    with pytest.raises(UserError, match="a share is a number above 0"):
        kept(keep=0.0)
    with pytest.raises(UserError, match="a share is a number above 0"):
        kept(keep=float("nan"))
    with pytest.raises(UserError, match="give 'successes', or a share"):
        kept(keep="best")
    with pytest.raises(UserError, match="a number from 0 to 1"):
        kept(min_worth=2.0)


def run(*args: object) -> Result:
    return CliRunner().invoke(filter_command, [str(arg) for arg in args])


def test_the_command(corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    with scored_folder(CorpusSource(corpus), scores, lambda *_: None, str(tiny_checkpoint), "cpu", 1):
        attempts = with_outcomes(read_attempts(scores), corpus)
    expected = [attempt.id for attempt in filter_trajectories(attempts, 0.3)]
    place = corpus.location
    ids, saved, told = tmp_path / "ids.txt", tmp_path / "good.json", tmp_path / "told.json"
    for options in (
        (place, "--checkpoint", tiny_checkpoint, "--out", ids),
        (scores, "--corpus", place, "--out", saved),
        (scores, "--json", told),
    ):
        done = run(*options, "--keep", "0.3")
        assert done.exit_code == 0, done.exception or done.output
    assert ids.read_text().splitlines() == expected
    assert Selection.load(saved).ids == tuple(expected)
    opened, rows = Selection.load(saved).open()
    assert [opened.ids[row] for row in rows.tolist()] == expected
    facts = json.loads(told.read_text())
    assert (facts["ids"], facts["of"], facts["evaluation"]) == (expected, len(corpus), None)
    one = run(scores, "--task", "open the door", "--keep", "0.5", "--json", "-")
    assert len(json.loads(one.stdout)["ids"]) == 7


def test_what_the_command_refuses(corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    with scored_folder(CorpusSource(corpus), scores, lambda *_: None, str(tiny_checkpoint), "cpu", 1):
        pass

    def why(*args: object) -> str:
        done = run(*args)
        assert isinstance(done.exception, UserError), done.output
        return str(done.exception)

    assert "give successes, or a share" in why(scores, "--keep", "best")
    assert "say which with --corpus" in why(scores, "--out", tmp_path / "good.json")
    assert "nothing is kept" in why(
        scores, "--corpus", corpus.location, "--min-worth", 1, "--out", tmp_path / "good.json"
    )
    assert not (tmp_path / "good.json").exists()
    assert "the folder" in why(scores, "--out", tmp_path / "nowhere" / "ids.txt")
