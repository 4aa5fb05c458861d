"""A reader of bars on videos of bars: what it must score is known. The clock beside it is the floor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from bars import NEW_TASK, TASKS, BarReader

from rbm.corpus import Corpus, CorpusWriter
from rbm.corpus.split import split_corpus
from rbm.errors import UserError
from rbm.evaluation.baselines.clock import Clock
from rbm.evaluation.baselines.constant import Constant
from rbm.evaluation.evaluate import Protocol, evaluate, evaluate_split, evaluate_together
from rbm.evaluation.results import Evaluation
from rbm.evaluation.summary import confusion
from rbm.scoring import ClipScores

PROTOCOL = Protocol(draws=50)


@pytest.fixture(scope="module")
def evaluation(corpus: Corpus) -> Evaluation:
    split = split_corpus(corpus, [NEW_TASK], heldout_per_quality=3, validation_per_quality=1)
    return evaluate_split(BarReader(), corpus, split, PROTOCOL)


def test_the_reader_is_found_to_be_good(evaluation: Evaluation) -> None:
    heldout = evaluation.groups["heldout"].metrics
    for name in ("voc", "kendall_tau", "preference_accuracy", "progress_accuracy", "success_auc", "success_auprc"):
        assert heldout[name] == pytest.approx(1), name
    assert heldout["voc_reversed"] == pytest.approx(-1)
    assert heldout["voc_shuffled_true_order"] == pytest.approx(1)
    assert abs(heldout["voc_failure"]) < 0.5
    assert heldout["gap"] > 0.8
    assert heldout["wrong_instruction"] == heldout["wrong_instruction_same_scene"] == 0
    assert heldout["instruction_margin"] == pytest.approx(1)
    assert heldout["paraphrase_difference"] == 0
    assert heldout["label_mae"] < 0.02
    assert heldout["ece"] == pytest.approx((0.03 + 2 * 0.02) / 3, abs=1e-6)  # a third succeeds
    assert heldout["trajectories"] == 27


def test_the_clock_has_the_best_voc_and_nothing_else(evaluation: Evaluation) -> None:
    clock = evaluation.groups["clock"].metrics
    assert clock["voc"] == clock["voc_failure"] == clock["voc_reversed"] == pytest.approx(1)
    assert clock["voc_shuffled_shown_order"] == pytest.approx(1)
    assert clock["preference_accuracy"] == clock["success_auc"] == clock["suboptimal_over_failure"] == 0.5
    assert clock["kendall_tau"] == clock["gap"] == clock["instruction_margin"] == 0
    assert clock["wrong_instruction"] == 1


def test_the_constant_has_nothing(evaluation: Evaluation) -> None:
    constant = evaluation.groups["constant"].metrics
    assert constant["voc"] == constant["voc_reversed"] == constant["gap"] == constant["kendall_tau"] == 0
    assert constant["success_auc"] == 0.5


def test_new_tasks_are_shown_under_all_instructions(evaluation: Evaluation) -> None:
    rows, columns, matrix = confusion(evaluation.groups["newtask"].records)
    assert [evaluation.tasks[row] for row in rows] == [NEW_TASK]
    assert sorted(columns) == [0, 1, 2, 3]
    assert columns[0] == rows[0]
    assert matrix[0] == pytest.approx([1, 0, 0, 0])


def test_held_out_trajectories_are_shown_under_trained_instructions(evaluation: Evaluation) -> None:
    rows, columns, matrix = confusion(evaluation.groups["heldout"].records)
    assert rows.tolist() == columns.tolist() == [0, 1, 2]
    assert np.diag(matrix) == pytest.approx([1, 1, 1])


def test_a_figure_without_its_trajectories_is_undefined(evaluation: Evaluation) -> None:
    assert np.isnan(evaluation.groups["newtask"].metrics["wrong_instruction_same_scene"])


def test_intervals_hold_the_figure(evaluation: Evaluation) -> None:
    result = evaluation.groups["heldout"]
    for name in ("label_mae", "final_suboptimal", "voc_failure", "gap"):
        low, high = result.intervals[name]
        assert low <= result.metrics[name] <= high, name
    low, high = result.intervals["final_suboptimal"]
    assert high - low > 0.01


def test_the_same_seed_gives_the_same_figures(corpus: Corpus, reader: BarReader) -> None:
    rows = np.arange(14)
    first, again = (evaluate(reader, corpus, rows, protocol=PROTOCOL) for _ in range(2))
    assert first.metrics == pytest.approx(again.metrics, nan_ok=True)
    assert first.intervals["gap"] == again.intervals["gap"]


def test_order_of_rows_changes_nothing(corpus: Corpus, reader: BarReader) -> None:
    forward = evaluate(reader, corpus, np.arange(28), protocol=PROTOCOL).metrics
    backward = evaluate(reader, corpus, np.arange(28)[::-1], protocol=PROTOCOL).metrics
    assert forward == pytest.approx(backward, nan_ok=True)


@dataclass
class CountingClock(Clock):
    """The clock, counting what it is shown."""

    context_frames: int = 8
    shown: list[tuple[int, str]] = field(default_factory=list)

    def predict(self, clips, batch_size: int = 64) -> list[ClipScores]:  # type: ignore[no-untyped-def]
        self.shown += [(id(frames), text) for frames, text in clips]
        return super().predict(clips, batch_size)


def test_other_instructions_come_with_the_same_array(corpus: Corpus) -> None:
    clock = CountingClock()
    success = int(corpus.select(quality="successful")[0])
    evaluate(clock, corpus, [success], allowed=range(4), protocol=Protocol(draws=0))
    texts = {text for key, text in clock.shown if key == clock.shown[0][0]}
    assert texts == {TASKS[0].text, *TASKS[0].paraphrases, *(task.text for task in TASKS[1:])}
    assert len(clock.shown) == 1 + 3 + 2 + 2  # plain, wrong, rephrased, reversed and shuffled


def test_pairs_are_bounded(corpus: Corpus, reader: BarReader) -> None:
    rows = np.flatnonzero(corpus.columns.task == 0)
    result = evaluate(reader, corpus, rows, protocol=Protocol(draws=0, most_in_pairs=2))
    assert len(result.preferences.probability) == 3 * 2 * 2
    qualities = np.array([record.quality for record in result.records])
    assert (qualities[result.preferences.better] < qualities[result.preferences.worse]).all()
    assert (result.preferences.probability > 0.5).all()


def test_nothing_to_evaluate_is_said(corpus: Corpus, reader: BarReader) -> None:
    with pytest.raises(UserError, match="no trajectories"):
        evaluate(reader, corpus, [])


def test_scorers_side_by_side_look_at_equally_many_frames(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="context_frames"):
        evaluate_together({"a": Clock(8), "b": Constant(16)}, corpus, [0])


def test_one_frame_trajectories_are_scored() -> None:
    scores = Clock(8).predict([(np.zeros((1, 4, 4, 3), np.uint8), "x")])
    assert scores[0].progress.tolist() == [0]


class SecondViewReader(BarReader):
    """Reads the bar in its second view; the corpus's first view shows nothing of it."""

    views = ("bar", "blank")

    def predict(self, clips, batch_size: int = 64) -> list[ClipScores]:  # type: ignore[no-untyped-def]
        assert all(set(shown) == {"bar", "blank"} for shown, _ in clips)
        return super().predict([(shown["bar"], text) for shown, text in clips], batch_size)

    def prefer(self, pairs):  # type: ignore[no-untyped-def]
        return super().prefer([(a["bar"], b["bar"], text) for a, b, text in pairs])


def test_a_scorer_of_several_views_is_shown_all_that_it_names(corpus: Corpus, reader: BarReader, tmp_path) -> None:
    with CorpusWriter(tmp_path / "two", codec="jpeg") as writer:
        writer.add_source("bars")
        for task in TASKS:
            writer.add_task(task)
        for trajectory in corpus:
            frames = trajectory.frames()
            record = replace(trajectory, views=("blank", "bar"))
            writer.add(record, {"blank": np.zeros_like(frames), "bar": frames})
    two = Corpus.open(tmp_path / "two")
    rows = np.flatnonzero(two.columns.task == 0)
    protocol = Protocol(draws=0)
    one_view = evaluate(reader, corpus, rows, protocol=protocol)
    both = evaluate_together({"model": SecondViewReader(), "clock": Clock(8)}, two, rows, protocol=protocol)
    assert both["model"].metrics["gap"] == pytest.approx(one_view.metrics["gap"], abs=0.05)
    assert both["model"].metrics["voc_reversed"] == pytest.approx(-1)
    assert both["clock"].metrics["preference_accuracy"] == 0.5
    missing = type("Other", (SecondViewReader,), {"views": ("top",)})()
    with pytest.raises(UserError, match="none of the views that the model reads"):
        evaluate(missing, two, rows, protocol=protocol)
