import numpy as np
import pytest
from attempts import attempt, same_record
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rbm.corpus.payload import CorruptPayload, Payload, pack
from rbm.errors import UserError
from rbm.trajectory import Quality


def read(packed, name="it"):
    return Payload(np.frombuffer(packed.payload, np.uint8), name)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = hnp.arrays(
    st.sampled_from(["<f4", "<f8", "<i4", "|u1", "|b1", ">f4"]),
    hnp.array_shapes(max_dims=3, min_side=0, max_side=5),
)


@settings(max_examples=40)
@given(data=st.data(), n_frames=st.integers(1, 7), codec=st.sampled_from(["jpeg", "h264"]))
def test_every_field_of_the_record_survives_a_round_trip(data, n_frames, codec):
    draw = data.draw
    record, clips = attempt(
        draw(st.integers(0, 20)),
        n_frames,
        draw(st.integers(25, 29)),
        draw(st.integers(25, 29)),
        id=draw(texts.filter(bool)),
        task="do " + draw(texts),
        source=draw(texts.filter(bool)),
        quality=draw(st.sampled_from(Quality)),
        frame_index=np.cumsum(draw(st.lists(st.integers(1, 999), min_size=n_frames, max_size=n_frames))),
        fps=draw(st.floats(1e-3, 1e4)),
        views=tuple(draw(st.lists(texts.filter(bool), min_size=1, max_size=3, unique=True))),
        messy=draw(st.booleans()),
        partial_success=draw(st.none() | st.floats(0, 1)),
        embodiment=draw(texts),
        is_robot=draw(st.booleans()),
        is_sim=draw(st.booleans()),
        done_index=draw(st.none() | st.integers(0, 999)),
        progress=draw(st.none() | st.just(np.linspace(0, 1, n_frames))),
        provenance=draw(texts),
    )
    arrays = draw(st.dictionaries(texts, numbers, max_size=3))
    payload = read(pack(record, clips, arrays, codec))
    payload.verify()
    assert same_record(payload.head.trajectory, record)
    assert payload.array_names() == tuple(arrays)
    for name, array in arrays.items():
        back = payload.array(name)
        assert back.shape == array.shape
        assert back.dtype == array.dtype.newbyteorder("<")
        np.testing.assert_array_equal(back, array)
    for view, clip in clips.items():
        back = payload.frames(view=view)
        assert back.shape == clip.shape
        assert np.abs(back.astype(int) - clip).mean() < 12


@pytest.mark.parametrize("codec", ["jpeg", "h264"])
def test_some_frames_equal_the_same_ones_out_of_all(codec):
    payload = read(pack(*attempt(3, n_frames=33, height=33, width=45), codec=codec))
    everything = payload.frames()
    for indices in ([32], [0, 32], [5, 4, 4, 31, 0], np.arange(33), []):
        np.testing.assert_array_equal(payload.frames(np.array(indices, int)), everything[np.array(indices, int)])
    with pytest.raises(IndexError, match="has 33 frames"):
        payload.frames(np.array([33]))
    with pytest.raises(IndexError):
        payload.frames(np.array([-1]))


def test_reading_two_jpeg_frames_touches_no_other():
    packed = pack(*attempt(0), codec="jpeg")
    ends = read(packed).head.ends
    data = np.frombuffer(packed.payload, np.uint8).copy()
    data[ends[1] : ends[2]] = 0
    payload = Payload(data, "holed")
    assert payload.frames(np.array([0, 2, 5])).shape[0] == 3
    with pytest.raises(CorruptPayload, match=r"'holed'.*frame 1 of view 'main'"):
        payload.frames(np.array([0, 1]))


@pytest.mark.parametrize("codec", ["jpeg", "h264"])
def test_a_flipped_byte_anywhere_is_found_by_reading(codec):
    record, clips = attempt(1, n_frames=3, height=18, width=18, progress=[0, 0.5, 1])
    packed = pack(record, clips, {"action": np.arange(12.0).reshape(3, 4), "none": np.zeros(0)}, codec)
    _read_everything(np.frombuffer(packed.payload, np.uint8))
    # The clip of the archive codec is one part with one checksum: a sample of its bytes stands for all.
    for place in range(0, len(packed.payload), 1 if codec == "jpeg" else 7):
        data = np.frombuffer(packed.payload, np.uint8).copy()
        data[place] ^= 1 << (place % 8)
        with pytest.raises(CorruptPayload, match="'flipped'"):
            _read_everything(data)


def test_a_payload_cut_anywhere_is_found_by_reading():
    packed = pack(*attempt(1, n_frames=3, height=18, width=18))
    for length in range(0, len(packed.payload), 5):
        with pytest.raises(CorruptPayload):
            _read_everything(np.frombuffer(packed.payload[:length], np.uint8))


def _read_everything(data):
    payload = Payload(data, "flipped")
    payload.frames()
    for name in payload.array_names():
        payload.array(name)


def test_views_may_differ_in_size():
    record, _ = attempt(0, views=("front", "wrist"))
    clips = {"front": attempt(0)[1]["main"], "wrist": attempt(1, height=40, width=40)[1]["main"]}
    payload = read(pack(record, clips))
    assert payload.frames(view="front").shape == (6, 24, 32, 3)
    assert payload.frames(view="wrist").shape == (6, 40, 40, 3)
    with pytest.raises(UserError, match=r"no view 'top'; it has: front, wrist"):
        payload.frames(view="top")


def test_frames_that_do_not_fit_the_record_are_refused():
    record, clips = attempt(0)
    clip = clips["main"]
    for wrong, sentence in [
        ({}, "has clips"),
        ({"main": clip, "more": clip}, "has clips"),
        ({"main": clip.astype(np.float32)}, "need uint8"),
        ({"main": clip[..., 0]}, "need uint8"),
        ({"main": clip[:3]}, "has 3 frames"),
        ({"main": clip[:, :10]}, "frames are 10x32"),
    ]:
        with pytest.raises(UserError, match=sentence):
            pack(record, wrong)
    with pytest.raises(UserError, match="need numbers"):
        pack(record, clips, {"words": np.array(["a"])})
    with pytest.raises(UserError, match="unknown clip codec 'gif': choose jpeg or h264"):
        pack(record, clips, codec="gif")
    with pytest.raises(UserError, match="not valid Unicode"):
        pack(attempt(0, provenance="\udcff")[0], clips)


def test_a_payload_of_a_newer_version_says_so(monkeypatch):
    monkeypatch.setattr("rbm.corpus.payload.VERSION", 99)
    packed = pack(*attempt(0))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"newer rbm \(payload version 99.*upgrade"):
        read(packed)
