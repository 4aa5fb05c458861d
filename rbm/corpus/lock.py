"""One writer at a time: Icechunk notices a second committer only when it commits, after hours of work.

On a local disk the lock is a file that the system frees when its holder dies. In an object store it is a
lease: an object that its holder renews, and that another may take over once it has run out. Each of these
writes is conditional on the object being as it was last seen, so of two that try at once one fails.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rbm.corpus.location import Location
from rbm.corpus.retry import reason, retrying, timeout
from rbm.errors import UserError

if TYPE_CHECKING:
    from obstore import PutMode, UpdateVersion
    from obstore.store import GCSStore, S3Store

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""A lease that was not renewed for so long is free. Clocks of two machines may differ by less than this."""

_RENEWALS = 3
"""Renewals in the time of a lease, so that one may fail."""

_ATTEMPTS = 5


class WriterLock:
    """An exclusive lock on a corpus, held by a file or an object beside it, `.NAME.writer.lock`.

    Beside, since Icechunk makes a repository in an empty directory only; a file, since network file
    systems do not lock directories.

    Attributes:
        predecessor_died: set by `acquire`: the last writer did not release it, and may have left chunks
            that no snapshot knows.
    """

    def __init__(self, location: Location) -> None:
        if location.local is not None:  # one lock, whatever links lead there
            location = Location.parse(os.path.realpath(location.path))
        place = location.sibling(f".{location.name}.writer.lock")
        self._lock = _FileLock(location, place) if place.local is not None else _Lease(location, place)

    @property
    def predecessor_died(self) -> bool:
        return self._lock.predecessor_died

    def acquire(self) -> None:
        """Raises UserError: another writer holds it (says which); it can not be written."""
        self._lock.acquire()

    def check(self) -> None:
        """Call it before each commit. Raises UserError: another writer has taken over the lease meanwhile."""
        self._lock.check()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold(path: Path, what: str) -> tuple[int, bool]:
    """An exclusive lock on a file, which the system frees when this process dies; and whether its last holder did.

    To give it back, remove the file and close the descriptor.

    Raises:
        UserError: another process holds it, or the file cannot be made; `what` says for whom.
    """
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(
                f"{what}: the lock for its writer can not be made ({path}: {error.strerror}): see that "
                f"{path.parent} is there and can be written to"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(file)
            raise UserError(
                f"{what}: another process (pid {holder}) is writing to it: wait for it, or stop it"
            ) from None
        try:
            current = os.path.samestat(path.stat(), os.fstat(file))
        except FileNotFoundError:
            current = False
        if current:
            died = os.fstat(file).st_size > 0
            mark = f"{os.getpid()}\n".encode()
            os.pwrite(file, mark, 0)  # before it is cut: killed in between, this one too has left its mark
            os.ftruncate(file, len(mark))
            return file, died
        os.close(file)  # its last holder removed it between our open and our lock


class _FileLock:
    def __init__(self, location: Location, place: Location) -> None:
        self.predecessor_died = False
        self._location = location
        self._path = Path(place.path)
        self._file: int | None = None

    def acquire(self) -> None:
        self._file, self.predecessor_died = hold(self._path, f"corpus {self._location}")

    def check(self) -> None:
        """The system holds the lock as long as this process lives."""

    def release(self) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


@dataclass(frozen=True)
class _Holder:
    """What the lease object holds, as JSON."""

    host: str
    machine: str
    pid: int
    token: str
    expires: float

    def is_gone(self) -> bool:
        """Its time is up, or its process was of this machine and is no more."""
        if time.time() > self.expires:
            return True
        if self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


class _Lease:
    def __init__(self, location: Location, place: Location) -> None:
        self.predecessor_died = False
        self._location = location
        self._key = place.path
        self._token = ""
        self._version: UpdateVersion | None = None
        self._lost: str | None = None
        self._mutex = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        from obstore.exceptions import BaseError

        self._token, self._lost, self.predecessor_died = uuid.uuid4().hex, None, False
        try:
            self._take()
        except BaseError as error:
            raise UserError(
                f"corpus {self._location}: the lock for its writer can not be written ({reason(error)}): the object "
                "store has to know conditional writes (If-None-Match, If-Match)"
            ) from error
        self._stop.clear()
        self._thread = threading.Thread(target=self._keep, name="rbm-lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        self._renew()

    def release(self) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        try:
            self._renew()  # so that what is deleted is ours: nobody takes over a fresh lease
            retrying(lambda: self._objects().delete(self._key), "freeing its lock", self._location)
        except UserError as error:  # the commits stand; the lease runs out by itself
            log.warning("%s", error)

    def _take(self) -> None:
        for _ in range(_ATTEMPTS):
            found = self._read()
            if found is None:
                done = self._put("create")
            else:
                holder, version = found
                if holder.token != self._token and not holder.is_gone():
                    raise UserError(
                        f"corpus {self._location}: another process (pid {holder.pid} on {holder.host}) is writing to "
                        "it: wait for it, or stop it (if it has died already, its lock is free in "
                        f"{holder.expires - time.time():.0f} s)"
                    )
                self.predecessor_died = holder.token != self._token or self.predecessor_died
                done = self._put(version)
            if done:
                return
        raise UserError(f"corpus {self._location}: others try to write to it at the same time: start one after another")

    def _keep(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / _RENEWALS) and self._lost is None:
            try:
                self._renew()
            except UserError as error:
                log.warning("%s", error)

    def _renew(self) -> None:
        with self._mutex:
            for _ in range(_ATTEMPTS):
                if self._lost is not None:
                    raise UserError(self._lost)
                if self._version is not None and self._put(self._version):
                    return
                found = self._read()
                if found is not None and found[0].token == self._token:
                    self._version = found[1]  # an earlier renewal came through, its answer did not
                else:
                    who = f"pid {found[0].pid} on {found[0].host}" if found else "another process"
                    self._lost = (
                        f"corpus {self._location}: {who} took over the writing while this process was not heard of "
                        f"for {LEASE_SECONDS:.0f} s: nothing more is committed here; run the same command again later"
                    )
        raise UserError(f"corpus {self._location}: its lock could not be renewed: run the same command again")

    def _put(self, mode: PutMode) -> bool:
        """Write the lease anew; False: the object is not as `mode` demands."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        holder = _Holder(socket.gethostname(), _machine(), os.getpid(), self._token, time.time() + LEASE_SECONDS)
        body = json.dumps(asdict(holder)).encode()
        try:
            written = retrying(lambda: self._objects().put(self._key, body, mode=mode), "locking it", self._location)
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return False
        self._version = _version(written["e_tag"], written["version"])
        return True

    def _read(self) -> tuple[_Holder, UpdateVersion] | None:
        def read() -> tuple[_Holder, UpdateVersion]:
            found = self._objects().get(self._key)
            return _Holder(**json.loads(bytes(found.bytes()))), _version(found.meta["e_tag"], found.meta["version"])

        try:
            return retrying(read, "looking at its lock", self._location)
        except FileNotFoundError:
            return None

    def _objects(self) -> S3Store | GCSStore:
        return self._location.objects(timeout())


def _version(e_tag: str | None, version: str | None) -> UpdateVersion:
    found: UpdateVersion = {}
    if e_tag is not None:
        found["e_tag"] = e_tag
    if version is not None:
        found["version"] = version
    return found


def _machine() -> str:
    """A name for this machine, and for the space in which its process ids count (a container has its own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
