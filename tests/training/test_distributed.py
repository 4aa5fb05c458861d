"""Two real processes (gloo, CPU) against one: losses, gradients, weights; stopped, killed, continued; converted.

All that can share a process group does: starting processes takes longer than the steps.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import moving_dot
import pytest
import torch
import two_processes
from safetensors.torch import load_file

from rbm.corpus import Corpus
from rbm.errors import UserError
from rbm.model import RewardModel
from rbm.model.lightning_file import load_lightning, load_sharded, read_rest
from rbm.training.parallel import anywhere, processes, together
from rbm.training.run import train

KINDS = ("nano", "qwen")
STRATEGIES = ("ddp", "fsdp")
LORA = "++optimization.tuning={_target_: rbm.training.tuning.Tuning, language: lora, vision: last, vision_blocks: 1, " \
       "vision_lr: 1e-5, lora: {r: 4, alpha: 8, dropout: 0.0}, gradient_checkpointing: true}"  # fmt: skip
CLI = ["model.backbone.image_size=32", "model.backbone.width=8", "model.backbone.hidden=32", "model.backbone.heads=2",
       "model.backbone.layers=1", "model.context_frames=6", "trainer.max_steps=60",
       "trainer.checkpoint_every=3"]  # fmt: skip


def options(folder: Path, corpus: Corpus, *more: str) -> list[str]:
    return [f"run_dir='{folder}'", f"data.corpus='{corpus.location}'", *more]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


@pytest.fixture(scope="module")
def bare_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Without dense labels, so that supervision falls unevenly: failures have no progress."""
    return moving_dot.write_corpus(tmp_path_factory.mktemp("bare") / "corpus", dense=False)


@pytest.fixture(scope="module")
def done(bare_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what two processes made: {nano,qwen}-{ddp,fsdp}, and more that the tests name."""
    root = tmp_path_factory.mktemp("two")
    two = "trainer.devices=2"
    jobs = [{"do": "gradients", "model": kind, "corpus": str(bare_corpus.location),
             "out": str(root / f"{kind}-gradients")} for kind in KINDS]  # fmt: skip
    for kind in KINDS:
        for strategy in STRATEGIES:
            more = options(root / f"{kind}-{strategy}", bare_corpus, two, f"trainer.strategy={strategy}")
            jobs.append({"do": "train", "model": kind, "config": more})
    micro = options(root / "nano-micro", bare_corpus, two, "trainer.strategy=fsdp", "data.micro_batches=2")
    jobs.append({"do": "train", "model": "nano", "config": micro})
    for strategy in STRATEGIES:
        more = options(root / f"lora-{strategy}", bare_corpus, two, f"trainer.strategy={strategy}", LORA)
        jobs.append({"do": "train", "model": "qwen", "config": more})
        long = ["trainer.max_steps=16", "trainer.checkpoint_every=2", f"trainer.strategy={strategy}", two]
        for name, ways in (("unbroken", [False]), ("stopped", [True, False])):
            more = options(root / f"{name}-{strategy}", bare_corpus, *long)
            jobs += [{"do": "train", "model": "nano", "config": more, "stop": stop} for stop in ways]
    plan = root / "plan.json"
    plan.write_text(json.dumps(jobs))
    ended = torchrun(two_processes.__file__, str(plan))
    assert ended.returncode == 0, ended.stderr[-6000:]
    return root


def losses(folder: Path) -> dict[int, dict[str, float]]:
    """What was logged in each step, over all starts."""
    found: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("logs/version_*/metrics.csv")):
        for row in csv.DictReader(path.open()):
            values = {name: float(row[name]) for name in row if name != "step" and row[name]}
            found.setdefault(int(row["step"]), {}).update(values)
    assert found
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same(a: Path, b: Path, tolerance: float) -> None:
    """Losses of every step and the weights at the end."""
    ours, theirs = losses(a), losses(b)
    assert ours.keys() == theirs.keys()
    for step, values in ours.items():
        assert values == pytest.approx(theirs[step], abs=tolerance), f"step {step}"
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    for name in x:
        if not name.startswith("success_"):  # found by a search that ends where the gain is small
            torch.testing.assert_close(x[name], y[name], atol=tolerance, rtol=0, msg=name)


@pytest.fixture(scope="module")
def alone(bare_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process made of the same."""
    root = tmp_path_factory.mktemp("one")
    for kind in KINDS:
        train(two_processes.config_of(kind, options(root / kind, bare_corpus)))
    train(two_processes.config_of("qwen", options(root / "lora", bare_corpus, LORA)))
    return root


def test_supervision_is_uneven_in_what_the_next_tests_train_on(bare_corpus):
    model = two_processes.tiny("nano")
    masks = [two_processes.first_step(model, str(bare_corpus.location), rank, 2).targets for rank in range(2)]
    progress = [int(found.progress_mask.sum()) for found in masks]
    positives = [int((found.success_mask & (found.success > 0.5)).sum()) for found in masks]
    assert progress[0] > 0 == progress[1]
    assert positives[0] > 0 == positives[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_clipped_gradient_of_fsdp_is_that_of_one_process(done, bare_corpus, kind):
    found = load_file(done / f"{kind}-gradients")
    norm = found.pop("norm")
    model = two_processes.tiny(kind)
    model.backbone.tower.requires_grad_(kind == "nano")
    two_processes.loss_of(model, two_processes.first_step(model, str(bare_corpus.location))).backward()
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    expected = torch.nn.utils.clip_grad_norm_(trained.values(), two_processes.CLIP)
    assert expected > 1.2 * two_processes.CLIP
    torch.testing.assert_close(norm, expected, atol=1e-5, rtol=1e-5)
    assert found.keys() == trained.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_are_one(done, alone, kind, strategy):
    assert_same(done / f"{kind}-{strategy}", alone / kind, 1e-5)


def test_so_are_two_processes_with_two_micro_batches(done, alone):
    assert_same(done / "nano-micro", alone / "nano", 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lora_and_part_of_the_tower_with_checkpointing(done, alone, strategy):
    assert_same(done / f"lora-{strategy}", alone / "lora", 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_signal_to_one_stops_both_at_the_same_step_and_they_continue_as_if_never_stopped(done, strategy):
    folder = done / f"stopped-{strategy}"
    assert (folder / "ended.txt").read_text() == "finished"
    starts = sorted(folder.glob("logs/version_*/metrics.csv"))
    assert len(starts) == 2
    assert_same(folder, done / f"unbroken-{strategy}", 1e-6)


@pytest.mark.parametrize("name", ["nano-fsdp", "qwen-fsdp", "lora-fsdp", "nano-ddp", "qwen-ddp"])
def test_a_checkpoint_is_the_model(done, name, tmp_path):
    last = done / name / "checkpoints" / "last.ckpt"
    assert last.is_dir() == name.endswith("fsdp")
    model = load_sharded(last) if last.is_dir() else load_lightning(last)
    assert not torch.distributed.is_initialized()
    model.save_pretrained(str(tmp_path / "model"))
    found = load_file(tmp_path / "model" / "model.safetensors")
    expected = weights(done / name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found if not key.startswith("success_"))
    again = RewardModel.from_pretrained(str(last))
    assert all(torch.equal(x, found[key]) for key, x in again.state_dict().items())


def test_interrupted_and_killed_at_the_command_line(bare_corpus, tmp_path):
    """Started by Lightning itself: Ctrl-C to all of them, then SIGKILL to all, then to the end by torchrun."""
    folder = tmp_path / "run"
    overrides = [*two_processes.RUN, *CLI, *options(folder, bare_corpus, "trainer.devices=2", "trainer.strategy=fsdp")]
    overrides.remove("trainer.max_steps=4")
    overrides.remove("trainer.checkpoint_every=2")
    command = [sys.executable, "-m", "rbm.cli", "train", *overrides]
    last = folder / "checkpoints" / "last.ckpt"

    def step() -> int:
        try:
            return read_rest(last)["global_step"]
        except UserError:  # between two checkpoints
            return 0

    def started(until: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while step() < until and process.poll() is None:
            time.sleep(0.1)
        return process

    stopped = started(3)
    os.killpg(stopped.pid, signal.SIGINT)
    printed, said = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, said
    assert said.count("stopping after this step") == said.count("the same command continues from there") == 1
    assert "Traceback" not in said
    assert printed == ""
    reached = step()
    assert 3 <= reached < 60
    killed = started(reached + 3)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    ended = torchrun("-m", "rbm.cli", "train", *overrides)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [str(folder / "model")]
    assert ended.stderr.count("continuing") == 1
    assert sorted(losses(folder)) == list(range(60))
    assert RewardModel.from_pretrained(str(folder)).context_frames == 6


def test_what_one_process_cannot_read_is_one_line_and_ends_both(bare_corpus, tmp_path):
    corpus = moving_dot.write_corpus(tmp_path / "corpus", dense=False)
    overrides = [*two_processes.RUN, *CLI[:-2], *options(tmp_path / "run", corpus, "trainer.devices=3")]
    ended = torchrun("-m", "rbm.cli", "train", *overrides)
    assert "torchrun has started 2 processes, but trainer.devices=3" in ended.stderr


def test_processes_by_devices():
    assert [processes("cpu", devices) for devices in (1, 2, "3", [0, 1], "0,1", "auto", -1)] == [1, 2, 3, 2, 2, 1, 1]


def test_alone_there_is_nobody_to_ask():
    assert not anywhere(False)
    assert anywhere(True)
    with pytest.raises(UserError, match="mine"), together():
        raise UserError("mine")
