"""Cached features: what the command writes, what it survives, and that training from them is training on frames."""

import itertools
import json
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import click
import lightning as L
import moving_dot
import numpy as np
import pytest
import torch
from tiny_vlm import architecture, qwen3_model, rewind_model

from rbm.config import compose
from rbm.corpus import Corpus, CorpusWriter, CorruptPayload
from rbm.corpus.selection import Selection
from rbm.errors import UserError
from rbm.model import RewardModel
from rbm.model.backbones import NanoBackbone
from rbm.training import features
from rbm.training.data import Loaded, Onward, PairDataModule, Share
from rbm.training.features import FeatureCache, FeatureWriter, contents, keys_of, tower_facts
from rbm.training.features_cli import Size, cache_features
from rbm.training.fit_success import fit_success
from rbm.training.module import RewardModule
from rbm.training.run import train
from rbm.training.tuning import Tuning
from rbm.trajectory import Quality

FROZEN = Tuning(vision="none")


def nano(seed: int = 0, **options) -> RewardModel:
    torch.manual_seed(seed)
    backbone = NanoBackbone(**{"image_size": 32, "width": 8, "hidden": 32, "layers": 1, "heads": 2} | options)
    return RewardModel(backbone, context_frames=8, dropout=0.0).eval()


MODELS = {"nano": nano, "qwen3_vl": lambda: qwen3_model(dropout=0.0), "rewind": lambda: rewind_model(dropout=0.0)}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "rbm.cli", "cache-features", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=240)


def call(*arguments: object) -> None:
    """The command in this process: an error of the user's comes through."""
    cache_features.main([*map(str, arguments)], standalone_mode=False)


def saved(model: RewardModel, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    return folder


def data_module(model: RewardModel, corpus: Corpus, folder: Path | None = None, **options) -> PairDataModule:
    options = {"heldout_per_quality": 1, "validation_per_quality": 1, "workers": 0, "pairs_per_step": 6} | options
    return PairDataModule(model, str(corpus.location), features=None if folder is None else str(folder), **options)


def batches(module: PairDataModule, workers: int = 0, start: int = 0, steps: int = 3) -> list[Loaded]:
    share = Share(module.pairs_per_step)
    orders = Onward(module.sampler.planner, share, start, start + steps)
    return list(module.loader(module.dataset(module.sampler, share), orders, workers))


def damaged(corpus: Corpus, folder: Path, rows: Iterable[int], begin: float = 0.5) -> Corpus:
    """A copy in which the later part of these trajectories' payloads is destroyed, or all with `begin` 0."""
    copy = shutil.copytree(corpus.location.local, folder)
    for row in rows:
        payload = corpus.payload(row).data.tobytes()
        for path in copy.glob("chunks/*"):
            content = bytearray(path.read_bytes())
            place = content.find(payload)
            if place >= 0:
                for at in range(place + int(begin * len(payload)), place + len(payload), 20):
                    content[at] ^= 0xFF
                path.write_bytes(content)
    return Corpus.open(copy)


def distinct(corpus: Corpus) -> dict[int, int]:
    """Content hash -> a row with these frames."""
    return {int(content): row for row, content in reversed(list(enumerate(corpus.columns.content)))}


@pytest.fixture(scope="module", params=list(MODELS))
def cached(request, dot_corpus, tmp_path_factory) -> tuple[str, Path, Path]:
    """Name of a kind of model, its folder, and float32 features of the dot corpus that the real command made."""
    folder = tmp_path_factory.mktemp(request.param)
    model = saved(MODELS[request.param](), folder / "model")
    done = run(model, dot_corpus.location, "--dtype", "float32", "--out", folder / "features", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    rows = distinct(dot_corpus).values()
    frames = int(dot_corpus.columns.n_frames[list(rows)].sum())
    assert (facts["trajectories"], facts["new_clips"], facts["frames"]) == (len(dot_corpus), len(rows), frames)
    assert facts["bytes"] == (folder / "features/features-00000.bin").stat().st_size
    assert f"{len(dot_corpus)} trajectories, {frames} frames, " in done.stderr
    assert "free on the disk of" in done.stderr
    return request.param, model, folder / "features"


def test_the_command_stores_what_the_tower_makes(cached, dot_corpus):
    _, place, folder = cached
    model = RewardModel.from_pretrained(str(place))
    cache = FeatureCache.open(folder, model)
    for content, row in itertools.islice(distinct(dot_corpus).items(), 5):
        with torch.inference_mode():
            expected = model.backbone.encode(model.preprocess(dot_corpus.frames(row)))
        found = cache.get(content)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cache.get(content, [7, 2, 2]), expected[[7, 2, 2]], atol=1e-5, rtol=1e-5)
        assert torch.equal(cache.get(content, view="main"), found)
    assert not (folder / "writer.lock").exists()


def test_the_files_are_as_the_documentation_says(cached, dot_corpus):
    """Read with numpy alone."""
    _, _, folder = cached
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["format"], meta["version"], meta["dtype"]) == ("rbm-features", 1, "float32")
    index = np.load(folder / "index.npy", allow_pickle=False)
    assert (np.diff(index["key"].astype(object)) > 0).all()
    row = 9
    (place,) = np.flatnonzero(index["key"] == dot_corpus.columns.content[row])
    entry = index[place]
    shape = [int(entry[name]) for name in ("frames", "levels", "rows", "columns", "width")]
    stored = np.fromfile(folder / f"features-{entry['file']:05d}.bin", "<f4", np.prod(shape), offset=entry["offset"])
    expected = FeatureCache(folder).get(int(dot_corpus.columns.content[row])).numpy()
    assert np.array_equal(stored.reshape(shape), expected)


class Stopped(AssertionError):
    pass


def watch(model: RewardModel) -> None:
    """The tower may not run from here on."""

    def stop(*_: object) -> None:
        raise Stopped("the tower ran")

    for module in model.backbone.tower.modules():
        module.register_forward_pre_hook(stop)


class Losses(L.Callback):
    """The losses of every step."""

    def __init__(self) -> None:
        self.values: list[list[float]] = []

    def on_train_batch_end(self, trainer, *_) -> None:
        names = ("total", "progress", "success", "preference")
        self.values.append([float(trainer.callback_metrics[f"train/{name}"]) for name in names])


def fitted(
    model: RewardModel, data: PairDataModule, steps: int = 4, resume: Path | None = None, keep: Path | None = None
):
    """Losses of real training steps with the tower frozen."""
    losses = Losses()
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=1, val_check_interval=2,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, callbacks=[losses],
    )  # fmt: skip
    module = RewardModule(model.train(), tuning=FROZEN)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    if keep is not None:
        trainer.save_checkpoint(keep)
    return np.array(losses.values)


def test_training_from_features_is_training_on_frames_without_the_tower(cached, dot_corpus):
    kind, place, folder = cached
    plain, lean = (RewardModel.from_pretrained(str(place)) for _ in range(2))
    on_frames = data_module(plain, dot_corpus)
    expected = fitted(plain, on_frames)
    watch(lean)
    with pytest.raises(Stopped):
        fit_success(lean, on_frames)
    from_features = data_module(lean, dot_corpus, folder)
    found = fitted(lean, from_features)
    assert expected.shape == (4, 4)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for (name, a), b in zip(plain.state_dict().items(), lean.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-3, msg=f"{kind} {name}")
    fit_success(plain.eval(), on_frames)
    fit_success(lean.eval(), from_features)
    assert float(lean.success_bias) == pytest.approx(float(plain.success_bias), abs=1e-2)
    clips = batches(from_features, steps=1)[0].batch.clips
    blind = replace(clips, frames=tuple(group * 0 for group in clips.frames))
    with torch.inference_mode():  # and what is read matters
        assert (lean(clips).progress_logits - lean(blind).progress_logits).abs().max() > 1e-2


def test_half_precision_changes_the_losses_little(cached, dot_corpus, tmp_path):
    kind, place, _ = cached
    expected = None
    for dtype, bound in (("float32", 0), ("bfloat16", 2e-3), ("float16", 5e-4)):
        call(place, dot_corpus.location, "--dtype", dtype, "--out", tmp_path / dtype)
        model = RewardModel.from_pretrained(str(place))
        module = data_module(model, dot_corpus, tmp_path / dtype)
        assert {group.dtype for group in batches(module, steps=1)[0].batch.clips.frames} == {getattr(torch, dtype)}
        found = fitted(model, module, steps=2)
        expected = found if expected is None else expected
        difference = np.abs(found[0] - expected[0]).max()
        assert difference <= bound, f"{kind} {dtype}"
    size = (tmp_path / "float32/features-00000.bin").stat().st_size
    assert (tmp_path / "bfloat16/features-00000.bin").stat().st_size * 2 == size


def same(a: Loaded, b: Loaded) -> bool:
    def plain(loaded: Loaded) -> list[object]:
        clips, targets = loaded.batch.clips, loaded.batch.targets
        tensors = [*clips.frames, clips.frame_ids, clips.lengths, targets.progress, targets.success_mask]
        return [[tensor.tolist() for tensor in tensors], clips.tasks, loaded.read, loaded.replaced]

    return plain(a) == plain(b)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_batches_are_the_same_with_any_number_of_workers_and_from_any_step(dot_corpus, tmp_path, method):
    model = nano()
    call(saved(model, tmp_path / "model"), dot_corpus.location, "--out", tmp_path / "features")
    module = data_module(model, dot_corpus, tmp_path / "features", start_method=method)
    unbroken = batches(module, steps=4)
    for workers in (1, 2):
        assert all(map(same, batches(module, workers, steps=4), unbroken))
    assert all(map(same, batches(module, 1, start=2, steps=2), unbroken[2:]))


def test_a_resumed_run_is_the_unbroken_one(dot_corpus, tmp_path):
    place = saved(nano(), tmp_path / "model")
    call(place, dot_corpus.location, "--out", tmp_path / "features")

    def start() -> tuple[RewardModel, PairDataModule]:
        model = RewardModel.from_pretrained(str(place))
        watch(model)
        return model, data_module(model, dot_corpus, tmp_path / "features", workers=1)

    unbroken, data = start()
    expected = fitted_to(unbroken, data, 5)
    broken, data = start()
    fitted_to(broken, data, 5, stop=2, keep=tmp_path / "last.ckpt")
    resumed, data = start()
    found = fitted_to(resumed, data, 5, resume=tmp_path / "last.ckpt")
    assert np.array_equal(found, expected[2:])
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))


def fitted_to(model, data, steps, stop=None, resume=None, keep=None):
    """Of a run of `steps` steps; one that is stopped has the same schedule."""
    losses, callbacks = Losses(), []

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            trainer.should_stop = trainer.should_stop or trainer.global_step == stop

    callbacks = [losses, Stop()]
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, min_epochs=0, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(RewardModule(model.train(), tuning=FROZEN), datamodule=data, ckpt_path=resume, weights_only=True)
    if keep is not None:
        assert trainer.global_step == stop
        trainer.save_checkpoint(keep)
    return np.array(losses.values)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Corpus:
    """Enough to be stopped in the middle of."""
    return moving_dot.write_corpus(tmp_path_factory.mktemp("many") / "corpus", per_quality=12)


def rows_of_index(folder: Path) -> int:
    try:
        return len(np.load(folder / "index.npy"))
    except (FileNotFoundError, ValueError):
        return 0


def test_it_goes_on_after_kill_and_ctrl_c_and_ends_the_same(many, tmp_path):
    """Real processes: one is SIGKILLed, the next gets Ctrl-C, the third ends."""
    model = saved(qwen3_model(), tmp_path / "model")
    call(model, many.location, "--out", tmp_path / "unbroken")
    folder = tmp_path / "broken"
    arguments = (model, many.location, "--out", folder, "--batch-frames", 1, "--json")
    names = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    wanted, reached, finished = len(np.load(tmp_path / "unbroken/index.npy")), 0, b""
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command(*arguments), **names)
        until = time.monotonic() + 120
        while rows_of_index(folder) <= reached and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        before, reached = reached, rows_of_index(folder)
        assert before < reached < wanted, said
        assert process.returncode == (-9 if number == signal.SIGKILL else 130), said
        if number == signal.SIGINT:
            assert "stopped; the same command goes on" in said
            assert "Traceback" not in said
        assert (folder / "features-00000.bin").read_bytes().startswith(finished)
        index = np.load(folder / "index.npy")
        shapes = [index[name].astype(np.int64) for name in ("frames", "levels", "rows", "columns", "width")]
        end = int((index["offset"] + 2 * np.prod(shapes, axis=0)).max())
        finished = (folder / "features-00000.bin").read_bytes()[:end]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kept_clips"] * 2 == reached
    assert (folder / "features-00000.bin").read_bytes().startswith(finished)
    a, b = FeatureCache(tmp_path / "unbroken"), FeatureCache(folder)
    assert a.entries().keys() == b.entries().keys()
    for content in distinct(many):
        torch.testing.assert_close(a.get(content), b.get(content), atol=2e-2, rtol=2e-2)  # other batches, rounded
    assert json.loads(run(*arguments).stdout)["new_clips"] == 0


def test_more_than_the_limit_is_refused_before_anything_is_written(dot_corpus, tmp_path):
    model = saved(qwen3_model(), tmp_path / "model")
    done = run(model, dot_corpus.location, "--out", tmp_path / "features", "--limit", "0.5MB")
    assert done.returncode == 2
    assert re.search(
        r"take about 983\.0 kB, more than --limit 500\.0 kB: choose fewer with --selection, or raise --limit",
        done.stderr,
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "features").exists()


def test_a_disk_without_room_is_refused(dot_corpus, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(UserError, match=r"features take 235.5 kB more, and the disk of .* has 10.0 kB free"):
        call("nano", dot_corpus.location, "--out", tmp_path / "features")
    assert not (tmp_path / "features").exists()


def test_a_disk_that_fills_up_is_one_line_and_what_is_finished_counts(dot_corpus, tmp_path):
    """A limit on the size of files stands in for the disk."""
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); "
        "from rbm.cli import main; sys.argv[0] = 'rbm'; main()"
    )
    arguments = ["cache-features", "nano", str(dot_corpus.location), "--out", str(tmp_path / "features")]
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "can not be written" in done.stderr
    finished = len(FeatureCache(tmp_path / "features"))
    assert 0 < finished < 2 * len(distinct(dot_corpus))
    call(*arguments[1:])
    assert len(FeatureCache(tmp_path / "features")) == 2 * len(distinct(dot_corpus))


def test_the_features_of_another_tower_are_refused(dot_corpus, tmp_path):
    place = saved(qwen3_model(), tmp_path / "model")
    call(place, dot_corpus.location, "--out", tmp_path / "features")
    deeper = architecture()
    deeper["vision_config"] = deeper["vision_config"] | {"deepstack_visual_indexes": [1]}
    for other, what in (
        (qwen3_model(seed=1), "weights"),
        (qwen3_model(backbone={"resize": "device"}), "preprocessor, resize"),
        (qwen3_model(sizes=deeper), "architecture"),
    ):
        with pytest.raises(
            UserError, match=rf"by another tower than this model's \(differs in: {what}\): run `rbm cach"
        ):
            data_module(other, dot_corpus, tmp_path / "features")
    with pytest.raises(UserError, match="made by another tower"):
        call(saved(qwen3_model(seed=1), tmp_path / "other"), dot_corpus.location, "--out", tmp_path / "features")


def test_the_same_tower_is_the_same_in_any_model(tmp_path):
    model = qwen3_model()
    first = tower_facts(model)["fingerprint"]
    assert tower_facts(RewardModel.from_pretrained(str(saved(model, tmp_path / "model"))))["fingerprint"] == first
    with torch.no_grad():
        model.backbone.markers.weight.add_(1)
    model.context_frames = 4
    assert tower_facts(model)["fingerprint"] == first
    rounded = tower_facts(model.to(torch.bfloat16))["fingerprint"]
    assert rounded != first
    assert tower_facts(model.float())["fingerprint"] == rounded  # the numbers are the same
    wide, narrow = (RewardModel(NanoBackbone(image_size=32, width=8, hidden=32, heads=heads)) for heads in (2, 4))
    narrow.backbone.tower.load_state_dict(wide.backbone.tower.state_dict())
    assert tower_facts(wide)["fingerprint"] == tower_facts(narrow)["fingerprint"]


def test_damaged_trajectories_are_named_counted_and_replaced_in_training(dot_corpus, tmp_path):
    model = nano()
    train_rows = data_module(model, dot_corpus).split.train
    content = dot_corpus.columns.content
    single = [row for row in train_rows.tolist() if (content == content[row]).sum() == 1]
    half = damaged(dot_corpus, tmp_path / "half", [single[11]])
    broken = damaged(half, tmp_path / "broken", [single[3]], begin=0.0)
    done = run(saved(model, tmp_path / "model"), broken.location, "--out", tmp_path / "features", "--json")
    assert done.returncode == 0, done.stderr
    names = {broken.ids[single[3]], broken.ids[single[11]]}
    assert set(json.loads(done.stdout)["damaged"]) == names
    assert all(f"left out: trajectory {name!r} can not be decoded" in done.stderr for name in names)
    assert "2 damaged, of 48" in done.stderr
    module = data_module(model, broken, tmp_path / "features")
    with pytest.raises(CorruptPayload, match="its frames could not be decoded when its features were cached"):
        module.pictures(single[11], np.array([0]))
    # one is damaged from its middle on, and a clip of its beginning could be decoded; of features none is there
    loaded = batches(module, steps=12)
    assert {name for item in loaded for name, _ in item.replaced} == names
    mended = run(tmp_path / "model", dot_corpus.location, "--out", tmp_path / "features", "--json")
    assert json.loads(mended.stdout)["new_clips"] == 2
    assert not any(item.replaced for item in batches(data_module(model, dot_corpus, tmp_path / "features"), steps=12))


def test_what_lacks_is_told_before_training_with_the_command_that_adds_it(dot_corpus, tmp_path):
    model = nano()
    place = saved(model, tmp_path / "my model")
    rows = dot_corpus.select(task=[task.text for task in moving_dot.TASKS[:3]])
    Selection.of(dot_corpus, rows, {}).save(tmp_path / "some.json")
    call(place, "--selection", tmp_path / "some.json", "--out", tmp_path / "features")
    some = data_module(model, dot_corpus, tmp_path / "features", selection=str(tmp_path / "some.json"))
    assert batches(some, steps=1)
    with pytest.raises(
        UserError, match=r"lack 8 of 34 trajectories of corpus .* \(the first: 'dot/move the dot"
    ) as told:
        data_module(model, dot_corpus, tmp_path / "features")
    (line,) = re.findall(r"`rbm (cache-features .*)` adds them", str(told.value))
    before = (tmp_path / "features/features-00000.bin").read_bytes()
    call(*shlex.split(line)[1:])
    assert (tmp_path / "features/features-00000.bin").read_bytes().startswith(before)
    assert batches(data_module(model, dot_corpus, tmp_path / "features"), steps=1)


def test_features_outlive_the_snapshot_and_the_copy(dot_corpus, tmp_path):
    place = saved(nano(), tmp_path / "model")
    call(place, dot_corpus.location, "--out", tmp_path / "features")
    copy = shutil.copytree(dot_corpus.location.local, tmp_path / "copy")
    with CorpusWriter(copy) as writer:
        record, frames = moving_dot.attempt(moving_dot.TASKS[0].text, Quality.FAILURE, 99)
        writer.add(record, {"main": frames})
    done = run(place, copy, "--out", tmp_path / "features", "--json")
    assert json.loads(done.stdout)["new_clips"] == 1
    assert batches(data_module(nano(), Corpus.open(copy), tmp_path / "features"), steps=1)


def test_by_default_they_lie_beside_the_corpus(dot_corpus, tmp_path):
    copy = shutil.copytree(dot_corpus.location.local, tmp_path / "copy")
    done = run("nano", copy)
    folder = Path(done.stdout.strip())
    assert folder.parent == tmp_path / "copy.features"
    assert FeatureCache(folder).meta["tower"]["fingerprint"] == folder.name
    with pytest.raises(UserError, match="say with --out=FOLDER where features go"):
        call("--train", "data=metaworld_mini")


SMALL = ["model.backbone.image_size=32", "model.backbone.width=8", "model.backbone.hidden=32", "model.backbone.heads=2",
         "model.backbone.layers=1", "model.context_frames=8", "data.validation_pairs=16", "data.heldout_tasks=[]",
         "data.heldout_per_quality=1", "data.validation_per_quality=1", "trainer.log_every_n_steps=1",
         "trainer.accelerator=cpu", "trainer.max_steps=3", "threads=1"]  # fmt: skip


def test_a_run_by_the_words_that_the_features_were_made_by(dot_corpus, tmp_path):
    words = [*SMALL, f"data.corpus='{dot_corpus.location}'"]
    call(*(word for text in words for word in ("--train", text)), "--out", tmp_path / "features")
    words += [f"run_dir='{tmp_path / 'run'}'", f"data.features='{tmp_path / 'features'}'"]
    with pytest.raises(
        UserError, match=r"this run trains it: set optimization.tuning.vision=none, or data.features=null"
    ):
        train(compose("train", words))
    assert not (tmp_path / "run").exists()
    words += ["optimization.tuning.vision=none"]
    for more in ("data.augment={shift: 0.05, light: 0.15}", "data.decode_short_side=16"):
        with pytest.raises(UserError, match=rf"{more.split('=')[0]} changes pixels, and data.features stands for them"):
            train(compose("train", [*words, more]))
    assert (train(compose("train", words)) / "config.json").exists()


def test_several_views_and_one_that_is_absent(tmp_path):
    with CorpusWriter(tmp_path / "corpus") as writer:
        writer.add_source("dot")
        for task, quality, number in itertools.product(moving_dot.TASKS, Quality, range(3)):
            record, frames = moving_dot.attempt(task.text, quality, number)
            views = {"near": frames, "wrist": frames[:, ::-1, :, :].copy(), "far": frames[:, ::2, ::2].copy()}
            kept = ("near", "wrist", "far") if number else ("wrist", "far")
            size = {"height": views[kept[0]].shape[1], "width": views[kept[0]].shape[2]}
            writer.add(replace(record, views=kept, **size), {name: views[name] for name in kept})
    corpus = Corpus.open(tmp_path / "corpus")
    model = nano(views=("near", "wrist"))
    call(saved(model, tmp_path / "model"), corpus.location, "--dtype", "float32", "--out", tmp_path / "features")
    assert {view for view in ("near", "wrist", "far") if keys_of(corpus.columns.content[-1:], view)[0].item()
            in FeatureCache(tmp_path / "features").entries()} == {"near", "wrist"}  # fmt: skip
    options = {"heldout_per_quality": 0, "validation_per_quality": 1}
    plain = batches(data_module(model, corpus, **options))
    watched = batches(data_module(model, corpus, tmp_path / "features", **options))
    assert any((item.batch.clips.frame_ids < 0).any() for item in plain)
    for a, b in zip(plain, watched, strict=True):
        assert torch.equal(a.batch.clips.frame_ids, b.batch.clips.frame_ids)
        with torch.inference_mode():
            expected, found = (model(item.batch.clips, item.batch.pairs).progress_logits for item in (a, b))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="lack 36 of 36 trajectories"):
        data_module(nano(views=("near", "far")), corpus, tmp_path / "features", **options)


def test_a_corpus_that_does_not_know_its_contents_is_asked_for_them(dot_corpus):
    corpus = Corpus.open(dot_corpus.location)
    corpus.columns = replace(corpus.columns, content=np.zeros(len(corpus), np.uint64))
    assert np.array_equal(contents(corpus, [3, 7]), dot_corpus.columns.content[[3, 7]])


def test_one_writer_at_a_time(dot_corpus, tmp_path):
    place = saved(nano(), tmp_path / "model")
    arguments = (place, dot_corpus.location, "--out", tmp_path / "features")
    tower = tower_facts(RewardModel.from_pretrained(str(place)))
    with FeatureWriter(tmp_path / "features", ["x"], tower, "bfloat16"):
        done = run(*arguments)
        assert done.returncode == 2
        assert re.search(r"error: features .*: another process \(pid \d+\) is writing to it: wait", done.stderr)
    assert run(*arguments).returncode == 0


def test_damage_to_the_files_is_told(dot_corpus, tmp_path):
    model = nano()
    call(saved(model, tmp_path / "model"), dot_corpus.location, "--out", tmp_path / "good")

    def bad(name: str) -> Path:
        return shutil.copytree(tmp_path / "good", tmp_path / name)

    numbers = bad("cut") / "features-00000.bin"
    numbers.write_bytes(numbers.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"features-00000.bin is cut short: delete the folder and run"):
        data_module(model, dot_corpus, tmp_path / "cut")
    (bad("gone") / "features-00000.bin").unlink()
    with pytest.raises(UserError, match=r"features-00000.bin is missing"):
        data_module(model, dot_corpus, tmp_path / "gone")
    (bad("index") / "index.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=r"index.npy can not be read"):
        data_module(model, dot_corpus, tmp_path / "index")
    (bad("new") / "meta.json").write_text(json.dumps({"format": "rbm-features", "version": 2}))
    with pytest.raises(UserError, match="have version 2, this rbm reads version 1"):
        data_module(model, dot_corpus, tmp_path / "new")
    with pytest.raises(UserError, match="holds no features: give a folder that `rbm cache-features` made"):
        data_module(model, dot_corpus, tmp_path / "model")
    with pytest.raises(UserError, match="holds no features"):
        call(tmp_path / "model", dot_corpus.location, "--out", tmp_path / "model")


def test_another_dtype_in_one_folder_and_numbers_too_large_are_refused(dot_corpus, tmp_path):
    model = nano()
    with torch.no_grad():
        model.backbone.tower.norm.weight.mul_(1e6)
    place = saved(model, tmp_path / "model")
    with pytest.raises(UserError, match=r"not finite in float16: give --dtype bfloat16"):
        call(place, dot_corpus.location, "--out", tmp_path / "half", "--dtype", "float16")
    call(place, dot_corpus.location, "--out", tmp_path / "features")
    with pytest.raises(
        UserError, match="are bfloat16, not float32: give --dtype bfloat16 to add to them, or another --o"
    ):
        call(place, dot_corpus.location, "--out", tmp_path / "features", "--dtype", "float32")


def test_files_stay_below_their_size(dot_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "FILE_BYTES", 60_000)
    place = saved(nano(), tmp_path / "model")
    call(place, dot_corpus.location, "--out", tmp_path / "features", "--dtype", "float32")
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("features/*.bin"))]
    assert len(sizes) > 1
    assert max(sizes) <= 60_000
    cache, model = FeatureCache(tmp_path / "features"), nano()
    for content, row in distinct(dot_corpus).items():
        with torch.inference_mode():
            expected = model.backbone.encode(model.preprocess(dot_corpus.frames(row)))
        torch.testing.assert_close(cache.get(content), expected, atol=1e-5, rtol=1e-5)


def test_a_worker_gets_a_path_and_reads_no_more_than_it_is_asked_for(dot_corpus, tmp_path):
    model = nano()
    call(saved(model, tmp_path / "model"), dot_corpus.location, "--out", tmp_path / "small")
    module = data_module(model, dot_corpus, tmp_path / "small")
    assert len(pickle.dumps(module.dataset(module.sampler, Share(6)))) < 5000
    clip = torch.zeros(64, 4, 8, 10, 64, dtype=torch.bfloat16)
    with FeatureWriter(tmp_path / "large", ["x"], tower_facts(model), "bfloat16") as writer:
        for content in range(1, 41):
            writer.add([content], clip + content)
    assert (tmp_path / "large/features-00000.bin").stat().st_size > 100e6
    code = f"""
import pathlib, pickle, numpy
from rbm.training.features import FeatureCache
def resident(): return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
cache = pickle.loads(pickle.dumps(FeatureCache(pathlib.Path({str(tmp_path / "large")!r}))))
cache.get(1, numpy.array([5, 60])).float().unique()
before = resident()
for content in range(1, 41):
    assert cache.get(content, numpy.array([5, 60])).float().unique().tolist() == [content]
print(resident() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 5e6  # of 105 MB


@pytest.mark.parametrize(
    ("text", "size"), [("50GB", 50e9), ("1.5 tb", 1.5e12), ("200m", 200e6), ("10kB", 10e3), ("17", 17), ("17b", 17)]
)
def test_sizes(text, size):
    assert Size().convert(text, None, None) == size


def test_words_that_make_no_sense_are_refused(dot_corpus, tmp_path):
    for arguments, what in (
        (("nano", dot_corpus.location, "--limit", "many"), "is no size: give a number with MB, GB or TB"),
        (("nano",), "give a CHECKPOINT and a CORPUS"),
        (("nano", dot_corpus.location, "--train", "init=nano"), "give no more than a CORPUS beside it"),
        (("nano", dot_corpus.location, "--device", "abacus"), "device 'abacus' cannot be used"),
        (("nano", tmp_path / "none"), "none"),
        (("--train", "data=corpus"), "which corpus"),
    ):
        with pytest.raises((UserError, click.ClickException)) as told:
            call(*arguments, "--out", tmp_path / "features")
        message = told.value.format_message() if isinstance(told.value, click.ClickException) else str(told.value)
        assert what in message
        assert "\n" not in message
    done = run("nano", tmp_path / "none")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
