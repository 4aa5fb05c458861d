"""How good are the labels of the Meta-World collector? Prints JSON; no pixels are rendered.

    python tests/benchmarks/bench_metaworld.py drawer-open push --attempts 60
    python tests/benchmarks/bench_metaworld.py --corpus rbm/assets/metaworld_mini

For each environment: Spearman's correlation of the dense label with time up to the first success, on clean and on messy
successes (scenes that the fit never saw), counts of outcomes and of attempts dropped. With --corpus, for each
task of a corpus: AUC of "longer means successful", which .5 says is useless.
"""

from __future__ import annotations

import argparse
import itertools
import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.stats import rankdata, spearmanr

from dataset_builder.sources.metaworld import Metaworld
from rbm.corpus import Corpus
from rbm.trajectory import Quality


def labels(env: str, attempts: int) -> dict[str, object]:
    source = Metaworld(envs=[env], per_quality={"successful": 1, "suboptimal": 1, "failure": 1}, max_attempts=attempts)
    voc: dict[str, list[float]] = {"clean": [], "messy": []}
    outcomes: Counter[str] = Counter()
    for _, attempt in itertools.islice(source.attempts(env), attempts):
        outcomes[attempt.quality.value if attempt.quality else attempt.why] += 1
        if attempt.quality is Quality.SUCCESSFUL and attempt.done:
            upto = attempt.progress[: attempt.done + 1]
            voc["messy" if attempt.messy else "clean"].append(float(spearmanr(upto, np.arange(len(upto)))[0]))
    means = {f"label_voc_{kind}": round(float(np.mean(values)), 3) for kind, values in voc.items() if values}
    return {"outcomes": dict(outcomes), **means}


def length_auc(corpus: Corpus) -> dict[str, float]:
    columns = corpus.columns
    length = np.array([trajectory.frame_index[-1] + 1 for trajectory in corpus])
    found = {}
    for number, task in enumerate(corpus.tasks):
        rows = columns.task == number
        won = columns.quality[rows] == Quality.SUCCESSFUL.rank
        ranks = rankdata(length[rows])[won]
        pairs = won.sum() * (~won).sum()
        found[task.text] = round(float((ranks.sum() - won.sum() * (won.sum() + 1) / 2) / pairs), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("envs", nargs="*")
    parser.add_argument("--attempts", type=int, default=60)
    parser.add_argument("--corpus", type=Path)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    result: dict[str, object] = {env: labels(env, given.attempts) for env in given.envs}
    if given.corpus:
        result["length_auc"] = length_auc(Corpus.open(given.corpus))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
