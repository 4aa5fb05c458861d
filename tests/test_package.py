"""The package as it is installed: a wheel in an environment of its own files, the bundled corpus, the whole demo."""

import json
import os
import subprocess
import sys
from pathlib import Path

from rbm.assets import bundled_corpus, nano_weights
from rbm.config import compose
from rbm.corpus import Corpus
from rbm.corpus.split import split_corpus
from rbm.model.checkpoint import describe
from rbm.trajectory import Quality

ROOT = Path(__file__).resolve().parents[1]


def test_a_wheel_works_from_any_directory(tmp_path):
    """Built from the tree, unpacked into a folder; code, configuration, corpus and weights come from there."""
    site = tmp_path / "site"
    build = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", site]
    subprocess.run([*build, ROOT], check=True, capture_output=True)
    code = """
import rbm, rbm.conf, rbm.assets, dataset_builder
from rbm.config import compose
print(rbm.__file__, rbm.conf.__file__, compose("train", ["experiment=demo"]).trainer.max_steps)
print(len(rbm.Corpus.open(rbm.assets.bundled_corpus())))
print(rbm.Scorer.from_pretrained(device="cpu").context_frames)
from importlib.resources import files
assert (files("rbm.evaluation") / "templates" / "report.html").is_file()
"""
    (tmp_path / "conf").mkdir()
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(site)) == 2


def test_the_bundled_corpus_is_what_it_is_said_to_be():
    corpus = Corpus.open(bundled_corpus())
    config = compose("train").data
    split = split_corpus(corpus, config.heldout_tasks, config.heldout_per_quality, config.validation_per_quality)
    size = sum(path.stat().st_size for path in bundled_corpus().rglob("*") if path.is_file())
    assert size <= 16e6
    task, quality = corpus.columns.task, corpus.columns.quality
    assert len(set(task[split.train])) == 10
    assert len(set(task[split.newtask])) == 4
    for rows in (split.heldout, split.newtask):
        for number in set(task[rows]):
            mine = rows[task[rows] == number]
            assert len(mine) >= 12
            assert set(quality[mine]) == {0, 1, 2}, corpus.tasks[number].text
    scenes = [corpus.tasks[number].scene for number in set(task[split.train])]
    assert sum(scenes.count(scene) == 2 for scene in set(scenes)) >= 3
    assert corpus.columns.done_known[quality == Quality.SUCCESSFUL.rank].all()
    assert corpus.columns.dense.all()


def test_length_does_not_tell_the_outcome():
    corpus = Corpus.open(bundled_corpus())
    length = [trajectory.frame_index[-1] for trajectory in corpus]
    areas = []
    for number in range(len(corpus.tasks)):
        rows = corpus.select(task=corpus.tasks[number].text)
        won = [length[row] for row in rows if corpus.columns.quality[row] == 0]
        lost = [length[row] for row in rows if corpus.columns.quality[row] != 0]
        if len(won) >= 12:  # fewer say nothing about a task
            area = sum((a > b) + 0.5 * (a == b) for a in won for b in lost) / (len(won) * len(lost))
            areas.append(max(area, 1 - area))
    assert len(areas) == 10
    assert max(areas) <= 0.60, areas


def test_the_shipped_weights_are_small_and_say_where_they_come_from():
    facts = describe(nano_weights())["facts"]
    assert facts["snapshot"]
    assert len(facts["tasks"]) > 10
    assert sum(path.stat().st_size for path in nano_weights().iterdir()) < 10e6
    assert (nano_weights() / "README.md").exists()


def test_the_demo_runs_from_an_empty_directory(tmp_path):
    command = [Path(sys.executable).with_name("rbm"), "demo", "trainer.max_steps=4", "model.backbone.width=8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    names = ("preference_accuracy", "success_auc", "kendall_tau", "gap", "suboptimal_over_failure", "wrong_instruction",
             "wrong_instruction_same_scene", "voc", "voc_failure", "voc_reversed", "ece")  # fmt: skip
    for group in ("heldout", "newtask", "clock"):
        assert {f"{group}.{name}" for name in names} <= metrics.keys()
    assert metrics["clock.voc"] == 1.0
    assert metrics["clock.preference_accuracy"] == 0.5
    assert (tmp_path / "report" / "index.html").stat().st_size > 100_000
    assert (tmp_path / "report" / "attempt-scored.mp4").exists()
    assert "report/index.html" in done.stdout
