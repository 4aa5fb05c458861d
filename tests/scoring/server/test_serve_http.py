"""Clips over HTTP: the same scores as in this process, in both formats, and sentences for everything else."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from rbm.scoring import wire
from rbm.scoring.scores import Scores

TASK = "open the drawer"
ARRAYS = ("progress", "progress_std", "success")


def npy(frames: np.ndarray) -> bytes:
    held = io.BytesIO()
    np.save(held, frames)
    return held.getvalue()


def same(answer: dict, scores: Scores) -> None:
    """Within rounding: a batch may be another one."""
    for name in ARRAYS:
        np.testing.assert_allclose(answer[name], getattr(scores, name), atol=2e-5)
    np.testing.assert_array_equal(answer["frame_index"], scores.frame_index)
    np.testing.assert_allclose(answer["timestamp"], scores.timestamp, atol=1e-5)
    assert answer["task"] == scores.task
    assert answer["n_frames"] == scores.n_frames
    assert answer["fps"] == pytest.approx(scores.fps)


def test_a_video_file_is_scored_as_in_process(server, own, video_path):
    files = {"video": ("any/name\x00.exe", video_path.read_bytes())}
    done = server.post("/v1/score", files=files, data={"task": TASK})
    assert done.status_code == 200, done.text
    (scores,) = done.json()["scores"]
    same(scores, own.score(video_path, TASK))


def test_every_frame_of_a_video_is_scored_as_in_process(server, own, video_path):
    for every in (1, 7):
        files = {"video": video_path.read_bytes()}
        done = server.post("/v1/score", files=files, data={"task": TASK, "every": str(every)})
        same(done.json()["scores"][0], own.score(video_path, TASK, every=every))


def test_dense_scores_have_a_number_for_every_frame(server, own, video_path):
    done = server.post("/v1/score", files={"video": video_path.read_bytes()}, data={"task": TASK, "dense": "true"})
    (scores,) = done.json()["scores"]
    assert scores["frame_index"] == list(range(90))
    same(scores, own.score(video_path, TASK).dense())


def test_npy_and_msgpack_frames_are_scored_as_in_process(server, own, clip_of):
    clips = [clip_of(1, 20), clip_of(2, 3, 24, 31), clip_of(3, 1), clip_of(4, 100, 300, 260)]
    fields = {"clips": [{"frames": frames, "task": TASK} for frames in clips], "every": None}
    done = server.post("/v1/score", fields)
    assert done.status_code == 200, done.text
    answers = wire.unpack(done.content)["scores"]
    assert answers[0]["progress"].dtype == np.float32
    assert answers[0]["frame_index"].dtype == np.int32
    for frames, answer in zip(clips, answers, strict=True):
        same(answer, own.score(frames, TASK))
        done = server.post("/v1/score", files={"video": npy(frames)}, data={"task": TASK})
        same(done.json()["scores"][0], own.score(frames, TASK))


def test_every_frame_of_an_array(server, own, clip_of):
    for frames in (clip_of(1, 70), clip_of(1, 20, 300, 260)):
        done = server.post("/v1/score", {"clips": [{"frames": frames, "task": TASK}], "every": 3, "dense": False})
        same(wire.unpack(done.content)["scores"][0], own.score(frames, TASK, every=3))


def test_an_array_in_fortran_order(server, own, clip_of):
    frames = clip_of(5, 12)
    done = server.post("/v1/score", files={"video": npy(np.asfortranarray(frames))}, data={"task": TASK})
    same(done.json()["scores"][0], own.score(frames, TASK))


def test_two_attempts_are_compared(server, own, clip_of, video_path):
    a, b = clip_of(1), clip_of(2, 30)
    done = server.post("/v1/compare", {"a": a, "b": b, "task": TASK})
    answer = wire.unpack(done.content)
    assert answer["p_a_better"] == pytest.approx(own.compare(a, b, TASK), abs=1e-5)
    same(answer["a"], own.score(a, TASK))
    same(answer["b"], own.score(b, TASK))
    files = {"a": video_path.read_bytes(), "b": npy(b)}
    done = server.post("/v1/compare", files=files, data={"task": TASK})
    assert done.json()["p_a_better"] == pytest.approx(own.compare(video_path, b, TASK), abs=1e-5)


def test_attempts_are_ranked(server, own, clip_of, video_path):
    clips = [clip_of(seed, 10 + seed) for seed in range(5)]
    answer = wire.unpack(server.post("/v1/rank", {"videos": clips, "task": TASK}).content)
    assert answer["order"] == own.rank(clips, TASK)
    for frames, scores in zip(clips, answer["scores"], strict=True):
        same(scores, own.score(frames, TASK))
    files = [("video", npy(clips[0])), ("video", video_path.read_bytes()), ("video", npy(clips[1]))]
    done = server.post("/v1/rank", files=files, data={"task": TASK})
    assert done.json()["order"] == own.rank([clips[0], video_path, clips[1]], TASK)


def test_many_at_once_get_their_own_scores_and_share_forwards(server, own, clip_of):
    def one(seed: int) -> None:
        frames, task = clip_of(seed, 5 + seed % 7), f"task {seed % 3}"
        fields = {"clips": [{"frames": frames, "task": task}]}
        same(wire.unpack(server.post("/v1/score", fields).content)["scores"][0], own.score(frames, task))

    before = server.number("rbm_batch_requests_count"), server.number("rbm_batch_requests_sum")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(48)))
    batches, requests = (
        server.number(f"rbm_batch_requests_{kind}") - then for kind, then in zip(("count", "sum"), before, strict=True)
    )
    assert requests >= 48
    assert batches < requests, "nothing was answered together"


def test_health_and_what_it_is(server):
    health = server.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "healthy"
    assert health.json()["ready"] is True
    assert health.json()["workers"] == 1
    info = server.get("/model_info").json()
    assert info["model"] == "nano"
    assert info["context_frames"] == 6
    (worker,) = server.get("/gpu_status").json()["workers"]
    assert worker["sessions"]["sessions"] == 0


def test_what_is_wrong_with_a_request_is_said(server, clip_of):
    frames = clip_of(1)

    def refused(status: int, says: str, done: httpx.Response) -> None:
        assert done.status_code == status, done.text
        assert set(done.json()) == {"error", "retry"}
        assert says in done.json()["error"], done.json()
        assert done.json()["retry"] is False

    video = {"video": npy(frames)}
    refused(400, "empty", server.post("/v1/score", files=video))
    refused(400, "empty", server.post("/v1/score", files=video, data={"task": " "}))
    refused(400, "one video", server.post("/v1/score", files=[("video", npy(frames))] * 2, data={"task": TASK}))
    refused(400, "'videos'", server.post("/v1/score", files={"videos": npy(frames)}, data={"task": TASK}))
    refused(
        400, "must be a file", server.post("/v1/score", files={"task": (None, TASK), "video": (None, "/etc/passwd")})
    )
    refused(400, "is empty", server.post("/v1/score", files={"video": b""}, data={"task": TASK}))
    refused(400, "every", server.post("/v1/score", files=video, data={"task": TASK, "every": "0"}))
    refused(400, "every", server.post("/v1/score", files=video, data={"task": TASK, "every": "-1"}))
    refused(400, "dense", server.post("/v1/score", files=video, data={"task": TASK, "dense": "maybe"}))
    refused(415, "multipart", server.post("/v1/score", json={"task": TASK}))
    refused(415, "multipart", server.post("/v1/score", data={"task": TASK}))
    refused(400, "two videos", server.post("/v1/compare", files={"a": npy(frames)}, data={"task": TASK}))
    refused(404, "/openapi.json", server.get("/v1/nothing"))
    refused(405, "GET", server.get("/v1/score"))
    headers = {"content-type": "multipart/form-data; boundary=x"}
    refused(400, "", server.post("/v1/score", content=b"--y\r\nnonsense", headers=headers))
    refused(400, "", server.post("/v1/score", content=b"x", headers={"content-type": "multipart/form-data"}))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ([], "map"),
        ({"clips": []}, "no clip"),
        ({"clips": 3}, "list"),
        ({"clips": [3]}, "list of maps"),
        ({"clips": [{"task": TASK}]}, "uint8"),
        ({"clips": [{"frames": "/etc/passwd", "task": TASK}]}, "uint8"),
        ({"clips": [{"frames": np.zeros((2, 8, 8, 3), np.float32), "task": TASK}]}, "float32"),
        ({"clips": [{"frames": np.zeros((8, 8, 3), np.uint8), "task": TASK}]}, "(T, H, W, 3)"),
        ({"clips": [{"frames": np.zeros((0, 8, 8, 3), np.uint8), "task": TASK}]}, "at least one"),
        ({"clips": [{"frames": np.zeros((1, 8, 8, 4), np.uint8), "task": TASK}]}, "(T, H, W, 3)"),
        ({"clips": [{"frames": np.zeros((1, 8, 8, 3), np.uint8), "task": 3}]}, "text"),
        ({"clips": [{"frames": np.zeros((1, 8, 8, 3), np.uint8), "task": ""}]}, "empty"),
        ({"clips": [{"frames": np.zeros((1, 8, 8, 3), np.uint8), "task": TASK, "url": "http://x"}]}, "'url'"),
        ({"clips": [{"frames": np.zeros((1, 8, 8, 3), np.uint8), "task": TASK}], "every": 0}, "every"),
        ({"clips": [{"frames": np.zeros((1, 8, 8, 3), np.uint8), "task": TASK}], "every": "1"}, "every"),
        ({"clips": [{"frames": np.zeros((1, 8, 8, 3), np.uint8), "task": TASK}], "dense": 2}, "dense"),
    ],
)
def test_what_is_wrong_with_a_message_is_said_in_msgpack(server, fields, says):
    done = server.post("/v1/score", fields)
    assert done.status_code == 400
    assert done.headers["content-type"] == "application/msgpack"
    answer = wire.unpack(done.content)
    assert says in answer["error"]
    assert answer["retry"] is False


def test_bytes_that_are_no_msgpack(server):
    for content in (b"", b"\xc1", b"\x81", b"\xdf\xff\xff\xff\xff", b"\x81\xa5clips\xc0trailing"):
        done = server.post("/v1/score", content=content, headers={"content-type": "application/msgpack"})
        assert done.status_code == 400
        assert wire.unpack(done.content)["error"]


def test_what_the_openapi_says(server):
    document = server.get("/openapi.json").json()
    for path in ("/v1/score", "/v1/compare", "/v1/rank"):
        post = document["paths"][path]["post"]
        assert {"multipart/form-data", "application/msgpack"} == set(post["requestBody"]["content"])
        assert {"200", "400", "413", "503"} <= set(post["responses"])


def test_metrics_count(server, clip_of):
    before = (
        server.number('rbm_requests_total{kind="/v1/score",status="200"}'),
        server.number('rbm_frames_scored_total{kind="clips"}'),
    )
    server.post("/v1/score", {"clips": [{"frames": clip_of(1, 4), "task": TASK}]})
    after = (
        server.number('rbm_requests_total{kind="/v1/score",status="200"}'),
        server.number('rbm_frames_scored_total{kind="clips"}'),
    )
    assert (after[0] - before[0], after[1] - before[1]) == (1, 4)
    server.get("/some/path/" + "x" * 50)
    assert server.number('rbm_requests_total{kind="other",status="404"}') >= 1
    assert server.number("rbm_waiting_requests") == 0
    assert server.number("rbm_pending_bytes") == 0
