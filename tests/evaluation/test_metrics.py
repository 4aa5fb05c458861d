"""Every measure against numbers worked out by hand, and its invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbm.evaluation import metrics as m

SCORES = st.lists(st.integers(0, 5).map(float), min_size=2, max_size=12)


def test_voc_of_rising_falling_and_constant_progress() -> None:
    assert m.voc_spearman([0.0, 0.1, 0.5, 0.6]) == pytest.approx(1)
    assert m.voc_spearman([0.9, 0.5, 0.1]) == pytest.approx(-1)
    assert m.voc_spearman([0.5, 0.5, 0.5]) == 0
    assert m.voc_pearson([0.5, 0.5, 0.5]) == 0
    assert np.isnan(m.voc_spearman([0.5]))


def test_voc_by_hand_with_ties() -> None:
    # ranks of progress 1.5 1.5 4 3 against 1 2 3 4: Σd² = .25 + .25 + 1 + 1; with ties Pearson of the ranks:
    # centred (−1 −1 1.5 .5)·(−1.5 −.5 .5 1.5) = 3.5; norms² 4.5 and 5
    assert m.voc_spearman([0.2, 0.2, 0.9, 0.4]) == pytest.approx(3.5 / np.sqrt(4.5 * 5))
    # Pearson of 0 0 1 against 0 1 2: centred (−1/3 −1/3 2/3)·(−1 0 1) = 1; norms² 2/3 and 2
    assert m.voc_pearson([0, 0, 1]) == pytest.approx(1 / np.sqrt(4 / 3))


def test_voc_against_the_true_time_of_shuffled_frames() -> None:
    filmed = [2, 0, 3, 1]
    progress = [0.6, 0.1, 0.9, 0.3]  # reads the picture
    assert m.voc_spearman(progress, filmed) == pytest.approx(1)
    # against the order shown: ranks 3 1 4 2 against 1 2 3 4, Σd² = 4 + 1 + 1 + 4: 1 − 6·10/60 = 0
    assert m.voc_spearman(progress) == pytest.approx(0)


def test_label_agreement() -> None:
    assert m.label_error([0.0, 0.5, 1.0], [0.1, 0.5, 0.7]) == pytest.approx(0.4 / 3)
    assert m.label_spearman([0.0, 0.5, 1.0], [0.1, 0.2, 0.9]) == pytest.approx(1)
    assert np.isnan(m.label_spearman([0.0, 0.5], [0.3, 0.3]))
    assert m.label_spearman([0.5, 0.5], [0.1, 0.3]) == 0


def test_auc_by_hand() -> None:
    # positives .9 .4 against negatives .4 .1: pairs 1, 1, ½, 1
    assert m.auc([0.9, 0.4, 0.4, 0.1], [1, 1, 0, 0]) == pytest.approx(3.5 / 4)
    # the positive with the tie counts three times: (1 + 1 + 3 (½ + 1)) / (4 · 2)
    assert m.auc([0.9, 0.4, 0.4, 0.1], [1, 1, 0, 0], np.array([1, 3, 1, 1])) == pytest.approx(6.5 / 8)
    assert np.isnan(m.auc([0.9, 0.4], [1, 1]))


def test_average_precision_by_hand() -> None:
    # ranked + − + −: ½ · 1 + ½ · 2/3
    assert m.average_precision([4, 3, 2, 1], [1, 0, 1, 0]) == pytest.approx(0.5 + 1 / 3)
    # one threshold for all: the share of positives
    assert m.average_precision([1, 1, 1, 1], [1, 0, 0, 0]) == pytest.approx(0.25)
    assert m.average_precision([4, 3, 2], [1, 0, 1], np.array([1, 2, 1])) == pytest.approx(0.5 + 0.5 * 2 / 4)


def test_kendall_tau_by_hand() -> None:
    assert m.kendall_tau([0.9, 0.5, 0.1], [0, 1, 2]) == pytest.approx(1)
    assert m.kendall_tau([0.1, 0.5, 0.9], [0, 1, 2]) == pytest.approx(-1)
    # success ties with suboptimal, both above failure: (0 + 1 + 1) / 3
    assert m.kendall_tau([0.5, 0.5, 0.1], [0, 1, 2]) == pytest.approx(2 / 3)
    # two triples: (.9 .5 .1) → 1, (.9 .5 .7) → (1 + 1 − 1)/3
    assert m.kendall_tau([0.9, 0.5, 0.1, 0.7], [0, 1, 2, 2]) == pytest.approx((1 + 1 / 3) / 2)
    assert np.isnan(m.kendall_tau([0.9, 0.5], [0, 1]))


@given(SCORES, SCORES, SCORES)
def test_kendall_tau_is_the_mean_over_all_triples(success: list, suboptimal: list, failure: list) -> None:
    triples = [
        (np.sign(a - b) + np.sign(a - c) + np.sign(b - c)) / 3 for a in success for b in suboptimal for c in failure
    ]
    final = [*success, *suboptimal, *failure]
    rank = [0] * len(success) + [1] * len(suboptimal) + [2] * len(failure)
    assert m.kendall_tau(final, rank) == pytest.approx(np.mean(triples))


@given(SCORES, SCORES)
def test_auc_is_the_pair_accuracy_with_half_ties(plus: list, minus: list) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in plus for b in minus]
    positive = [1] * len(plus) + [0] * len(minus)
    assert m.auc([*plus, *minus], positive) == pytest.approx(np.mean(pairs))


@given(st.data())
def test_a_weight_is_a_repetition(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 10))
    scores = np.array(data.draw(st.lists(st.integers(0, 4).map(float), min_size=n, max_size=n)))
    positive = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    repeated = np.repeat(np.arange(n), weights)
    for measure in (m.auc, m.average_precision):
        once = measure(scores, positive, weights)
        assert once == pytest.approx(measure(scores[repeated], positive[repeated]), nan_ok=True)
        assert measure(scores, positive, np.stack([weights, weights]))[1] == pytest.approx(once, nan_ok=True)


def test_preference_accuracy_counts_ties_half_and_pairs_by_both_weights() -> None:
    better, worse = np.array([0, 0, 1]), np.array([2, 3, 2])
    said = [0.9, 0.5, 0.2]
    assert m.preference_accuracy(better, worse, said) == pytest.approx(0.5)
    # weights 2 · 1, 2 · 0, 1 · 1 of right 1, ½, 0
    assert m.preference_accuracy(better, worse, said, np.array([2, 1, 1, 0])) == pytest.approx(2 / 3)


def test_mean_leaves_out_what_is_unknown() -> None:
    assert m.mean([1.0, np.nan, 4.0]) == pytest.approx(2.5)
    assert m.mean([1.0, np.nan, 4.0], np.array([[1, 5, 1], [3, 5, 1]])) == pytest.approx([2.5, 1.75])
    assert np.isnan(m.mean([np.nan]))
    assert m.over_groups([np.array(1.0), np.array(np.nan), np.array(0.5)]) == pytest.approx(0.75)


def test_calibration_error_by_hand() -> None:
    # bins of ½: .2 .4 with outcomes 0 1 → |1 − .6|; .8 with outcome 1 → |1 − .8|; over 3
    sums = m.calibration_sums([0.2, 0.4, 0.8], [0, 1, 1], [0, 1, 1], n=2, bins=2)
    assert m.calibration_error(sums) == pytest.approx(0.6 / 3)
    # trajectory 1 alone: .4 → .6, .8 → .2, over 2
    assert m.calibration_error(sums, np.array([0, 1])) == pytest.approx(0.8 / 2)


def test_calibration_bins_hold_their_upper_edge() -> None:
    sums = m.calibration_sums([0.0, 0.5, 1.0], [0, 0, 0], [0, 0, 0], n=1, bins=2)
    assert sums[0, :, 0].tolist() == [2, 1]


def test_certain_and_right_is_calibrated() -> None:
    sums = m.calibration_sums([0, 1, 1], [0, 1, 1], [0, 1, 2], n=3)
    assert m.calibration_error(sums) == 0
    assert m.calibration_floor([0, 1, 1], seed=0) == 0


def test_the_floor_is_what_chance_alone_shows() -> None:
    # 100 predictions of ½: E|binomial(100, ½) − 50| / 100 = √(2 · 25 / π) / 100
    assert m.calibration_floor(np.full(100, 0.5), seed=0, draws=4000) == pytest.approx(0.0399, rel=0.05)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_bootstrap_keeps_every_stratum_at_its_size(strata: list) -> None:
    weights = m.bootstrap_weights(strata, draws=7, seed=3)
    assert weights.shape == (7, len(strata))
    for stratum in set(strata):
        members = np.array(strata) == stratum
        assert (weights[:, members].sum(1) == members.sum()).all()
    assert (weights == m.bootstrap_weights(strata, draws=7, seed=3)).all()


def test_interval_holds_the_middle_of_the_draws() -> None:
    assert m.interval(np.linspace(0, 1, 1001)) == pytest.approx((0.025, 0.975))
    assert m.interval(np.array([np.nan, 2.0])) == (2.0, 2.0)
    assert np.isnan(m.interval(np.array([np.nan]))).all()


def test_bootstrap_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = m.interval(m.mean(values, m.bootstrap_weights(np.zeros(400), 2000, seed=1)))
    assert (high - low) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
