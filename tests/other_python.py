"""Run by .ci/newer-python on two versions of Python: what one writes, the other reads; both read the bundled corpus.

python tests/other_python.py FOLDER write|read
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "corpus"))

from attempts import attempt, same_record

from rbm.assets import bundled_corpus
from rbm.corpus import Corpus, CorpusWriter

ATTEMPTS = range(12)


def main(place: Path, what: str) -> None:
    bundled = Corpus.open(bundled_corpus())
    for row in range(len(bundled)):
        bundled.payload(row).verify()
    assert bundled.frames(len(bundled) - 1).dtype == np.uint8
    if what == "write":
        for codec in ("jpeg", "h264"):
            with CorpusWriter(place / codec, codec, commit_every=5) as writer:
                for number in ATTEMPTS:
                    writer.add(*attempt(number), {"action": np.arange(number)})
    for codec in ("jpeg", "h264"):
        corpus = Corpus.open(place / codec)
        assert len(corpus) == len(ATTEMPTS)
        for row, number in enumerate(ATTEMPTS):
            record, clips = attempt(number)
            assert same_record(corpus[row], record)
            assert np.abs(corpus.frames(row).astype(int) - clips["main"]).mean() < 10
            np.testing.assert_array_equal(corpus[row].array("action"), np.arange(number))
    print(f"Python {sys.version.split()[0]}: {what} passed, {len(bundled)} bundled trajectories read")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
