"""Calibration after training: weights by hand, and probabilities that fit better than before."""

import numpy as np
import pytest

from rbm.model.calibration import fit_calibration
from rbm.training.fit_success import clip_weights


def test_the_last_frame_weighs_as_much_as_the_others_together():
    assert clip_weights(np.array([True, False, True, True])).tolist() == [0.25, 0, 0.25, 0.5]
    assert clip_weights(np.array([True])).tolist() == [1]
    assert clip_weights(np.array([True, True, False])).tolist() == [0.5, 0.5, 0]


def test_calibration_finds_temperature_and_bias():
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2, 20_000)
    labels = rng.random(20_000) < 1 / (1 + np.exp(-true))
    # a head that is three times too sure, and shifted: logit = 3 (true - 0.5), so true = logit / 3 + 0.5
    temperature, bias = fit_calibration(3 * (true - 0.5), labels)
    assert temperature == pytest.approx(3, rel=0.05)
    assert bias == pytest.approx(0.5, abs=0.05)


def test_labels_of_one_kind_change_nothing(caplog):
    assert fit_calibration([1.0, 2.0], [1, 1]) == (1.0, 0.0)
    assert "all 2 labels are equal" in caplog.text
