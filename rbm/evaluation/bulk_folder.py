"""The folder that bulk scoring fills: parts, what was asked, what came of it.

    FOLDER/
      part-000000.parquet …       trajectories k·size … of what is scored; whole or not there
      scores.json                 what was asked (a second run goes on only with the same), and the outcome
      robometer_progress.parquet  of a LeRobot data set: all parts, one after another

Each part carries in its metadata which run it belongs to and what came of it, so that no list of finished parts has to
be kept while many processes write.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rbm.corpus.lock import hold
from rbm.errors import UserError
from rbm.output import whole_file

FORMAT, VERSION = "rbm-scores", 1
MANIFEST = "scores.json"
_LOCK = ".scores.lock"


@dataclass(frozen=True)
class Report:
    """What came of one part.

    Attributes:
        part: its number.
        trajectories: how many were scored. frames: how many of their frames. rows: of the file.
        several_tasks: how many of them have more than one instruction, and were scored under the first.
        unreadable: name and reason of each that was left out.
    """

    part: int
    trajectories: int
    frames: int
    rows: int
    several_tasks: int
    unreadable: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Folder:
    """Where the scores of one run go.

    Attributes:
        path: absolute.
        asked: what makes two runs the same, JSON values by name.
        described: metadata that every file carries.
    """

    path: Path
    asked: dict[str, Any]
    described: dict[str, str]

    @property
    def run(self) -> str:
        """Hexadecimal; the same for the same scores."""
        return sha256(json.dumps([VERSION, self.asked], sort_keys=True).encode()).hexdigest()

    def part(self, number: int) -> Path:
        return self.path / f"part-{number:06d}.parquet"

    def begin(self, joined: str | None) -> None:
        """Make the folder, or see that it holds nothing but this run. A run that came to no part is no hindrance.

        Raises:
            UserError: it holds another run, or files of something else; or it cannot be written.
        """
        manifest = self.path / MANIFEST
        there = sorted(self.path.glob("part-*.parquet"))
        if manifest.exists():
            earlier = _manifest(manifest)
            if there:
                self._compare(earlier)
        elif there:
            raise UserError(
                f"{self.path} holds {there[0].name}, but no {MANIFEST} that says what it is: give another --out"
            )
        if joined is not None and _described(self.path / joined) not in ("missing", "broken", self.run):
            raise UserError(
                f"{self.path / joined} is there already, of something else: move it away, or give another --out"
            )
        if not there:
            self.conclude({}, complete=False)

    @contextmanager
    def held(self) -> Iterator[None]:
        """For this process alone; what killed processes left half written goes.

        Raises:
            UserError: another process holds it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.path}: {error.strerror}") from error
        file, _ = hold(self.path / _LOCK, f"scores {self.path}")
        try:
            self._sweep()
            yield
        finally:
            self._sweep()
            (self.path / _LOCK).unlink(missing_ok=True)
            os.close(file)

    def _sweep(self) -> None:
        for left in self.path.glob(".writing-*"):
            shutil.rmtree(left, ignore_errors=True)

    def write(self, table: pa.Table, report: Report) -> None:
        """One part, whole."""
        facts = {**self.described, "run": self.run, "report": json.dumps(asdict(report), ensure_ascii=False)}
        facts["content"] = _content(table, facts)
        with whole_file(self.part(report.part)) as temporary:
            pq.write_table(table.replace_schema_metadata(facts), temporary, **_OPTIONS)

    def report(self, number: int) -> Report | None:
        """What came of a part that is there, every value in it verified; none if it is not there, or damaged.

        Raises:
            UserError: a file of another run stands in its place.
        """
        path = self.part(number)
        run = _described(path)
        if run in ("missing", "broken"):
            return None
        if run != self.run:
            raise UserError(
                f"{path} belongs to another run than {self.path / MANIFEST}: move it away, or give another --out"
            )
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            described = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
            whole = described.pop("content", "") == _content(table, described)
            facts = json.loads(described.get("report", "{}")) if whole else {}
        except (OSError, ValueError, pa.ArrowException):
            return None
        if not whole:
            return None
        if facts["part"] != number:
            raise UserError(f"{path} is part {facts['part']} of this run: give it its name back, or remove it")
        return Report(**{**facts, "unreadable": tuple((name, why) for name, why in facts["unreadable"])})

    def others(self, count: int) -> list[str]:
        """Parts beyond the last one: of no run that was asked for here."""
        known = {self.part(number).name for number in range(count)}
        return sorted(path.name for path in self.path.glob("part-*.parquet") if path.name not in known)

    def join(self, name: str, count: int) -> None:
        """All parts in one file, in the order of the frames, a part at a time in memory.

        Raises:
            UserError: the frames of one part do not follow those before it.
        """
        last = -1
        with whole_file(self.path / name) as temporary:
            writer = None
            for number in range(count):
                table = pq.read_table(self.part(number))
                if writer is None:
                    schema = table.schema.with_metadata({**self.described, "run": self.run})
                    writer = pq.ParquetWriter(temporary, schema, **_OPTIONS)
                if table.num_rows:
                    if table["index"][0].as_py() <= last:
                        raise UserError(f"{self.part(number)}: its frames do not follow those of the part before it")
                    last = table["index"][-1].as_py()
                    writer.write_table(table.replace_schema_metadata(writer.schema.metadata))
            if writer is not None:
                writer.close()

    def conclude(self, outcome: dict[str, Any], complete: bool = True) -> None:
        """Write what was asked, and what came of it."""
        content = {"format": FORMAT, "version": VERSION, "complete": complete, "asked": self.asked, **outcome}
        with whole_file(self.path / MANIFEST) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def clear(self, parts: int) -> None:
        """Take back a run that came to nothing, so that its folder is free for another."""
        for number in range(parts):
            self.part(number).unlink(missing_ok=True)
        (self.path / MANIFEST).unlink(missing_ok=True)

    def _compare(self, manifest: dict[str, Any]) -> None:
        before = manifest["asked"]
        for name in dict.fromkeys((*before, *self.asked)):
            then, now = before.get(name), self.asked.get(name)
            if then != now:
                raise UserError(
                    f"{self.path} holds the scores of another run: {name} was {_told(then)} and is {_told(now)} now: "
                    "give another --out, or the options of that run"
                )


_OPTIONS: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}


def _content(table: pa.Table, facts: dict[str, str]) -> str:
    """Hexadecimal: of all values of a table, and of what is said of it."""
    found = sha256(json.dumps(sorted(facts.items())).encode())
    sink = pa.BufferOutputStream()
    plain = table.replace_schema_metadata(None).combine_chunks()
    with pa.ipc.new_stream(sink, plain.schema) as stream:
        stream.write_table(plain)
    found.update(sink.getvalue())
    return found.hexdigest()


def _described(path: Path) -> str:
    """The run that a parquet file says it belongs to ("" for none), or `missing`, or `broken`."""
    try:
        with pq.ParquetFile(path) as file:
            return ((file.schema_arrow.metadata or {}).get(b"run") or b"").decode("ascii", "replace")
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError, pa.ArrowException):  # a name that is no text any more, among others
        return "broken"


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; give another --out") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("asked"), dict):
        raise UserError(f"{path} is some other file: give another --out")
    if found.get("version") != VERSION:
        raise UserError(f"{path} is of version {found.get('version')}, this rbm writes {VERSION}: give another --out")
    return found


def _told(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
