"""What users get wrong: one line on stderr, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rbm.cli import main
from rbm.errors import UserError
from rbm.scoring import Scorer


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def rbm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def run(*arguments: str | Path, disk: int | None = None) -> Done:
        """The `rbm` command; with `disk`, no file may grow beyond that many bytes, as where the disk is full."""
        monkeypatch.setattr(sys, "argv", ["rbm", *(str(argument) for argument in arguments)])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        code: object = 0
        try:
            if disk is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (disk, hard))
            main()
        except SystemExit as end:
            code = end.code
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert isinstance(code, int)
        return Done(code, *capsys.readouterr())

    return run


def refused(done: Done, *words: str) -> None:
    assert done.code == 2, done.err
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_the_command_of_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rbm.cli", "score", str(tmp_path / "a.mp4"), "--task", ""]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    refused(Done(done.returncode, done.stdout, done.stderr), "the task (instruction) is empty")


def test_a_missing_video(tmp_path: Path, checkpoints: dict[str, Path], rbm: Callable[..., Done]) -> None:
    path = tmp_path / "kein Video.mp4"
    refused(rbm("score", path, "--task", "push", "--checkpoint", checkpoints["utility"]), str(path), "no such file")


def test_a_truncated_video(
    tmp_path: Path, video_path: Path, checkpoints: dict[str, Path], rbm: Callable[..., Done]
) -> None:
    path, out = tmp_path / "cut.mp4", tmp_path / "out.json"
    path.write_bytes(video_path.read_bytes()[:5000])
    done = rbm("score", path, "--task", "push", "--checkpoint", checkpoints["utility"], "--json", out)
    refused(done, str(path), "truncated")
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_instruction(video_path: Path, rbm: Callable[..., Done]) -> None:
    for command in (["score", video_path], ["compare", video_path, video_path], ["rank", video_path]):
        refused(rbm(*command, "--task", " "), "the task (instruction) is empty")


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("--json", "nowhere/out.json", "does not exist; make it first"),
        ("--plot", "nowhere/out.png", "does not exist; make it first"),
        ("--plot", "out.docx", "must end in .png or .pdf or .svg"),
        ("--video", "out.gif", "must end in .mp4"),
        ("--json", ".", "it is a folder"),
    ],
)
def test_outputs_that_cannot_be_are_refused_first(
    tmp_path: Path, video_path: Path, option: str, name: str, words: str, rbm: Callable[..., Done]
) -> None:
    done = rbm("score", video_path, "--task", "push", "--checkpoint", "not even looked at", option, tmp_path / name)
    refused(done, words)
    assert list(tmp_path.iterdir()) == []


def test_the_input_is_never_overwritten(tmp_path: Path, video_path: Path, rbm: Callable[..., Done]) -> None:
    path = tmp_path / "in.mp4"
    shutil.copy(video_path, path)
    refused(rbm("score", path, "--task", "push", "--video", path), "it is an input")
    assert path.read_bytes() == video_path.read_bytes()


def test_several_videos_have_no_one_plot(tmp_path: Path, video_path: Path, rbm: Callable[..., Done]) -> None:
    done = rbm("score", video_path, video_path, "--task", "push", "--plot", tmp_path / "a.png")
    refused(done, "--plot draws one video, 2 were given")


@pytest.mark.parametrize("option", ["--json a.json", "--plot a.png", "--video a.mp4"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, video_path: Path, checkpoints: dict[str, Path], option: str, rbm: Callable[..., Done]
) -> None:
    flag, name = option.split()
    target = tmp_path / name
    target.write_text("of an earlier run")
    arguments = ["score", video_path, "--task", "push", "--checkpoint", checkpoints["utility"], flag, target]
    done = rbm(*arguments, disk=1000)
    assert done.code == 2, done.err
    (line,) = done.err.splitlines()
    assert line.startswith(f"error: cannot write {target}: ")
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() == "of an earlier run"


# Checkpoints


def broken(folder: Path, kind: str) -> Path:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "missing":
        shutil.rmtree(folder)
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        config.unlink()
    elif kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "truncated header":
        weights.write_bytes(weights.read_bytes()[:20])
    elif kind == "truncated config":
        config.write_text(config.read_text()[:-40])
    elif kind == "newer":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"version": 1000}))
    elif kind == "pickle":
        (folder / "last.ckpt").write_bytes(b"\x80\x04.")
        return folder / "last.ckpt"
    elif kind == "other sizes":
        description = json.loads(config.read_text())
        description["model"]["backbone"]["hidden"] = 64
        config.write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "neither a file or folder"),
        ("no weights", "model.safetensors is missing"),
        ("no config", "config.json is missing"),
        ("truncated weights", "truncated"),
        ("truncated header", "truncated"),
        ("truncated config", "cannot be read as JSON"),
        ("newer", "version 1000"),
        ("pickle", "last.ckpt cannot be read"),
        ("other sizes", "has shape"),
    ],
)
def test_bad_checkpoints(tmp_path: Path, checkpoints: dict[str, Path], kind: str, words: str) -> None:
    path = broken(Path(shutil.copytree(checkpoints["utility"], tmp_path / "model")), kind)
    with pytest.raises(UserError) as caught:
        Scorer.from_pretrained(path, device="cpu")
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_checkpoint_on_the_command_line(
    tmp_path: Path, video_path: Path, checkpoints: dict[str, Path], rbm: Callable[..., Done]
) -> None:
    path = broken(Path(shutil.copytree(checkpoints["utility"], tmp_path / "model")), "truncated weights")
    refused(rbm("score", video_path, "--task", "push", "--checkpoint", path), str(path), "truncated")
