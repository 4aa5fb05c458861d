"""After training: temperature and bias of the success head, fitted on the validation trajectories."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from rbm.frames import pick_frames
from rbm.model import ClipBatch, RewardModel
from rbm.model.calibration import fit_calibration
from rbm.sampling import Table
from rbm.sampling.targets import clip_targets
from rbm.training.data import PairDataModule

log = logging.getLogger(__name__)


@torch.inference_mode()
def fit_success(model: RewardModel, data: PairDataModule, batch_size: int = 32) -> None:
    """Calibrate `model` on the clips that scoring would make of the validation trajectories.

    Every clip weighs the same, and in it the last frame as much as all others together: the verdict at the end is
    what success detection goes by. Without validation trajectories the head stays as it is.
    """
    table = Table.of(data.corpus.columns, data.corpus.tasks, data.split.validation)
    device = next(model.parameters()).device
    logits, labels, weights = [], [], []
    for begin in range(0, len(table), batch_size):
        rows = range(begin, min(begin + batch_size, len(table)))
        shown = [pick_frames(int(table.n_frames[row]), model.context_frames) for row in rows]
        clips = [
            (model.preprocess(data.corpus.frames(int(table.number[row]), frames)), table.tasks[table.task[row]].text)
            for row, frames in zip(rows, shown, strict=True)
        ]
        output = model(ClipBatch.from_clips(clips).to(device)).success_logits.float().cpu().numpy()
        ends = np.cumsum([len(frames) for frames in shown])[:-1]
        for row, frames, values in zip(rows, shown, np.split(output, ends), strict=True):
            targets = clip_targets(frames, table.outcome(row), None, wrong_instruction=False)
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
