"""The benchmarks run, small, from the command, and say what they should; what they measure is no test's business."""

import json
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rbm.bench import codecs, figure, layouts, measure, reading, scale, synthetic
from rbm.corpus import Corpus
from rbm.errors import UserError


def bench(*arguments: str) -> str:
    command = Path(sys.executable).with_name("rbm")
    done = subprocess.run([command, "bench", "corpus", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_growth_and_its_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "PAYLOADS", 6)
    facts = scale.run((100, 300), keep=tmp_path / "kept", workers=2, blocks=3)
    assert [row["trajectories"] for row in facts["results"]] == [100, 300]
    for row in facts["results"]:
        assert set(row["worker_private_MB"]) == {"spawn", "forkserver", "fork"}
        assert min(row["draw_us"], row["pair_us"], row["sample_ms"], row["open_seconds"]) > 0
    figure.draw(facts, tmp_path / "scale.png")
    assert Image.open(tmp_path / "scale.png").width > 1000
    assert len(Corpus.open(tmp_path / "kept" / "corpus-300")) == 300
    json.dumps(facts)


def test_a_synthetic_corpus_is_uneven_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "PAYLOADS", 6)
    corpus = synthetic.make(tmp_path / "c", 500, 20, height=48, width=64)
    counts = np.bincount(corpus.columns.task, minlength=20)
    assert counts.min() >= 1
    assert counts.max() > 2 * counts.min()
    assert len(np.unique(corpus.columns.content)) == 500
    assert corpus.frames(499, [0, 63]).shape == (2, 48, 64, 3)


def test_writing_against_encoding(tmp_path):
    out = tmp_path / "write.json"
    facts = json.loads(bench("write", "--workers", "2", "--trajectories", "5", "--rounds", "1", "--out", str(out)))
    assert facts == json.loads(out.read_text())
    assert facts["written_over_encoder"] > 0
    assert set(facts["trajectories_a_second"]) == {"encoder_alone", "written"}


def test_reading_against_npz(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "clips.npy", np.stack([synthetic.scene(rng, 48, 64, 0.0) for _ in range(2)]))
    facts = reading.run(tmp_path / "clips.npy", trajectories=3, rounds=2)
    for content in ("clean", "noise"):
        result = facts["results"][content]
        assert set(result) == {"npz", "jpeg", "jpeg_reduced", "h264"}
        assert result["npz"]["times_npz"] == result["npz"]["npz_bytes_over_these"] == 1
        assert result["h264"]["bytes_a_trajectory"] < result["jpeg"]["bytes_a_trajectory"]
    np.save(tmp_path / "wrong.npy", np.zeros((2, 3), np.uint8))
    for run in (reading.run, codecs.run):
        with pytest.raises(UserError, match=r"wrong\.npy"):
            run(tmp_path / "wrong.npy")


def test_layouts(monkeypatch):
    monkeypatch.setattr(layouts, "TOTAL", 32 << 20)
    monkeypatch.setattr(layouts, "SHARDS", (16 << 20,))
    monkeypatch.setattr(layouts, "INNER", (1 << 20,))
    facts = layouts.run(rounds=2)
    assert set(facts["write_MB_a_second"]["16 MiB"]) == {"zarr", "object"}
    assert {"zarr", "byte range"} <= set(facts["read_ms"]["1024 KiB"])
    assert set(facts["corpus_read_ms"]) == {"whole payload", "eight frames", "record"}


def test_memory_counts_what_is_written_and_not_what_is_mapped(tmp_path):
    np.save(tmp_path / "big.npy", np.ones(20_000_000, np.uint8))
    before = measure.private_megabytes()
    mapped = np.load(tmp_path / "big.npy", mmap_mode="r")
    assert mapped.sum() == 20_000_000
    assert measure.private_megabytes() - before < 5
    with mmap.mmap(-1, 20_000_000, flags=mmap.MAP_PRIVATE) as fresh:  # not memory that was used and freed before
        fresh.write(b"1" * 20_000_000)
        assert measure.private_megabytes() - before > 15


def test_a_call_takes_its_turn():
    order = []
    spent = measure.medians({"a": lambda number: order.append(("a", number)), "b": lambda number: order.append("b")}, 2)
    assert order == [("a", 0), "b", ("a", 1), "b"]
    assert set(spent) == {"a", "b"}
