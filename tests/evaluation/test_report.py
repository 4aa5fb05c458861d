from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from bars import NEW_TASK, BarReader
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from rbm.corpus import Corpus
from rbm.corpus.split import split_corpus
from rbm.errors import UserError
from rbm.evaluation import report
from rbm.evaluation.evaluate import Protocol, evaluate_split
from rbm.evaluation.gallery import shown_records, worst
from rbm.evaluation.headline import HEADLINES, console_table, show
from rbm.evaluation.results import Evaluation, load, write_atomic
from rbm.evaluation.strips import film_strip
from rbm.report_cli import report as report_command

NAMES = (
    "preference_accuracy",
    "success_auc",
    "kendall_tau",
    "gap",
    "suboptimal_over_failure",
    "wrong_instruction",
    "wrong_instruction_same_scene",
    "voc",
    "voc_failure",
    "voc_reversed",
    "ece",
)


@pytest.fixture(scope="module")
def evaluation(corpus: Corpus) -> Evaluation:
    split = split_corpus(corpus, [NEW_TASK], heldout_per_quality=2, validation_per_quality=0)
    facts = {"model": "<bar & reader>", "corpus": "bars"}
    return evaluate_split(BarReader(), corpus, split, Protocol(draws=20), facts)


@pytest.fixture(scope="module")
def folder(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("out") / "ein Bericht – 報告"
    report.write(evaluation, where)
    return where


def test_metrics_json_has_the_flat_names(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    for group in ("heldout", "newtask", "clock", "constant"):
        for name in NAMES:
            assert f"{group}.{name}" in metrics
    assert metrics["heldout.voc"] == pytest.approx(1)
    assert metrics["newtask.wrong_instruction_same_scene"] is None
    assert len(metrics["intervals"]["heldout.gap"]) == 2
    assert metrics["facts"]["model"] == "<bar & reader>"


def test_the_page_needs_nothing_beside_it(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "<script" not in page
    assert "&lt;bar &amp; reader&gt;" in page
    for line in HEADLINES:
        assert line.title in page


def test_pictures_are_pictures(folder: Path) -> None:
    for name in ("curves.png", "instructions.png", "calibration.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 500
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["curves.png", "instructions.png", "calibration.png", "index.html", "metrics.json", "results.json"]
    )


def test_saved_results_come_back_as_they_were(evaluation: Evaluation, folder: Path) -> None:
    again = load(folder / "results.json")
    assert again.tasks == evaluation.tasks
    assert again.strips == evaluation.strips
    for name, result in evaluation.groups.items():
        assert again.groups[name].metrics == pytest.approx(result.metrics, nan_ok=True)
        for one, other in zip(result.records, again.groups[name].records, strict=True):
            assert (one.id, one.ordered, one.messy) == (other.id, other.ordered, other.messy)
            assert other.progress == pytest.approx(one.progress, abs=1e-6)
            assert other.done.tolist() == pytest.approx(one.done.tolist(), nan_ok=True)
            assert other.frames.dtype == one.frames.dtype


def test_the_page_is_made_again_from_saved_results(folder: Path) -> None:
    before = (folder / "index.html").read_bytes()
    (folder / "index.html").unlink()
    done = CliRunner().invoke(report_command, ["eval", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0
    assert (folder / "index.html").read_bytes() == before
    assert "Kendall" in done.output


def test_missing_and_foreign_results_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rbm eval"):
        report.rebuild(tmp_path)
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(UserError, match="not results"):
        report.rebuild(tmp_path)
    (tmp_path / "results.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="version 99"):
        report.rebuild(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "metrics.json"
    target.mkdir()
    (target / "kept").write_text("old")
    with pytest.raises(UserError, match="cannot write"):
        write_atomic(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert (target / "kept").read_text() == "old"


def test_every_shown_trajectory_has_a_strip(evaluation: Evaluation) -> None:
    assert {record.id for record in shown_records(evaluation)} == set(evaluation.strips)


def test_worst_cases_stand_worst_first(evaluation: Evaluation) -> None:
    cases = worst(evaluation.groups["heldout"])["Failures that end high (final progress)"]
    finals = [case.record.final for case in cases]
    assert finals == sorted(finals, reverse=True)
    assert all(case.record.quality == 2 for case in cases)


def test_a_strip_is_a_row_of_small_pictures() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, 240, 320, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(film_strip(frames))) as strip:
        assert strip.size == (3 * 171 + 2 * 3, 128)


def test_figures_are_short() -> None:
    shown = {0.9712: ".971", 1.0: "1.00", -0.9: "−.900", 0.0: "0", -0.0001: "0", 0.99999: "1.00", 0.0004: "0"}
    assert {value: show(value) for value in shown} == shown
    assert show(float("nan")) == "–"


def test_targets_are_judged_on_the_right_side() -> None:
    reached = {line.metric: line for line in HEADLINES}
    assert reached["voc"].verdict(0.98) == "met"
    assert reached["voc"].verdict(0.96) == "missed"
    assert reached["voc_reversed"].verdict(-0.95) == "met"
    assert reached["voc_reversed"].verdict(-0.5) == "missed"
    assert reached["ece"].verdict(float("nan")) == ""
    assert reached["voc_reversed"].bound == "≤ −.90"


def test_the_console_table_fits_a_terminal(evaluation: Evaluation) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(console_table(evaluation))
    text = console.export_text()
    assert "…" not in text.replace("… of the same scene", "")
    assert "heldout" in text


def test_spread_over_runs_is_a_markdown_table(tmp_path):
    from click.testing import CliRunner

    from rbm.evaluation.cli import spread
    from rbm.report_cli import report

    for name, value in (("a", 0.9), ("b", 0.8)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(
            f'{{"heldout.gap": {value}, "newtask.gap": null, "clock.gap": 0.0}}'
        )
    done = CliRunner().invoke(report, ["spread", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "| Gap, success − failure | ≥ .60 | .850 (.800 to .900) | – | 0 |" in done.output
    assert spread([1.0, None]) == "1.00"
    missing = CliRunner().invoke(report, ["spread", str(tmp_path / "none")])
    assert "no figures to read" in str(missing.exception)
