"""Batches of several views and with the time that remains, from a corpus on disk to a trained model."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import moving_dot
import numpy as np
import pytest
import torch

from rbm.config import compose
from rbm.corpus import Corpus, CorpusWriter
from rbm.errors import UserError
from rbm.model import Counts, RewardModel
from rbm.model.backbones import NanoBackbone
from rbm.scoring import Scorer
from rbm.training.data import Loaded, Onward, PairDataModule, Share
from rbm.training.fit_success import fit_success
from rbm.training.run import train
from rbm.trajectory import Quality, Trajectory

VIEWS = ("near", "wrist")
WRIST = (24, 40)
"""Pixels of the second view: another size than the first's."""


def wrist(frames: np.ndarray) -> np.ndarray:
    """What the other camera sees: the picture's middle in other colours, and smaller or larger."""
    return np.ascontiguousarray(np.pad(255 - frames[:, 4:28], ((0, 0), (0, 0), (4, 4), (0, 0))))


def shown(record: Trajectory, frames: np.ndarray, views: tuple[str, ...]) -> tuple[Trajectory, dict[str, np.ndarray]]:
    clips = {name: wrist(frames) if name == "wrist" else frames for name in views}
    height, width = clips[views[0]].shape[1:3]
    return replace(record, views=views, height=height, width=width), clips


def write(path: Path, views_of, per_quality: int = 4) -> Corpus:
    """The moving dot, filmed in `views_of(number, source)` views; half of it comes from a second source."""
    with CorpusWriter(path) as writer:
        for source in ("dot", "lab"):
            writer.add_source(source)
        for task, quality, number in itertools.product(moving_dot.TASKS, Quality, range(per_quality)):
            record, frames = moving_dot.attempt(task.text, quality, number)
            record = replace(record, source=("dot", "lab")[number % 2])
            writer.add(*shown(record, frames, views_of(number, record.source)))
    return Corpus.open(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """One in four attempts lacks the wrist's view, one in four has it only; they also have one that nobody reads."""
    views = {0: ("near", "wrist"), 1: ("top", "wrist", "near"), 2: ("near",), 3: ("wrist", "top")}
    return write(tmp_path_factory.mktemp("views") / "corpus", lambda number, _: views[number])


def model(views: tuple[str, ...] = VIEWS, **options) -> RewardModel:
    backbone = NanoBackbone(image_size=32, width=8, hidden=32, layers=1, heads=2, views=views)
    return RewardModel(backbone, context_frames=8, **options)


def data_module(corpus: Corpus, made: RewardModel | None = None, **options) -> PairDataModule:
    usual = {"heldout_per_quality": 0, "validation_per_quality": 0, "workers": 0, "pairs_per_step": 8}
    return PairDataModule(made or model(), str(corpus.location), **(usual | options))


def batches(module: PairDataModule, steps: int = 3, workers: int = 0, **share: int) -> list[Loaded]:
    part = Share(module.pairs_per_step, module.micro_batches, **share)
    orders = Onward(module.sampler.planner, part, 0, steps)
    return list(module.loader(module.dataset(module.sampler, part), orders, workers))


def both(pair):
    return pair.first, pair.second


def test_every_step_shows_the_views_that_its_trajectory_has(corpus):
    module = data_module(corpus)
    made, patterns = model(), set()
    for step, loaded in enumerate(batches(module)):
        batch = loaded.batch.clips
        pairs = module.sampler.maker.pairs(module.sampler.planner.plan(step * 8, 8))
        clips = [clip for pair in pairs for clip in both(pair)]
        assert batch.frame_ids.shape == (batch.lengths.sum(), 2)
        pool = torch.cat(list(batch.frames))
        for clip, ids in zip(clips, batch.frame_ids.split(batch.lengths.tolist()), strict=True):
            there = corpus[clip.row].views
            patterns.add(tuple(view in there for view in VIEWS))
            for view, column in zip(VIEWS, ids.T, strict=True):
                if view not in there:
                    assert (column == -1).all()
                    continue
                expected = made.preprocess(corpus.frames(clip.row, clip.frames, view=view))
                assert torch.equal(pool[column], expected)
        # a frame of a view is there once, however many clips show it
        wanted = {
            (clip.row, view, frame) for clip in clips for view in VIEWS if view in corpus[clip.row].views
            for frame in clip.frames.tolist()
        }  # fmt: skip
        assert len(pool) == len(wanted)
    assert patterns == {(True, True), (True, False), (False, True)}


def test_batches_are_the_same_in_loader_processes_and_with_augmentation(corpus):
    options = {"augment": {"shift": 0.1, "light": 0.2}, "start_method": "fork"}
    module = data_module(corpus, model(remaining=True), completion={"lab": 0.5}, **options)
    for here, there in zip(batches(module), batches(module, workers=2), strict=True):
        assert torch.equal(here.batch.clips.frame_ids, there.batch.clips.frame_ids)
        assert all(torch.equal(a, b) for a, b in zip(here.batch.clips.frames, there.batch.clips.frames, strict=True))
        assert torch.equal(here.batch.targets.remaining, there.batch.targets.remaining)
        assert torch.equal(here.batch.targets.progress, there.batch.targets.progress)
        assert here.batch.counts == there.batch.counts


def test_models_without_names_see_the_first_view_and_batches_as_ever(corpus):
    loaded = batches(data_module(corpus, model(views=())), 1)[0].batch
    assert loaded.clips.frame_ids.shape[1] == 1
    assert (loaded.clips.frame_ids >= 0).all()
    assert loaded.targets.remaining is None
    assert loaded.targets.remaining_mask is None
    assert loaded.counts.remaining == 0


def test_a_trajectory_without_any_of_the_views_is_replaced_and_counted(tmp_path, caplog):
    lone = "dot/move the dot up/failure/2"
    with CorpusWriter(tmp_path / "corpus") as writer:
        writer.add_source("dot")
        for task, quality, number in itertools.product(moving_dot.TASKS, Quality, range(4)):
            record, frames = moving_dot.attempt(task.text, quality, number)
            writer.add(*shown(record, frames, ("top",) if record.id == lone else VIEWS))
    corpus = Corpus.open(tmp_path / "corpus")
    module = data_module(corpus)
    loaded = batches(module, 12)
    names = {name for batch in loaded for name, _ in batch.replaced}
    assert names == {lone}
    whats = {what for batch in loaded for _, what in batch.replaced}
    assert whats == {"it has none of the views near, wrist, only top"}
    for batch in loaded:
        assert (batch.batch.clips.frame_ids >= 0).all()
    with caplog.at_level(logging.WARNING):
        module.split = replace(module.split, validation=np.arange(len(corpus)))
        fit_success(model().eval(), module)
    assert f"trajectory {lone!r}: it has none of the views near, wrist, only top" in caplog.text


def test_names_that_the_corpus_does_not_have_are_refused_before_training(corpus, tmp_path):
    with pytest.raises(UserError, match=r"no trajectory looked at has the view 'wirst' .* there are: near, top, wrist"):
        data_module(corpus, model(("near", "wirst")))
    with pytest.raises(UserError, match="source 'dot' has the views near, wrist, the model reads far: name its views"):
        data_module(corpus, model(("far",)))
    apart = write(tmp_path / "apart", lambda _, source: ("near", "wrist") if source == "dot" else ("top",), 2)
    with pytest.raises(UserError, match="source 'lab' has the views top, the model reads near, wrist") as caught:
        data_module(apart)
    assert "data.selection" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_seconds_that_remain_are_those_of_the_stored_frames(corpus):
    module = data_module(corpus, model(remaining=True))
    supervised = 0
    for step, loaded in enumerate(batches(module, 6)):
        pairs = module.sampler.maker.pairs(module.sampler.planner.plan(step * 8, 8))
        targets, at = loaded.batch.targets, 0
        assert loaded.batch.counts == Counts.of(targets)
        for clip in (clip for pair in pairs for clip in both(pair)):
            mine = slice(at, at + len(clip.frames))
            at += len(clip.frames)
            record = corpus[clip.row]
            timed = record.quality is Quality.SUCCESSFUL and not clip.wrong_instruction
            assert targets.remaining_mask[mine].tolist() == [timed] * len(clip.frames)
            if timed:  # a frame each 0.1 s, done at frame 16 (fifteen and a fifth frames are four fifths of nineteen)
                expected = np.maximum(0, 16 - clip.frames) * 0.1
                np.testing.assert_allclose(targets.remaining[mine], expected, atol=1e-5)
                supervised += len(clip.frames)
    assert supervised > 50


def test_ranks_and_parts_count_seconds_alike(corpus):
    made = model(remaining=True)
    whole = batches(data_module(corpus, made))
    assert all(loaded.batch.counts.remaining for loaded in whole)
    for rank in (0, 1):
        parts = batches(data_module(corpus, made, micro_batches=2), rank=rank, world=2)
        assert [part.batch.counts for part in parts[::2]] == [loaded.batch.counts for loaded in whole]


def test_which_clips_of_a_pair_are_supervised(corpus):
    def masks(made: RewardModel, **options) -> torch.Tensor:
        batch = batches(data_module(corpus, made, **options), 1)[0].batch
        targets = batch.targets
        every = targets.progress_mask | targets.success_mask | targets.remaining_mask
        clips = torch.stack([part.any() for part in every.split(batch.clips.lengths.tolist())]).reshape(-1, 2)
        return clips.any(0)

    isolated = model(remaining=True)
    causal = model(remaining=True, pair="causal", preference="joint")
    assert masks(isolated).tolist() == [True, True]
    assert masks(isolated, supervise_both=False).tolist() == [True, False]
    assert masks(causal).tolist() == [True, False]
    with pytest.raises(UserError, match=r"data\.supervise_both=true: .* set model\.pair=isolated"):
        data_module(corpus, causal, supervise_both=True)


def test_gaps_and_order_are_settings(corpus):
    def clips(**options: float):
        module = data_module(corpus, clips=options)
        return [module.sampler.pair(index) for index in range(40)]

    even = {"irregular": 0.0, "session": 0.0, "shorter": 0.0, "shuffle": 0.0}
    plain = clips(**even)
    for pair in plain:
        for clip in both(pair):
            gaps = np.abs(np.diff(clip.frames))
            assert gaps.max() - gaps.min() <= 1 or pair.strategy == "rewind"
        assert pair.preference is not None
    uneven = [np.abs(np.diff(clip.frames)) for pair in clips(**even | {"irregular": 1.0}) for clip in both(pair)]
    assert sum(gaps.max() - gaps.min() > 1 for gaps in uneven) > 40
    shuffled = clips(**even | {"shuffle": 1.0})
    assert all(pair.preference is None for pair in shuffled)
    for before, after in zip(plain, shuffled, strict=True):
        assert sorted(before.first.frames) == sorted(after.first.frames)
    assert sum(bool((np.diff(pair.first.frames) < 0).any()) for pair in shuffled) > 35


def test_cut_offs_reach_targets_and_calibration(tmp_path):
    """Successes without a done frame: the corpus says the end, the run says four fifths."""
    with CorpusWriter(tmp_path / "corpus") as writer:
        writer.add_source("dot")
        for task, quality, number in itertools.product(moving_dot.TASKS, Quality, range(3)):
            record, frames = moving_dot.attempt(task.text, quality, number, dense=False)
            writer.add(replace(record, done_index=None), {"main": frames})
    corpus = Corpus.open(tmp_path / "corpus")
    for options, done in (({}, 19), ({"completion": {"dot": 0.8}}, 16)):  # ⌈.8 · 19 − 10⁻⁴⌉
        module = data_module(corpus, model(views=(), remaining=True), **options)
        seen = 0
        for index in range(40):
            pair = module.sampler.pair(index)
            for clip in both(pair):
                if corpus.columns.quality[clip.row] == 0 and not clip.wrong_instruction:
                    targets = module.sampler.targets(clip, corpus.progress)
                    np.testing.assert_allclose(targets.progress, np.minimum(1, clip.frames / done), atol=1e-6)
                    assert targets.success.tolist() == (clip.frames >= done).tolist()
                    seen += 1
        assert seen > 20
        assert set(module.trajectories.columns.done.tolist()) == {-1, done}
    with pytest.raises(UserError, match=r"names no source of the corpus: 'dott'; it has 'dot'"):
        data_module(corpus, model(views=()), completion={"dott": 0.9})


SMALL = ["model.backbone.image_size=32", "model.backbone.width=8", "model.backbone.hidden=32", "model.backbone.heads=2",
         "model.backbone.layers=1", "model.context_frames=8", "data.validation_pairs=16", "data.heldout_tasks=[]",
         "data.heldout_per_quality=1", "data.validation_per_quality=1", "data.workers=0",
         "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "threads=1"]  # fmt: skip


def test_a_run_with_views_and_seconds_from_the_command_line_to_scores(corpus, tmp_path):
    options = ["model.backbone.views=[near,wrist]", "model.remaining=true", "data.completion={lab: 0.9}",
               "data.source_weights={lab: 2}",
               "trainer.max_steps=4", "trainer.validate_every=2", f"data.corpus='{corpus.location}'",
               f"run_dir='{tmp_path / 'run'}'"]  # fmt: skip
    folder = train(compose("train", [*SMALL, *options]))
    stored = json.loads((folder / "config.json").read_text())["model"]
    assert stored["backbone"]["views"] == list(VIEWS)
    assert stored["remaining"] is True
    (log,) = tmp_path.glob("run/logs/version_*/metrics.csv")
    header = log.read_text().splitlines()[0].split(",")
    assert {"train/remaining", "val/remaining"} <= set(header)
    scorer = Scorer.from_pretrained(folder, device="cpu")
    row = next(row for row in range(len(corpus)) if set(VIEWS) <= set(corpus[row].views))
    video = {name: corpus.frames(row, view=name) for name in VIEWS}
    scores = scorer.score(video, corpus[row].task)
    assert scores.remaining.shape == scores.progress.shape == (8,)
    assert np.isfinite(scores.remaining).all()
    shutil.rmtree(tmp_path / "run")


def test_a_run_without_them_logs_no_seconds(corpus, tmp_path):
    options = ["trainer.max_steps=2", "trainer.validate_every=2", f"data.corpus='{corpus.location}'",
               f"run_dir='{tmp_path / 'run'}'"]  # fmt: skip
    train(compose("train", [*SMALL, *options]))
    (log,) = tmp_path.glob("run/logs/version_*/metrics.csv")
    assert "remaining" not in log.read_text()
