import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
import zarr
from attempts import attempt, payload_bytes, write
from damage import flip
from s3_server import BUCKET

from rbm.cli import LazyGroup, main
from rbm.corpus import Corpus, CorpusWriter
from rbm.corpus.cli import corpus as group
from rbm.corpus.selection import Selection
from rbm.trajectory import Task

RBM = (sys.executable, "-m", "rbm.cli", "corpus")


def id_of(number: int) -> str:
    return attempt(number)[0].id


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def rbm(*arguments: object, stdin: str = "") -> Done:
    """The command as its entry point runs it, in this process: a new one takes a second to start."""
    out, err = StringIO(), StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        TemporaryFile("w+") as given,
    ):
        given.write(stdin)
        given.seek(0)
        patch.setattr(sys, "argv", ["rbm", "corpus", *map(str, arguments)])
        patch.setattr(sys, "stdin", given)
        patch.setenv("COLUMNS", "80")
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def works(*arguments: object, stdin: str = "") -> str:
    done = rbm(*arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*arguments: object, says: str) -> None:
    done = rbm(*arguments)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert says in done.stderr, done.stderr
    assert done.stderr.startswith("Usage:") or done.stderr.count("\n") == 1, done.stderr


@pytest.fixture
def path(tmp_path) -> Path:
    with CorpusWriter(tmp_path / "c", commit_every=3) as writer:
        writer.add_task(Task(attempt(0)[0].task, scene="[kitchen]"))
        for number in range(9):
            writer.add(*attempt(number, source="[lab]" if number < 6 else "web", embodiment="panda"))
    return tmp_path / "c"


def test_every_command_has_help_with_an_example():
    assert isinstance(group.name, str)
    for name, command in group.commands.items():
        assert command.help is not None
        assert f"rbm corpus {name}" in command.help
    listed = rbm("--help").stdout
    assert all(f"  {name} " in listed for name in group.commands)
    assert LazyGroup().get_command(None, "corpus") is group
    assert ".." not in rbm("--help").stdout.replace("[ARGS]...", "")
    assert "can not be moved" in rbm("tag", "--help").stdout
    for name in ("copy", "export"):
        assert "a new local folder" in rbm(name, "--help").stdout


def test_numbers_out_of_range(path):
    refused("log", path, "-n", "-3", says="-3 is not in the range")
    refused("stats", path, "--sample", "-5", says="-5 is not in the range")
    refused("select", path, "--min-frames", "-5", says="-5 is not in the range")
    refused("copy", path, "x", "--codec", "jpeg", "--short-side", "0", says="0 is not in the range")


def test_tables_fit_a_terminal(path):
    """Of 80 columns; whatever else is cut, the id of a snapshot is not."""
    with CorpusWriter(path) as writer:
        writer.add(*attempt(9, task="put the red cup onto the white plate beside the stove", source="a-long-name-" * 5))
    newest = works("tag", path, "a-tag-with-a-long-name-of-more-than-thirty-letters").split()[-1]
    log = works("log", path)
    assert newest in log
    assert "time (UTC)" in log
    stats = works("stats", path)
    for text in (log, stats):
        assert max(map(len, text.partition("\n")[2].splitlines())) <= 80
    tables = ("source ", "embodiment ", "scene ", "task ", "quantile ")
    assert all(f"\n\n{name}" in "\n".join(map(str.rstrip, stats.splitlines())) for name in tables)


def heed_modes() -> None:
    """The superuser passes over file modes; without these two capabilities it does not."""
    if os.geteuid() == 0:
        for capability in (1, 2):
            assert ctypes.CDLL(None).prctl(24, capability) == 0


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run([*RBM, *map(str, arguments)], capture_output=True, text=True, check=False, **options)


def test_places_that_one_may_not_enter_or_write(path, tmp_path):
    path.chmod(0)
    try:
        for command in ("info", "check"):
            done = run(command, path, preexec_fn=heed_modes)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert f"corpus {path}: can not be read: Permission denied" in done.stderr
    finally:
        path.chmod(0o755)
    tmp_path.chmod(0o555)
    try:
        done = run("check", path, "--repair", preexec_fn=heed_modes)
    finally:
        tmp_path.chmod(0o755)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"can not be made ({tmp_path}/.c.writer.lock: Permission denied)" in done.stderr


def stands_still(process: subprocess.Popen[str], seconds: float = 0.5) -> None:
    """Waits until a process has used no processor for so long."""
    used = ""
    while process.poll() is None:
        now = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        if used == now:
            return
        used = now
        time.sleep(seconds)


def release(pipe: Path) -> None:
    """Opens the other end of a pipe where somebody waits for that."""
    with contextlib.suppress(OSError):  # nobody does
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("check", "c"), "stopped; nothing was written\n"),
        (("copy", "c", "copy"), "stopped; nothing was written\n"),
        (("merge", "all", "c"), "stopped; the same command goes on\n"),
    ],
)
def test_stopping_a_command(path, tmp_path, command, says):
    """A shard is a pipe here: the command stands still where it opens it, and there it is stopped.

    Where it had not come so far (the machine was busy), the attempt says nothing, and the next one is made.
    """
    place = max((path / "chunks").iterdir(), key=lambda file: file.stat().st_size)
    place.unlink()
    os.mkfifo(place)
    for _ in range(10):
        with subprocess.Popen([*RBM, *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
            stands_still(process)
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            release(place)  # threads that wait there, too
            _, errors = process.communicate()
        if errors == says:
            break
    assert (process.returncode, errors) == (130, says)
    assert not (tmp_path / "copy").exists()


def test_info_and_stats(path):
    assert "9 trajectories" in works("info", path)
    assert "öffne die Tür" in works("info", path)
    assert json.loads(works("info", path, "--json"))["by_source"] == {"[lab]": 6, "web": 3}
    text = works("stats", path)
    assert "[lab]" in text
    assert "[kitchen]" in text
    assert "copies of the same frames: 0 in 0 groups" in text
    facts = json.loads(works("stats", path, "--json"))
    assert [(one["name"], one["trajectories"]) for one in facts["sources"]] == [("[lab]", 6), ("web", 3)]


def test_log_and_tag(path):
    newest = Corpus.open(path).snapshot
    assert works("tag", path, "v1") == f"tag v1: snapshot {newest}\n"
    log = works("log", path)
    assert log.splitlines()[1].split()[0] == newest
    assert "v1" in log
    facts = json.loads(works("log", path, "--json", "-n", "2"))
    assert [one["trajectories"] for one in facts] == [9, 6]
    assert facts[0]["tags"] == ["v1"]
    refused("tag", path, "v1", says="exists already")
    assert "deleted" in works("tag", path, "v1", "--delete")
    refused("info", path, "--snapshot", "v1", says="has no snapshot or tag 'v1'")


def test_select_counts_and_saves(path, tmp_path):
    text = works("select", path, "--source", "[lab]", "--quality", "successful", "-o", tmp_path / "some.json")
    assert "3 of 9 trajectories" in text
    opened, rows = Selection.load(tmp_path / "some.json").open()
    assert rows.tolist() == opened.select(source="[lab]", quality="successful").tolist() == [0, 1, 2]
    assert Selection.load(tmp_path / "some.json").filters == {"source": ["[lab]"], "quality": ["successful"]}
    facts = json.loads(works("select", path, "--task", attempt(1)[0].task, "--json"))
    assert facts["by_task"] == {attempt(1)[0].task: {"successful": 1, "suboptimal": 1, "failure": 1}}
    assert facts["by_quality"] == {"successful": 1, "suboptimal": 1, "failure": 1}
    listed = f"{id_of(8)}\n{id_of(2)}\n"
    assert json.loads(works("select", path, "--ids-from", "-", "--json", stdin=listed))["trajectories"] == 2
    refused("select", path, "--source", "la", says="no source 'la'; there are '[lab]'")
    refused("select", path, "--min-frames", "99", "-o", tmp_path / "none.json", says="no trajectory passes")
    (tmp_path / "ids.txt").write_text("nobody\n")
    refused("select", path, "--ids-from", tmp_path / "ids.txt", says="no trajectory has the id 'nobody'")
    (tmp_path / "ids.txt").write_text("\n")
    refused("select", path, "--ids-from", tmp_path / "ids.txt", says="ids.txt: holds no id")
    refused("select", path, "-o", tmp_path / "sel.txt", says="ends in .json or .json.gz")
    assert not (tmp_path / "none.json").exists()


def test_check_says_what_is_damaged_and_mends_it(path):
    assert "all are as they were written" in works("check", path)
    flip(Corpus.open(path), 4, 400)
    done = rbm("check", path)
    assert done.returncode == 1
    assert f"{id_of(4)}: the checksum of" in done.stdout
    assert "check --repair" in done.stdout
    done = rbm("check", path, "--json")
    assert done.returncode == 1
    assert [bad["id"] for bad in json.loads(done.stdout)["bad"]] == [id_of(4)]
    refused("check", path, "--repair", "--snapshot", "v1", says="leave --snapshot out")
    assert "taken out as damaged: 1 trajectory;" in works("check", path, "--repair")
    assert json.loads(works("check", path, "--decode", "--json"))["clean"]
    assert len(Corpus.open(path)) == 8


def test_merge(path, tmp_path):
    other = write(tmp_path / "other", range(8, 12))
    refused("merge", tmp_path / "all", path, other.location, says="ids that stand for different trajectories: 1 (")
    assert not (tmp_path / "all").exists()
    facts = json.loads(works("merge", tmp_path / "all", path, other.location, "--conflict", "skip", "--json"))
    assert (facts["added"], facts["skipped"]) == (12, 1)
    assert "/all: 0 trajectories added, 9 there already; snapshot" in works("merge", tmp_path / "all", path)
    assert "/new: 9 trajectories added; snapshot" in works("merge", tmp_path / "new", path)
    flip(Corpus.open(path), 4, 400)
    refused("merge", tmp_path / "newer", path, says="--skip-damaged")
    refused("merge", tmp_path / "all", says="SOURCES")
    refused("merge", tmp_path / "all", tmp_path / "none", says="no such directory")


def test_remove_and_compact(path, tmp_path):
    (tmp_path / "ids.txt").write_text(f"{id_of(0)}\n\n{id_of(1)}\n")
    assert "2 trajectories removed, 7 left" in works("remove", path, "--ids-from", tmp_path / "ids.txt")
    works("select", path, "--source", "web", "-o", tmp_path / "web.json")
    facts = json.loads(works("remove", path, id_of(2), "--selection", tmp_path / "web.json", "--json"))
    assert (facts["removed"], facts["left"]) == (4, 3)
    assert list(Corpus.open(path).ids) == [id_of(3), id_of(4), id_of(5)]
    refused("remove", path, "nobody", says="has no trajectory 'nobody'")
    refused("remove", path, says="say which trajectories")
    refused("remove", tmp_path / "none", "x", says="no such directory")
    shutil.copytree(path, tmp_path / "twin")
    shutil.copytree(path, tmp_path / "before")
    refused("remove", tmp_path / "twin", "--selection", tmp_path / "web.json", says="is of the corpus")
    works("tag", path, "v1")
    works("remove", path, id_of(3))
    text = works("compact", path, "--drop-history")
    assert "older snapshots: " in text
    assert "1 tagged kept (v1)" in text
    assert "v1" in works("log", path)
    works("merge", path, tmp_path / "before")
    assert list(Corpus.open(path).ids) == [id_of(4), id_of(5), id_of(3)]
    works("compact", path)
    assert json.loads(works("compact", path, "--json"))["moved"] == 0


def test_copy_and_export(path, tmp_path):
    works("copy", path, tmp_path / "copy", "--codec", "h264")
    assert len(Corpus.open(tmp_path / "copy")) == 9
    refused("copy", path, tmp_path / "x", "--short-side", "12", says="say --codec too")
    works("export", "--plain", path, tmp_path / "plain")
    assert zarr.open_group(tmp_path / "plain", mode="r")["index/task"].shape == (9,)
    refused("export", path, tmp_path / "x", says="say --plain")
    refused("export", "--plain", path, tmp_path / "plain", says="exists already")


def test_urls_go_everywhere(s3, path, tmp_path):
    url = f"s3://{BUCKET}/cli/c"
    works("merge", url, path)
    assert "9 trajectories" in works("info", url)
    works("tag", url, "v1")
    works("remove", url, id_of(0))
    works("compact", url, "--drop-history")
    assert json.loads(works("log", url, "--json"))[0]["trajectories"] == 8
    assert json.loads(works("check", url, "--repair", "--json"))["removed"] == 0
    works("copy", url, tmp_path / "copy")
    assert len(payload_bytes(Corpus.open(tmp_path / "copy"))) == 8
    assert len(Corpus.open(url, "v1")) == 9
    refused("info", f"s3://{BUCKET}/cli/none", says="no corpus at")
