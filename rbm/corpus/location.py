"""Where a corpus lies: a directory of this machine, or a prefix in a bucket of an object store.

Options come from the environment, by the names that other tools use. S3: `AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN` or `AWS_PROFILE`; `AWS_REGION`; `AWS_ENDPOINT_URL` for another
store than Amazon's (`http://` allowed, buckets in the path); `AWS_NO_SIGN_REQUEST` for a public bucket.
Google: `GOOGLE_APPLICATION_CREDENTIALS`.
"""

from __future__ import annotations

import configparser
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from rbm.corpus.layout import BRANCH
from rbm.errors import UserError

if TYPE_CHECKING:
    import icechunk
    from obstore.store import ClientConfig, GCSStore, RetryConfig, S3Config, S3Store

_STREAM_SECONDS = 20
"""An answer of which no byte comes for so long is broken off (and asked for again)."""

_CONNECT_SECONDS = 5

_TRUE = ("1", "true", "yes", "on")

S3_KEYS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN for temporary keys) or AWS_PROFILE to keys "
    "that may use the bucket"
)
S3_CREDENTIALS = f"{S3_KEYS}, or AWS_NO_SIGN_REQUEST=true if it is public"
_KEY_SOURCES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


@dataclass(frozen=True)
class Location:
    """A place for a corpus; can be pickled, `str()` gives the path or URL. Make it with `Location.parse`.

    Attributes:
        scheme: `file`, `s3` or `gs`. bucket: empty for a file.
        path: absolute, or the key prefix in the bucket, without slashes around it.
    """

    scheme: str
    bucket: str
    path: str

    @classmethod
    def parse(cls, place: Location | str | os.PathLike[str]) -> Location:
        """A path (`~` is expanded, a relative one is made absolute), `s3://bucket/prefix` or `gs://bucket/prefix`.

        Raises:
            UserError: an unknown scheme, no bucket, no prefix, or a query in the URL.
        """
        if isinstance(place, Location):
            return place
        text = os.fspath(place)
        if "://" not in text:
            return cls("file", "", os.path.abspath(os.path.expanduser(text)))
        url = urlsplit(text)
        prefix = url.path.strip("/")
        if url.scheme not in ("s3", "gs"):
            raise UserError(f"corpus {text}: unknown scheme {url.scheme!r}: give a path, s3://... or gs://...")
        if url.query or url.fragment:
            raise UserError(f"corpus {text}: a location has no query: options stand in the environment")
        if not url.netloc or not prefix:
            missing = "prefix" if url.netloc else "bucket"
            raise UserError(f"corpus {text}: no {missing} in it: write {url.scheme}://bucket/prefix")
        return cls(url.scheme, url.netloc, prefix)

    def __str__(self) -> str:
        return self.path if self.scheme == "file" else f"{self.scheme}://{self.bucket}/{self.path}"

    @property
    def local(self) -> Path | None:
        """The directory, where it is one."""
        return Path(self.path) if self.scheme == "file" else None

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rsplit("/", 1)[-1]

    def sibling(self, name: str) -> Location:
        """The place of this name beside it."""
        folder, slash, _ = self.path.rpartition("/")
        return Location(self.scheme, self.bucket, folder + slash + name)

    def storage(self) -> icechunk.Storage:
        """What Icechunk opens.

        Raises:
            UserError: the endpoint in the environment is no URL; there can be no credentials.
        """
        import icechunk

        if self.scheme == "file":
            return icechunk.local_filesystem_storage(self.path)
        if self.scheme == "gs":
            return icechunk.gcs_storage(bucket=self.bucket, prefix=self.path, from_env=True)
        options = _S3Options.from_environment()
        return icechunk.s3_storage(
            bucket=self.bucket,
            prefix=self.path,
            region=options.region,
            endpoint_url=options.endpoint,
            allow_http=options.allow_http,
            force_path_style=options.endpoint is not None,
            anonymous=options.anonymous or None,
            from_env=None if options.anonymous else True,
            network_stream_timeout_seconds=_STREAM_SECONDS,
        )

    def objects(self, seconds: float) -> S3Store | GCSStore:
        """The bucket as plain objects, for what Icechunk has no call for; nothing is tried twice.

        Args:
            seconds: a request that takes longer fails.

        Raises:
            UserError: the endpoint in the environment is no URL; there can be no credentials, or none can be read.
        """
        from obstore.exceptions import BaseError
        from obstore.store import GCSStore, S3Store

        client: ClientConfig = {"timeout": f"{math.ceil(seconds * 1000)}ms", "connect_timeout": f"{_CONNECT_SECONDS}s"}
        once: RetryConfig = {"max_retries": 0}
        if self.scheme == "gs":
            try:
                return GCSStore(self.bucket, client_options=client, retry_config=once)
            except BaseError as error:
                what = " ".join(str(error).partition("Debug source:")[0].split())
                raise UserError(
                    f"corpus {self}: {what}: set GOOGLE_APPLICATION_CREDENTIALS to the file of a key that may use the "
                    "bucket"
                ) from error
        options = _S3Options.from_environment()
        client["allow_http"] = options.allow_http
        return S3Store(self.bucket, config=options.for_obstore(), client_options=client, retry_config=once)

    def holds_repository(self, seconds: float = 60.0) -> bool:
        """Whether an Icechunk repository is there; of an object store one small object is asked for, in one request."""
        reference = f"refs/branch.{BRANCH}/ref.json"
        if self.local is not None:
            return (self.local / reference).is_file()
        try:
            self.objects(seconds).get(f"{self.path}/{reference}").bytes()
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            return False
        return True


@dataclass(frozen=True)
class _S3Options:
    endpoint: str | None
    region: str
    allow_http: bool
    anonymous: bool
    keys: dict[str, str]

    @classmethod
    def from_environment(cls) -> _S3Options:
        profile = _profile()
        endpoint = _first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") or profile.get("endpoint_url")
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise UserError(f"AWS_ENDPOINT_URL is {endpoint!r}: it must begin with http:// or https://")
        anonymous = is_anonymous()
        if not (anonymous or profile or _first(*_KEY_SOURCES)) and _is_set("AWS_EC2_METADATA_DISABLED"):
            raise UserError(f"no credentials for S3 were found: {S3_CREDENTIALS}")
        return cls(
            endpoint=endpoint,
            region=_first("AWS_REGION", "AWS_DEFAULT_REGION") or profile.get("region") or "us-east-1",
            allow_http=_is_set("AWS_ALLOW_HTTP") or (endpoint or "").startswith("http://"),
            anonymous=anonymous,
            keys={key: profile[name] for name, key in _PROFILE_KEYS.items() if name in profile},
        )

    def for_obstore(self) -> S3Config:
        """It takes keys from the environment by itself, but does not read profiles."""
        options: dict[str, Any] = {"region": self.region, "skip_signature": self.anonymous}
        if self.endpoint is not None:
            options["endpoint"] = self.endpoint
        return cast("S3Config", options if os.environ.get("AWS_ACCESS_KEY_ID") else options | self.keys)


_PROFILE_KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}


def is_anonymous() -> bool:
    """Whether the environment asks for requests without a signature, as a public bucket takes."""
    return _is_set("AWS_NO_SIGN_REQUEST") or _is_set("AWS_SKIP_SIGNATURE")


def _profile() -> dict[str, str]:
    """What the profile in use says in the files of the AWS tools; empty where there are none.

    Raises:
        UserError: the environment names a profile that is not there, and no keys.
    """
    wanted = _first("AWS_PROFILE", "AWS_DEFAULT_PROFILE")
    name = wanted or "default"
    files = configparser.RawConfigParser()
    found: dict[str, str] = {}
    for variable, file in (("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials")):
        files.clear()
        files.read(os.path.expanduser(os.environ.get(variable) or f"~/.aws/{file}"))
        for section in (f"profile {name}", name):
            if files.has_section(section):
                found |= dict(files.items(section))
    if wanted and not found and not (is_anonymous() or _first(*_KEY_SOURCES)):
        raise UserError(f"AWS_PROFILE is {wanted!r}: there is no such profile, or an empty one: name another")
    return found


def _first(*names: str) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in _TRUE
