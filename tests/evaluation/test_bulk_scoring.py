"""`rbm score --corpus`: the scorer's own numbers in whole parts, whoever makes them and however often it is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import av
import moving_dot
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_vlm
import torch
from click.testing import CliRunner, Result
from lerobot_dataset import CAMERAS, EPISODES, Filmed, write_lerobot
from s3_server import serve_s3

from rbm.cli import cli
from rbm.corpus import Corpus, CorpusWriter, Selection, copy_corpus
from rbm.errors import UserError
from rbm.evaluation import bulk_run
from rbm.evaluation.bulk_run import Crew, Outcome, open_source, plan
from rbm.model import RewardModel
from rbm.model.backbones import NanoBackbone
from rbm.scoring import Scorer, Scores
from rbm.trajectory import Quality
from rbm.video import StoredClip

RBM = [sys.executable, "-m", "rbm.cli"]
SECONDS = 120.0
"""No command here takes so long."""


ALONE = Crew()


def no_tick(trajectories: int, frames: int) -> None: ...


def score(place: Path | str, out: Path, checkpoint: Path, crew: Crew = ALONE, **options: Any) -> Outcome:
    """One run, its parts of 10 trajectories."""
    opened = {name: options.pop(name) for name in ("snapshot", "selection", "view") if name in options}
    retry = options.pop("retry", False)
    source = open_source(str(place), **opened)
    job, model = plan(source, out, str(checkpoint), "cpu", **{"size": 10} | options)
    return bulk_run.run(job, model, crew, no_tick, retry)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rows(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))])


def clip_of(corpus: Corpus, row: int, view: str | None = None) -> StoredClip:
    record = corpus[row]
    return StoredClip(record.frames(view=view), record.frame_index, record.timestamp, record.fps, record.n_frames)


def same(table: pa.Table, scores: Scores) -> None:
    for name in ("frame_index", "timestamp", "progress", "progress_std", "success"):
        np.testing.assert_allclose(table[name].to_numpy(), getattr(scores, name), atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def whole(dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of 48 trajectories in 5 parts, made by one process without a break."""
    folder = tmp_path_factory.mktemp("scores") / "whole"
    outcome = score(place(dot_corpus), folder, tiny_checkpoint)
    assert (outcome.parts, outcome.trajectories, outcome.frames) == (5, 48, 48 * 8)
    return folder


def place(corpus: Corpus) -> Path:
    assert corpus.location.local is not None
    return corpus.location.local


# a corpus


@pytest.mark.parametrize("every", [None, 1, 3])
def test_scores_are_those_of_the_scorer(
    every: int | None, dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    score(place(dot_corpus), tmp_path / "out", tiny_checkpoint, every=every)
    table = rows(tmp_path / "out")
    scorer = Scorer.from_pretrained(tiny_checkpoint, device="cpu")
    assert table["row"].unique().to_pylist() == list(range(len(dot_corpus)))
    for row in range(len(dot_corpus)):
        mine = table.filter(pa.compute.equal(table["row"], row))
        same(mine, scorer.score(clip_of(dot_corpus, row), dot_corpus[row].task, every))
        assert mine["trajectory"].unique().to_pylist() == [dot_corpus.ids[row]]
        assert mine["task"].unique().to_pylist() == [dot_corpus[row].task]


def test_a_file_says_what_it_is(whole: Path, dot_corpus: Corpus, tiny_checkpoint: Path) -> None:
    assert sorted(files(whole)) == [*(f"part-00000{number}.parquet" for number in range(5)), "scores.json"]
    schema = pq.read_schema(whole / "part-000000.parquet")
    assert schema.metadata[b"reward_model_path"].decode() == str(tiny_checkpoint)
    assert schema.metadata[b"snapshot"].decode() == dot_corpus.snapshot
    assert (schema.metadata[b"every"], schema.metadata[b"version"]) == (b"", b"1")
    kinds = {name: str(schema.field(name).type) for name in schema.names}
    assert kinds["trajectory"] == kinds["task"] == "string"
    assert kinds["row"] == kinds["frame_index"] == "int64"
    assert {kinds[name] for name in ("timestamp", "progress", "progress_std", "success")} == {"float"}
    manifest = json.loads((whole / "scores.json").read_text())
    assert manifest["complete"]
    assert (manifest["trajectories"], manifest["unreadable"]) == (48, [])
    assert manifest["asked"]["snapshot"] == dot_corpus.snapshot
    assert len(manifest["asked"]["weights"]) == 64


@pytest.mark.parametrize("every", [None, 4])
def test_two_processes_write_the_same_bytes(
    every: int | None, whole: Path, dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    expected = files(whole)
    if every is not None:
        score(place(dot_corpus), tmp_path / "one", tiny_checkpoint, every=every)
        expected = files(tmp_path / "one")
    done: list[int] = []
    source = open_source(str(place(dot_corpus)))
    job, model = plan(source, tmp_path / "two", str(tiny_checkpoint), "cpu", every=every, size=10)
    outcome = bulk_run.run(job, model, Crew(workers=2), lambda more, frames: done.append(more))
    assert outcome.trajectories == sum(done) == 48
    assert files(tmp_path / "two") == expected


def test_two_ray_machines_write_the_same_bytes(
    whole: Path, dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from ray.cluster_utils import Cluster

    room = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**room, "include_dashboard": False})
    try:
        second = cluster.add_node(**room)
        cluster.wait_for_nodes()
        outcome = score(place(dot_corpus), tmp_path / "ray", tiny_checkpoint, Crew(ray=cluster.address))
        assert outcome.new_trajectories == 48
        assert files(tmp_path / "ray") == files(whole)

        # and so does one that is left alone: its parts are given to the other
        lost: list[Any] = []
        before = ready_ray_workers()

        def lose(trajectories: int, frames: int) -> None:
            if not lost:
                lost.append(second)
                until(lambda: both_wait(before))  # so that the other is given a part
                cluster.remove_node(second, allow_graceful=False)
                until(lambda: len(ready_ray_workers() - before) == 1)  # it works on for a moment

        job, model = plan(open_source(str(place(dot_corpus))), tmp_path / "left", str(tiny_checkpoint), "cpu", size=2)
        assert bulk_run.run(job, model, Crew(ray=cluster.address), lose).trajectories == 48
        assert "a worker died" in caplog.text
    finally:
        cluster.shutdown()
    score(place(dot_corpus), tmp_path / "alone", tiny_checkpoint, size=2)
    assert files(tmp_path / "left") == files(tmp_path / "alone")


def ready_ray_workers() -> set[str]:
    """Processes of workers that have loaded their model: their titles tell."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if (process / "cmdline").read_bytes().rstrip(b"\0 ") in (b"ray::Worker", b"ray::Worker.score"):
                found.add(process.name)
    return found


def both_wait(before: set[str]) -> bool:
    """For two seconds: a worker that has not begun to load its model has the same title for a moment."""
    for _ in range(20):
        if len(ready_ray_workers() - before) != 2:
            return False
        time.sleep(0.1)
    return True


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it has not come about"
        time.sleep(0.02)


def test_no_ray_cluster_is_a_sentence(dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path) -> None:
    for address in ("127.0.0.1:1", "nowhere"):
        with pytest.raises(UserError, match=f"no Ray cluster at '{address}'"):
            score(place(dot_corpus), tmp_path / "out", tiny_checkpoint, Crew(ray=address))


def test_a_selection_and_a_snapshot(tiny_checkpoint: Path, tmp_path: Path) -> None:
    corpus = moving_dot.write_corpus(tmp_path / "corpus", per_quality=1)
    Selection.of(corpus, [2, 5, 7], {}).save(tmp_path / "some.json")
    record, frames = moving_dot.attempt(moving_dot.TASKS[0].text, Quality.FAILURE, 77)
    with CorpusWriter(tmp_path / "corpus") as writer:
        writer.add(record, {"main": frames})
    assert score(tmp_path / "corpus", tmp_path / "new", tiny_checkpoint).trajectories == 13
    old = score(tmp_path / "corpus", tmp_path / "old", tiny_checkpoint, snapshot=corpus.snapshot)
    assert old.trajectories == 12
    score(tmp_path / "corpus", tmp_path / "some", tiny_checkpoint, selection=str(tmp_path / "some.json"), size=2)
    some = rows(tmp_path / "some")
    assert some["row"].unique().to_pylist() == [2, 5, 7]
    assert some["trajectory"].unique().to_pylist() == [corpus.ids[row] for row in (2, 5, 7)]
    for name, option in (("new", {"snapshot": corpus.snapshot}), ("old", {})):
        with pytest.raises(UserError, match="another run: snapshot was"):
            score(tmp_path / "corpus", tmp_path / name, tiny_checkpoint, **option)


def test_a_corpus_in_an_object_store(
    whole: Path, dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_s3() as s3:
        for name, value in {
            "ENDPOINT_URL": s3.url,
            "REGION": "us-east-1",
            "ACCESS_KEY_ID": "tester",
            "SECRET_ACCESS_KEY": "secret",
        }.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        url = s3.place()
        with CorpusWriter(url, codec="jpeg") as writer:
            writer.add_source("dot")
            for row in range(12):
                record = dot_corpus[row]
                writer.add(replace(record, reader=None), {"main": record.frames()})
        outcome = score(url, tmp_path / "out", tiny_checkpoint, Crew(workers=2))
    assert outcome.trajectories == 12
    local = rows(whole).slice(0, 12 * 8)
    there = rows(tmp_path / "out")
    assert there["trajectory"].equals(local["trajectory"])
    np.testing.assert_allclose(there["progress"].to_numpy(), local["progress"].to_numpy(), atol=0.05)  # jpeg twice


def test_views(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """A model with one view is shown the first, or the one that is named; one with several those that it knows."""
    with CorpusWriter(tmp_path / "corpus", codec="jpeg") as writer:
        writer.add_source("dot")
        for number in range(3):
            record, frames = moving_dot.attempt(moving_dot.TASKS[number].text, Quality.FAILURE, number)
            cameras = {"near": frames, "wrist": 255 - frames} if number < 2 else {"near": frames}
            writer.add(replace(record, views=tuple(cameras)), cameras)
    corpus = Corpus.open(tmp_path / "corpus")
    one = Scorer.from_pretrained(tiny_checkpoint, device="cpu")

    def scored(name: str, row: int) -> pa.Table:
        table = rows(tmp_path / name)
        return table.filter(pa.compute.equal(table["row"], row))

    score(tmp_path / "corpus", tmp_path / "first", tiny_checkpoint)
    outcome = score(tmp_path / "corpus", tmp_path / "wrist", tiny_checkpoint, view="wrist")
    assert outcome.unreadable == ((corpus.ids[2], "it has no view 'wrist', only near"),)
    for row in range(2):
        same(scored("first", row), one.score(clip_of(corpus, row, "near"), corpus[row].task))
        same(scored("wrist", row), one.score(clip_of(corpus, row, "wrist"), corpus[row].task))

    torch.manual_seed(1)
    backbone = NanoBackbone(image_size=32, width=8, hidden=32, layers=2, heads=2, views=("wrist", "near"))
    RewardModel(backbone, context_frames=8).save_pretrained(str(tmp_path / "model"))
    two = Scorer.from_pretrained(tmp_path / "model", device="cpu")
    for name, every in (("both", None), ("live", 2)):
        score(tmp_path / "corpus", tmp_path / name, tmp_path / "model", every=every)
        for row in range(3):
            clips = {view: clip_of(corpus, row, view) for view in corpus[row].views}
            same(scored(name, row), two.score(clips, corpus[row].task, every))


def test_seconds_to_go_where_the_model_says_them(dot_corpus: Corpus, tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = NanoBackbone(image_size=32, width=8, hidden=32, layers=2, heads=2)
    RewardModel(backbone, context_frames=8, remaining=True).save_pretrained(str(tmp_path / "model"))
    for every in (None, 5):
        out = tmp_path / f"every {every}"
        score(place(dot_corpus), out, tmp_path / "model", every=every)
        expected = Scorer.from_pretrained(tmp_path / "model", device="cpu").score(
            clip_of(dot_corpus, 0), dot_corpus[0].task, every
        )
        assert expected.remaining is not None
        mine = rows(out)["remaining"].to_numpy()[: len(expected)]
        np.testing.assert_allclose(mine, expected.remaining, rtol=1e-4)


# what goes wrong


def damage_last_frame(corpus: Corpus, row: int) -> None:
    data = corpus.payload_bytes(row).tobytes()
    for file in (place(corpus) / "chunks").iterdir():
        content = bytearray(file.read_bytes())
        if (at := content.find(data)) >= 0:
            content[at + len(data) - 9] ^= 4
            file.write_bytes(content)
            return
    raise AssertionError("no file holds it")


def test_a_damaged_trajectory_is_named_left_out_and_tried_again_on_demand(
    whole: Path, dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy_corpus(place(dot_corpus), tmp_path / "corpus")
    corpus, out = Corpus.open(tmp_path / "corpus"), tmp_path / "out"
    damage_last_frame(corpus, 13)
    done = run("--corpus", tmp_path / "corpus", "--out", out, "--checkpoint", tiny_checkpoint, "--part-size", "10")
    assert f"left out: {corpus.ids[13]}: " in done.stderr
    assert "1 could not be read, of 48" in done.stderr
    assert 13 not in rows(out)["row"].to_pylist()
    assert len(rows(out)) == 47 * 8
    manifest = json.loads((out / "scores.json").read_text())
    assert [entry["trajectory"] for entry in manifest["unreadable"]] == [corpus.ids[13]]

    before = files(out)
    damage_last_frame(corpus, 13)  # the same bit again: mended
    assert score(tmp_path / "corpus", out, tiny_checkpoint).kept_parts == 5
    assert files(out) == before
    again = score(tmp_path / "corpus", out, tiny_checkpoint, retry=True)
    assert (again.kept_parts, again.unreadable, again.trajectories) == (4, (), 48)
    np.testing.assert_array_equal(rows(out)["progress"], rows(whole)["progress"])


@pytest.mark.parametrize("every", [None, 1])
def test_an_instruction_that_the_model_cannot_read_leaves_a_gap(every: int | None, tmp_path: Path) -> None:
    tasks = ["push the dot", "push <|vision_start|> the dot", "push the dot"]
    with CorpusWriter(tmp_path / "corpus", codec="jpeg") as writer:
        writer.add_source("dot")
        for number, task in enumerate(tasks):
            record, frames = moving_dot.attempt(moving_dot.TASKS[0].text, Quality.FAILURE, number)
            writer.add(replace(record, task=task), {"main": frames})
    tiny_vlm.qwen3_model().save_pretrained(str(tmp_path / "model"))
    outcome = score(tmp_path / "corpus", tmp_path / "out", tmp_path / "model", every=every)
    assert outcome.trajectories == 2
    ((_, why),) = outcome.unreadable
    assert "<|vision_start|>" in why
    assert set(rows(tmp_path / "out")["row"].to_pylist()) == {0, 2}


def test_where_nothing_can_be_read_it_fails(dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"none of 48 could be read; the first, dot/.*: it has no view 'side', only main"
    ):
        score(place(dot_corpus), tmp_path / "out", tiny_checkpoint, view="side")
    assert not files(tmp_path / "out")


def test_a_run_that_came_to_nothing_is_no_hindrance(dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Ray cluster"):
        score(place(dot_corpus), tmp_path / "out", tiny_checkpoint, Crew(ray="127.0.0.1:1"), size=7)
    assert score(place(dot_corpus), tmp_path / "out", tiny_checkpoint, size=10).parts == 5


BROKEN: dict[str, Callable[[Path], object]] = {
    "cut": lambda part: part.write_bytes(part.read_bytes()[:-30]),
    "empty": lambda part: part.write_bytes(b""),
    "a bit flipped": lambda part: part.write_bytes(flipped(part.read_bytes(), first_number(part))),
    "gone": lambda part: part.unlink(),
}


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def first_number(part: Path) -> int:
    """A place among the compressed values of the column `progress`."""
    column = pq.read_metadata(part).row_group(0).column(5)
    return column.data_page_offset + column.total_compressed_size // 2


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_part_is_made_again_and_the_others_are_kept(
    name: str, whole: Path, dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = copy_of(whole, tmp_path)
    BROKEN[name](out / "part-000002.parquet")
    (out / ".writing-left by a killed one").mkdir()
    times = {path: path.stat().st_mtime_ns for path in out.glob("part-*") if path.name != "part-000002.parquet"}
    outcome = score(place(dot_corpus), out, tiny_checkpoint)
    assert (outcome.kept_parts, outcome.new_trajectories, outcome.trajectories) == (4, 10, 48)
    assert files(out) == files(whole)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_no_flipped_bit_changes_a_score_unseen(
    whole: Path, dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = copy_of(whole, tmp_path)
    job, _ = plan(open_source(str(place(dot_corpus))), out, str(tiny_checkpoint), "cpu", size=10)
    part = out / "part-000001.parquet"
    data, table, report = part.read_bytes(), pq.read_table(part), job.folder.report(1)
    assert report is not None
    rng, found = np.random.default_rng(0), 0
    for _ in range(300):
        part.write_bytes(flipped(data, int(rng.integers(len(data))), int(rng.integers(8))))
        try:
            said = job.folder.report(1)
        except UserError:
            said = None
        if said is None:
            found += 1
        else:  # in what no reader looks at
            assert said == report
            assert pq.read_table(part).equals(table, check_metadata=True)
    assert found > 150


def copy_of(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "copy").mkdir()
    for name, content in files(folder).items():
        (tmp_path / "copy" / name).write_bytes(content)
    return tmp_path / "copy"


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "every": ({"every": 2}, "every was not given and is 2 now"),
    "part size": ({"size": 5}, "part_size was 10 and is 5 now"),
    "precision": ({"dtype": "bfloat16"}, "dtype was not given and is bfloat16 now"),
    "camera": ({"view": "main"}, "view was not given and is main now"),
}


@pytest.mark.parametrize("name", list(OTHER))
def test_other_options_do_not_go_into_the_same_folder(
    name: str, whole: Path, dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = copy_of(whole, tmp_path)
    options, says = OTHER[name]
    with pytest.raises(UserError, match=says):
        score(place(dot_corpus), out, tiny_checkpoint, **options)
    assert files(out) == files(whole)


def test_another_model_and_another_corpus_do_not_either(
    whole: Path, dot_corpus: Corpus, tiny_model: RewardModel, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = copy_of(whole, tmp_path)
    moved = tmp_path / "the same elsewhere"
    tiny_model.save_pretrained(str(moved))
    assert score(place(dot_corpus), out, moved).kept_parts == 5
    torch.manual_seed(5)
    other = RewardModel(NanoBackbone(image_size=32, width=8, hidden=32, layers=2, heads=2), context_frames=8)
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(UserError, match="weights was"):
        score(place(dot_corpus), out, tmp_path / "other")
    moving_dot.write_corpus(tmp_path / "corpus", per_quality=1)
    with pytest.raises(UserError, match="snapshot was"):
        score(tmp_path / "corpus", out, tiny_checkpoint)


def test_a_folder_of_something_else_is_left_alone(
    whole: Path, dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def refused(says: str) -> None:
        before = files(out)
        with pytest.raises(UserError, match=says):
            score(place(dot_corpus), out, tiny_checkpoint)
        assert files(out) == before

    out = copy_of(whole, tmp_path)
    foreign = pa.table({"mine": [1, 2]})
    pq.write_table(foreign, out / "part-000001.parquet")
    refused("part-000001.parquet belongs to another run")
    (out / "part-000001.parquet").write_bytes((whole / "part-000003.parquet").read_bytes())
    refused("part-000001.parquet is part 3 of this run")
    (out / "part-000001.parquet").write_bytes((whole / "part-000001.parquet").read_bytes())
    pq.write_table(foreign, out / "part-000007.parquet")
    refused("holds part-000007.parquet, which is no part of this run")
    (out / "part-000007.parquet").unlink()
    (out / "scores.json").write_text('{"format": "another"}')
    refused("some other file")
    (out / "scores.json").unlink()
    refused("holds part-000000.parquet, but no scores.json")


def test_two_runs_at_once_do_not_mix(whole: Path, dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = copy_of(whole, tmp_path)
    job, _ = plan(open_source(str(place(dot_corpus))), out, str(tiny_checkpoint), "cpu", size=10)
    with job.folder.held(), pytest.raises(UserError, match=r"another process .* is writing to it"):
        score(place(dot_corpus), out, tiny_checkpoint)
    assert score(place(dot_corpus), out, tiny_checkpoint).kept_parts == 5


# the command, and its end


def command(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*RBM, "score", *map(str, arguments)], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, ["score", "--device", "cpu", *map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def test_the_command(whole: Path, dot_corpus: Corpus, tiny_checkpoint: Path, tmp_path: Path) -> None:
    usual = ("--corpus", place(dot_corpus), "--checkpoint", tiny_checkpoint, "--part-size", "10")
    done = run(*usual, "--out", tmp_path / "a")
    assert "48 trajectories, 5 parts" in done.stderr
    assert "48 scored, 384 frames, in " in done.stderr
    assert done.stdout == f"{tmp_path / 'a'}\n"
    facts = json.loads(run(*usual, "--out", tmp_path / "a", "--json").stdout)
    assert (facts["kept_parts"], facts["trajectories"], facts["folder"]) == (5, 48, str(tmp_path / "a"))
    assert files(tmp_path / "a") == files(whole)


def test_one_name_for_videos_and_corpora(tmp_path: Path) -> None:
    videos, corpora = run("--help").stdout, run("--corpus", "x", "--help").stdout
    assert "--plot" in videos
    assert "rbm score --corpus PATH --out FOLDER" in " ".join(videos.split())
    assert "--part-size" in corpora
    assert "--plot" not in corpora
    done = command(f"--corpus={tmp_path}/none", "--out", tmp_path / "out", code=2)
    assert "no such directory" in done.stderr
    missing = CliRunner().invoke(cli, ["score", "--corpus", str(tmp_path)])
    assert (missing.exit_code, "Missing option '--out'" in missing.stderr) == (2, True)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command on the bundled corpus, and gives it when it has finished a part of several hundred."""
    from rbm.assets import bundled_corpus

    started: list[subprocess.Popen[str]] = []

    def start(*options: str) -> subprocess.Popen[str]:
        arguments = ["score", "--corpus", str(bundled_corpus()), "--out", str(tmp_path / "out"), "--part-size", "2"]
        process = subprocess.Popen(
            [*RBM, *arguments, "--device", "cpu", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        until(lambda: (tmp_path / "out" / "part-000003.parquet").exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def all_whole(folder: Path) -> bool:
    """Every file is whole, and nothing else lies there than parts and the manifest."""
    for path in parts(folder):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            file.read()
    return {path.name for path in folder.iterdir()} == {*(path.name for path in parts(folder)), "scores.json"}


@pytest.mark.parametrize("options", [(), ("--workers", "2")])
def test_ctrl_c_leaves_whole_parts_only(
    options: tuple[str, ...], running: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = running(*options)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, errors
    assert "stopped; the same command goes on" in errors
    assert "Traceback" not in errors
    there = parts(tmp_path / "out")
    assert 0 < len(there) < 366
    assert all_whole(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in there}
    again = running(*options)
    until(lambda: len(parts(tmp_path / "out")) > len(there) or again.poll() is not None)
    assert len(parts(tmp_path / "out")) > len(there)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_killed_coordinator_leaves_no_workers(running: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = running("--workers", "2")
    workers = children(process.pid)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    until(lambda: not any(Path("/proc", str(pid)).exists() for pid in workers))
    for path in parts(tmp_path / "out"):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            file.read()


def test_a_killed_worker_is_a_sentence(running: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = running("--workers", "2")
    os.kill(max(children(process.pid)), signal.SIGKILL)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 2, errors
    assert "a worker was killed by signal 9" in errors
    assert "the same command goes on" in errors
    assert all_whole(tmp_path / "out")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# LeRobot data sets


def film_of(folder: Path, version: str, number: int, camera: str = CAMERAS[0]) -> np.ndarray:
    """All frames of an episode, decoded by plain PyAV from the start of the file."""
    length = EPISODES[number].length
    if version == "v3.0":
        path = folder / f"videos/{camera}/chunk-000/file-{number // 3:03d}.mp4"
        before = sum(one.length for one in EPISODES[number // 3 * 3 : number])
    else:
        path, before = folder / f"videos/chunk-000/{camera}/episode_{number:06d}.mp4", 0
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), before + length)]
    return np.stack(frames[before:])


@pytest.mark.parametrize(("version", "codec"), [("v3.0", "av1"), ("v2.1", "h264")])
@pytest.mark.parametrize("every", [None, 1, 4])
def test_a_lerobot_data_set(version: str, codec: str, every: int | None, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder, out = write_lerobot(tmp_path / "set", version, codec), tmp_path / "out"
    outcome = score(folder, out, tiny_checkpoint, every=every, size=2)
    total = sum(one.length for one in EPISODES)
    assert (outcome.parts, outcome.trajectories, outcome.rows) == (3, len(EPISODES), total)
    table = pq.read_table(out / "robometer_progress.parquet")
    assert table.equals(rows(out))
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds == {
        "index": "int64", "episode_index": "int64", "frame_index": "int64", "progress_dense": "float",
        "progress_sparse": "float", "progress_std": "float", "success": "float", "scored": "bool",
    }  # fmt: skip
    metadata = table.schema.metadata
    assert (metadata[b"reward_model_path"].decode(), metadata[b"version"]) == (str(tiny_checkpoint), b"1")
    np.testing.assert_array_equal(table["index"], np.arange(total))
    assert all(column.null_count == 0 for column in table.columns)
    scorer = Scorer.from_pretrained(tiny_checkpoint, device="cpu")
    for number, filmed in enumerate(EPISODES):
        mine = table.filter(pa.compute.equal(table["episode_index"], number))
        np.testing.assert_array_equal(mine["frame_index"], np.arange(filmed.length))
        scores = scorer.score(film_of(folder, version, number), str(filmed.tasks), every)
        assert np.flatnonzero(mine["scored"]).tolist() == scores.frame_index.tolist()
        dense = scores.dense()
        for ours, theirs in (("progress_dense", "progress"), ("progress_std", "progress_std"), ("success", "success")):
            np.testing.assert_allclose(mine[ours].to_numpy(), getattr(dense, theirs), atol=2e-5)
        np.testing.assert_array_equal(mine["progress_sparse"], mine["progress_dense"])


def test_reward_weighted_cloning_finds_a_number_for_every_frame(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Its weight of frame t stands on p[t + chunk] − p[t] within the episode; without a number it is 1 whatever p."""
    score(write_lerobot(tmp_path / "set"), tmp_path / "out", tiny_checkpoint)
    table = pq.read_table(tmp_path / "out" / "robometer_progress.parquet")
    for column in ("progress_sparse", "progress_dense"):
        found = dict(zip(table["index"].to_pylist(), table[column].to_pylist(), strict=True))
        ends: dict[int, int] = {}
        for index, episode in zip(table["index"].to_pylist(), table["episode_index"].to_pylist(), strict=True):
            ends[episode] = index
        for index, episode in zip(table["index"].to_pylist(), table["episode_index"].to_pylist(), strict=True):
            assert np.isfinite(found[min(index + 8, ends[episode])] - found[index])


def test_two_processes_join_the_same_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_lerobot(tmp_path / "set")
    score(folder, tmp_path / "one", tiny_checkpoint, size=1)
    score(folder, tmp_path / "two", tiny_checkpoint, Crew(workers=2), size=1)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    (tmp_path / "two" / "robometer_progress.parquet").unlink()
    assert score(folder, tmp_path / "two", tiny_checkpoint, size=1).kept_parts == 5
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_cameras_of_a_data_set(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_lerobot(tmp_path / "set")
    usual = ("--corpus", folder, "--checkpoint", tiny_checkpoint)
    done = run(*usual, "--out", tmp_path / "first")
    assert "5 episodes, 1 parts" in done.stderr
    assert f"camera: {CAMERAS[0]} (of {', '.join(CAMERAS)})" in done.stderr
    assert done.stdout == f"{tmp_path / 'first' / 'robometer_progress.parquet'}\n"
    assert f"camera: {CAMERAS[1]} (of" in run(*usual, "--out", tmp_path / "wrist", "--view", "wrist").stderr
    scorer = Scorer.from_pretrained(tiny_checkpoint, device="cpu")
    for name, camera in (("first", CAMERAS[0]), ("wrist", CAMERAS[1])):
        table = pq.read_table(tmp_path / name / "robometer_progress.parquet")
        expected = scorer.score(film_of(folder, "v3.0", 4, camera), "lift the cube").dense()
        np.testing.assert_allclose(table["progress_dense"].to_numpy()[-31:], expected.progress, atol=2e-5)
    with pytest.raises(UserError, match="no camera 'side'"):
        score(folder, tmp_path / "x", tiny_checkpoint, view="side")
    with pytest.raises(UserError, match="snapshots and selections are of a corpus"):
        score(folder, tmp_path / "x", tiny_checkpoint, snapshot="v1")


def test_a_model_with_several_views_is_shown_the_cameras_that_it_knows(tmp_path: Path) -> None:
    torch.manual_seed(1)
    backbone = NanoBackbone(image_size=32, width=8, hidden=32, layers=2, heads=2, views=("wrist", "top"))
    RewardModel(backbone, context_frames=8).save_pretrained(str(tmp_path / "model"))
    scorer = Scorer.from_pretrained(tmp_path / "model", device="cpu")
    folder = write_lerobot(tmp_path / "set")
    for every in (None, 3):
        score(folder, tmp_path / f"every {every}", tmp_path / "model", every=every)
        table = pq.read_table(tmp_path / f"every {every}" / "robometer_progress.parquet")
        films = {view: film_of(folder, "v3.0", 0, f"observation.images.{view}") for view in ("wrist", "top")}
        expected = scorer.score(films, "push the cube", every).dense()
        np.testing.assert_allclose(table["progress_dense"].to_numpy()[:23], expected.progress, atol=2e-5)


@pytest.mark.parametrize("every", [None, 1])
def test_an_episode_that_cannot_be_read_leaves_a_gap(every: int | None, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Also one whose damage is found late, behind frames that were scored; those after it in its file are read."""
    filmed = (*EPISODES, Filmed(["reach", "grasp"], 2))
    folder = write_lerobot(tmp_path / "set", codec="av1", episodes=filmed, per_file=4)
    blank(folder / f"videos/{CAMERAS[0]}/chunk-000/file-000.mp4", range(98, 102))  # 66 to 69 of episode 2
    table = pq.read_table(folder / "data/chunk-000/file-001.parquet")
    pq.write_table(table.slice(1), folder / "data/chunk-000/file-001.parquet")  # the first of episode 4
    outcome = score(folder, tmp_path / "out", tiny_checkpoint, every=every, size=5)
    (second, why), (fourth, why_not) = outcome.unreadable
    assert (second, fourth) == ("episode 2", "episode 4")
    assert "cannot be decoded; the file is damaged" in why
    assert "has 30 frames of episode 4" in why_not
    assert (outcome.trajectories, outcome.several_tasks) == (4, 1)
    table = pq.read_table(tmp_path / "out" / "robometer_progress.parquet")
    assert table["episode_index"].unique().to_pylist() == [0, 1, 3, 5]
    assert np.all(np.diff(table["index"]) > 0)
    assert table["index"][-1].as_py() == sum(one.length for one in filmed) - 1
    scorer = Scorer.from_pretrained(tiny_checkpoint, device="cpu")
    expected = scorer.score(film_of(folder, "v3.0", 1), "pull the cube", every).dense()
    mine = table.filter(pa.compute.equal(table["episode_index"], 1))
    np.testing.assert_allclose(mine["progress_dense"].to_numpy(), expected.progress, atol=2e-5)


def blank(video: Path, frames: range) -> None:
    """Overwrite some packets of a video with zeros."""
    with av.open(str(video)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(video.read_bytes())
    for number in frames:
        at, size = packets[number]
        assert at is not None
        data[at : at + size] = bytes(size)
    video.write_bytes(data)


def test_a_progress_file_of_something_else_is_not_overwritten(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_lerobot(tmp_path / "set")
    theirs = folder / "robometer_progress.parquet"
    pq.write_table(pa.table({"index": [0], "progress_sparse": [0.5]}), theirs)
    before = theirs.read_bytes()
    with pytest.raises(UserError, match="is there already, of something else"):
        score(folder, folder, tiny_checkpoint)
    assert theirs.read_bytes() == before
    assert not list(folder.glob("part-*"))
