"""Files that mean harm: each is refused with a sentence, and the server is afterwards as it was before."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from bombs import Touch, gzipped, jpeg, mp4, npy, npy_that_says, npz, png
from siege import TASK, MiB, Siege, named, sentence
from watch import opened

from rbm.scoring import wire

JPEG = jpeg(32, 24)
GOOD = mp4(JPEG, 32, 24, 9)


def cut(video: bytes, at: float) -> bytes:
    return video[: int(len(video) * at)]


def with_length(video: bytes, box: bytes, length: int) -> bytes:
    """An mp4 in which one box claims another length."""
    place = video.index(box) - 4
    return video[:place] + length.to_bytes(4, "big") + video[place + 4 :]


FILES: dict[str, Callable[[], bytes]] = {
    "one byte": lambda: b"\0",
    "text": lambda: b"open the drawer, please\n" * 100,
    "a page": lambda: b"<html><body><script>alert(1)</script></body></html>",
    "noise": lambda: np.random.default_rng(0).bytes(100_000),
    "zeros": lambda: bytes(1_000_000),
    "a pickle": lambda: pickle.dumps({"frames": [1, 2, 3]}),
    "a zip of zeros": lambda: npz(256),
    "zeros in gzip": lambda: gzipped(256),
    "a video in gzip": lambda: gzip.compress(GOOD),
    "an mp4 that is cut": lambda: cut(GOOD, 0.5),
    "an mp4 that is cut in its last byte": lambda: GOOD[:-1],
    "an mp4 of nothing but its first box": lambda: GOOD[:28],
    "an mp4 whose index claims to be longer": lambda: with_length(GOOD, b"moov", 1 << 31),
    "an mp4 whose index claims to be shorter": lambda: with_length(GOOD, b"moov", 100),
    "an mp4 whose pixels claim to be everything": lambda: with_length(GOOD, b"mdat", 0xFFFFFFFF),
    "an mp4 of a million frames in 300 bytes": lambda: mp4(JPEG, 32, 24, 10**6, offsets=3),
    "an mp4 of 300 million frames": lambda: mp4(JPEG, 32, 24, 3 * 10**8, offsets=3),
    "an mp4 of 300 million empty frames": lambda: mp4(JPEG, 32, 24, 3 * 10**8, offsets=3, length=0),
    "an mp4 of a million frames that are there": lambda: mp4(JPEG, 32, 24, 10**6),
    "an mp4 of 60000 × 60000": lambda: mp4(jpeg(32, 24, (60000, 60000)), 60000, 60000, 3),
    "an mp4 whose pictures are 60000 × 60000": lambda: mp4(jpeg(32, 24, (60000, 60000)), 32, 24, 3),
    "an mp4 whose pictures are 20000 × 20000": lambda: mp4(jpeg(32, 24, (20000, 20000)), 32, 24, 3),
    "an mp4 that claims 16 × 16 for pictures of 5000 × 4000": lambda: mp4(jpeg(5000, 4000), 16, 16, 3),
    "a png of 60000 × 60000": lambda: png(60000, 60000),
    "a png of 30000 × 30000 with all its pixels": lambda: png(30000, 30000, filled=True),
    "an npy of 60000 × 60000": lambda: npy_that_says("(9, 60000, 60000, 3)"),
    "an npy of more than there can be": lambda: npy_that_says("(999999999999, 999999999999, 999999999999, 3)"),
    "an npy of minus one": lambda: npy_that_says("(-1, 4, 6, 3)"),
    "an npy with a shape of words": lambda: npy_that_says("('a', 'b', 'c', 'd')"),
    "an npy with an endless shape": lambda: npy_that_says("(" + "1," * 40 + ")"),
    "an npy whose header is code": lambda: npy_that_says("__import__('os').system('x')"),
    "an npy that is too short": lambda: npy(np.zeros((9, 20, 20, 3), np.uint8))[:-1],
    "an npy that is too long": lambda: npy(np.zeros((9, 20, 20, 3), np.uint8)) + b"\0",
    "an npy of too many frames": lambda: npy(np.zeros((257, 2, 2, 3), np.uint8)),
    "an npy of objects": lambda: npy_that_says("(1, 4, 6, 3)", "|O"),
    "an npy of floats": lambda: npy(np.zeros((2, 8, 8, 3), np.float32)),
    "an npy of big-endian words": lambda: npy(np.zeros((2, 8, 8, 3), ">u2")),
    "an npy of records": lambda: npy(np.zeros((2, 8, 8, 3), [("a", "u1")])),
    "an npy of one picture": lambda: npy(np.zeros((8, 8, 3), np.uint8)),
    "an npy without frames": lambda: npy(np.zeros((0, 8, 8, 3), np.uint8)),
    "an npy without pixels": lambda: npy(np.zeros((8, 0, 8, 3), np.uint8)),
}


@pytest.mark.parametrize("kind", ["mp4", "npy", "other"])
def test_files_that_are_no_clips(siege: Siege, kind: str) -> None:
    with siege.unharmed():
        for name, make in FILES.items():
            if kind == next((known for known in ("mp4", "npy") if known in name), "other"):
                with named(name):
                    is_refused(siege, make())


def is_refused(siege: Siege, data: bytes) -> None:
    assert len(data) < 8 * MiB
    began = time.monotonic()
    for every in ({}, {"every": "1"}):
        sentence(siege.upload(data, **every), 400, 413, 415)
    if data.startswith(b"\x93NUMPY"):
        sample = {"sample_type": "progress", "trajectory": {"frames": {"__numpy_file__": "f"}, "task": TASK}}
        form = {"data": {"sample_0": json.dumps(sample)}, "files": {"f": ("f.npy", data)}}
        sentence(siege.post("/evaluate_batch_npy", **form), 400, 413)
    assert time.monotonic() - began < 12


def test_the_good_file_is_scored(siege: Siege) -> None:
    """What the others are variations of."""
    assert siege.upload(GOOD).status_code == 200


def test_a_video_that_is_damaged_anywhere(siege: Siege) -> None:
    """It is scored or refused; a decoder that it brings down is started again."""
    random = np.random.default_rng(1)
    with siege.unharmed():
        for _ in range(60):
            damaged = bytearray(GOOD)
            for place in random.integers(0, len(GOOD), 1 + int(random.integers(12))):
                damaged[place] = random.integers(256)
            answer = siege.upload(bytes(damaged))
            if answer.status_code != 200:
                sentence(answer, 400, 413, 415)


def test_a_pickle_in_an_npy_is_not_opened(siege: Siege, tmp_path: Path) -> None:
    evil = npy(np.array([Touch(str(tmp_path / "touched"))], dtype=object))
    sample = {"sample_type": "progress", "trajectory": {"frames": {"__numpy_file__": "f"}, "task": TASK}}
    with siege.unharmed():
        for data in (evil, pickle.dumps(Touch(str(tmp_path / "touched")))):
            sentence(siege.upload(data), 400, 415)
            form = {"data": {"sample_0": json.dumps(sample)}, "files": {"f": ("f.npy", data)}}
            sentence(siege.post("/evaluate_batch_npy", **form), 400)
            sentence(siege.msgpack("/v1/score", data), 400)
    assert list(tmp_path.iterdir()) == []


def test_a_body_in_gzip_is_not_unpacked(siege: Siege) -> None:
    body = gzip.compress(wire.pack({"clips": [{"frames": siege.frames, "task": TASK}]}))
    with siege.unharmed():
        for content in (body, gzipped(256)):
            headers = {"content-type": "application/msgpack", "content-encoding": "gzip"}
            sentence(siege.post("/v1/score", headers, content=content), 400, 415)
            headers["content-type"] = "application/json"
            sentence(siege.post("/evaluate_batch", headers, content=content), 400, 415)


def test_names_of_files_are_not_opened(siege: Siege, tmp_path: Path) -> None:
    """Neither paths nor URLs, wherever they stand: as video, task, name of the upload, or inside of it."""
    canary = tmp_path / "canary.mp4"
    canary.write_bytes(GOOD)
    with opened(canary) as times:
        canary.read_bytes()
        assert times() > 0, "opening is not seen here: this test would prove nothing"
    linked = mp4(JPEG, 32, 24, 9, elsewhere=str(canary))
    (tmp_path / "linked.mp4").write_bytes(linked)
    with opened(canary) as times:
        allowed = {"enable_drefs": "1", "use_absolute_path": "1"}
        with av.open(str(tmp_path / "linked.mp4"), options=allowed) as container:
            assert len(list(container.decode(video=0))) == 9
        assert times() > 0, "who is allowed to follow this link does not: it would prove nothing"
    names = [str(canary), f"file://{canary}", f"concat:{canary}", f"pipe:{canary}", os.path.relpath(canary)]
    with siege.unharmed(), opened(canary) as times:
        for name in names:
            sentence(siege.post("/v1/score", data={"video": name, "task": TASK}), 415)
            sentence(siege.post("/v1/score", files={"video": (None, name), "task": (None, TASK)}), 400)
            sentence(siege.upload(name.encode(), name), 400, 415)
            assert siege.upload(GOOD, name, task=name).status_code == 200
            for inside in playlists(name):
                sentence(siege.upload(inside, name), 400, 415)
            for path, fields in (
                ("/v1/score", {"clips": [{"frames": name, "task": TASK}]}),
                ("/v1/score", {"clips": [{"video": name, "task": TASK}]}),
                ("/v1/compare", {"a": name, "b": name, "task": TASK}),
                ("/v1/rank", {"videos": [name, name], "task": TASK}),
            ):
                sentence(siege.msgpack(path, wire.pack(fields)), 400)
        sentence(siege.upload(linked), 400)
        assert times() == 0, "the server opened a file that a client named"


def test_urls_are_not_fetched(siege: Siege) -> None:
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/clip.mp4"

        def answer() -> None:
            try:
                while True:
                    connected, _ = listening.accept()
                    calls.append(connected)
                    connected.close()
            except OSError:
                return

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with siege.unharmed():
            sentence(siege.post("/v1/score", files={"video": (None, url), "task": (None, TASK)}), 400)
            sentence(siege.upload(url.encode(), url), 400, 415)
            for inside in playlists(url):
                sentence(siege.upload(inside, url), 400, 415)
            sentence(siege.msgpack("/v1/score", wire.pack({"clips": [{"frames": url, "task": TASK}]})), 400)
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(5)
    assert calls == []


def playlists(name: str) -> list[bytes]:
    """Files that ask a player to open another."""
    reference = name.encode()
    return [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n" + reference + b"\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile '" + reference + b"'\n",
        b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "' + reference + b'">]><svg><text>&b;</text></svg>',
        b'<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>' + reference + b"</BaseURL></Period></MPD>",
        b"v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 26\na=control:" + reference + b"\n",
    ]
