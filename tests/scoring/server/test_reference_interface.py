"""A client of the published server, which knows nothing of this one: its requests, and what it reads in the answers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from running import Running

from rbm.scoring import Scorer

CONTEXT = 6  # frames that the tiny model reads at once
TASK = "pick up the yellow cup"
ARRAYS = ("frames", "lang_vector", "video_embeddings", "text_embedding")
TRAJECTORIES = ("chosen_trajectory", "rejected_trajectory", "trajectory")


def trajectory(frames: Any, task: str = TASK, **more: Any) -> dict[str, Any]:
    """All the fields that such a client sends; most say nothing here."""
    return {
        "frames": frames,
        "frames_shape": list(np.shape(frames)),
        "embeddings_path": None,
        "video_embeddings": None,
        "text_embedding": None,
        "id": "episode_7",
        "task": task,
        "lang_vector": None,
        "data_source": None,
        "quality_label": None,
        "is_robot": True,
        "target_progress": None,
        "metadata": {"subsequence_length": len(frames)},
    } | more


def progress(frames: Any, task: str = TASK, **more: Any) -> dict[str, Any]:
    known = {"sample_type": "progress", "data_gen_strategy": None, "resample_attempts": 1}
    return known | {"trajectory": trajectory(frames, task, **more)}


def preference(chosen: Any, rejected: Any, task: str = TASK) -> dict[str, Any]:
    known = {"sample_type": "preference", "data_gen_strategy": None, "resample_attempts": 1}
    return known | {"chosen_trajectory": trajectory(chosen, task), "rejected_trajectory": trajectory(rejected, task)}


@dataclass(frozen=True)
class Client:
    """Sends batches as the published clients do."""

    url: str
    files: list[str] = field(default_factory=list)

    def post(self, samples: list[dict[str, Any]], **fields: str) -> dict[str, Any]:
        """Each array becomes a file `sample_{i}_{trajectory}_{field}`, of which the JSON keeps the name."""
        form, files = dict(fields), {}
        for i, sample in enumerate(samples):
            told = dict(sample)
            for key in TRAJECTORIES:
                if key not in told:
                    continue
                told[key] = dict(told[key])
                for name in ARRAYS:
                    if isinstance(told[key][name], np.ndarray):
                        part, file = f"sample_{i}_{key}_{name}", io.BytesIO()
                        np.save(file, told[key][name])
                        files[part] = (f"{part}.npy", file.getvalue(), "application/octet-stream")
                        told[key][name] = {"__numpy_file__": part}
            form[f"sample_{i}"] = json.dumps(told)
        self.files[:] = files
        answer = httpx.post(f"{self.url}/evaluate_batch_npy", data=form, files=files, timeout=60)
        answer.raise_for_status()
        return answer.json()


@pytest.fixture
def client(server: Running) -> Client:
    return Client(server.url)


def same(answer: Any, expected: Any) -> None:
    """Within rounding: what else is in a batch changes the last digits."""
    if isinstance(answer, dict):
        assert answer.keys() == expected.keys()
        for key, value in answer.items():
            same(value, expected[key])
    elif isinstance(answer, list):
        assert len(answer) == len(expected)
        for value, other in zip(answer, expected, strict=True):
            same(value, other)
    else:
        assert answer == (None if expected is None else pytest.approx(expected, abs=1e-5))


Clips = Callable[..., np.ndarray]


def test_progress_of_each_frame(client: Client, own: Scorer, clip_of: Clips) -> None:
    frames = clip_of(3, CONTEXT)
    answer = client.post([progress(frames)], use_frame_steps="false")
    assert client.files == ["sample_0_trajectory_frames"]
    (expected,) = own.predict([(frames, TASK)])
    assert answer["outputs_progress"]["progress_pred"] == [pytest.approx(expected.progress.tolist(), abs=1e-5)]
    assert answer["outputs_success"]["success_probs"] == [pytest.approx(expected.success.tolist(), abs=1e-5)]
    assert answer["outputs_preference"] is None
    assert np.ptp(expected.progress) > 1e-3, "the model says the same for all frames: this would prove nothing"


def test_kinds_lengths_and_sizes_in_one_batch(client: Client, own: Scorer, clip_of: Clips) -> None:
    clips = [clip_of(seed, count, height, width) for seed, count, height, width in CLIPS]
    a, b, c, d = clips
    answer = client.post([progress(a), preference(b, c, "push"), progress(c, "other"), preference(c, b), progress(d)])
    read = answer["outputs_progress"]["progress_pred"]
    assert [len(values) for values in read] == [len(a), len(c), len(d)]
    for values, frames, task in zip(read, (a, c, d), (TASK, "other", TASK), strict=True):
        assert values == pytest.approx(expected_progress(own, frames, task), abs=1e-4)
    pairs = answer["outputs_preference"]
    expected = [own.compare(b, c, "push"), own.compare(c, b, TASK)]
    assert pairs["prediction_probs"] == pytest.approx(expected, abs=1e-5)
    assert pairs["predictions"] == [int(p > 0.5) for p in expected]
    assert pairs["preference_labels"] == [1.0, 1.0]
    assert abs(expected[0] + expected[1] - 1) > 1e-6, "the tasks must differ, or the order is not tested"


CLIPS = [(1, 1, 40, 56), (2, 4, 40, 56), (3, CONTEXT, 30, 30), (4, 3 * CONTEXT, 48, 40)]


def expected_progress(own: Scorer, frames: np.ndarray, task: str) -> list[float]:
    """In one forward where the clip fits, else as a live session would say it."""
    if len(frames) <= CONTEXT:
        return own.predict([(frames, task)])[0].progress.tolist()
    return own.score(frames, task, every=1).progress.tolist()


def test_a_clip_longer_than_the_context_has_a_number_for_each_frame(
    client: Client, own: Scorer, clip_of: Clips
) -> None:
    frames = clip_of(5, 100)
    answer = client.post([progress(frames)])
    assert answer["outputs_progress"]["progress_pred"] == [
        pytest.approx(expected_progress(own, frames, TASK), abs=1e-4)
    ]
    assert len(answer["outputs_success"]["success_probs"][0]) == 100


def test_frame_steps_say_what_one_pass_says(client: Client, clip_of: Clips) -> None:
    """That server scores each prefix by itself then; a causal model has done so already."""
    samples = [progress(clip_of(6, CONTEXT)), preference(clip_of(7, 3), clip_of(8, 5)), progress(clip_of(9, 1))]
    stepwise = client.post(samples, use_frame_steps="true")
    assert [len(values) for values in stepwise["outputs_progress"]["progress_pred"]] == [CONTEXT, 1]
    same(stepwise, client.post(samples, use_frame_steps="false"))
    for n in (1, 3, CONTEXT):
        prefix = client.post([progress(clip_of(6, CONTEXT)[:n])])["outputs_progress"]["progress_pred"][0]
        assert prefix[-1] == pytest.approx(stepwise["outputs_progress"]["progress_pred"][0][n - 1], abs=1e-5)


def test_arrays_that_are_no_frames_are_not_looked_at(client: Client, clip_of: Clips) -> None:
    frames = clip_of(10, 3)
    vectors = {"lang_vector": np.ones(384, np.float32), "video_embeddings": np.ones((3, 768)), "text_embedding": None}
    with_vectors = client.post([progress(frames, **vectors)])
    assert len(client.files) == 3
    same(with_vectors, client.post([progress(frames)]))


def test_many_samples_at_once(client: Client, clip_of: Clips) -> None:
    clips = [clip_of(seed, 1 + seed % CONTEXT) for seed in range(40)]
    together = client.post([progress(frames) for frames in clips])["outputs_progress"]["progress_pred"]
    alone = [client.post([progress(frames)])["outputs_progress"]["progress_pred"][0] for frames in clips[:6]]
    assert [len(values) for values in together] == [len(frames) for frames in clips]
    for values, expected in zip(together, alone, strict=False):
        assert values == pytest.approx(expected, abs=1e-5)


def test_json_with_the_pixels_in_it(client: Client, server: Running, clip_of: Clips) -> None:
    clips = [clip_of(11, 4), clip_of(12, 9)]
    samples = [progress(clips[0]), preference(clips[0], clips[1]), progress(clips[1])]
    plain = [progress(clips[0].tolist()), preference(*(c.tolist() for c in clips)), progress(clips[1].tolist())]
    expected = client.post(samples)
    for flag in ({}, {"use_frame_steps": True}):
        for body in ({"samples": plain}, {"x": plain}):
            answer = httpx.post(f"{server.url}/evaluate_batch", json=body | flag, timeout=60)
            assert answer.status_code == 200
            same(answer.json(), expected)


def test_what_clients_ask_before_they_begin(server: Running) -> None:
    health = httpx.get(f"{server.url}/health").json()
    assert health["status"] == "healthy"
    assert health["available_gpus"] <= health["total_gpus"] == 1
    status = httpx.get(f"{server.url}/gpu_status").json()
    assert (status["total_gpus"], status["available_gpus"], status["pool_size"], status["max_workers"]) == (1, 1, 1, 1)
    assert status["gpu_stats"]["0"]["status"] == "ready"
    info = httpx.get(f"{server.url}/model_info").json()
    assert info["num_gpus"] == 1
    assert info["experiment_config"]["data"]["max_frames"] == info["context_frames"] == CONTEXT
    assert info["model_architecture"]["total_parameters"] == info["parameters"] > 0
    assert "/" in info["model_path"]


def good_form(clip_of: Clips) -> tuple[dict[str, str], dict[str, tuple[str, bytes, str]]]:
    file = io.BytesIO()
    np.save(file, clip_of(13, 3))
    sample = progress(clip_of(13, 3)) | {"trajectory": {"frames": {"__numpy_file__": "f"}, "task": TASK}}
    return {"sample_0": json.dumps(sample)}, {"f": ("f.npy", file.getvalue(), "application/octet-stream")}


def test_a_path_is_never_read(server: Running, tmp_path: Path, clip_of: Clips) -> None:
    canary = tmp_path / "canary.npy"
    np.save(canary, clip_of(14, 3))
    fields, files = good_form(clip_of)
    named = json.dumps({"sample_type": "progress", "trajectory": {"frames": [str(canary)], "task": TASK}})
    elsewhere = json.dumps(
        {"sample_type": "progress", "trajectory": {"frames": {"__numpy_file__": str(canary)}, "task": TASK}}
    )
    for sample in (named, elsewhere):
        answer = httpx.post(f"{server.url}/evaluate_batch_npy", data={"sample_0": sample}, files=files)
        assert answer.status_code == 400
        answer = httpx.post(f"{server.url}/evaluate_batch", json={"samples": [json.loads(sample)]})
        assert answer.status_code == 400
    answer = httpx.post(
        f"{server.url}/evaluate_batch_npy", data=fields, files={"f": (str(canary), b"", "application/octet-stream")}
    )
    assert answer.status_code == 400, "what is in the file could be scored"


def test_mistakes_are_told_in_a_sentence(server: Running, clip_of: Clips) -> None:
    fields, files = good_form(clip_of)
    url = f"{server.url}/evaluate_batch_npy"
    good = httpx.post(url, data=fields, files=files)
    assert good.status_code == 200, good.text
    torn = {"f": ("f.npy", files["f"][1][:-1], "application/octet-stream")}
    json_of_frames = {"samples": [progress([[[[0, 0, 300]]]])]}
    for answer, status, words in (
        (httpx.post(url, data=fields, files=torn), 400, "its header says"),
        (httpx.post(url, data={"sample_1": fields["sample_0"]}, files=files), 400, "without a gap"),
        (httpx.post(url, data={"sample_0": "{"}, files=files), 400, "is not JSON"),
        (httpx.post(url, data=fields, files={"g": files["f"]}), 400, "was not sent"),
        (httpx.post(url, data=fields, files=[("f", files["f"]), ("f", files["f"])]), 400, "two parts of the form"),
        (httpx.post(url, data={"sample_0": " " * 1_100_000}, files=files), 400, "1024"),
        (httpx.post(url, data=fields), 415, "multipart/form-data"),
        (httpx.post(url, json={"samples": []}), 415, "multipart/form-data"),
        (httpx.post(url, content=b"x", headers={"content-type": "multipart/form-data"}), 400, "boundary"),
        (httpx.post(f"{server.url}/evaluate_batch", data=fields), 415, "application/json"),
        (httpx.post(f"{server.url}/evaluate_batch", json=json_of_frames), 400, "0 to 255"),
        (httpx.post(f"{server.url}/evaluate_batch", json=[]), 400, "JSON object"),
        (
            httpx.post(
                f"{server.url}/evaluate_batch",
                content=b" " * (8 << 20) + b"{}",
                headers={"content-type": "application/json"},
            ),
            413,
            "evaluate_batch_npy",
        ),
    ):
        assert answer.status_code == status, answer.text
        body = answer.json()
        assert words in body["error"]
        assert body["retry"] is False
