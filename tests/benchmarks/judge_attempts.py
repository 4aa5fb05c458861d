"""What reward models make of attempts that they were not trained on: JSON, a line for each model.

    python tests/benchmarks/judge_attempts.py runs/heldout --models runs/rl-judge-1/model docs/rl/judge

The attempts are those of `rbm rl` runs (`attempts.jsonl`), played again and labelled by the simulator, at most 40
successes, 20 half-done ones and 40 failures of each run. A model sees one frame for each action, as it does when it
trains a policy. It *judges done* when the success probability of any frame is a half or more, and not more than two
actions before the simulator does. *progress_error* is the mean distance of progress from the dense label.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from dataset_builder.sources.base import Episode
from dataset_builder.sources.metaworld_attempts import MetaworldAttempts
from rbm.scoring import Scorer
from rbm.trajectory import Quality

EARLY = 16  # control steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of runs")
    parser.add_argument("--models", nargs="+", required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    source = MetaworldAttempts(str(given.runs), {"successful": 40, "suboptimal": 20, "failure": 40})
    episodes = [one for unit in source.units() for one in source.collect(unit, ()) if isinstance(one, Episode)]
    true = np.array([one.trajectory.quality is Quality.SUCCESSFUL for one in episodes])
    for model in given.models:
        scorer = Scorer.from_pretrained(model, device="cpu")
        judged, right, errors = [], [], []
        for episode in episodes:
            record = episode.trajectory
            score = scorer.score(episode.frames[record.views[0]], record.task, every=1)
            done = np.flatnonzero(np.asarray(score.success) >= 0.5)
            moment = record.frame_index[done[0]] if len(done) else None
            judged.append(moment is not None)
            right.append(moment is not None and record.done_index is not None and moment >= record.done_index - EARLY)
            errors.append(float(np.abs(np.asarray(score.progress) - record.progress).mean()))
        found = {
            "model": model,
            "attempts": len(episodes),
            "successes": int(true.sum()),
            "precision": round(sum(right) / max(sum(judged), 1), 3),
            "recall": round(sum(right) / max(int(true.sum()), 1), 3),
            "progress_error": round(float(np.mean(errors)), 4),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
