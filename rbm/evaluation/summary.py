"""From records to figures: every metric of the report by its flat name, with bootstrap intervals.

`compute` states all of them once, for any weights: the point estimate counts every trajectory once, the
intervals evaluate the same lines on bootstrap counts, all draws at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rbm.evaluation import metrics as m
from rbm.evaluation.protocols import same_scene
from rbm.evaluation.results import Preferences, Record
from rbm.trajectory import Quality

SUCCESS, SUBOPTIMAL, FAILURE = (q.rank for q in (Quality.SUCCESSFUL, Quality.SUBOPTIMAL, Quality.FAILURE))

_PAIRS = {
    "success_over_failure": (SUCCESS, FAILURE),
    "suboptimal_over_failure": (SUBOPTIMAL, FAILURE),
    "success_over_suboptimal": (SUCCESS, SUBOPTIMAL),
}


def summarise(
    records: Sequence[Record], preferences: Preferences, scenes: Sequence[str], draws: int = 500, seed: int = 0
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """(metrics, 95 % intervals) by flat name; trajectories are resampled within task × outcome."""
    strata = np.array([record.task * 3 + record.quality for record in records])
    point = compute(records, preferences, scenes, np.ones(len(records)))
    metrics = {name: float(value) for name, value in point.items()}
    spread = compute(records, preferences, scenes, m.bootstrap_weights(strata, draws, seed)) if draws else {}
    final = np.array([record.success[-1] for record in records])
    metrics["ece_floor"] = m.calibration_floor(final, seed)
    metrics["trajectories"] = float(len(records))
    return metrics, {name: m.interval(values) for name, values in spread.items()}


def compute(
    records: Sequence[Record], preferences: Preferences, scenes: Sequence[str], weights: NDArray
) -> dict[str, m.Floats]:
    """Every metric for `weights` (..., N); docs/metrics.md says what the names mean."""
    task = np.array([record.task for record in records])
    quality = np.array([record.quality for record in records])
    messy = np.array([record.messy for record in records])
    final = np.array([record.final for record in records])
    final_success = np.array([record.success[-1] for record in records])
    clean = (quality == SUCCESS) & ~messy
    success, suboptimal, failure = (quality == rank for rank in (SUCCESS, SUBOPTIMAL, FAILURE))

    def average(of: Callable[[Record], float], among: NDArray[np.bool_] | None = None) -> m.Floats:
        chosen = np.ones(len(records), bool) if among is None else among
        return m.mean([of(r) if c else np.nan for r, c in zip(records, chosen, strict=True)], weights)

    def by_task(measure: Callable[[NDArray[np.intp]], m.Floats]) -> m.Floats:
        return m.over_groups([measure(np.flatnonzero(task == number)) for number in np.unique(task)])

    out: dict[str, m.Floats] = {}
    for suffix, among in (("", clean), ("_messy", success & messy), ("_suboptimal", suboptimal), ("_failure", failure)):
        out[f"voc{suffix}"] = average(lambda r: m.voc_spearman(r.progress[: r.ordered]), among)
        out[f"voc_pearson{suffix}"] = average(lambda r: m.voc_pearson(r.progress[: r.ordered]), among)
    out["voc_reversed"] = average(lambda r: m.voc_spearman(r.backward), clean)
    out["voc_pearson_reversed"] = average(lambda r: m.voc_pearson(r.backward), clean)
    out["voc_shuffled_true_order"] = average(lambda r: m.voc_spearman(r.shuffled, r.permutation), clean)
    out["voc_shuffled_shown_order"] = average(lambda r: m.voc_spearman(r.shuffled), clean)

    labelled = np.array([len(record.label) > 0 for record in records])
    out["label_spearman"] = average(lambda r: m.label_spearman(r.progress, r.label), labelled)
    out["label_mae"] = average(lambda r: m.label_error(r.progress, r.label), labelled)
    for name, among in (("success", success), ("suboptimal", suboptimal), ("failure", failure)):
        out[f"label_mae_{name}"] = average(lambda r: m.label_error(r.progress, r.label), labelled & among)
        out[f"final_{name}"] = average(lambda r: r.final, among)

    out["kendall_tau"] = by_task(lambda rows: m.kendall_tau(final[rows], quality[rows], weights[..., rows]))
    out["gap"] = by_task(lambda rows: _gap(final[rows], quality[rows], weights[..., rows]))
    for name, (better, worse) in _PAIRS.items():
        rows = [np.flatnonzero(task == number) for number in np.unique(task)]
        by_progress = [m.over(final[r], quality[r], better, worse, weights[..., r]) for r in rows]
        by_preference = [_preference(preferences, quality, r, better, worse, weights) for r in rows]
        main = name == "success_over_failure"
        out["progress_accuracy" if main else name] = m.over_groups(by_progress)
        out["preference_accuracy" if main else f"{name}_preference"] = m.over_groups(by_preference)

    out["success_auc"] = m.auc(final_success, success, weights)
    out["success_auprc"] = m.average_precision(final_success, success, weights)
    out["ece"] = m.calibration_error(calibration(records, last_only=True), weights)
    out["ece_all_frames"] = m.calibration_error(calibration(records, last_only=False), weights)

    wrong = [_wrong_finals(record, scenes) for record in records]
    out["wrong_instruction"] = m.mean([_mean(other) for other, _ in wrong], weights)
    out["wrong_instruction_same_scene"] = m.mean([_mean(same) for _, same in wrong], weights)
    tried = np.array([len(record.instructions) > 1 for record in records])
    out["instruction_margin"] = average(lambda r: float(r.final_under[0] - r.final_under[1:].max()), tried)
    out["instruction_accuracy"] = average(lambda r: float(r.final_under[0] > r.final_under[1:].max()), tried)
    rephrased = np.array([len(record.rephrased) > 0 for record in records])
    out["paraphrase_difference"] = average(lambda r: float(np.abs(r.rephrased - r.final).mean()), rephrased)
    return out


def calibration(records: Sequence[Record], last_only: bool) -> m.Floats:
    """(N, K, 3) sums for the calibration error of the success head, at last frames or at all whose target is known."""
    probability, outcome, owner = [], [], []
    for number, record in enumerate(records):
        known = np.flatnonzero(~np.isnan(record.done))
        known = known[known == len(record.done) - 1] if last_only else known
        probability.append(record.success[known])
        outcome.append(record.done[known])
        owner.append(np.full(len(known), number))
    return m.calibration_sums(np.concatenate(probability), np.concatenate(outcome), np.concatenate(owner), len(records))


def confusion(records: Sequence[Record]) -> tuple[NDArray[np.int64], NDArray[np.int64], m.Floats]:
    """(rows, columns, matrix): mean final progress of the successes of task `rows[i]` under instruction `columns[j]`.

    nan where an instruction was not tried. Rows and columns are task numbers; the rows' own tasks come first.
    """
    shown = [record for record in records if len(record.instructions)]
    rows = np.unique([record.task for record in shown]).astype(np.int64)
    rest = np.setdiff1d([number for record in shown for number in record.instructions], rows)
    columns = np.concatenate([rows, rest]).astype(np.int64)
    total, count = np.zeros((2, len(rows), len(columns)))
    place = {int(number): index for index, number in enumerate(columns)}
    for record in shown:
        where = [place[int(number)] for number in record.instructions]
        total[place[record.task], where] += record.final_under
        count[place[record.task], where] += 1
    return rows, columns, np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _gap(final: NDArray, quality: NDArray, weights: NDArray) -> m.Floats:
    success, failure = quality == SUCCESS, quality == FAILURE
    return m.mean(final[success], weights[..., success]) - m.mean(final[failure], weights[..., failure])


def _preference(
    pairs: Preferences, quality: NDArray, rows: NDArray[np.intp], better: int, worse: int, weights: NDArray
) -> m.Floats:
    chosen = np.isin(pairs.better, rows) & (quality[pairs.better] == better) & (quality[pairs.worse] == worse)
    return m.preference_accuracy(pairs.better[chosen], pairs.worse[chosen], pairs.probability[chosen], weights)


def _wrong_finals(record: Record, scenes: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Final progress under wrong instructions of (another scene, the same scene)."""
    same = np.array([same_scene(scenes[record.task], scenes[number]) for number in record.instructions[1:]], bool)
    return record.final_under[1:][~same], record.final_under[1:][same]


def _mean(values: NDArray[np.float32]) -> float:
    return float(values.mean()) if len(values) else float("nan")
