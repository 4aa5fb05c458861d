import json

import numpy as np
import pytest
import zarr
from attempts import attempt, payload_bytes, write
from damage import flip, shard_file
from rich.progress import Progress
from s3_server import BUCKET

from rbm.corpus import Corpus, CorpusWriter, CorruptPayload
from rbm.corpus.export import export_plain
from rbm.corpus.layout import COLUMNS
from rbm.corpus.payload import Payload
from rbm.errors import UserError


def plain_payloads(place) -> dict[str, bytes]:
    """Ids and payloads of an export, read with zarr alone."""
    root = zarr.open_group(place, mode="r")
    index = {name: root[f"index/{name}"][:] for name in (*COLUMNS, "id_heap", "id_end")}
    heap, ends = index["id_heap"].tobytes(), index["id_end"].tolist()
    found = {}
    for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        at, length = int(index["offset"][row]), int(index["length"][row])
        data = root[f"segments/{index['segment'][row]}"][at : at + length]
        found[heap[start:end].decode()] = np.asarray(data).tobytes()
    return found


def test_zarr_alone_reads_all_of_it(tmp_path):
    with CorpusWriter(tmp_path / "c", commit_every=2) as writer:
        writer.add_source("tests", completion=0.9)
        for number in range(5):
            writer.add(*attempt(number), {"action": np.eye(2)})
    corpus = Corpus.open(tmp_path / "c")
    with Progress(disable=True) as progress:
        place = export_plain(corpus, tmp_path / "deep" / "plain", progress)
    assert place == tmp_path / "deep" / "plain"
    assert list(plain_payloads(place).items()) == list(payload_bytes(corpus).items())
    root = zarr.open_group(place, mode="r")
    assert root.attrs["format"] == "rbm-corpus"
    assert root.attrs["sources"] == [{"name": "tests", "completion": 0.9, "facts": {}}]
    for name in COLUMNS:
        np.testing.assert_array_equal(root[f"index/{name}"][:], getattr(corpus.columns, name))
    tasks = root["index/task_heap"][:].tobytes()[: int(root["index/task_end"][0])]
    assert json.loads(tasks)["text"] == corpus.tasks[0].text
    data = np.frombuffer(plain_payloads(place)[corpus.ids[3]], np.uint8)
    np.testing.assert_array_equal(Payload(data, "3").frames(), corpus.frames(3))
    assert sorted(item.name for item in (tmp_path / "deep").iterdir()) == ["plain"]


def test_an_older_snapshot(tmp_path):
    old = write(tmp_path / "c", range(3))
    write(tmp_path / "c", range(3, 5))
    export_plain(old, tmp_path / "plain")
    assert plain_payloads(tmp_path / "plain") == payload_bytes(old)


def test_from_an_object_store(s3, tmp_path):
    corpus = write(f"s3://{BUCKET}/exported/c", range(3))
    export_plain(f"s3://{BUCKET}/exported/c", tmp_path / "plain")
    assert plain_payloads(tmp_path / "plain") == payload_bytes(corpus)
    with pytest.raises(UserError, match="to a local folder"):
        export_plain(corpus, f"s3://{BUCKET}/exported/plain")


def test_damage_is_not_copied(tmp_path):
    corpus = write(tmp_path / "c", range(3))
    flip(corpus, 1, 400)
    with pytest.raises(CorruptPayload, match=rf"'{corpus.ids[1]}' of corpus {corpus.location} .*check --repair"):
        export_plain(corpus, tmp_path / "plain")
    flip(corpus, 1, 400)
    file, _ = shard_file(corpus, 0)
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # the checksum of its chunk index, which only zarr looks at
    with pytest.raises(UserError, match=r"snapshot .* is damaged \(.*check --repair"):
        export_plain(corpus, tmp_path / "plain")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["c"]


def test_all_or_nothing(tmp_path):
    corpus = write(tmp_path / "c", range(3))
    with pytest.raises(UserError, match="exists already"):
        export_plain(corpus, tmp_path / "c")
    for file in (tmp_path / "c" / "chunks").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"can not be read|is missing"):
        export_plain(corpus, tmp_path / "plain")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["c"]
