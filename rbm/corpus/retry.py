"""Patience with object storage: what can pass is tried again and reported, what cannot pass is said at once.

Of its own accord Icechunk would try ten times without a word, and wait for ever for a server that accepts a
connection and never answers. So each call here has a time limit and its own count of tries, each failure is
a line in the log, and Icechunk itself is set to one try (a broken read of a chunk it still repeats once).

    RBM_STORAGE_TRIES     tries of one call before it is given up (10: about two minutes of a dead network)
    RBM_STORAGE_TIMEOUT   seconds that one try may take (60; a large object gets longer)

Local directories are not touched by any of this.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import pickle
import queue
import random
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import icechunk
from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import WrapperStore

from rbm.corpus.layout import BRANCH
from rbm.corpus.location import S3_CREDENTIALS, S3_KEYS, Location, is_anonymous
from rbm.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

_TRIES = 10
_TIMEOUT = 60.0
_LONGEST_TIMEOUT = 7 * 24 * 3600.0
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
_SLOWEST_BYTES = 256 << 10
"""Bytes a second: an object that is written may take as long as at this rate, on top of the timeout."""

_TOKEN = "token"
_METADATA = "zarr.json"
_INSIDES = "Debug source:"
"""After this an error of obstore prints its structure."""

_REFUSED = re.compile(
    r"AccessDenied|AccountProblem|AllAccessDisabled|Expired|Forbidden|InvalidAccessKeyId|InvalidClientTokenId"
    r"|InvalidSecurity|InvalidToken|MissingAuthentication|MissingSecurity|NotSignedUp|SignatureDoesNotMatch|TokenRefresh"
)
_WRONG_REGION = ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect")
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
_TRANSIENT_CODE = re.compile(
    r"SlowDown|Throttl|InternalError|ServiceUnavailable|RequestTimeout|RequestLimit|TooManyRequests|OperationAborted"
)
_TRANSIENT_TEXT = re.compile(
    r"dispatch failure|streaming error|response error|time[d ]*out|end of file|connection (closed|reset|refused)", re.I
)
_NO_CREDENTIALS = re.compile(
    r"loading credentials|no credentials|Missing (Access|SecretAccess)Key|169\.254\.169\.254|metadata\.google", re.I
)
_CODES = re.compile(r'code: "(\w+)"|unhandled error \((\w+)\)|<Code>(\w+)</Code>|(NoSuchBucket|NoSuchKey)')
_NAMES = re.compile(r"https?://(?!169\.|metadata)\S+|path:? \S+|at location \S+")
"""Where a name stands in an error of obstore, in which any word may occur."""

_CAUSE = re.compile(r"\s*(?:x|\||[`|]->)\s+(?!\d+: |context|at |with )(\S.*)")
"""A line of Icechunk's drawing that holds a cause, and not the place in its code."""


def retrying(call: Callable[[], T], what: str, location: Location, limit: float | None = None) -> T:
    """`call()`; on object storage it is repeated while its failures look as if they would pass.

    Args:
        call: safe to repeat: a read, or a write that comes to the same when it is done twice. It may still be
            running, in a thread of its own, after its time limit is over.
        what: for messages: "reading its index".
        limit: seconds for one try; None: RBM_STORAGE_TIMEOUT; `math.inf`: no limit.

    Raises:
        UserError: wrong or no credentials, no such bucket, wrong region (at once); no success after all tries.
        Exception: whatever else `call` raises, as it is.
    """
    if location.local is not None:
        return call()
    patience = _Patience(what, location)
    while True:
        try:
            return _within(call, patience, timeout() if limit is None else limit)
        except Exception as error:
            time.sleep(patience.pause(error))


def storage_config() -> icechunk.RepositoryConfig:
    """Icechunk with one try of its own. It counts for a session's requests only in what `connect` gives."""
    once = icechunk.StorageRetriesSettings(max_tries=1)
    return icechunk.RepositoryConfig(storage=icechunk.StorageSettings(retries=once))


def connect(location: Location) -> icechunk.Repository:
    """Open the repository there.

    Raises:
        UserError: as `retrying`. FileNotFoundError: there is none. IcechunkError: it can not be read.
    """
    if location.local is not None:
        return icechunk.Repository.open(location.storage())
    if not retrying(lambda: location.holds_repository(timeout()), "looking for it", location):
        raise FileNotFoundError(f"no corpus at {location}")
    found = retrying(lambda: icechunk.Repository.open(location.storage(), storage_config()), "opening it", location)
    # Icechunk makes its client for the first request of open, before it looks at the configuration, and keeps
    # it; a copy makes a client of its own, which tries once.
    return pickle.loads(pickle.dumps(found))


def create(location: Location) -> icechunk.Repository:
    """Make a repository where nothing is.

    Raises:
        UserError: as `retrying`. IcechunkError: something is there; the disk is full.
    """

    def attempt() -> None:
        try:
            icechunk.Repository.create(location.storage())
        except icechunk.IcechunkError:
            if not location.holds_repository(timeout()):  # an earlier try made it, its answer was lost
                raise

    if location.local is not None:
        return icechunk.Repository.create(location.storage())
    retrying(lambda: location.holds_repository(timeout()), "looking for it", location)  # its errors are clearer
    retrying(attempt, "making the repository", location)
    return connect(location)


def read_session(repository: icechunk.Repository, snapshot: str | None, location: Location) -> icechunk.Session:
    """A session that reads a snapshot, or the newest one.

    Raises:
        UserError: as `retrying`. IcechunkError: there is no such snapshot, or it is damaged.
    """

    def attempt() -> icechunk.Session:
        if snapshot is None:
            return repository.readonly_session(BRANCH)
        try:
            return repository.readonly_session(snapshot_id=snapshot)
        except icechunk.IcechunkError as error:  # "snapshot not found", whatever the reason was
            repository.lookup_snapshot(snapshot)  # raises the reason
            raise ConnectionError("connection lost") from error  # it is there

    if location.local is not None and snapshot is not None:
        return repository.readonly_session(snapshot_id=snapshot)
    return retrying(attempt, "opening a snapshot", location)


def write_session(repository: icechunk.Repository, location: Location) -> icechunk.Session:
    """A session that writes on top of the newest snapshot.

    Raises:
        UserError: as `retrying`. IcechunkError: it can not be read.
    """
    return retrying(lambda: repository.writable_session(BRANCH), "beginning a commit", location)


def commit(repository: icechunk.Repository, session: icechunk.Session, message: str, location: Location) -> str:
    """Commit and return the snapshot. Where the answer is lost, the branch says whether the commit has landed:
    it carries a token, so another writer's commit is not taken for ours.

    Raises:
        UserError: as `retrying`. ConflictError: another writer has committed.
    """
    token = uuid.uuid4().hex

    def attempt() -> str:
        try:
            return session.commit(message, metadata={_TOKEN: token})
        except Exception:
            newest = repository.lookup_branch(BRANCH)
            if repository.lookup_snapshot(newest).metadata.get(_TOKEN) == token:
                return newest
            raise

    return retrying(attempt, "committing", location, limit=10 * timeout())


def patient(store: Store, location: Location) -> Store:
    """A zarr store whose reads and writes of single objects are repeated as in `retrying`; a local one as it is."""
    return store if location.local is not None else _PatientStore(store, location)


class _PatientStore(WrapperStore[Store]):
    """Icechunk takes a snapshot that it can not load for an empty one: it finds no group and lists nothing. Of its
    questions only `exists` then fails, so that is asked before an absence is believed."""

    def __init__(self, store: Store, location: Location) -> None:
        super().__init__(store)
        self._location = location

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        async def get() -> Buffer | None:
            found = await self._store.get(key, prototype, byte_range)
            if found is None and key.endswith(_METADATA) and await self._store.exists(key):
                found = await self._store.get(key, prototype, byte_range)
            return found

        return await self._patiently(get, f"reading {key}")

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        ranges = list(key_ranges)
        what = f"reading {len(ranges)} ranges"
        return await self._patiently(lambda: self._store.get_partial_values(prototype, ranges), what)

    async def exists(self, key: str) -> bool:
        return await self._patiently(lambda: self._store.exists(key), f"looking for {key}")

    async def is_empty(self, prefix: str) -> bool:
        await self.exists(_METADATA)
        return await super().is_empty(prefix)

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        await self.exists(_METADATA)
        async for name in super().list_dir(prefix):
            yield name

    async def set(self, key: str, value: Buffer) -> None:
        limit = timeout() + len(value) / _SLOWEST_BYTES
        await self._patiently(lambda: self._store.set(key, value), f"writing {key}", limit)

    def _with_store(self, store: Store) -> _PatientStore:
        return type(self)(store, self._location)

    async def _patiently(self, call: Callable[[], Awaitable[T]], what: str, limit: float | None = None) -> T:
        patience = _Patience(what, self._location)
        while True:
            seconds = timeout() if limit is None else limit
            try:
                return await asyncio.wait_for(call(), seconds)
            except TimeoutError:
                pause = patience.pause(TimeoutError(f"no answer in {seconds:.0f} s"))
            except Exception as error:
                pause = await asyncio.to_thread(patience.pause, error)
            await asyncio.sleep(pause)


def tries() -> int:
    """RBM_STORAGE_TRIES. Raises UserError: it is no whole number above 0."""
    text = os.environ.get("RBM_STORAGE_TRIES") or str(_TRIES)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"RBM_STORAGE_TRIES is {text!r}: give a whole number above 0")
    return int(text)


def timeout() -> float:
    """RBM_STORAGE_TIMEOUT, in seconds. Raises UserError: it is no number above 0."""
    text = os.environ.get("RBM_STORAGE_TIMEOUT") or str(_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        raise UserError(f"RBM_STORAGE_TIMEOUT is {text!r}: give seconds, a number above 0")
    return seconds


def reason(error: BaseException) -> str:
    """The one sentence in a storage error: Icechunk draws several lines, obstore prints its insides.

    Raises:
        KeyboardInterrupt: it was Ctrl-C, which inside Icechunk comes as an error of its own.
    """
    if "KeyboardInterrupt" in str(error):
        raise KeyboardInterrupt from error
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    if found := re.search(r'code: "(\w+)", message: "([^"]*)"|<Code>(\w+)</Code>\s*<Message>([^<]*)', text):
        code, message = (part for part in found.groups() if part is not None)
        return f"{code}: {message}" if message else code
    if _INSIDES in text:
        return _reason_of_obstore(text)
    causes = _causes(text)
    return causes[-1] if causes else " ".join(text.split()) or type(error).__name__


def _within(call: Callable[[], T], patience: _Patience, limit: float) -> T:
    """`call()`, or TimeoutError: nothing can end a call into Icechunk, so it is left to its own thread."""
    answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((call(), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=run, name="rbm-storage", daemon=True).start()
    patient = min(limit, timeout())
    try:
        try:
            result, error = answer.get(timeout=patient)
        except queue.Empty:
            if limit <= patient:
                raise
            patience.report_slow(patient, limit)
            result, error = answer.get(timeout=None if math.isinf(limit) else limit - patient)
    except queue.Empty:
        raise TimeoutError(f"no answer in {limit:.0f} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


class _Patience:
    """Counts the tries of one call, reports each failure, and says how long to wait for the next."""

    def __init__(self, what: str, location: Location) -> None:
        self._what = what
        self._location = location
        self._tries = tries()
        self._failed = 0
        self._since = time.monotonic()

    def pause(self, error: Exception) -> float:
        """Seconds to wait.

        Raises:
            UserError: waiting does not help, or has not helped. Exception: `error`, if it is of another kind.
        """
        failure = examine(error)
        if failure is not None and not failure.transient and not failure.code:
            failure = self._diagnose(failure)
        if failure is None:
            raise error
        if not failure.transient:
            raise UserError(self._refusal(failure)) from error
        self._failed += 1
        if self._failed >= self._tries:
            raise UserError(
                f"corpus {self._location}: {self._what} failed {self._failed} times in "
                f"{time.monotonic() - self._since:.0f} s ({failure.reason}): see that the network and the object store "
                "are up, and run the same command again"
            ) from error
        longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (self._failed - 1))
        pause = random.uniform(longest / 2, longest)
        log.warning(
            "corpus %s: %s failed (%s); try %d of %d follows in %.1f s",
            *(self._location, self._what, failure.reason, self._failed + 1, self._tries, pause),
        )
        return pause

    def report_slow(self, seconds: float, limit: float) -> None:
        until = "until it is done" if math.isinf(limit) else f"for up to {limit:.0f} s"
        log.warning("corpus %s: %s has taken %.0f s so far; waiting %s", self._location, self._what, seconds, until)

    def _diagnose(self, failure: Failure) -> Failure | None:
        """A refusal without its reason (an answer to HEAD has no text): a small read says more."""
        try:
            self._location.holds_repository(timeout())
        except Exception as error:
            found = examine(error)
            return None if found is None or not (found.code or found.transient) else found
        return Failure("", True, failure.reason)

    def _refusal(self, failure: Failure) -> str:
        where, scheme = self._location, self._location.scheme
        start = f"corpus {where}: {self._what} was refused ({failure.reason}): "
        if failure.code == "NoSuchBucket":
            return (
                f"corpus {where}: there is no bucket {where.bucket!r}: make it, or correct the name or AWS_ENDPOINT_URL"
            )
        if failure.code in _WRONG_REGION:
            return start + "the bucket lies in another region: set AWS_REGION"
        if failure.code == "RequestTimeTooSkewed":
            return start + "set this machine's clock"
        if scheme == "gs":
            return start + "set GOOGLE_APPLICATION_CREDENTIALS to a key that may use the bucket"
        if is_anonymous():
            return start + f"it is not public: unset AWS_NO_SIGN_REQUEST and {S3_KEYS}"
        return start + S3_CREDENTIALS


@dataclass(frozen=True)
class Failure:
    """What a storage error comes to. Neither `code` nor `transient`: refused, and the answer does not say why."""

    code: str
    transient: bool
    reason: str


def examine(error: BaseException) -> Failure | None:
    """What is known of an error; None: it has nothing to do with reaching the storage or being let in."""
    if isinstance(error, TimeoutError | ConnectionError):
        return Failure("", True, reason(error))
    text = _without_names(error)
    if text is None:
        return None
    if _NO_CREDENTIALS.search(text):
        return Failure("NoCredentials", False, "no credentials were found")
    status = int(found[1]) if (found := re.search(r"status code: (\d+)", text)) else 0
    code = next((part for found in _CODES.finditer(text) for part in found.groups() if part), "")
    if _REFUSED.match(code) or code in (*_WRONG_REGION, "NoSuchBucket", "RequestTimeTooSkewed"):
        return Failure(code, False, reason(error))
    if "incorrectly configured region" in text:
        return Failure("PermanentRedirect", False, reason(error))
    if status in (401, 403):
        return Failure(code or "AccessDenied", False, reason(error))
    if status in _TRANSIENT_STATUS or _TRANSIENT_CODE.search(code) or _TRANSIENT_TEXT.search(text):
        return Failure(code, True, reason(error))
    if not code and "service error" in text:
        return Failure("", False, reason(error))
    return None


def _without_names(error: BaseException) -> str | None:
    """The text of a storage error without URLs and keys, in which any word may stand; None for other errors."""
    kind = type(error).__module__.partition(".")[0]
    text = str(error)
    if isinstance(error, icechunk.IcechunkError):
        text = "\n".join(_causes(text))
    elif kind == "obstore" or (isinstance(error, FileNotFoundError) and _INSIDES in text):
        text = text.partition(_INSIDES)[0]
    else:
        return None
    return _NAMES.sub("", text.replace("HTTP error", "dispatch failure"))


def _causes(text: str) -> list[str]:
    return [found[1] for line in text.splitlines() if (found := _CAUSE.match(line))]


def _reason_of_obstore(text: str) -> str:
    sentence, _, insides = text.partition(_INSIDES)
    if found := re.search(r'message: "([^"]+)"', insides):
        return found[1]
    if "TimedOut" in insides or "kind: Timeout" in insides:
        return "no answer in time"
    if "IncompleteMessage" in insides:
        return "connection closed before the answer"
    return " ".join(sentence.rpartition(" - ")[2].split())
