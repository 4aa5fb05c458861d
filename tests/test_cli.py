"""The command as a user sees it: help, unknown names, one-line errors, exit codes."""

import subprocess
import sys

import pytest

from rbm.cli import COMMANDS


def rbm(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rbm.cli", *arguments], capture_output=True, text=True, **options)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name):
    done = rbm(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def refused(*arguments: str, says: str, **options) -> None:
    done = rbm(*arguments, **options)
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert says in done.stderr, done.stderr


def test_names_that_do_not_exist_say_which_do(tmp_path):
    refused("train", "model=giant", says="nano", cwd=tmp_path)
    refused("train", "experiment=nothing", says="demo", cwd=tmp_path)
    refused("build", "source=nowhere", says="videos", cwd=tmp_path)
    refused("train", "trainer.max_stepps=3", says="max_stepps", cwd=tmp_path)
    refused("build", says="source=videos", cwd=tmp_path)
    refused("build", "source=videos", says="corpus=FOLDER", cwd=tmp_path)
    refused("score", "a.mp4", says="--task", cwd=tmp_path)
    refused("nonsense", says="nonsense", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_that_is_not_there(tmp_path):
    refused("corpus", "info", str(tmp_path / "no corpus ü"), says="no such directory")
    refused("train", f"data.corpus='{tmp_path}/none'", f"run_dir='{tmp_path}/run'", says="no such directory")


def test_an_option_that_a_constructor_refuses(tmp_path):
    refused("train", "model.pair=causal", f"run_dir='{tmp_path}/run'", says="preference='joint'")
    refused("train", "data.micro_batches=3", f"run_dir='{tmp_path}/run'", says="choose a multiple of 3")


def test_corpus_info(dot_corpus):
    done = rbm("corpus", "info", str(dot_corpus.location))
    assert done.returncode == 0, done.stderr
    assert "48 trajectories" in done.stdout
    assert "move the dot left" in done.stdout
