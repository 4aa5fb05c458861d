import pickle
from pathlib import Path

import icechunk
import pytest
from s3_server import BUCKET, S3

from rbm.corpus.location import Location
from rbm.errors import UserError


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert Location.parse("a/../corpus").local == tmp_path / "corpus"
    assert str(Location.parse("~/corpus")) == "/home/me/corpus"
    location = Location.parse(tmp_path / "corpus")
    assert location.name == "corpus"
    assert location.sibling(".lock").local == tmp_path / ".lock"
    assert Location.parse(location) is location


def test_urls() -> None:
    location = Location.parse("s3://robots/lab/corpus/")
    assert (location.scheme, location.bucket, location.path) == ("s3", "robots", "lab/corpus")
    assert str(location) == "s3://robots/lab/corpus"
    assert location.local is None
    assert location.name == "corpus"
    assert str(location.sibling(".lock")) == "s3://robots/lab/.lock"
    assert str(Location.parse("gs://robots/corpus").sibling(".lock")) == "gs://robots/.lock"
    assert pickle.loads(pickle.dumps(location)) == location


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3:///corpus", "no bucket"),
        ("s3://robots", "no prefix"),
        ("s3://robots/", "no prefix"),
        ("ftp://robots/corpus", "unknown scheme 'ftp'"),
        ("s3://robots/corpus?region=x", "no query"),
    ],
)
def test_wrong_urls(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Location.parse(url)


def test_what_tools_of_aws_are_told_counts(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    location = Location.parse(s3.place())
    keys = location.objects(5)
    assert keys.config["endpoint"] == s3.url
    assert keys.config["region"] == "us-east-1"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://other.example")
    assert location.objects(5).config["endpoint"] == "https://other.example"

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = ours\naws_secret_access_key = hidden\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    assert location.objects(5).config["access_key_id"] == "ours"

    monkeypatch.setenv("AWS_PROFILE", "nope")
    with pytest.raises(UserError, match="AWS_PROFILE is 'nope': there is no such profile"):
        location.objects(5)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "other.example:9000")
    with pytest.raises(UserError, match="must begin with http"):
        location.storage()


def test_storage_works_with_icechunk(s3: S3, tmp_path: Path) -> None:
    for place in (s3.place(), tmp_path / "corpus"):
        location = Location.parse(place)
        assert not location.holds_repository()
        made = icechunk.Repository.create(location.storage())
        assert location.holds_repository()
        assert icechunk.Repository.open(location.storage()).lookup_branch("main") == made.lookup_branch("main")


def test_a_key_for_google_that_can_not_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "garbage").write_text("x")
    for name in ("garbage", "none"):
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / name))
        with pytest.raises(UserError, match=r"corpus gs://lab/c: .*set GOOGLE_APPLICATION_CREDENTIALS") as caught:
            Location.parse("gs://lab/c").objects(5)
        assert "\n" not in str(caught.value)


def test_no_credentials(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="set AWS_ACCESS_KEY_ID"):
        Location.parse(f"s3://{BUCKET}/corpus").storage()
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "true")
    assert not Location.parse(f"s3://{BUCKET}/corpus").holds_repository()
