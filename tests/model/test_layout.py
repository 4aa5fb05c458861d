"""Who sees whom, by hand."""

import numpy as np

from rbm.model.layout import BOTH, FIRST, SECOND, TEXT, Kind, causal_row, clip_row, joint_row, visible

WORDS = np.array([7, 8])
A, B = np.array([0, 1, 2]), np.array([3, 4])


def test_a_clip():
    row = clip_row(WORDS, A, readout=True)
    assert row.kind.tolist() == [Kind.TEXT, Kind.TEXT, Kind.FRAME, Kind.FRAME, Kind.FRAME, Kind.PREFERENCE]
    assert row.source.tolist() == [7, 8, 0, 1, 2, 0]
    assert row.position.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(visible(row.segment), np.tri(6, dtype=bool))
    assert len(clip_row(WORDS, A, readout=False)) == 5


def test_a_joint_pair_restarts_positions_and_isolates_the_clips():
    row = joint_row(WORDS, A, B)
    assert row.position.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 6]
    assert row.segment.tolist() == [TEXT, TEXT, FIRST, FIRST, FIRST, FIRST, SECOND, SECOND, SECOND, BOTH]
    seen = visible(row.segment)
    second = slice(6, 9)
    assert not seen[second, 2:6].any()  # the second sees nothing of the first
    assert seen[second, :2].all()  # but the instruction
    assert seen[9].all()  # the preference token sees both
    assert not seen[2:5, 5].any()  # frames do not see the marker behind them
    assert not np.triu(seen, 1).any()  # nobody sees what comes later


def test_a_causal_pair_is_one_stream():
    row = causal_row(WORDS, A, B)
    assert row.kind.tolist()[5] == Kind.SPLIT
    assert row.position.tolist() == list(range(9))
    assert np.array_equal(visible(row.segment), np.tri(9, dtype=bool))
