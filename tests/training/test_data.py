"""The loader: the same batches with any number of workers and from any step, and what it does about damage."""

from __future__ import annotations

import csv
import itertools
import logging
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path

import lightning as L
import moving_dot
import numpy as np
import pytest
import torch

from rbm.config import compose
from rbm.corpus import Corpus, CorpusWriter, CorruptPayload
from rbm.corpus.selection import Selection
from rbm.errors import UserError
from rbm.model import RewardModel
from rbm.model.backbones import NanoBackbone
from rbm.sampling import Pair
from rbm.training.callbacks import ReplacedPairs
from rbm.training.data import ATTEMPTS, Loaded, Onward, PairDataModule, Refused, Share
from rbm.training.fit_success import fit_success
from rbm.training.module import RewardModule
from rbm.training.run import train
from rbm.trajectory import Quality


def model() -> RewardModel:
    return RewardModel(NanoBackbone(image_size=32, width=8, hidden=32, layers=1, heads=2), context_frames=8)


def data_module(corpus: Corpus, **options) -> PairDataModule:
    options = {"heldout_per_quality": 1, "validation_per_quality": 1, "workers": 0, "pairs_per_step": 6} | options
    return PairDataModule(model(), str(corpus.location), **options)


def batches(module: PairDataModule, workers: int, start: int = 0, steps: int = 4, **share: int) -> list[Loaded]:
    """Micro-batches of some steps, through the real loader."""
    part = Share(module.pairs_per_step, module.micro_batches, **share)
    orders = Onward(module.sampler.planner, part, start, start + steps)
    return list(module.loader(module.dataset(module.sampler, part), orders, workers))


def damaged(corpus: Corpus, folder: Path, rows: Iterable[int], begin: float = 0.0) -> Corpus:
    """A copy in which a byte in fifty of these trajectories' payloads is another, from a part `begin` of them on."""
    copy = shutil.copytree(corpus.location.local, folder / "damaged")
    for row in rows:
        payload = corpus.payload(row).data.tobytes()
        for path in copy.glob("chunks/*"):
            content = bytearray(path.read_bytes())
            place = content.find(payload)
            if place >= 0:
                for at in range(place + int(begin * len(payload)), place + len(payload), 50):
                    content[at] ^= 0xFF
                path.write_bytes(content)
    return Corpus.open(copy)


def same(a: Loaded, b: Loaded) -> bool:
    left, right = pickle.dumps(plain(a)), pickle.dumps(plain(b))
    return left == right


def plain(loaded: Loaded) -> list:
    batch = loaded.batch
    tensors = [*batch.clips.frames, batch.clips.frame_ids, batch.clips.lengths, *vars(batch.targets).values()]
    return [
        *(tensor.numpy().tobytes() for tensor in tensors if tensor is not None),
        batch.clips.tasks,
        batch.strategies,
        vars(batch.counts),
        loaded.read,
        [tuple(item) for item in loaded.replaced],
    ]


@pytest.fixture(scope="module")
def broken(dot_corpus, tmp_path_factory) -> Corpus:
    """The dot corpus with damage in two trajectories that are trained on: one's header, the other's later frames."""
    one, other = data_module(dot_corpus).split.train[[3, 11]]
    half = damaged(dot_corpus, tmp_path_factory.mktemp("half"), [other], begin=0.5)
    return damaged(half, tmp_path_factory.mktemp("broken"), [one])


def readable(corpus: Corpus, pair: Pair) -> bool:
    try:
        for clip in (pair.first, pair.second):
            corpus.frames(clip.row, np.unique(clip.frames))
    except CorruptPayload:
        return False
    return True


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_batches_are_the_same_with_any_number_of_workers_and_from_any_step(broken, method):
    """Replaced pairs included."""
    unbroken = batches(data_module(broken, micro_batches=2), workers=0, steps=6)
    assert any(loaded.replaced for loaded in unbroken)
    module = data_module(broken, micro_batches=2, start_method=method)
    for workers in (1, 2):
        loaded = batches(module, workers, steps=6)
        assert len(loaded) == 12
        assert all(map(same, loaded, unbroken))
    resumed = batches(module, workers=1, start=2, steps=4)
    assert all(map(same, resumed, unbroken[4:]))


def test_the_loader_of_a_run_starts_at_its_step(dot_corpus):
    module = data_module(dot_corpus)
    first = next(iter(module.train_dataloader()))
    assert same(first, batches(module, 0, steps=1)[0])


def test_a_pair_that_can_not_be_read_becomes_its_next_substitute(broken):
    module = data_module(broken)
    replaced = set()
    for step, loaded in enumerate(batches(module, 0, steps=12)):
        expected, failed = [], 0
        for index in range(step * 6, step * 6 + 6):
            attempt = 0
            while not readable(broken, module.sampler.pair(index, attempt)):
                attempt, failed = attempt + 1, failed + 1
            expected.append(module.sampler.pair(index, attempt))
        assert loaded.batch.strategies == tuple(pair.strategy for pair in expected)
        assert loaded.batch.clips.tasks == tuple(pair.task for pair in expected for _ in range(2))
        assert loaded.batch.clips.lengths.tolist() == [len(clip.frames) for pair in expected for clip in both(pair)]
        assert len(loaded.replaced) == failed
        assert loaded.read == len({clip.row for pair in expected for clip in both(pair)}) + failed
        replaced |= {name for name, _ in loaded.replaced}
    assert replaced == {broken.ids[row] for row in module.split.train[[3, 11]]}


def both(pair):
    return pair.first, pair.second


def test_what_is_replaced_does_not_depend_on_how_a_step_is_cut(broken):
    whole = batches(data_module(broken), 0, steps=8)
    parts = batches(data_module(broken, micro_batches=3), 0, steps=8)
    for step, loaded in enumerate(whole):
        cut = parts[step * 3 : step * 3 + 3]
        assert loaded.batch.strategies == tuple(itertools.chain(*(part.batch.strategies for part in cut)))
        assert sorted(loaded.replaced) == sorted(itertools.chain(*(part.replaced for part in cut)))
        progress = torch.cat([part.batch.targets.progress for part in cut])
        assert torch.equal(loaded.batch.targets.progress, progress)


def test_ranks_and_parts_count_alike_also_where_labels_decide(tmp_path):
    """Dense labels and unknown completions: what is supervised in other shares depends on labels."""
    with CorpusWriter(tmp_path / "corpus") as writer:
        writer.add_source("dot", completion=0.7)
        for task, quality, number in itertools.product(moving_dot.TASKS, Quality, range(3)):
            record, frames = moving_dot.attempt(task.text, quality, number)
            writer.add(type(record)(**(vars(record) | {"done_index": None})), {"main": frames})
    corpus = Corpus.open(tmp_path / "corpus")
    options = {"heldout_per_quality": 0, "validation_per_quality": 0, "pairs_per_step": 8}
    whole = batches(data_module(corpus, **options), 0)
    for rank in (0, 1):
        parts = batches(data_module(corpus, micro_batches=2, **options), 0, rank=rank, world=2)
        assert [part.batch.counts for part in parts[::2]] == [loaded.batch.counts for loaded in whole]
        assert [part.batch.counts for part in parts[1::2]] == [loaded.batch.counts for loaded in whole]


def trainer(module: PairDataModule, steps: int) -> L.Trainer:
    return L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[ReplacedPairs(module)],
    )  # fmt: skip


def test_what_was_replaced_is_named_once_counted_and_counted_on_after_a_resume(broken, tmp_path, caplog):
    options = {"max_bad_share": 1.0, "pairs_per_step": 6, "workers": 2, "start_method": "fork"}
    unbroken = data_module(broken, **options)
    with caplog.at_level(logging.WARNING, logger="rbm.training.data"):
        trainer(unbroken, 8).fit(RewardModule(model()), datamodule=unbroken)
    expected = batches(unbroken, 0, steps=8)
    assert unbroken.replaced == sum(len(loaded.replaced) for loaded in expected) > 2
    assert unbroken.read == sum(loaded.read for loaded in expected)
    said = [record.message for record in caplog.records if "can not be decoded" in record.message]
    names = {name for loaded in expected for name, _ in loaded.replaced}
    assert len(said) == len(names) > 0
    assert all(any(repr(name) in line for line in said) for name in names)

    first = data_module(broken, **options)
    run = trainer(first, 3)
    run.fit(RewardModule(model()), datamodule=first)
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert 0 < first.read < unbroken.read
    second = data_module(broken, **options)
    run = trainer(second, 8)
    run.fit(RewardModule(model()), datamodule=second, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert (second.read, second.replaced) == (unbroken.read, unbroken.replaced)
    assert run.callback_metrics["data/replaced"] == second.replaced


SMALL = ["model.backbone.image_size=32", "model.backbone.width=8", "model.backbone.hidden=32", "model.backbone.heads=2",
         "model.backbone.layers=1", "model.context_frames=8", "data.validation_pairs=16", "data.heldout_tasks=[]",
         "data.heldout_per_quality=1", "data.validation_per_quality=1", "trainer.log_every_n_steps=1",
         "trainer.accelerator=cpu", "threads=1"]  # fmt: skip


def run(folder: Path, corpus: Corpus, *more: str) -> Path:
    return train(compose("train", [*SMALL, f"run_dir='{folder}'", f"data.corpus='{corpus.location}'", *more]))


def test_a_run_over_few_damaged_trajectories_ends_and_says_how_many(broken, tmp_path):
    options = ["trainer.max_steps=6", "trainer.checkpoint_every=6", "data.max_bad_share=0.5", "data.workers=0"]
    run(tmp_path / "run", broken, *options)
    (log,) = tmp_path.glob("run/logs/version_*/metrics.csv")
    logged = [float(row["data/replaced"]) for row in csv.DictReader(log.open()) if row.get("data/replaced")]
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["PairDataModule"]
    assert logged[-1] == state["replaced"] > 0
    assert sorted(logged) == logged


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_trajectories_stop_a_run(broken, tmp_path, workers):
    with pytest.raises(
        UserError, match=r"could not be decoded, more than data.max_bad_share=0.01 .*dot/move"
    ) as caught:
        run(tmp_path / "run", broken, "trainer.max_steps=40", f"data.workers={workers}")
    assert "\n" not in str(caught.value)


def test_a_few_unlucky_ones_at_the_start_stop_nothing(broken, tmp_path):
    assert run(tmp_path / "run", broken, "trainer.max_steps=4", "data.workers=0", "data.max_bad_share=0.001").exists()


def test_a_corpus_that_is_damaged_throughout_is_told_at_once(dot_corpus, tmp_path):
    corpus = damaged(dot_corpus, tmp_path, range(len(dot_corpus)))
    (loaded,) = batches(data_module(corpus), 0, steps=1)
    assert isinstance(loaded, Refused)
    assert f"{ATTEMPTS} pairs in a row could not be read: trajectory 'dot/" in loaded.message
    assert "`rbm corpus check" in loaded.message


def test_calibration_leaves_out_what_is_damaged(dot_corpus, tmp_path, caplog):
    row = int(data_module(dot_corpus).split.validation[2])
    corpus = damaged(dot_corpus, tmp_path, [row])
    fitted = model().eval()
    fit_success(fitted, data_module(corpus))
    assert f"left out of the calibration of success: trajectory {corpus.ids[row]!r}" in caplog.text


def test_a_worker_gets_no_table(dot_corpus):
    module = data_module(dot_corpus)
    dataset = module.dataset(module.sampler, Share(6))
    module.sampler.planner.plan(0, 6)
    copied = pickle.loads(pickle.dumps(dataset))
    assert not hasattr(copied.sampler.planner, "_table")
    assert copied.corpus.columns.task.base is not None  # mapped
    assert len(pickle.dumps(dataset)) < 5000


def test_frames_decode_smaller_where_that_is_asked_for(dot_corpus):
    full = batches(data_module(dot_corpus), 0, steps=1)[0].batch
    small = batches(data_module(dot_corpus, decode_short_side=16), 0, steps=1)[0].batch
    assert full.clips.frames[0].shape == small.clips.frames[0].shape
    difference = (full.clips.frames[0].float() - small.clips.frames[0].float()).abs()
    assert 0 < difference.mean() < 8
    assert torch.equal(full.clips.frame_ids, small.clips.frame_ids)


def test_weights_of_sources_and_tasks_reach_the_draws(dot_corpus):
    task = moving_dot.TASKS[0].text
    module = data_module(dot_corpus, task_weights={task: 100}, weights={"reverse": 1})
    plan = module.sampler.planner.plan(0, 1000)
    share = (dot_corpus.columns.task[plan.chosen] == dot_corpus.task_number(task)).mean()
    assert share == pytest.approx(100 / 103, abs=0.02)
    with pytest.raises(UserError, match="no source 'dots'; there are 'dot'"):
        data_module(dot_corpus, source_weights={"dots": 2})


@pytest.fixture
def selection(dot_corpus, tmp_path) -> Path:
    """The attempts at two of the four tasks."""
    rows = dot_corpus.select(task=[task.text for task in moving_dot.TASKS[:2]])
    Selection.of(dot_corpus, rows, {}).save(tmp_path / "some.json")
    return tmp_path / "some.json"


def test_a_selection_is_all_that_is_used(dot_corpus, selection):
    module = PairDataModule(model(), selection=str(selection), heldout_per_quality=1, validation_per_quality=1)
    assert str(module.corpus.location) == str(dot_corpus.location)
    sides = [module.split.train, module.split.validation, module.split.heldout]
    assert set(dot_corpus.columns.task[np.concatenate(sides)]) == {0, 1}
    assert sum(map(len, sides)) == 24
    plan = module.sampler.planner.plan(0, 500)
    assert set(plan.chosen) | set(plan.rejected) <= set(module.split.train)


def test_a_selection_of_another_corpus_or_snapshot_is_refused(dot_corpus, selection, tmp_path):
    with pytest.raises(UserError, match=f"is of the corpus {dot_corpus.location}, not of {tmp_path}"):
        PairDataModule(model(), str(tmp_path), selection=str(selection))
    copy = shutil.copytree(dot_corpus.location.local, tmp_path / "copy")
    with CorpusWriter(copy) as writer:
        record, frames = moving_dot.attempt(moving_dot.TASKS[0].text, Quality.FAILURE, 9)
        writer.add(record, {"main": frames})
    Selection(str(copy), dot_corpus.snapshot, tuple(dot_corpus.ids)).save(tmp_path / "old.json")
    options = {"selection": str(tmp_path / "old.json")}
    assert PairDataModule(model(), snapshot=dot_corpus.snapshot, **options).corpus.snapshot == dot_corpus.snapshot
    with pytest.raises(UserError, match=f"is of snapshot {dot_corpus.snapshot}, not of "):
        PairDataModule(model(), snapshot=Corpus.open(copy).snapshot, **options)


def test_a_run_needs_no_corpus_beside_its_selection_and_notices_another(dot_corpus, selection, tmp_path):
    options = [*SMALL, f"run_dir='{tmp_path / 'run'}'", "data=corpus", f"data.selection='{selection}'",
               "trainer.max_steps=2", "trainer.checkpoint_every=2", "data.workers=0"]  # fmt: skip
    made = train(compose("train", options))
    assert made.exists()
    shutil.rmtree(made)
    Selection.of(dot_corpus, range(len(dot_corpus)), {}).save(selection)
    with pytest.raises(UserError, match="other trajectories of this corpus than are selected now"):
        train(compose("train", options))


@pytest.mark.parametrize("options", [{"start_method": "thread"}, {"max_bad_share": 2}, {"decode_short_side": 0}])
def test_impossible_options_are_refused(dot_corpus, options):
    with pytest.raises(UserError, match=f"data.{next(iter(options))}="):
        data_module(dot_corpus, **options)


def test_scenes_that_are_held_out_are_not_trained_on(dot_corpus):
    module = data_module(dot_corpus, heldout_scenes=["vertical"])
    assert module.tasks == [task.text for task in moving_dot.TASKS if task.scene == "horizontal"]
    assert set(dot_corpus.columns.task[module.split.newtask]) == {2, 3}
    rows = np.concatenate([module.sampler.planner.plan(0, 500).chosen, module.sampler.planner.plan(0, 500).rejected])
    assert set(dot_corpus.columns.task[rows]) == {0, 1}
