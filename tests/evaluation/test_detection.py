"""Failures and successes noticed frame by frame: the formulas by hand, streaming as offline, what goes wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from rbm.corpus import Corpus
from rbm.errors import UserError
from rbm.evaluation.attempts import ScoredAttempt, read_attempts, with_outcomes
from rbm.evaluation.bulk_cli import score_corpus
from rbm.evaluation.detection import (
    Band,
    CorrelationDetector,
    FailureDetector,
    FailureLimits,
    calibrate_failures,
    conformal_limit,
    correlation,
    detect_failures,
    first_alarm,
)
from rbm.evaluation.detection_results import Detection, evaluate_detection, evaluate_success_detection
from rbm.evaluation.successes import SuccessRule, calibrate_success, detect_successes
from rbm.evaluation.uses_cli import detect
from rbm.scoring import FrameScore, Scorer
from rbm.scoring.vote import vote
from rbm.video import encode_video

TASK = "open the drawer"


def attempt(
    progress: list[float],
    success: list[float] | None = None,
    won: bool | None = None,
    done: float | None = None,
    **more,
) -> ScoredAttempt:
    """One frame a second."""
    n = len(progress)
    given = {"id": "a", "task": TASK, "time": np.arange(n), **more}
    return ScoredAttempt(progress=progress, success=success or [0.0] * n, succeeded=won, done=done, **given)


def limits(band: Band, behind: float = math.inf, stall: float = math.inf, fall: float = math.inf) -> FailureLimits:
    return FailureLimits({TASK: band}, behind, stall, fall)


BAND = Band(np.array([0.0, 2.0, 4.0]), np.array([0.0, 0.5, 1.0]), np.array([0.05, 0.15, 0.05]), 4.0, 1.0, 5)
"""Half way after two seconds, done after four."""


def ramp(steps: int, n: int = 12, **more) -> ScoredAttempt:
    """A success after `steps` seconds, at constant speed."""
    progress = np.minimum(np.arange(n) / steps, 1)
    return attempt(
        progress.tolist(), (progress >= 1).astype(float).tolist(), True, float(steps), id=f"r{steps}", **more
    )


def crowd(seed: int, count: int = 40) -> list[ScoredAttempt]:
    """Half of them arrive after 10 to 16 seconds, half get stuck on the way."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        arrives, n = number % 2 == 0, 24
        speed = 1 / rng.uniform(10, 16)
        progress = np.minimum(np.arange(n) * speed, 1.0 if arrives else rng.uniform(0.1, 0.5))
        progress = np.clip(progress + rng.normal(0, 0.01, n), 0, 1)
        done = float(np.ceil(1 / speed)) if arrives else None
        success = (np.arange(n) >= done).astype(float) if done is not None else np.zeros(n)
        found.append(attempt(progress.tolist(), success.tolist(), arrives, done, id=str(number)))
    return found


# the signs


def test_the_three_signs_by_hand() -> None:
    detector = FailureDetector(limits(BAND), TASK)
    detector.add(0.0)
    assert detector.signs == (0.0, 0.0, 0.0)  # (0 − 0) / (0.05 + 0.05)
    detector.add(0.2)  # mean of two: 0.1; the band at 1 s: 0.25 ± 0.1
    np.testing.assert_allclose(detector.signs, ((0.25 - 0.1) / 0.15, 0, 0), atol=1e-12)
    detector.add(0.1)  # 0.1 again: no rise since 1 s; the band at 2 s: 0.5 ± 0.15
    np.testing.assert_allclose(detector.signs, (0.4 / 0.2, 1 / 4, 0), atol=1e-12)
    detector.add(0.0)  # the last three: 0.1
    np.testing.assert_allclose(detector.signs, (0.65 / 0.15, 2 / 4, 0), atol=1e-12)
    detector.add(0.05)  # 0.05, half of the best; the band at 4 s: 1 ± 0.05
    np.testing.assert_allclose(detector.signs, (0.95 / 0.1, 3 / 4, 0.05), atol=1e-12)
    detector.add(0.6)  # 0.216…, a rise
    now = 0.65 / 3
    np.testing.assert_allclose(detector.signs, ((1 - now) / 0.1, 0, 0), atol=1e-12)
    assert detector.alarm is None


@pytest.mark.parametrize(("name", "value", "at"), [("behind", 1.9, 2), ("stall", 0.4, 3), ("fall", 0.04, 4)])
def test_each_sign_gives_alarm_above_its_limit(name: str, value: float, at: int) -> None:
    detector = FailureDetector(limits(BAND, **{name: value}), TASK)
    said = [detector.add(progress) for progress in (0.0, 0.2, 0.1, 0.0, 0.05, 0.6)]
    assert said == [n >= at for n in range(6)]  # and from then on
    assert detector.alarm == name
    detector.reset()
    assert not detector.add(0.0)
    assert detector.alarm is None


def test_no_alarm_while_it_counts_as_done() -> None:
    stuck = [1.0] * 10
    assert first_alarm(FailureDetector(limits(BAND, stall=0.5), TASK), attempt(stuck)) == 3
    done = attempt(stuck, [0.9] * 10)
    assert first_alarm(FailureDetector(limits(BAND, stall=0.5), TASK), done) is None
    late = FailureLimits({TASK: BAND}, math.inf, 0.5, math.inf, done={TASK: SuccessRule(6, 6)})
    assert first_alarm(FailureDetector(late, TASK), done) == 3  # before six frames have said so


def test_streaming_is_offline_whatever_the_clock_starts_at() -> None:
    known = calibrate_failures(crowd(0))
    held = crowd(1)
    alarms = detect_failures(held, known)
    assert any(alarms)
    detector = FailureDetector(known, TASK)
    for one, alarm in zip(held, alarms, strict=True):
        detector.reset()
        scores = [FrameScore(float(p), 0.1, float(s)) for p, s in zip(one.progress, one.success, strict=True)]
        live = [detector.add(score) for score in scores]  # one frame a second, as in calibration
        assert (None if alarm is None else one.time.tolist().index(alarm)) == (live.index(True) if any(live) else None)
    moved = [replace(one, time=one.time + 100, done=None if one.done is None else one.done + 100) for one in held]
    assert detect_failures(moved, known) == [None if alarm is None else alarm + 100 for alarm in alarms]


# calibration


def test_a_band_by_hand() -> None:
    band = Band.of([ramp(2, 4), ramp(4, 6)])
    np.testing.assert_allclose(band.time, [0, 1, 2, 3, 4, 5])
    slow = [0, 0.125, 0.25, 0.5, 0.75, 1]  # means of the last three of 0, ¼, ½, ¾, 1, 1; 1 after 4 s
    fast = [0, 0.25, 0.5, 1, 1, 1]  # of 0, ½, 1, 1; 1 after 2 s
    np.testing.assert_allclose(band.mean, (np.array(slow) + fast) / 2)
    np.testing.assert_allclose(band.std, np.abs(np.array(slow) - fast) / np.sqrt(2))
    assert (band.usual, band.period, band.count) == (3.0, 1.0, 2)
    assert band.behind(0.5, 0.0) == pytest.approx(0.09375 / (0.125 / np.sqrt(2) / 2 + 0.05))
    assert band.behind(99, 0.5) == pytest.approx(0.5 / 0.05)


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.0, math.inf), (0.1, math.inf), (0.2, 9), (0.25, 9), (0.4, 7), (0.8, 1)]
)
def test_a_conformal_limit_by_hand(alpha: float, expected: float) -> None:
    """Of four values the ⌈5 (1 − α)⌉-th smallest: 5th, 5th, 4th, 4th, 3rd, 1st."""
    assert conformal_limit([5.0, 1.0, 9.0, 7.0], alpha) == expected


def test_a_conformal_limit_holds_what_it_promises() -> None:
    rng = np.random.default_rng(0)
    passed = [rng.gamma(2) > conformal_limit(rng.gamma(2, size=19), 0.1) for _ in range(4000)]
    assert np.mean(passed) == pytest.approx(0.1, abs=0.02)


def test_calibrated_limits_notice_failures_of_other_attempts() -> None:
    known, held = calibrate_failures(crowd(0)), crowd(1)
    found = evaluate_detection(held, detect_failures(held, known))
    assert found.all.f1 > 0.9
    assert found.all.median < 0.75
    alone = calibrate_failures([one for one in crowd(0) if one.succeeded], false_alarms=0.2)
    assert alone.alphas == (0.1, 0.1, 0.0)
    assert math.isinf(alone.fall)
    assert evaluate_detection(held, detect_failures(held, alone)).all.f1 > 0.85


def test_limits_are_kept_in_a_file(tmp_path: Path) -> None:
    known = calibrate_failures(crowd(0))
    known.save(tmp_path / "limits.json")
    again = FailureLimits.load(tmp_path / "limits.json")
    assert (again.behind, again.stall, again.fall, again.alphas, again.done) == (
        known.behind,
        known.stall,
        known.fall,
        known.alphas,
        known.done,
    )
    assert detect_failures(crowd(1), again) == detect_failures(crowd(1), known)
    facts = json.loads((tmp_path / "limits.json").read_text())
    for broken in ("{", "[]", json.dumps({**facts, "version": 9}), json.dumps({**facts, "bands": {"x": {"time": []}}})):
        (tmp_path / "limits.json").write_text(broken)
        with pytest.raises(UserError, match=r"rbm detect calibrate|calibrate again"):
            FailureLimits.load(tmp_path / "limits.json")


# the plain recipe


def test_correlation_by_hand() -> None:
    assert correlation([0, 1, 2], [0.1, 0.2, 0.3]) == pytest.approx(1)
    assert correlation([0, 1, 2, 3], [0.3, 0.1, 0.2, 0.0]) == pytest.approx(-0.8)
    assert correlation([0, 1, 2], [0.4, 0.4, 0.4]) == 0
    detector = CorrelationDetector(4, -0.75)  # of the last four: .63, −.63, −1, 1
    assert [detector.add(p) for p in (0.1, 0.2, 0.3, 0.2, 0.1, 0.0)] == [False] * 5 + [True]
    assert detector.add(0.9)  # an alarm stays
    detector.reset()
    assert not detector.add(0.0)


# how well it went


def test_detection_counts_by_hand() -> None:
    attempts = [
        attempt([0.1] * 11, won=False),  # alarm at 4 of 10 s: right
        attempt([0.1] * 11, won=False),  # at 8 of 10 s: right
        attempt([0.1] * 11, won=False, task="close it"),  # none: missed
        attempt([0.1] * 11, won=True, done=6.0),  # at 5 s: false
        attempt([0.1] * 11, won=True, done=6.0),  # at 6 s: after it, does not count
        attempt([0.1] * 11, won=True),  # it is not known when it was done: false
        attempt([0.1] * 11, won=True, done=6.0),  # none
    ]
    found = evaluate_detection(attempts, [4.0, 8.0, None, 5.0, 6.0, 10.0, None])
    one = found.all
    assert (one.tp, one.fp, one.fn, one.tn) == (2, 2, 1, 2)
    assert (one.precision, one.recall, one.f1) == (0.5, pytest.approx(2 / 3), pytest.approx(4 / 7))
    assert (one.false_alarms, one.median) == (0.5, pytest.approx(0.6))
    assert (found.by_task["close it"].fn, found.by_task["close it"].recall) == (1, 0)
    told = found.to_json()
    assert (told["f1"], told["median_alarm"], told["median_frames"]) == (0.5714, 0.6, 6)
    assert told["by_task"]["close it"]["precision"] is None
    assert found.table().row_count == 3


def test_success_detection_counts_by_hand() -> None:
    attempts = [
        attempt([0.1] * 11, won=True, done=6.0),  # said at 8: right, 2 s late
        attempt([0.1] * 11, won=True, done=6.0),  # at 5.5: a tenth of 6 s is allowed
        attempt([0.1] * 11, won=True, done=6.0),  # at 5: too early, false and missed
        attempt([0.1] * 11, won=True, done=6.0),  # never: missed
        attempt([0.1] * 11, won=True),  # at 3: right, without a delay
        attempt([0.1] * 11, won=False),  # at 9: false
        attempt([0.1] * 11, won=False),
    ]
    one = evaluate_success_detection(attempts, [8.0, 5.5, 5.0, None, 3.0, 9.0, None]).all
    assert (one.tp, one.fp, one.fn, one.tn, one.missed_early) == (3, 2, 1, 1, 1)
    assert (one.precision, one.recall, one.f1) == (0.6, 0.6, 0.6)
    assert one.when.tolist() == [2.0, -0.5]
    assert one.frames.tolist() == [2.0, 0.0]
    assert one.median == 0.75


def test_a_vote_over_progress_and_success() -> None:
    one = attempt([0.2, 0.8, 0.6, 0.8, 0.9], [0.0, 0.0, 0.9, 0.2, 0.9])
    assert detect_successes([one], SuccessRule(2, 3, 0.5)) == [4.0]
    assert detect_successes([one], SuccessRule(2, 2, 0.5, "progress")) == [2.0]
    assert detect_successes([one], {TASK: SuccessRule(2, 2, 0.5, "mean")}) == [3.0]  # .4, .75, .5
    assert detect_successes([one], {}) == [None]  # the usual 3 of 5
    rng = np.random.default_rng(0)
    for _ in range(20):
        random = attempt(rng.random(30).tolist(), rng.random(30).tolist())
        held = vote(random.success, 4, 6, 0.6)
        assert detect_successes([random], SuccessRule(4, 6, 0.6)) == [float(held.argmax()) if held.any() else None]


def test_a_rule_is_chosen_by_f1_and_then_by_delay() -> None:
    """Failures flash for one frame at .9; successes stay at .6: only a vote of two can tell, the quickest at once."""
    flash = attempt([0.0] * 8, [0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1], False)
    stays = attempt([0.0] * 8, [0.1, 0.1, 0.1, 0.1, 0.6, 0.6, 0.6, 0.6], True, 4.0)
    rule = calibrate_success([flash, stays])
    assert rule == SuccessRule(2, 2, 0.5, "success")  # thresholds from .15 to .6 do as well
    assert detect_successes([flash, stays], rule) == [None, 5.0]


# what goes wrong


def test_bad_input_is_a_sentence() -> None:
    known = calibrate_failures(crowd(0))
    with pytest.raises(UserError, match="has no scores"):
        attempt([])
    with pytest.raises(UserError, match="its progress at scored frame 1 is nan"):
        attempt([0.1, math.nan])
    with pytest.raises(UserError, match="its success at scored frame 0 is inf"):
        attempt([0.1], [math.inf])
    with pytest.raises(UserError, match="must rise"):
        attempt([0.1, 0.2], time=[1.0, 1.0])
    with pytest.raises(UserError, match="one number for each frame"):
        attempt([0.1, 0.2], [0.1])
    with pytest.raises(UserError, match="no limits for the task 'fly', only for 'open the drawer'"):
        FailureDetector(known, "fly")
    with pytest.raises(UserError, match="not a finite number"):
        FailureDetector(known, TASK).add(math.nan)
    with pytest.raises(UserError, match="not a finite number"):
        CorrelationDetector().add(math.nan)
    with pytest.raises(UserError, match="no attempts were given"):
        calibrate_failures([])
    with pytest.raises(UserError, match="at least 4 successes of a task, the most here are 0"):
        calibrate_failures([one for one in crowd(0) if not one.succeeded])
    with pytest.raises(UserError, match="no success is among"):
        calibrate_success([attempt([0.1], won=False)])
    with pytest.raises(UserError, match="outcome of 'a' is not known"):
        evaluate_detection([attempt([0.1])], [None])
    with pytest.raises(UserError, match="no attempts were given"):
        evaluate_success_detection([], [])
    with pytest.raises(UserError, match="2 alarms for 1 attempts"):
        evaluate_detection([attempt([0.1], won=True)], [None, None])
    with pytest.raises(UserError, match="a window of 1 frames"):
        CorrelationDetector(1)
    with pytest.raises(UserError, match="not on 'luck'"):
        SuccessRule(of="luck")  # type: ignore[arg-type]


def test_one_frame_is_enough_to_look_at() -> None:
    known = calibrate_failures(crowd(0))
    one = attempt([0.3], won=False)
    assert detect_failures([one], known) == [None]
    assert evaluate_detection([one], [None]).all.recall == 0
    assert first_alarm(CorrelationDetector(), one) is None


# the command


def run(*args: object) -> Result:
    return CliRunner().invoke(detect, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def scores(corpus: Corpus, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bulk") / "scores"
    args = ["--corpus", str(corpus.location), "--out", str(out), "--checkpoint", str(tiny_checkpoint), "--every", "1"]
    assert CliRunner().invoke(score_corpus, args).exit_code == 0
    return out


def test_a_corpus_and_its_scores_say_the_same(
    corpus: Corpus, scores: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    place = str(corpus.location)
    done = run("calibrate", scores, "--corpus", place, "--out", tmp_path / "limits.json")
    assert done.exit_code == 0, done.exception or done.output
    folder = ("failures", scores, "--corpus", place)
    whole = ("failures", place, "--checkpoint", tiny_checkpoint, "--device", "cpu")
    for kind in (folder, whole, (*whole, "--scores", scores)):
        name = tmp_path / f"{len(kind)}.json"
        done = run(*kind, "--limits", tmp_path / "limits.json", "--json", name)
        assert done.exit_code == 0, done.exception or done.output
    first, *others = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (4, 6, 8))
    assert others == [first, first]
    assert len(first["attempts"]) == len(corpus)
    assert first["evaluation"]["positive"] == "failure"
    assert {entry["sign"] for entry in first["attempts"]} <= {"behind", "stall", "fall", None}
    known = FailureLimits.load(tmp_path / "limits.json")
    assert detect_failures(with_outcomes(read_attempts(scores), corpus), known) == [
        entry["alarm"] for entry in first["attempts"]
    ]
    done = run("success", scores, "--limits", tmp_path / "limits.json", "--json", "-")
    assert json.loads(done.stdout)["evaluation"] is None  # nobody said where the corpus is


def test_outcomes_of_a_corpus(corpus: Corpus, scores: Path) -> None:
    for one, record in zip(with_outcomes(read_attempts(scores), corpus), corpus, strict=True):
        assert (one.id, one.task, one.succeeded) == (record.id, record.task, record.quality == "successful")
        assert one.done == (None if record.done_index is None else pytest.approx(record.done_index / 20, abs=1e-6))
        np.testing.assert_array_equal(one.time.astype(np.float32), record.timestamp)


def test_a_folder_of_videos(corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for row in (3, 1):
        encode_video(tmp_path / f"{row}.mp4", corpus[row].frames(), fps=10)
    done = run("failures", tmp_path, "--task", TASK, "--checkpoint", tiny_checkpoint, "--json", "-", "--window", 3)
    told = json.loads(done.stdout)
    assert [Path(entry["id"]).name for entry in told["attempts"]] == ["1.mp4", "3.mp4"]
    assert told["evaluation"] is None
    scorer = Scorer.from_pretrained(tiny_checkpoint, device="cpu")
    for entry in told["attempts"]:
        scored = scorer.score(entry["id"], TASK, every=1)
        detector = CorrelationDetector(3)
        said = [detector.add(float(p), 0.0, float(t)) for p, t in zip(scored.progress, scored.timestamp, strict=True)]
        expected = float(scored.timestamp[said.index(True)]) if any(said) else None
        assert entry["alarm"] == (None if expected is None else pytest.approx(expected))


def test_what_the_command_refuses(corpus: Corpus, scores: Path, tmp_path: Path) -> None:
    def why(*args: object) -> str:
        done = run(*args)
        assert isinstance(done.exception, UserError), done.output
        return str(done.exception)

    assert "is empty" in why("failures", tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"no video")
    assert "with --task" in why("failures", tmp_path)
    assert "has no attempt at 'fly'" in why("success", scores, "--task", "fly")
    assert "outcome of 'bars/0/0' is not known" in why("calibrate", scores, "--out", tmp_path / "limits.json")
    assert "rbm detect calibrate" in why("failures", scores, "--limits", tmp_path / "none.json")
    assert "write K/N" in why("success", scores, "--vote", "three")
    assert "no task" in why("failures", corpus.location, "--task", "fly")
    manifest = json.loads((scores / "scores.json").read_text())
    half = tmp_path / "half"
    half.mkdir()
    (half / "scores.json").write_text(json.dumps({**manifest, "complete": False}))
    assert "is not complete" in why("failures", half)
    (half / "scores.json").write_text(json.dumps(manifest))
    assert "missing or damaged" in why("failures", half)


def test_a_result_of_one_task_has_one_row() -> None:
    found = evaluate_detection([attempt([0.1], won=False)], [None])
    assert isinstance(found, Detection)
    assert found.table().row_count == 1
