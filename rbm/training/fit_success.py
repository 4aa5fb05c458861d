"""After training: temperature and bias of the success head, fitted on the validation trajectories."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from rbm.corpus import CorruptPayload
from rbm.frames import pick_frames
from rbm.model import ClipBatch, RewardModel
from rbm.model.calibration import fit_calibration
from rbm.sampling import Table, clip_targets
from rbm.sampling.table import outcome
from rbm.training.data import PairDataModule
from rbm.training.views import NoView

log = logging.getLogger(__name__)


MOST = 4096
"""Validation trajectories that are looked at: two numbers are fitted."""


@torch.inference_mode()
def fit_success(model: RewardModel, data: PairDataModule, batch_size: int = 32) -> None:
    """Calibrate `model` on the clips that scoring would make of the validation trajectories.

    Of more than `MOST` an even choice over tasks and outcomes. Every clip weighs the same, and in it the last frame
    as much as all others together: the verdict at the end is what success detection goes by. What can not be decoded
    is named and left out. Without validation trajectories the head stays as it is.
    """
    corpus, columns = data.corpus, data.trajectories.columns
    found = Table.of(corpus, data.split.validation).row
    chosen = found[pick_frames(len(found), MOST)].tolist() if len(found) else []
    device = next(model.parameters()).device
    logits, labels, weights = [], [], []
    for begin in range(0, len(chosen), batch_size):
        rows, shown, clips = [], [], []
        for row in chosen[begin : begin + batch_size]:
            frames = pick_frames(columns.n_frames.item(row), model.context_frames)
            try:
                clips.append((data.pictures(row, frames), corpus.tasks[columns.task.item(row)].text))
            except (CorruptPayload, NoView) as error:
                log.warning("left out of the calibration of success: %s", error)
                continue
            rows.append(row)
            shown.append(frames)
        if not clips:
            continue
        output = model(ClipBatch.from_clips(clips).to(device)).success_logits.float().cpu().numpy()
        ends = np.cumsum([len(frames) for frames in shown])[:-1]
        for row, frames, values in zip(rows, shown, np.split(output, ends), strict=True):
            targets = clip_targets(frames, outcome(columns, row), None, wrong_instruction=False)
            mask = targets.success_mask
            logits.append(values[mask])
            labels.append(targets.success[mask])
            weights.append(clip_weights(mask)[mask])
    if not logits:
        log.warning("no validation trajectories: the success head is not calibrated")
        return
    temperature, bias = fit_calibration(np.concatenate(logits), np.concatenate(labels), np.concatenate(weights))
    model.calibrate(temperature, bias)


def clip_weights(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Weights of a clip's frames, float64 (n,), 0 where not supervised: 1/2 on the last, 1/2 shared by the others."""
    weights = mask / max(mask.sum(), 1)
    if mask[-1] and mask.sum() > 1:
        weights = mask * 0.5 / (mask.sum() - 1)
        weights[-1] = 0.5
    return weights
