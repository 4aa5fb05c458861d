"""What the published server's clients send, read without a server: forms, JSON, .npy files; and what is refused."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from bombs import Touch, npy, npy_that_says
from hypothesis import given, settings
from hypothesis import strategies as st

from rbm.scoring.server.limits import Limits
from rbm.scoring.server.npy import read_npy
from rbm.scoring.server.refusal import Refusal
from rbm.scoring.server.robometer import (
    PreferenceSample,
    ProgressSample,
    outputs,
    samples_of_form,
    samples_of_json,
)

LIMITS = Limits(frames=9, side=8, clips=3)
CLIP = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)


def progress(**changes: Any) -> dict[str, Any]:
    trajectory = {"frames": {"__numpy_file__": "f"}, "frames_shape": [2, 3, 4, 3], "task": "push"} | changes
    return {"sample_type": "progress", "trajectory": trajectory}


def form(*samples: Any, files: dict[str, bytes] | None = None, **fields: str) -> Any:
    rows = {f"sample_{i}": json.dumps(sample) for i, sample in enumerate(samples)}
    return samples_of_form(rows | fields, {"f": npy(CLIP)} if files is None else files, LIMITS)


def test_a_form_becomes_samples_in_their_order() -> None:
    pair = {
        "sample_type": "preference",
        "chosen_trajectory": {"frames": {"__numpy_file__": "a"}, "task": "push"},
        "rejected_trajectory": {"frames": {"__numpy_file__": "b"}, "task": "another"},
    }
    files = {"f": npy(CLIP), "a": npy(CLIP[:1]), "b": npy(255 - CLIP), "unused": b"\x93NUMPY not looked at"}
    first, second, third = form(progress(task="öffne"), pair, progress(), files=files, use_frame_steps="true", note="{")
    assert isinstance(first, ProgressSample)
    assert isinstance(second, PreferenceSample)
    assert (first.task, second.task, third.task) == ("öffne", "push", "push")
    assert np.array_equal(first.frames, CLIP)
    assert np.array_equal(second.chosen, CLIP[:1])
    assert np.array_equal(second.rejected, 255 - CLIP)
    assert np.array_equal(third.frames, CLIP)


def test_alpha_is_dropped_and_grey_is_repeated() -> None:
    alpha = np.concatenate([CLIP, CLIP[..., :1]], axis=3)
    assert np.array_equal(form(progress(), files={"f": npy(alpha)})[0].frames, CLIP)
    grey = form(progress(), files={"f": npy(CLIP[..., :1])})[0].frames
    assert np.array_equal(grey, CLIP[..., [0, 0, 0]])


def test_json_holds_the_pixels_themselves() -> None:
    sample = progress(frames=CLIP.tolist())
    for body in ({"samples": [sample]}, {"anything": [sample]}, {"0": sample, "use_frame_steps": False}):
        (read,) = samples_of_json(body, LIMITS)
        assert np.array_equal(read.frames, CLIP)
        assert read.frames.dtype == np.uint8


def test_an_answer_has_null_for_what_was_not_asked() -> None:
    scored = [(np.float32([0.25, 0.5]), np.float32([0, 1])), (np.float32([1]), np.float32([0.5]))]
    assert outputs(scored, []) == {
        "outputs_preference": None,
        "outputs_progress": {"progress_pred": [[0.25, 0.5], [1.0]]},
        "outputs_success": {"success_probs": [[0.0, 1.0], [0.5]]},
    }
    assert outputs([], [0.75, 0.25]) == {
        "outputs_preference": {
            "predictions": [1, 0],
            "prediction_probs": [0.75, 0.25],
            "preference_labels": [1.0, 1.0],
        },
        "outputs_progress": None,
        "outputs_success": None,
    }


def test_frames_whose_first_index_runs_fastest() -> None:
    turned = np.asfortranarray(CLIP)
    assert b"True" in npy(turned)[:128]
    assert np.array_equal(read_npy(npy(turned), "it"), CLIP)


def test_what_a_header_says_allocates_nothing() -> None:
    with pytest.raises(Refusal, match=r"its header says \(60000, 60000"):
        read_npy(npy_that_says("(60000, 60000, 9999, 3)"), "it")


@given(st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255)), max_size=5), st.integers(0, 200))
@settings(max_examples=300)
def test_a_damaged_npy_is_frames_or_a_sentence(edits: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(npy(CLIP))
    for place, value in edits:
        data[place] = value
    for damaged in (bytes(data), bytes(data[:cut])):
        try:
            frames = read_npy(damaged, "it")
        except Refusal:
            continue
        assert frames.dtype == np.uint8
        assert frames.size == CLIP.size


def test_a_pickle_is_not_opened(tmp_path: Any) -> None:
    evil = npy(np.array([Touch(str(tmp_path / "touched"))], dtype=object))
    with pytest.raises(Refusal, match="send uint8"):
        read_npy(evil, "it")
    assert list(tmp_path.iterdir()) == []
    np.load(io.BytesIO(evil), allow_pickle=True)
    assert list(tmp_path.iterdir()) != []  # it is as bad as it looks


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (CLIP.astype(np.float32), "'<f4'; send uint8"),
        (CLIP.astype(np.int8), "'|i1'; send uint8"),
        (np.zeros(3, [("a", "u1")]), "several fields; send uint8"),
        (CLIP[0], "3 dimensions"),
        (CLIP.transpose(0, 3, 1, 2)[:, :, :, :2], r"shape \(2, 3, 3, 2\)"),
        (CLIP[:0], "at least one frame"),
        (CLIP[..., :2], "1, 3 or 4 channels"),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        form(progress(), files={"f": npy(array)})


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ([], "must be a JSON object"),
        ({}, "sample_type is a NoneType"),
        ({"sample_type": "similarity"}, "'similarity'; it must be"),
        ({"sample_type": "progress"}, "sample_0.trajectory must be"),
        ({"sample_type": "preference", "chosen_trajectory": progress()["trajectory"]}, "sample_0.rejected_trajectory"),
        (progress(task=None), "must be text"),
        (progress(task="  "), "is empty"),
        (progress(task="x" * 2001), "takes 2000"),
        (progress(task="\ud800"), "valid Unicode"),
        (progress(frames=None), "nested lists"),
        (progress(frames={"__numpy_file__": "other"}), "'other', which was not sent"),
        (progress(frames={"__numpy_file__": ["f"]}), "nested lists"),
        (progress(frames="/etc/passwd"), "never reads"),
        (progress(frames=["/etc/passwd", "/etc/group"]), "never reads"),
        (progress(frames=[[[[0.5]]]]), "whole numbers"),
        (progress(frames=[[[[True]]]]), "whole numbers"),
        (progress(frames=[[[[256]]]]), "whole numbers"),
        (progress(frames=[[[[-1]]]]), "whole numbers"),
        (progress(frames=[[[[2**80]]]]), "whole numbers"),
        (progress(frames=[[1, 2, 3]]), "whole numbers"),
        (progress(frames=[[[[1, 2, 3]], [[1]]]]), "no regular array"),
        (progress(frames=[]), "whole numbers"),
    ],
)
def test_other_samples_are_refused(sample: Any, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        form(sample)
    with pytest.raises(Refusal):
        samples_of_json({"samples": [sample]}, LIMITS)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "found none"),
        ({"samples": "[]"}, "found none"),
        ({"sample_1": json.dumps(progress())}, "without a gap; found sample_1"),
        ({"sample_0": json.dumps(progress()), "sample_2": json.dumps(progress())}, "without a gap"),
        ({"sample_0": "{"}, "sample_0 is not JSON: Expecting"),
        ({"sample_0": "[" * 100_000}, "sample_0 is not JSON"),
        ({"sample_0": "9" * 5000}, "sample_0 is not JSON"),
    ],
)
def test_other_forms_are_refused(fields: dict[str, str], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        samples_of_form(fields, {"f": npy(CLIP)}, LIMITS)


@pytest.mark.parametrize("body", [None, [], 3, "x", {}, {"samples": []}, {"samples": {}}, {"use_frame_steps": True}])
def test_other_json_is_refused(body: Any) -> None:
    with pytest.raises(Refusal):
        samples_of_json(body, LIMITS)


@pytest.mark.parametrize(
    ("sample", "count", "words"),
    [
        (progress(frames=np.zeros((10, 1, 1, 3), int).tolist()), 1, "10 frames in one array"),
        (progress(frames=np.zeros((1, 9, 1, 1), int).tolist()), 1, "1 × 9 pixels"),
        (progress(frames=[[[[0, 0, 0]]]]), 4, "4 samples"),
    ],
)
def test_more_than_the_limits_is_too_large(sample: Any, count: int, words: str) -> None:
    for read in (lambda: form(*[sample] * count), lambda: samples_of_json({"samples": [sample] * count}, LIMITS)):
        with pytest.raises(Refusal, match=words) as caught:
            read()
        assert caught.value.status == 413
