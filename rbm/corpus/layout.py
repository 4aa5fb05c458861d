"""Names, versions and chunk sizes of the on-disk format (docs/corpus.md shows the picture).

A corpus is a Zarr v3 hierarchy in an Icechunk repository. Whatever can be learned without a frame
stands in columns, one number a trajectory; everything that belongs to one trajectory stands in its
payload, which describes itself: an index that was lost could be made again from the payloads.
"""

from __future__ import annotations

FORMAT = "rbm-corpus"
VERSION = 1
"""Version of the layout. A reader refuses a higher one; a change that old readers survive leaves it."""

BRANCH = "main"

SEGMENT_GROUP = "segments"
"""Segment k, shard n holds bytes [n S, (n + 1) S) of the segment, S = SHARD_BYTES, as they are and unbroken,
then zarr's index of its inner chunks. Any zarr reads that; ours takes byte ranges of the object itself."""
SHARD_BYTES = 64 << 20
"""One object in the store. Large enough that a terabyte is some ten thousand objects."""
INNER_CHUNK_BYTES = 64 << 10
"""The least that a read fetches: about one short-GOP clip, or a few JPEG frames."""

INDEX_GROUP = "index"
INDEX_CHUNK_ROWS = 1 << 16
"""Rows of an index chunk; an append rewrites at most the last one of each column."""

HEAP_CHUNK_BYTES = 1 << 20

COLUMNS: dict[str, str] = {
    "task": "int32",
    "source": "int16",
    "quality": "int8",
    "n_frames": "int32",
    "done": "int32",
    "done_known": "bool",
    "messy": "bool",
    "dense": "bool",
    "partial_success": "float32",
    "embodiment": "int16",
    "is_robot": "bool",
    "is_sim": "bool",
    "content": "uint64",
    "segment": "int32",
    "offset": "int64",
    "length": "int64",
}
"""One array `index/<name>` each, one row a trajectory, in the order in which they were written."""

ID_END = "id_end"
ID_HEAP = "id_heap"
"""Ids end to end as UTF-8, and int64 ends: id i = heap[end[i-1]:end[i]]."""

TASK_END = "task_end"
TASK_HEAP = "task_heap"
"""Task table: one JSON object a task, end to end, and int64 ends. Row number = the column `task`."""


def shard_key(segment: int, shard: int) -> str:
    """The store's key of a shard (zarr v3, default chunk key encoding)."""
    return f"{segment_name(segment)}/c/{shard}"


def segment_name(number: int) -> str:
    return f"{SEGMENT_GROUP}/{number}"
