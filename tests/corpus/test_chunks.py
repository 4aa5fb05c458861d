import logging

import numpy as np
import pytest
import zarr
from attempts import payload_bytes, write

from rbm.corpus import Corpus, layout, store


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "SHARD_BYTES", 1 << 13)
    monkeypatch.setattr(layout, "INNER_CHUNK_BYTES", 1 << 11)
    return write(tmp_path / "c", range(20), commit_every=7)


def test_the_files_hold_what_icechunk_reads(corpus):
    assert len(corpus._files._keys) > 6
    repository = store.open_repository(corpus.location)
    root = zarr.open_group(repository.readonly_session(snapshot_id=corpus.snapshot).store, mode="r")
    for row in range(len(corpus)):
        segment, offset, length = (int(getattr(corpus.columns, name)[row]) for name in ("segment", "offset", "length"))
        there = root[f"segments/{segment}"][offset : offset + length]
        np.testing.assert_array_equal(corpus.payload(row).data[:], there)


def test_manifests_of_another_version_are_left_to_icechunk(corpus, tmp_path, monkeypatch, caplog):
    """Byte 36 of a manifest is the version of Icechunk's specification."""
    expected = payload_bytes(corpus)
    monkeypatch.setenv("RBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rbm.corpus.chunks.SPECIFICATION", 7)
    with caplog.at_level(logging.WARNING):
        again = Corpus.open(corpus.location)
    assert "read through Icechunk" in caplog.text
    assert payload_bytes(again) == expected


def test_a_damaged_manifest_never_gives_wrong_bytes(corpus, tmp_path, monkeypatch):
    expected = payload_bytes(corpus)
    manifests = sorted((corpus.location.local / "manifests").iterdir())
    rng = np.random.default_rng(0)
    for number, file in enumerate(manifests):
        whole = file.read_bytes()
        data = bytearray(whole)
        data[int(rng.integers(39, len(data)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        monkeypatch.setenv("RBM_CACHE", str(tmp_path / f"cache-{number}"))
        try:
            for id, payload in payload_bytes(Corpus.open(corpus.location)).items():
                assert payload == expected[id]
        except Exception as error:
            assert "corpus" in str(error)  # noqa: PT017
        file.write_bytes(whole)
