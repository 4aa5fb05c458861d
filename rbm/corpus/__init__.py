"""The corpus: a million trajectories on disk, readable one by one. The only package that knows the format.

    corpus = Corpus.open("data/corpus")
    trajectory = corpus[0]
    frames = trajectory.frames([0, 5, 9])        # uint8 (3, H, W, 3); decodes these three only

Layout in docs/corpus.md; files: layout (names), payload (one trajectory's bytes), codecs (clips),
index (columns), writer, reader, selection; and to look after one: check, repair, history, merge, copy,
compact, export, stats.
"""

from rbm.corpus.check import check_corpus
from rbm.corpus.codecs import ClipCodec, H264Codec, JpegCodec
from rbm.corpus.compact import compact_corpus
from rbm.corpus.copy import copy_corpus
from rbm.corpus.export import export_plain
from rbm.corpus.index import CSR, Columns
from rbm.corpus.merge import merge_corpora
from rbm.corpus.payload import CorruptPayload, Packed, pack
from rbm.corpus.reader import Corpus
from rbm.corpus.repair import repair_corpus
from rbm.corpus.segment import Fork, ForkWriter, Placed, Segment
from rbm.corpus.selection import Selection
from rbm.corpus.stats import corpus_stats
from rbm.corpus.tables import SourceInfo
from rbm.corpus.writer import CorpusWriter

__all__ = [
    "CSR",
    "ClipCodec",
    "Columns",
    "Corpus",
    "CorpusWriter",
    "CorruptPayload",
    "Fork",
    "ForkWriter",
    "H264Codec",
    "JpegCodec",
    "Packed",
    "Placed",
    "Segment",
    "Selection",
    "SourceInfo",
    "check_corpus",
    "compact_corpus",
    "copy_corpus",
    "corpus_stats",
    "export_plain",
    "merge_corpora",
    "pack",
    "repair_corpus",
]
