"""Training on a tiny real corpus: accumulation, resumption, what a checkpoint holds, and that it learns."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import moving_dot
import pytest
import torch
from safetensors.torch import load_file

from rbm.config import compose
from rbm.errors import UserError
from rbm.model import Counts, LossWeights, PairBatch, RewardModel, reward_losses
from rbm.model.backbones import NanoBackbone
from rbm.training.data import Onward, PairDataModule, Share
from rbm.training.module import learning_rate_factor
from rbm.training.run import train

SMALL = ["model.backbone.image_size=32", "model.backbone.width=8", "model.backbone.hidden=32", "model.backbone.heads=2",
         "model.backbone.layers=1", "model.context_frames=8", "data.workers=0", "data.validation_pairs=16",
         "data.heldout_tasks=[]", "data.heldout_per_quality=1", "data.validation_per_quality=1",
         "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "threads=1"]  # fmt: skip


def small(path: Path, corpus: Path, *more: str):
    return compose("train", [*SMALL, f"run_dir='{path}'", f"data.corpus='{corpus}'", *more])


def data_module(corpus, pair="isolated", preference="utility", **options) -> PairDataModule:
    backbone = NanoBackbone(image_size=32, width=8, hidden=32, layers=1, heads=2)
    model = RewardModel(backbone, context_frames=8, pair=pair, preference=preference)
    return PairDataModule(
        model, str(corpus.location), heldout_per_quality=1, validation_per_quality=1, workers=0, **options
    )


def batches(module: PairDataModule, share: Share) -> list[PairBatch]:
    """The micro-batches of the first step."""
    dataset = module.dataset(module.sampler, share)
    return [dataset[order].batch for order in Onward(module.sampler.planner, share, 0, 1)]


def gradient(model: RewardModel, batches: list[PairBatch]) -> torch.Tensor:
    model.zero_grad()
    for batch in batches:
        reward_losses(model(batch.clips, batch.pairs), batch.targets, batch.counts, LossWeights()).total.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_four_times_eight_equals_thirty_two(dot_corpus, tmp_path):
    # without dense labels, so that supervision falls unevenly: none for failures, all for the rest
    module = data_module(dot_corpus, use_dense=False, pairs_per_step=32)
    torch.manual_seed(0)
    model = RewardModel(
        NanoBackbone(image_size=32, width=8, hidden=32, layers=1, heads=2), context_frames=8, dropout=0.0
    )
    whole = batches(module, Share(32))
    micro = batches(module, Share(32, micro=4))
    ranks = [batch for rank in range(2) for batch in batches(module, Share(32, micro=2, rank=rank, world=2))]
    supervised = [int(batch.targets.progress_mask.sum()) for batch in micro]
    assert len(set(supervised)) > 1
    assert sum(supervised) == micro[0].counts.progress == whole[0].counts.progress
    expected = gradient(model, whole)
    # rounding apart: a wrong count would be off by tens of per cent
    torch.testing.assert_close(gradient(model, micro), expected, atol=5e-5, rtol=1e-3)
    torch.testing.assert_close(gradient(model, ranks), expected, atol=5e-5, rtol=1e-3)


def test_lightning_steps_the_same_with_and_without_accumulation(dot_corpus, tmp_path):
    options = ["trainer.max_steps=3", "data.pairs_per_step=8", "data.use_dense=false", "model.dropout=0.0"]
    one = train(small(tmp_path / "one", dot_corpus.location, *options))
    four = train(small(tmp_path / "four", dot_corpus.location, *options, "data.micro_batches=4"))
    a, b = load_file(one / "model.safetensors"), load_file(four / "model.safetensors")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3, msg=name)


def test_counts_are_of_the_whole_step_and_a_causal_pair_supervises_its_first_clip_only(dot_corpus):
    module = data_module(dot_corpus, pairs_per_step=6)
    (both,) = batches(module, Share(6))
    assert both.counts == Counts.of(both.targets)
    (first,) = batches(data_module(dot_corpus, "causal", "joint", pairs_per_step=6), Share(6))
    starts = first.clips.lengths.cumsum(0) - first.clips.lengths
    for clip, (start, length) in enumerate(zip(starts, first.clips.lengths, strict=True)):
        mask = first.targets.success_mask[start : start + length]
        assert bool(mask.any()) == (clip % 2 == 0)


def test_shared_frames_are_read_once(dot_corpus):
    (batch,) = batches(data_module(dot_corpus, weights={"rewind": 1}, pairs_per_step=4), Share(4))
    assert sum(map(len, batch.clips.frames)) < len(batch.clips.frame_ids)
    assert int(batch.clips.frame_ids.max()) == sum(map(len, batch.clips.frames)) - 1


def test_a_step_cannot_be_cut_unevenly():
    with pytest.raises(UserError, match="choose a multiple of 3"):
        Share(10, micro=3)


def test_a_killed_run_resumes_to_the_same_losses_and_weights(dot_corpus, tmp_path):
    """The broken run is a real process: SIGKILLed, then stopped with Ctrl-C, then finished."""
    options = ["trainer.max_steps=60", "trainer.checkpoint_every=5", "trainer.validate_every=25", "data.workers=1"]
    unbroken = train(small(tmp_path / "unbroken", dot_corpus.location, *options))
    folder = tmp_path / "broken"
    command = [
        sys.executable,
        "-m",
        "rbm.cli",
        "train",
        *SMALL,
        f"run_dir='{folder}'",
        f"data.corpus='{dot_corpus.location}'",
        *options,
    ]
    last = folder / "checkpoints" / "last.ckpt"

    def steps() -> int:
        return torch.load(last, weights_only=True)["global_step"] if last.exists() else 0

    def started(until: int) -> subprocess.Popen:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while steps() < until and process.poll() is None:
            time.sleep(0.3)
        return process

    killed = started(10)
    killed.kill()
    killed.communicate()
    reached = steps()
    assert 10 <= reached < 60
    stopped = started(min(reached + 10, 50))
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, said
    assert "the same command continues from there" in said
    assert "Traceback" not in said
    assert not (folder / "model").exists()
    subprocess.run(command, check=True, capture_output=True)
    a, b = load_file(unbroken / "model.safetensors"), load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = losses_by_step(folder)
    for step, loss in losses_by_step(tmp_path / "unbroken").items():
        assert losses.get(step, loss) == loss, f"step {step}"


def losses_by_step(folder: Path) -> dict[int, str]:
    import csv

    found = {}
    for path in sorted(folder.glob("logs/version_*/metrics.csv")):
        for row in csv.DictReader(path.open()):
            if row.get("train/total"):
                found[int(row["step"])] = row["train/total"]
    assert found
    return found


def test_a_checkpoint_says_what_it_stands_on(dot_corpus, tmp_path):
    config = small(tmp_path / "run", dot_corpus.location, "trainer.max_steps=4", "trainer.checkpoint_every=2")
    model = train(config)
    facts = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["rbm"]
    assert facts["snapshot"] == dot_corpus.snapshot
    assert facts["config"]["model"]["context_frames"] == 8
    assert "revision" in facts
    assert (model / "config.json").exists()
    assert list((tmp_path / "run").glob("logs/version_*/events.out.tfevents*"))
    assert (
        train(small(tmp_path / "run", dot_corpus.location, "trainer.max_steps=4", "trainer.checkpoint_every=2"))
        == model
    )


def test_another_configuration_does_not_continue_a_run(dot_corpus, tmp_path):
    train(small(tmp_path / "run", dot_corpus.location, "trainer.max_steps=2"))
    with pytest.raises(UserError, match=r"another configuration \(differs in: data.seed, optimization.seed, seed\)"):
        train(small(tmp_path / "run", dot_corpus.location, "trainer.max_steps=2", "seed=5"))


def test_a_truncated_checkpoint_is_told_and_nothing_is_lost(dot_corpus, tmp_path):
    config = small(tmp_path / "run", dot_corpus.location, "trainer.max_steps=4", "trainer.checkpoint_every=2")
    model = train(config)
    import shutil

    shutil.rmtree(model)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(UserError, match="may be truncated"):
        train(config)
    assert last.exists()


def test_fine_tuning_starts_from_a_model(dot_corpus, tmp_path, tiny_checkpoint):
    model = train(
        small(
            tmp_path / "run",
            dot_corpus.location,
            "trainer.max_steps=1",
            "optimization.lr=0",
            f"init='{tiny_checkpoint}'",
        )
    )
    a, b = load_file(tiny_checkpoint / "model.safetensors"), load_file(model / "model.safetensors")
    assert torch.equal(a["progress_head.0.weight"], b["progress_head.0.weight"])


@pytest.mark.parametrize(("pair", "preference"), [("isolated", "utility"), ("isolated", "joint"), ("causal", "joint")])
def test_it_learns(dot_corpus, tmp_path, pair, preference):
    options = [f"model.pair={pair}", f"model.preference={preference}", "trainer.max_steps=100", "optimization.lr=3e-3",
               "data.pairs_per_step=8"]  # fmt: skip
    folder = train(small(tmp_path / "run", dot_corpus.location, *options))
    model = RewardModel.from_pretrained(str(folder))
    task = moving_dot.TASKS[0].text
    from rbm.model import ClipBatch

    rows = dot_corpus.select(task=task, quality="successful")
    frames = model.preprocess(dot_corpus.frames(int(rows[0])))[[0, 3, 6, 9, 12, 15, 17, 19]]
    with torch.inference_mode():
        progress = model.decode(model(ClipBatch.from_clips([(frames, task)])))[0]
    assert progress[-1] - progress[0] > 0.4, progress


def test_learning_rate_by_hand():
    assert learning_rate_factor(0, 100, 0.1) == pytest.approx(0.1)
    assert learning_rate_factor(9, 100, 0.1) == pytest.approx(1.0)
    assert learning_rate_factor(10, 100, 0.1) == pytest.approx(1.0)
    assert learning_rate_factor(55, 100, 0.1) == pytest.approx(0.01 + 0.99 / 2)
    assert learning_rate_factor(100, 100, 0.1) == pytest.approx(0.01)


def test_a_full_disk_is_one_line_and_leaves_no_half_checkpoint(dot_corpus, tmp_path):
    """A limit on the size of files stands in for the disk: the checkpoint does not fit."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "from rbm.cli import main; sys.argv[0] = 'rbm'; main()"
    )
    folder = tmp_path / "run"
    arguments = ["train", *SMALL, f"run_dir='{folder}'", f"data.corpus='{dot_corpus.location}'", "trainer.max_steps=4",
                 "trainer.checkpoint_every=2"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"cannot write to {folder}" in done.stderr
    assert not list(folder.rglob("*.ckpt"))
    assert train(small(folder, dot_corpus.location, "trainer.max_steps=4", "trainer.checkpoint_every=2")).exists()


def test_options_that_lightning_refuses_are_one_line(dot_corpus, tmp_path):
    for option in ("trainer.precision=17", "trainer.accelerator=abacus", "trainer.wandb=true"):
        with pytest.raises(UserError) as caught:
            train(small(tmp_path / "run", dot_corpus.location, option))
        assert "\n" not in str(caught.value)


def test_the_last_step_is_in_a_checkpoint_though_none_was_due(dot_corpus, tmp_path):
    from rbm.model.lightning_file import read_rest

    config = small(tmp_path / "run", dot_corpus.location, "trainer.max_steps=5", "trainer.checkpoint_every=3")
    model = train(config)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert read_rest(last)["global_step"] == 5
    # so that what failed after the training is done again without it: the model is the same
    weights = load_file(model / "model.safetensors")
    for path in model.iterdir():
        path.unlink()
    again = load_file(train(config) / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == ["version_0", "version_1"]


def test_a_pretrained_model_with_a_rate_for_none_is_warned_of(caplog):
    import tiny_vlm

    from rbm.training.module import RewardModule
    from rbm.training.tuning import Tuning

    RewardModule(tiny_vlm.qwen3_model(), lr=1e-3)
    assert "lr=0.001 is much" in caplog.text
    caplog.clear()
    RewardModule(tiny_vlm.qwen3_model(), lr=1e-3, tuning=Tuning(language="none"))
    RewardModule(RewardModel(NanoBackbone(image_size=32, width=8, hidden=32, layers=1, heads=2)), lr=1e-3)
    assert not caplog.text
