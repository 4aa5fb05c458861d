"""`rbm corpus ...`: what a corpus holds, whether it is whole, and what changes it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC
from pathlib import Path
from typing import Any, TextIO, get_args

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rbm.assets import bundled_corpus
from rbm.corpus.check import Report, check_corpus
from rbm.corpus.compact import compact_corpus
from rbm.corpus.copy import copy_corpus
from rbm.corpus.export import export_plain
from rbm.corpus.history import add_tag, delete_tag, read_history
from rbm.corpus.location import Location
from rbm.corpus.merge import Conflict, merge_corpora
from rbm.corpus.reader import Corpus
from rbm.corpus.repair import Repair, repair_corpus
from rbm.corpus.selection import Selection
from rbm.corpus.stats import QUANTILES, SAMPLE, Group, Stats, corpus_stats
from rbm.corpus.writer import CorpusWriter
from rbm.errors import UserError
from rbm.trajectory import Quality

_ROWS_SHOWN = 30
"""Rows of a printed table; --json has them all."""


class _Group(click.Group):
    """A group that lists its commands with the whole first line of their help."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, (one.help or "").partition("\n")[0]) for name, one in self.commands.items()])


@click.group(cls=_Group)
def corpus() -> None:
    """Look at a corpus, check it, choose from it, change it. PATH is a folder or a URL (s3://bucket/prefix)."""


@corpus.command()
@click.argument("path", required=False)
@click.option("--snapshot", help="An older snapshot, by its id or tag; the newest by default.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(path: str | None, snapshot: str | None, as_json: bool) -> None:
    """What a corpus holds; without PATH, the bundled one.

    \b
    Examples:
      rbm corpus info
      rbm corpus info data/mine --json
      rbm corpus info s3://lab/corpus --snapshot v1
    """
    facts = Corpus.open(path or bundled_corpus(), snapshot).info()
    if as_json:
        return _print_json(facts)
    _say(f"[bold]{escape(facts['path'])}[/]  snapshot {facts['snapshot']}")
    _say(
        f"{_trajectories(facts['trajectories'])}, {facts['frames']} frames, {_size(facts['bytes'])} "
        f"({', '.join(facts['codecs'])}); {facts['dense']} with dense labels, {facts['messy']} messy successes, "
        f"{facts['scenes']} scenes"
    )
    counts = {task: list(row.values()) for task, row in facts["by_task"].items()}
    _print_outcomes("task", sorted(counts.items(), key=lambda item: -sum(item[1])), list(facts["by_quality"].values()))


@corpus.command()
@click.argument("path", required=False)
@click.option("--snapshot", help="An older snapshot, by its id or tag; the newest by default.")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=SAMPLE,
    show_default=True,
    help="Trajectories read for what the index does not tell.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def stats(path: str | None, snapshot: str | None, sample: int, as_json: bool) -> None:
    """Sizes, outcomes, duplicates and gaps of a corpus; without PATH, of the bundled one.

    \b
    Examples:
      rbm corpus stats data/mine
      rbm corpus stats s3://lab/corpus --json > stats.json
    """
    opened = Corpus.open(path or bundled_corpus(), snapshot)
    with _progress("stopped") as progress:
        found = corpus_stats(opened, sample, progress)
    if as_json:
        return _print_json(found.to_json())
    _print_stats(found)


@corpus.command()
@click.argument("path")
@click.option("--snapshot", help="Check an older snapshot, by its id or tag; the newest by default.")
@click.option(
    "--decode", is_flag=True, help="Decode every frame and array, too: slow, and finds nothing in most cases."
)
@click.option("--repair", is_flag=True, help="Mend what is wrong with the newest snapshot.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(path: str, snapshot: str | None, decode: bool, repair: bool, as_json: bool) -> None:
    """Read every byte of a corpus and name each trajectory that is damaged.

    Exit code 0: clean (after --repair: clean now); 1: something is damaged; 2: it could not be checked.

    --repair takes damaged trajectories out in a new snapshot (older ones keep them), deletes what killed writers left,
    makes a damaged local copy of the index again, and where the newest snapshot can not be read at all, goes back to
    the newest that can.

    \b
    Examples:
      rbm corpus check data/mine
      rbm corpus check data/mine --decode --json > report.json
      rbm corpus check s3://lab/corpus --repair
    """
    if repair and snapshot is not None:
        raise UserError("--repair mends the newest snapshot: leave --snapshot out")
    with _progress(_GOES_ON if repair else _NOTHING_WRITTEN) as progress:
        if repair:
            done = repair_corpus(path, decode, progress)
            report, clean = done.report, not done.report.index
        else:
            report = check_corpus(path, snapshot, decode, progress)
            clean = report.clean
    if as_json:
        _print_json(done.to_json() if repair else report.to_json())
    else:
        _print_report(report)
        if repair:
            _print_repair(done)
        elif not clean and not any("--repair" in line for line in report.index):
            _say(f"`rbm corpus check --repair {escape(path)}` mends what can be mended")
    if not clean:
        sys.exit(1)


@corpus.command()
@click.argument("path", required=False)
@click.option(
    "-n", "--limit", type=click.IntRange(min=0), default=20, show_default=True, help="How many, newest first; 0: all."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def log(path: str | None, limit: int, as_json: bool) -> None:
    """Snapshots of a corpus, newest first: what led to the present one, and others that have a tag. Times are UTC.

    \b
    Examples:
      rbm corpus log data/mine
      rbm corpus log data/mine -n 0 --json
    """
    history = read_history(str(path or bundled_corpus()), limit or None)
    if as_json:
        return _print_json([vars(snapshot) | {"time": snapshot.time.isoformat()} for snapshot in history])
    table = _table()
    for name in ("snapshot", "time (UTC)", "trajectories"):
        table.add_column(name, no_wrap=True)
    longest = max((len(tag) for one in history for tag in one.tags), default=0)
    table.add_column("tags", overflow="fold", min_width=min(20, longest))
    table.add_column("what", overflow="fold")
    for one in history:
        count = "unreadable" if one.trajectories is None else str(one.trajectories)
        when = one.time.astimezone(UTC).strftime("%Y-%m-%d %H:%M")
        table.add_row(one.id, when, count, escape(" ".join(one.tags)), escape(one.message))
    _print_table(table)


@corpus.command()
@click.argument("path")
@click.argument("name")
@click.argument("snapshot", required=False)
@click.option("--delete", is_flag=True, help="Take the name away; it can not be used again.")
def tag(path: str, name: str, snapshot: str | None, delete: bool) -> None:
    """Give a snapshot (the newest by default) a NAME, by which it can be opened. It is then kept by `compact`.

    A tag can not be moved to another snapshot: choose another name.

    \b
    Examples:
      rbm corpus tag data/mine v1
      rbm corpus tag data/mine paper 478A39V93NFDP2TTK7J0
      rbm corpus tag data/mine v1 --delete
    """
    if delete:
        delete_tag(path, name)
        click.echo(f"tag {name} is deleted")
    else:
        click.echo(f"tag {name}: snapshot {add_tag(path, name, snapshot)}")


@corpus.command()
@click.argument("path", required=False)
@click.option("--source", multiple=True, help="Of this source. Each filter may be given several times: one of them.")
@click.option("--task", multiple=True, help="With this instruction.")
@click.option("--quality", multiple=True, type=click.Choice([quality.value for quality in Quality]))
@click.option("--embodiment", multiple=True, help="Of this robot.")
@click.option("--min-frames", type=click.IntRange(min=1), help="With at least so many stored frames.")
@click.option("--ids-from", type=click.File(encoding="utf-8"), help="With an id in this file, one a line; - for stdin.")
@click.option("--snapshot", help="An older snapshot, by its id or tag; the newest by default.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Save the selection: .json, or .json.gz.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def select(
    path: str | None,
    source: tuple[str, ...],
    task: tuple[str, ...],
    quality: tuple[str, ...],
    embodiment: tuple[str, ...],
    min_frames: int | None,
    ids_from: TextIO | None,
    snapshot: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Trajectories that pass every filter: count them, and save them for training and evaluation.

    The saved file pins the snapshot and the ids, so it means the same trajectories whatever happens to the corpus.

    \b
    Examples:
      rbm corpus select data/mine --quality failure --quality suboptimal
      rbm corpus select data/mine --source lab --min-frames 16 -o lab.json
      rbm train data=corpus data.selection=lab.json run_dir=runs/lab
    """
    if output is not None and not output.name.endswith((".json", ".json.gz")):
        raise UserError(f"--output {output}: give a name that ends in .json or .json.gz")
    opened = Corpus.open(path or bundled_corpus(), snapshot)
    filters: dict[str, Any] = {"source": source, "task": task, "quality": quality, "embodiment": embodiment}
    filters = {name: list(values) for name, values in filters.items() if values}
    if min_frames is not None:
        filters["min_frames"] = min_frames
    rows = opened.select(**filters)
    if ids_from is not None:
        rows = np.intersect1d(rows, _rows_of(opened, _read_ids(ids_from)))
        filters["ids_from"] = str(ids_from.name)
    if output is not None:
        if not len(rows):
            raise UserError(f"corpus {opened.location}: no trajectory passes these filters, so {output} is not written")
        Selection.of(opened, rows, filters).save(output)
    counts = _outcomes_by_task(opened, rows)
    totals = np.bincount(opened.columns.quality[rows], minlength=3).tolist()
    if as_json:
        names = [item.value for item in Quality]
        by_task = {text: dict(zip(names, row, strict=True)) for text, row in counts}
        facts = {"corpus": str(opened.location), "snapshot": opened.snapshot, "trajectories": len(rows)}
        facts |= {"by_quality": dict(zip(names, totals, strict=True)), "by_task": by_task, "filters": filters}
        return _print_json(facts | {"output": None if output is None else str(output)})
    _say(f"{len(rows)} of {len(opened)} trajectories of {escape(str(opened.location))}, snapshot {opened.snapshot}")
    _print_outcomes("task", counts, totals)
    if output is not None:
        _say(f"saved: {escape(str(output))}")


@corpus.command()
@click.argument("destination")
@click.argument("sources", nargs=-1, required=True)
@click.option(
    "--conflict",
    type=click.Choice(get_args(Conflict)),
    default="error",
    show_default=True,
    help="An id that is there with other content: stop before anything is written, keep the first, or take the last.",
)
@click.option("--skip-damaged", is_flag=True, help="Leave damaged trajectories out and name them, instead of stopping.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def merge(destination: str, sources: tuple[str, ...], conflict: Conflict, skip_damaged: bool, as_json: bool) -> None:
    """Add all trajectories of SOURCES to DESTINATION, which is made if it is not there.

    Payloads are copied byte for byte, their checksums verified. What is there already is passed over, so a merge
    that was broken off goes on when the same command is run again.

    \b
    Examples:
      rbm corpus merge data/all data/simulated data/real
      rbm corpus merge s3://lab/corpus data/new --conflict replace
    """
    with _progress(_GOES_ON) as progress:
        done = merge_corpora(destination, sources, conflict, skip_damaged, progress)
    if as_json:
        return _print_json(done.to_json())
    for id, what in done.damaged:
        _say(f"left out, damaged: {escape(id)}: {escape(what)}")
    also = {
        "replaced": done.replaced,
        "there already": done.present,
        "passed over for another of the same id": done.skipped,
        "left out as damaged": len(done.damaged),
    }
    parts = [f"{_trajectories(done.added)} added", *(f"{count} {what}" for what, count in also.items() if count)]
    _say(f"{escape(done.corpus)}: {', '.join(parts)}; snapshot {done.snapshot}")


@corpus.command()
@click.argument("source")
@click.argument("destination")
@click.option("--codec", type=click.Choice(["jpeg", "h264"]), help="Encode again; as it is by default.")
@click.option("--short-side", type=click.IntRange(min=1), help="Scale frames down to this many pixels (with --codec).")
def copy(source: str, destination: str, codec: str | None, short_side: int | None) -> None:
    """Copy a corpus into one segment, with the same or another codec.

    DESTINATION is a new local folder; `merge` writes to a URL, or to a corpus that is there.

    \b
    Examples:
      rbm corpus copy data/archive data/training --codec jpeg
      rbm corpus copy s3://lab/corpus data/training
    """
    if short_side is not None and codec is None:
        raise UserError("--short-side encodes again: say --codec too")
    with _progress(_NOTHING_WRITTEN) as progress:
        copied = copy_corpus(source, destination, codec, short_side, progress=progress)
    click.echo(f"{_trajectories(len(copied))} in {copied.location}")


@corpus.command()
@click.argument("path")
@click.argument("ids", nargs=-1)
@click.option("--ids-from", type=click.File(encoding="utf-8"), help="Ids, one a line; - for stdin.")
@click.option("--selection", type=click.Path(path_type=Path), help="All of a saved selection.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def remove(path: str, ids: tuple[str, ...], ids_from: TextIO | None, selection: Path | None, as_json: bool) -> None:
    """Take trajectories out, in a new snapshot. Older snapshots keep them; `compact --drop-history` frees their room.

    \b
    Examples:
      rbm corpus remove data/mine lab/0017 lab/0042
      rbm corpus remove data/mine --ids-from bad.txt
      rbm corpus remove data/mine --selection old.json
    """
    wanted = [*ids, *(_read_ids(ids_from) if ids_from is not None else [])]
    if selection is not None:
        saved = Selection.load(selection)
        if Location.parse(saved.corpus) != Location.parse(path):
            raise UserError(f"selection {selection} is of the corpus {saved.corpus}, not of {path}")
        wanted += saved.ids
    if not wanted:
        raise UserError("say which trajectories: ids, --ids-from FILE or --selection FILE")
    Corpus.open(path)  # says what is wrong with the place, before a writer makes anything there
    with CorpusWriter(path) as writer:
        writer.remove(wanted)
        snapshot = writer.commit()
        left = len(writer.ids)
    if as_json:
        return _print_json({"removed": len(set(wanted)), "left": left, "snapshot": snapshot})
    click.echo(f"{_trajectories(len(set(wanted)))} removed, {left} left; snapshot {snapshot}")


@corpus.command()
@click.argument("path")
@click.option("--drop-history", is_flag=True, help="Give up older snapshots without a tag, and free their room.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compact(path: str, drop_history: bool, as_json: bool) -> None:
    """Join small segments and leave out the bytes of removed trajectories, in a new snapshot.

    Rows, ids and payloads stay as they are. The disk is freed only with --drop-history: older snapshots still hold
    the former bytes. Tagged snapshots are always kept; so tag what a checkpoint or a selection is pinned to.

    \b
    Examples:
      rbm corpus compact data/mine
      rbm corpus compact data/mine --drop-history
    """
    with _progress(_GOES_ON) as progress:
        done = compact_corpus(path, drop_history, progress=progress)
    if as_json:
        return _print_json(vars(done))
    before, after = done.segments
    _say(f"{_trajectories(done.moved)} moved; segments: {before} before, {after} now; snapshot {done.snapshot}")
    if drop_history:
        kept = f", {len(done.kept)} tagged kept ({escape(', '.join(done.kept))})" if done.kept else ""
        _say(f"older snapshots: {done.dropped} dropped{kept}; {_size(done.freed)} freed")


@corpus.command()
@click.argument("path")
@click.argument("destination")
@click.option("--plain", is_flag=True, help="As plain Zarr v3 in a folder: all arrays and attributes, no Icechunk.")
@click.option("--snapshot", help="An older snapshot, by its id or tag; the newest by default.")
def export(path: str, destination: str, plain: bool, snapshot: str | None) -> None:
    """Write a snapshot in another form: with --plain as a folder that zarr alone reads.

    DESTINATION is a new local folder. Every checksum is verified.

    \b
    Examples:
      rbm corpus export --plain data/mine data/mine.zarr
      python -c "import zarr; print(zarr.open_group('data/mine.zarr').tree())"
    """
    if not plain:
        raise UserError("say --plain: it is the only form that there is")
    with _progress(_NOTHING_WRITTEN) as progress:
        place = export_plain(Corpus.open(path, snapshot), destination, progress)
    click.echo(f"plain zarr in {place}")


_NOTHING_WRITTEN = "stopped; nothing was written"
_GOES_ON = "stopped; the same command goes on"


@contextmanager
def _progress(stopped: str) -> Iterator[Progress | None]:
    """Bars, which go when the work is done, where somebody can see them. At Ctrl-C `stopped` is said."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        try:
            if console.is_terminal:
                with Progress(*columns, console=console, transient=True) as progress:
                    yield progress
            else:
                yield None
        except UserError as error:
            # Icechunk makes an error of its own of Ctrl-C, which may come as the reason in a sentence of ours
            if "KeyboardInterrupt" not in str(error):
                raise
            raise KeyboardInterrupt from error
    except KeyboardInterrupt:  # Icechunk and Python may both raise for one Ctrl-C, one while the other is looked at
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        click.echo(stopped, err=True)
        sys.exit(130)


def _print_json(facts: Any) -> None:
    click.echo(json.dumps(facts, indent=2, ensure_ascii=False))


def _say(line: str) -> None:
    Console().print(line, highlight=False, soft_wrap=True)


def _print_table(table: Table) -> None:
    """Lines as long as they are in a pipe, unless COLUMNS says how long they may be."""
    console = Console()
    console.print(table) if console.is_terminal or "COLUMNS" in os.environ else Console(width=1000).print(table)


def _table(name: str = "", *numbers: str) -> Table:
    """Names and numbers: where there is no room, names are broken."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    if name:
        table.add_column(name, overflow="fold")
    for number in numbers:
        table.add_column(number, no_wrap=True)
    return table


def _trajectories(count: int) -> str:
    return "1 trajectory" if count == 1 else f"{count} trajectories"


def _size(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(int(np.log10(count)) // 3, 4)
    return f"{count / 1000**power:.1f} {('', 'kB', 'MB', 'GB', 'TB')[power]}"


def _read_ids(file: TextIO) -> list[str]:
    try:
        ids = [id for line in file if (id := line.rstrip("\r\n"))]
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name}: is no UTF-8 text: give a file with one id a line") from error
    if not ids:
        raise UserError(f"{file.name}: holds no id: give a file with one id a line")
    return ids


def _rows_of(opened: Corpus, ids: Sequence[str]) -> NDArray[np.int64]:
    rows = opened.ids.find_many(ids)
    unknown = np.flatnonzero(rows < 0)
    if len(unknown):
        raise UserError(
            f"corpus {opened.location}: no trajectory has the id {ids[unknown[0]]!r} (unknown ids: {len(unknown)})"
        )
    return rows


def _outcomes_by_task(opened: Corpus, rows: NDArray[np.int64]) -> list[tuple[str, list[int]]]:
    """Counts by `Quality.rank` of the tasks that have any, largest first."""
    columns = opened.columns
    key = columns.task[rows].astype(np.int64) * 3 + columns.quality[rows]
    counts = np.bincount(key, minlength=3 * len(opened.tasks)).reshape(-1, 3)
    order = np.argsort(-counts.sum(axis=1), kind="stable")[: np.count_nonzero(counts.any(axis=1))]
    return [(opened.tasks[int(number)].text, counts[number].tolist()) for number in order]


def _print_outcomes(what: str, rows: Sequence[tuple[str, Iterable[int]]], totals: Iterable[int]) -> None:
    table = _table(what, *(quality.value for quality in Quality))
    for name, counts in rows[:_ROWS_SHOWN]:
        table.add_row(escape(name), *map(str, counts))
    table.add_row("[bold]all[/]", *map(str, totals))
    _print_table(table)
    if len(rows) > _ROWS_SHOWN:
        _say(f"and {len(rows) - _ROWS_SHOWN} more: --json lists them all")


def _print_report(report: Report) -> None:
    _say(f"[bold]{escape(report.corpus)}[/]  snapshot {report.snapshot or 'unknown'}")
    for line in report.index:
        _say(escape(line))
    if report.cache_damaged:
        _say("the local copy of its index is damaged")
    for shard in report.shards:
        _say(f"{shard.name}: {escape(shard.what)}; lost in it: {_trajectories(len(shard.ids))}")
    for bad in report.bad:
        _say(f"{escape(bad.id)}: {escape(bad.what)}")
    if report.trajectories:
        decoded = " and every frame decoded" if report.decoded else ""
        _say(
            f"{_trajectories(report.trajectories)}, {_size(report.bytes)} read{decoded}: "
            + ("all are as they were written" if report.clean else f"{len(report.bad)} damaged")
        )


def _print_repair(done: Repair) -> None:
    if done.reference_made:
        _say(f"the file that names the newest snapshot was damaged and is made again: snapshot {done.report.snapshot}")
    if done.lost_snapshot:
        had = "" if done.lost_trajectories is None else f", had {done.lost_trajectories}"
        _say(
            f"snapshot {done.lost_snapshot} can not be read: set back to {done.report.snapshot}; the corpus has "
            f"{_trajectories(done.report.trajectories)} now{had}: merge a backup into it, or run its build again"
        )
        known = "not known" if done.lost_ids is None else ", ".join(map(escape, done.lost_ids[:_ROWS_SHOWN])) or "none"
        more = len(done.lost_ids or ()) - _ROWS_SHOWN
        _say(f"trajectories that only it had: {known}" + (f" and {more} more: --json lists them" if more > 0 else ""))
    if done.removed:
        _say(f"taken out as damaged: {_trajectories(done.removed)}; older snapshots keep them")
    if done.moved:
        _say(f"taken over whole from damaged shards: {_trajectories(done.moved)}")
    if done.cache_made:
        _say("the local copy of the index is made again")
    if done.collected:
        _say(f"{_size(done.collected)} that killed writers had left are deleted")
    if done.collected is None:
        _say("an old snapshot can not be read, so what killed writers left stays: `rbm corpus compact --drop-history`")
    if done.report.index:
        _say("ids that occur twice are not mended: restore it from a backup, or build it again")
    _say(f"the newest snapshot is {done.snapshot}")


def _print_stats(found: Stats) -> None:
    total, sample = found.trajectories, found.sample
    _say(f"[bold]{escape(found.corpus)}[/]  snapshot {found.snapshot}")
    about = "" if sample.heads == total else f" (from {sample.heads} of them)"
    _say(f"{_trajectories(total)}, {found.frames} frames, {_size(found.bytes)}, {sample.seconds / 3600:.2f} h{about}")
    for name, groups in (
        ("source", found.sources),
        ("embodiment", found.embodiments),
        ("scene", found.scenes),
        ("task", found.tasks),
    ):
        _print_groups(name, groups)
    if total:
        _say("")
        table = _table("quantile", *(f"{quantile:.0%}" for quantile in QUANTILES))
        table.add_row("frames", *(f"{value:.0f}" for value in found.n_frames))
        table.add_row("bytes", *(_size(value) for value in found.bytes_each))
        _print_table(table)
    _say("")
    successes = found.outcomes[0]
    for what, count, of in (
        ("successful", successes, total),
        ("suboptimal", found.outcomes[1], total),
        ("failures", found.outcomes[2], total),
        ("with dense labels", found.dense, total),
        ("with a graded outcome", found.partial, total),
        ("of a robot", found.robot, total),
        ("from a simulator", found.sim, total),
        ("successes that are messy", found.messy, successes),
        ("successes with a known done frame", found.done_known, successes),
    ):
        _say(f"{what}: {count}" + (f" ({count / of:.1%})" if of else ""))
    _say("views: " + ", ".join(f"{count} × {number}" for number, count in sample.views.items()) + about)
    if sample.damaged:
        _say(f"{sample.damaged} of {sample.heads} heads are damaged: run `rbm corpus check`")
    copies = found.duplicates
    _say(f"copies of the same frames: {copies.surplus} in {copies.groups} groups; {copies.unknown} without a hash")
    for group in copies.examples:
        _say("  " + ", ".join(map(escape, group)))
    _say(f"tasks without a trajectory: {len(found.unused_tasks)}; with one outcome only: {len(found.one_outcome)}")


def _print_groups(name: str, groups: Sequence[Group]) -> None:
    table = _table(name, "trajectories", "frames", "bytes", *(quality.value for quality in Quality))
    for group in groups[:_ROWS_SHOWN]:
        counts = (group.trajectories, group.frames, _size(group.bytes), *group.outcomes)
        table.add_row(escape(group.name) or "-", *map(str, counts))
    _say("")
    _print_table(table)
    if len(groups) > _ROWS_SHOWN:
        _say(f"and {len(groups) - _ROWS_SHOWN} more: --json lists them all")
