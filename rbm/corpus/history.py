"""Snapshots and their names: what a corpus held, and when."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import islice

import icechunk

from rbm.corpus import layout, store
from rbm.corpus.location import Location
from rbm.corpus.retry import read_session, reason, retrying
from rbm.errors import UserError

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Snapshot:
    """One state of a corpus.

    Attributes:
        id: for `Corpus.open`. time: of its commit, with time zone. message: what that did.
        trajectories: that it holds; None: its index can not be read.
        tags: its names.
    """

    id: str
    time: datetime
    message: str
    trajectories: int | None
    tags: tuple[str, ...]


def read_history(place: str | Location, limit: int | None = None) -> list[Snapshot]:
    """The newest `limit` snapshots (default all), newest first: what led to the present one, and others with a tag.

    Raises:
        UserError: no corpus there; a snapshot in between can not be read.
    """
    location = Location.parse(place)
    repository = store.open_repository(location)
    tags: dict[str, list[str]] = {}
    for name, snapshot in store.tagged(repository, location).items():
        tags.setdefault(snapshot, []).append(name)
    with store.readable(location):
        chain = retrying(
            lambda: list(islice(repository.ancestry(branch=layout.BRANCH), limit)), "listing its snapshots", location
        )
    for snapshot in set(tags) - {info.id for info in chain}:  # cut off by `compact`, by a repair, or by the limit
        with suppress(*store.STORE_ERRORS):  # after a repair it may be damaged
            look = partial(repository.lookup_snapshot, snapshot)
            chain.append(retrying(look, "looking up a snapshot", location))
    chain.sort(key=lambda info: info.written_at, reverse=True)
    return [
        Snapshot(
            info.id,
            info.written_at,
            info.message,
            count(repository, location, info.id),
            tuple(tags.get(info.id, ())),
        )
        for info in chain[:limit]
    ]


def add_tag(place: str | Location, name: str, snapshot: str | None = None) -> str:
    """Name a snapshot (id or other tag; the newest by default); returns its id. It is kept for ever, `compact` and all.

    Raises:
        UserError: the name is taken, was used before, or is no name; no such snapshot.
    """
    location = Location.parse(place)
    if not _TAG.fullmatch(name):
        raise UserError(
            f"tag {name!r}: a name has letters, digits, '.', '_' and '-', and begins with one of the former"
        )
    repository = store.open_repository(location)
    wanted = store.resolve(repository, location, snapshot)
    with store.readable(location):
        if name in retrying(repository.list_tags, "listing its tags", location):
            where = store.resolve(repository, location, name)
            raise UserError(
                f"corpus {location}: tag {name!r} exists already, for snapshot {where}: choose another name"
            )
    try:
        retrying(partial(repository.create_tag, name, wanted), "writing a tag", location)
    except icechunk.IcechunkError as error:
        if "already exists" in reason(error):
            raise UserError(
                f"corpus {location}: there was a tag {name!r}, and a deleted name can not be used again: choose another"
            ) from error
        raise UserError(f"corpus {location}: tag {name!r} can not be written: {reason(error)}") from error
    return wanted


def delete_tag(place: str | Location, name: str) -> None:
    """Take a name away from its snapshot, which stays; the name can not be used again.

    Raises:
        UserError: there is no such tag (says which there are).
    """
    location = Location.parse(place)
    repository = store.open_repository(location)
    with store.readable(location):
        tags = sorted(retrying(repository.list_tags, "listing its tags", location))
        if name not in tags:
            raise UserError(f"corpus {location}: has no tag {name!r}; it has: {', '.join(tags) or 'none'}")
        retrying(partial(repository.delete_tag, name), "deleting a tag", location)


def count(repository: icechunk.Repository, location: Location, snapshot: str) -> int | None:
    """Trajectories of a snapshot; None: its index can not be read."""
    try:
        root = store.open_root(read_session(repository, snapshot, location), location)
        return 0 if root is None else store.array(root, f"{layout.INDEX_GROUP}/{layout.ID_END}").shape[0]
    except (KeyError, *store.STORE_ERRORS):
        return None
