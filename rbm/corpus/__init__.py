"""The corpus: a million trajectories on disk, readable one by one. The only package that knows the format.

    corpus = Corpus.open("data/corpus")
    trajectory = corpus[0]
    frames = trajectory.frames([0, 5, 9])        # uint8 (3, H, W, 3); decodes these three only

Layout in docs/corpus.md; files: layout (names), payload (one trajectory's bytes), codecs (clips),
index (columns), writer, reader, copy.
"""

from rbm.corpus.codecs import ClipCodec, H264Codec, JpegCodec
from rbm.corpus.copy import copy_corpus
from rbm.corpus.index import CSR, Columns
from rbm.corpus.payload import CorruptPayload, Packed, pack
from rbm.corpus.reader import Corpus
from rbm.corpus.tables import SourceInfo
from rbm.corpus.writer import CorpusWriter

__all__ = [
    "CSR",
    "ClipCodec",
    "Columns",
    "Corpus",
    "CorpusWriter",
    "CorruptPayload",
    "H264Codec",
    "JpegCodec",
    "Packed",
    "SourceInfo",
    "copy_corpus",
    "pack",
]
