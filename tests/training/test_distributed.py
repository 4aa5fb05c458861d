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

from rbm.config import compose
from rbm.corpus import Corpus
from rbm.errors import UserError
from rbm.model import RewardModel
from rbm.model.lightning_file import load_lightning, load_sharded, read_rest
from rbm.training.parallel import Replicated, Sharded, anywhere, placement, processes, together
from rbm.training.run import train

KINDS = ("nano", "qwen")
STRATEGIES = ("ddp", "fsdp")
PRECISIONS = ("bf16-mixed", "bf16-true")
LORA = "++optimization.tuning={_target_: rbm.training.tuning.Tuning, language: lora, vision: last, vision_blocks: 1, " \
       "vision_lr: 1e-5, lora: {r: 4, alpha: 8, dropout: 0.0}, gradient_checkpointing: true}"  # fmt: skip
STOPPED = {"nano": [], "qwen-dropout": [LORA.replace("dropout: 0.0", "dropout: 0.1"), "data.micro_batches=2"]}
"""What is stopped and continued: in the second each rank, part of a step and LoRA matrix has dropout of its own."""
CLI = ["model.backbone.image_size=32", "model.backbone.width=8", "model.backbone.hidden=32", "model.backbone.heads=2",
       "model.backbone.layers=1", "model.context_frames=6", "model.dropout=0.0", "trainer.max_steps=24",
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
    for precision in PRECISIONS:
        more = options(root / precision, bare_corpus, two, "trainer.strategy=fsdp", f"trainer.precision={precision}")
        jobs.append({"do": "train", "model": "qwen", "config": more})
    for strategy in STRATEGIES:
        more = options(root / f"lora-{strategy}", bare_corpus, two, f"trainer.strategy={strategy}", LORA)
        jobs.append({"do": "train", "model": "qwen", "config": more})
        long = ["trainer.max_steps=12", "trainer.checkpoint_every=2", f"trainer.strategy={strategy}", two]
        for kind, own in STOPPED.items():
            for name, ways in (("unbroken", [False]), ("stopped", [True, False])):
                more = options(root / f"{name}-{kind}-{strategy}", bare_corpus, *long, *own)
                jobs += [{"do": "train", "model": kind, "config": more, "stop": stop} for stop in ways]
        more = options(root / f"full-{strategy}", bare_corpus, two, f"trainer.strategy={strategy}")
        jobs.append({"do": "train", "model": "nano", "config": more, "limit": 30_000})
    jobs.append({"do": "fail", "out": str(root)})
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


def ended(folder: Path) -> list[str]:
    """How a job ended for each process."""
    return [(folder / f"ended-{rank}.txt").read_text() for rank in range(2)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same(a: Path, b: Path, tolerance: float, prefix: str = "", lost: int = 0) -> None:
    """What was logged of every step (under names with a prefix), and the weights at the end.

    A kill may have lost the lines of so many steps that were not on the disk yet.
    """
    ours, theirs = losses(a), losses(b)
    assert ours.keys() <= theirs.keys()
    assert len(theirs) - len(ours) <= lost
    for step, values in ours.items():
        expected = {name: value for name, value in theirs[step].items() if name.startswith(prefix)}
        found = {name: value for name, value in values.items() if name.startswith(prefix)}
        assert found == pytest.approx(expected, abs=tolerance), f"step {step}"
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


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bfloat16_is_near(done, alone, precision):
    exact, near = losses(alone / "qwen"), losses(done / precision)
    assert all(near[step] == pytest.approx(exact[step], rel=0.02, abs=0.15) for step in exact)
    found = weights(done / precision)
    assert found["progress_head.0.weight"].dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert found["success_temperature"].dtype == torch.float32
    model = load_sharded(done / precision / "checkpoints" / "last.ckpt")
    assert model.backbone.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("kind", STOPPED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_signal_to_one_stops_both_at_the_same_step_and_they_continue_as_if_never_stopped(done, strategy, kind):
    folder = done / f"stopped-{kind}-{strategy}"
    assert ended(folder) == ["finished", "finished"]
    starts = sorted(folder.glob("logs/version_*/metrics.csv"))
    assert len(starts) == 2
    assert_same(folder, done / f"unbroken-{kind}-{strategy}", 1e-6)


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


def test_a_checkpoint_without_what_was_not_trained_finds_it_where_the_run_had_it(bare_corpus, tmp_path):
    base = tmp_path / "base"
    two_processes.tiny("qwen").save_pretrained(str(base))
    start = ["data.validation_pairs=0", "trainer.max_steps=2", "optimization.lr=1e-2"]
    config = two_processes.config_of("qwen", options(tmp_path / "run", bare_corpus, f"init='{base}'", LORA, *start))
    finished = RewardModel.from_pretrained(str(train(config)))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert "left_out" in read_rest(last)
    found = load_lightning(last).state_dict()
    for name, tensor in finished.state_dict().items():
        if not name.startswith("success_"):
            assert torch.equal(found[name], tensor), name
    two_processes.tiny("qwen", seed=1).save_pretrained(str(base))
    with pytest.raises(UserError, match=r"was trained on other weights than .* holds now"):
        load_lightning(last)


def test_interrupted_and_killed_at_the_command_line(bare_corpus, tmp_path):
    """Started by Lightning itself: Ctrl-C to all of them, then SIGKILL to all, then to the end by torchrun."""
    folder = tmp_path / "run"
    common = [*two_processes.RUN, *CLI]  # of two values for a key the later one holds
    overrides = [*common, *options(folder, bare_corpus, "trainer.devices=2", "trainer.strategy=fsdp")]
    command = [sys.executable, "-m", "rbm.cli", "train", *overrides]
    last = folder / "checkpoints" / "last.ckpt"

    def step() -> int:
        try:
            return read_rest(last)["global_step"]
        except UserError:  # between two checkpoints
            return 0

    def started(until: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(  # in a group of its own, which is what a terminal signals
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while step() < until and process.poll() is None:
            time.sleep(0.03)
        return process

    stopped = started(3)
    os.killpg(stopped.pid, signal.SIGINT)
    printed, said = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, said
    assert said.count("stopping after this step") == said.count("the same command continues from there") == 1
    assert "Traceback" not in said
    assert printed == ""
    reached = step()
    assert 3 <= reached < 24
    killed = started(reached + 3)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    ended = torchrun("-m", "rbm.cli", "train", *overrides)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [str(folder / "model")]
    assert ended.stderr.count("continuing") == 1
    whole = tmp_path / "whole"
    train(compose("train", [*common, *options(whole, bare_corpus)]))
    assert_same(folder, whole, 1e-5, "train/", lost=1)
    assert RewardModel.from_pretrained(str(folder)).context_frames == 6


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_full_disk_ends_both_and_the_first_says_so(done, strategy):
    folder = done / f"full-{strategy}"
    first, second = ended(folder)
    assert first.startswith(f"UserError: cannot write to {folder}: ")
    assert "\n" not in first
    assert second == "SystemExit: 2"
    assert not (folder / "checkpoints" / "last.ckpt").exists()


def test_what_fails_on_one_process_fails_on_both(done):
    assert ended(done) == ["Elsewhere: process 1 has failed: UserError: only here", "UserError: only here"]


def test_other_processes_than_asked_for_are_refused(monkeypatch):
    asked = {"strategy": "auto", "precision": "32-true", "accelerator": "cpu", "devices": 1, "num_nodes": 1}
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"torchrun has started 2 processes, but trainer.devices=1 .* makes 1"):
        placement(asked)
    assert isinstance(placement(asked | {"devices": 2})["strategy"], Replicated)
    assert isinstance(placement(asked | {"num_nodes": 2, "strategy": "fsdp"})["strategy"], Sharded)
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    with pytest.raises(UserError, match="SLURM has started 4 processes"):
        placement(asked)
    placed = placement(asked | {"devices": 2, "num_nodes": 2})
    assert [plugin.auto_requeue for plugin in placed["plugins"]] == [False]
    monkeypatch.undo()
    for wrong in ({"strategy": "magic"}, {"precision": "17"}):
        with pytest.raises(UserError, match="choose"):
            placement(asked | wrong)


def test_processes_by_devices():
    assert [processes("cpu", devices) for devices in (1, 2, "3", [0, 1], "0,1", "auto", -1)] == [1, 2, 3, 2, 2, 1, 1]


def test_alone_there_is_nobody_to_ask():
    assert not anywhere(False)
    assert anywhere(True)
    with pytest.raises(UserError, match="mine"), together():
        raise UserError("mine")
