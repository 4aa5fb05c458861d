"""Augmentation by hand: shifts repeat the edge, light is a straight line, equal keys change equally."""

import numpy as np
import pytest

from rbm.training.augment import Augmentation, _shifted


def frames(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)


def test_a_shift_repeats_the_edge():
    film = frames()
    moved = _shifted(film, 2, -3)
    np.testing.assert_array_equal(moved[:, 2:, :-3], film[:, :-2, 3:])
    np.testing.assert_array_equal(moved[:, 0], moved[:, 1])
    np.testing.assert_array_equal(moved[:, 5, -1], film[:, 3, -1])


def test_all_frames_change_alike_and_the_key_decides():
    augment = Augmentation()
    film = frames()
    one = augment(film, (1, 2))
    np.testing.assert_array_equal(one, augment(film, (1, 2)))
    np.testing.assert_array_equal(one[:2], augment(film[:2], (1, 2)))  # frame by frame the same
    assert any((augment(film, (1, key)) != one).any() for key in range(3, 6))
    assert one.shape == film.shape
    assert one.dtype == np.uint8


def test_nothing_changes_nothing():
    film = frames()
    np.testing.assert_array_equal(Augmentation(shift=0, light=0)(film, (0,)), film)


def test_light_stays_in_range():
    film = np.array([0, 255], np.uint8).reshape(1, 1, 2, 1).repeat(3, -1)
    for key in range(20):
        assert abs(int(Augmentation(shift=0, light=0.2)(film, (key,))[0, 0, 0, 0]) - 0) <= 0.2 * 255 + 1


def test_too_much_is_refused():
    with pytest.raises(ValueError, match=r"shift must be in \[0, 0.5\)"):
        Augmentation(shift=0.6)
