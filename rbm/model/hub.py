"""Models on the Hugging Face hub: fetched into its client's cache, and pushed from a folder.

The client's own environment variables hold: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT. Only safetensors and text
travel, in both directions: a pickle is neither fetched nor sent.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rbm.errors import UserError

NEEDED = ("*.safetensors", "*.json", "*.yaml", "*.txt")
"""What a model is made of: weights, configuration, tokenizer."""
SENT = (
    "config.json", "config.yaml", "adapter_config.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
"""Files beside the weights that are pushed; what the repository has of these, but the folder not, is deleted there."""
DOCUMENTS = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
CARD = DOCUMENTS[0]
ADAPTER = "adapter_model.safetensors"
LIBRARY = "robot-rbm"

_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[\w])?"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([\w][\w./-]*))?", re.ASCII)
_FILES = {
    ".bin", ".ckpt", ".gz", ".json", ".mp4", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensors", ".tar", ".txt",
    ".yaml", ".yml", ".zip",
}  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def is_hub_id(place: str) -> bool:
    """Whether `place` can only be a model on the hub: `org/name`, or `org/name@revision`.

    False for what exists here, and for what is written like a path: it starts with `.`, `/` or `~`, or ends as a file.
    """
    found = _ID.fullmatch(place)
    if found is None or os.path.lexists(place):
        return False
    name = found[1]
    return not (".." in place or "--" in name or name.endswith(".git") or Path(name).suffix.lower() in _FILES)


def fetch(name: str, patterns: Sequence[str] = NEEDED) -> Path:
    """Folder with the files of a model on the hub, in the client's cache; what is there already is not sent again.

    Without a network, the cache alone has to do.

    Args:
        name: `org/name` or `org/name@revision` (a branch, a tag or a commit).
        patterns: of the names of the files that are needed; those in subfolders never are.

    Raises:
        UserError: no such model or revision, no access, no network, no space, a transfer that broke off, or a model
            without safetensors.
    """
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = name.partition("@")
    try:
        with _quiet():
            folder = snapshot_download(
                repository, revision=revision or None, allow_patterns=list(patterns), ignore_patterns="*/*"
            )
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(_why_not_fetched(name, error)) from error
    if patterns is NEEDED and not any(Path(folder).glob("*.safetensors")):
        raise UserError(
            f"{name} has no weights as safetensors, and other formats are not read: choose a revision or a model that "
            "has them, or convert it"
        )
    return Path(folder)


def _why_not_fetched(name: str, error: Exception) -> str:
    """One sentence that says what happened and what to do."""
    from huggingface_hub import constants, errors

    repository, _, revision = name.partition("@")
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return (
            f"{name} is not wholly in the cache {cache} and HF_HUB_OFFLINE forbids to fetch it: unset HF_HUB_OFFLINE, "
            "or give a folder"
        )
    if isinstance(cause, errors.GatedRepoError):
        return (
            f"{repository} is gated: ask for access at {hub}/{repository}, log in with `hf auth login` (or set "
            "HF_TOKEN), then try again"
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return (
            f"{repository} is neither a folder here nor a model at {hub}: check the spelling; if it is private, log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision or 'main'!r}: see {hub}/{repository}/commits for those it has"
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if status == 401:
            return f"{hub} refuses the access token: log in again with `hf auth login`, or set another HF_TOKEN"
        if status == 403:
            return f"{hub} does not let you read {repository} ({_short(cause)}): ask its owner for access"
        return f"{hub} answers {status} for {repository} ({_short(cause)}): try again later"
    if isinstance(cause, OSError) and cause.errno in _FULL:
        return f"no space left for {name} in {cache}: free some, or set HF_HOME to a folder on another disk"
    if isinstance(cause, OSError) and cause.errno in _NOT_WRITABLE:
        return f"cannot write to the cache {cache} ({cause.strerror}): set HF_HOME to a folder that you can write to"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"{name} is not wholly in the cache and {hub} cannot be reached ({_short(cause or error)}): check the "
            "network (and HTTPS_PROXY), or give a folder"
        )
    return (
        f"{name} could not be fetched wholly from {hub} ({_short(error)}): run the same again, finished files are kept"
    )


@dataclass(frozen=True)
class Parcel:
    """What is pushed of a folder.

    Attributes:
        folder: where it lies.
        kind: `ours`, `published` or `adapter`.
        config: its config.json.
        files: names of the files, those that exist.
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    files: tuple[str, ...]

    @property
    def has_card(self) -> bool:
        return CARD in self.files

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: (self.folder / name).stat().st_size for name in self.files}


def parcel(folder: str | os.PathLike[str]) -> Parcel:
    """Look at a folder that is to be pushed: the model in it must be whole.

    Raises:
        UserError: no folder, no reward model in it, or one with a missing or truncated file.
    """
    from rbm.model.checkpoint import CONFIG, FORMAT, describe
    from rbm.model.published import is_published
    from rbm.model.weights import read_json

    source = Path(folder)
    if source.is_file():
        raise UserError(f"{source} is a file: `rbm export` makes a folder of a checkpoint that can be pushed")
    if not source.is_dir():
        raise UserError(f"{source} does not exist: give the folder of a model")
    if not (source / CONFIG).exists() and (source / "model" / CONFIG).exists():
        source = source / "model"  # the folder of a run
    config = read_json(source / CONFIG)
    if "adapter" in config and config.get("format") == FORMAT:
        describe(source)
        kind, weights = "adapter", [ADAPTER]
        base = config["adapter"].get("base") if isinstance(config["adapter"], dict) else None
        if not is_hub_id(str(base)):
            raise UserError(
                f"{source} is an adapter of {base}, which others do not have: push that first and name its hub id in "
                f"{CONFIG}, or merge the adapter with `rbm export`"
            )
    elif config.get("format") == FORMAT:
        describe(source)
        kind, weights = "ours", _weights(source)
    elif is_published(config):
        kind, weights = "published", _weights(source)
    else:
        raise UserError(
            f"{source} does not hold a reward model: give the folder model/ of a run, or one that `rbm export` wrote"
        )
    for name in weights:
        _check_whole(source / name)
    named = [*SENT, "model.safetensors.index.json", *DOCUMENTS]
    if kind == "adapter":
        named.remove("model.safetensors.index.json")
    files = [name for name in named if (source / name).is_file()]
    return Parcel(source, kind, config, tuple(sorted([*files, *weights])))


def _weights(folder: Path) -> list[str]:
    """Names of the weights' files: those that the loader reads, and no others that lie there."""
    from rbm.model.weights import INDEX, WEIGHTS, read_json

    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{folder / INDEX} names no weights: write the model again")
    names = sorted({str(name) for name in places.values()})
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{folder / INDEX} names {name!r}, which is no file of this folder")
    return names


def _check_whole(path: Path) -> None:
    """Raises UserError for a safetensors file that is missing, truncated or something else; reads its head alone."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path.parent}: {path.name} is missing, the model is not complete")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({_short(error)}): write the model again"
        ) from error


def push(
    folder: str | os.PathLike[str],
    name: str,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Send a model to the hub, in one commit; the address of what is then there.

    The repository is made if it does not exist. Where neither the folder nor the repository has a README.md, one is
    written into the folder and sent. Weights and other model files of the repository that the folder does not have
    are deleted in the same commit: they would be read with the new ones.

    Args:
        folder: with a model of ours, one in a published layout, or an adapter.
        name: `org/name`.
        private: of a new repository. A public one is not written to unless this is False.
        revision: a branch, made if it does not exist.
        message: of the commit.
        token: access token; else that of `hf auth login` or HF_TOKEN.

    Raises:
        UserError: nothing that can be pushed, no login, no right to write there, no network.
    """
    from huggingface_hub import HfApi, errors, get_token

    model = parcel(folder)
    check_name(name)
    if token is None and get_token() is None:
        raise UserError("not logged in to the hub: run `hf auth login`, or set HF_TOKEN to a token that may write")
    api = HfApi(token=token, library_name=LIBRARY)
    try:
        with _quiet():
            _make_room(api, name, private, revision)
            files = list(model.files)
            if not model.has_card and not api.file_exists(name, CARD, revision=revision):
                _write(model.folder / CARD, card(model, name))
                files.append(CARD)
            api.upload_folder(
                repo_id=name,
                folder_path=model.folder,
                allow_patterns=[escape(file) for file in files],
                delete_patterns=["*.safetensors", "*.safetensors.index.json", *SENT],
                commit_message=message or "A reward model",
                revision=revision,
            )
    except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise UserError(_why_not_pushed(name, error)) from error
    return f"{api.endpoint}/{name}" + (f"/tree/{quote(revision, safe='')}" if revision else "")


def check_name(name: str) -> None:
    """Raises UserError for what cannot be the name of a repository."""
    found = _ID.fullmatch(name)
    if found is None or found[2] or "--" in name or ".." in name or name.endswith(".git"):
        raise UserError(f"{name!r} is no name on the hub: give ORG/NAME or USER/NAME, of letters, digits and . _ -")


def _make_room(api: Any, name: str, private: bool, revision: str | None) -> None:
    """The repository and the branch exist after this."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        there = api.model_info(name)
    except RepositoryNotFoundError:
        api.create_repo(name, private=private, exist_ok=True)
    else:
        if private and there.private is False:
            raise UserError(
                f"{api.endpoint}/{name} is public: push with --public (private=False) if everyone may read this model, "
                "or choose another name"
            )
    if revision is not None and revision != "main":
        api.create_branch(name, branch=revision, exist_ok=True)


def _why_not_pushed(name: str, error: Exception) -> str:
    """One sentence that says what happened and what to do."""
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    cause: BaseException = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:  # an upload's thread wraps what it met
        cause = cause.__cause__
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to push: unset it"
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if status == 401:
            return f"{hub} refuses the access token: log in again with `hf auth login`, or set another HF_TOKEN"
        if status in (403, 404):
            return (
                f"your access token may not write to {name} at {hub} ({_short(cause)}): take a token with the right to "
                "write, ask the organisation, or choose a name of your own"
            )
        return f"{hub} answers {status} to the push of {name} ({_short(cause)}): try again later"
    if isinstance(cause, errors.HTTPError):
        return (
            f"{hub} cannot be reached ({_short(cause)}): check the network (and HTTPS_PROXY) and push again; what it "
            "has already is not sent twice"
        )
    if "README.md" in str(cause):
        return f"the hub does not take the first lines of {CARD}: {_short(cause)}"
    return f"pushing {name} failed: {_short(cause)}"


def card(model: Parcel, name: str) -> str:
    """Text of README.md: what the model is, how it is loaded, what it was trained on. The licence is left open."""
    import yaml

    facts = _facts(model)
    head: dict[str, Any] = {"library_name": LIBRARY, "pipeline_tag": "robotics", "tags": ["robotics", "reward-model"]}
    base = facts.get("base model")
    if base is not None and is_hub_id(base):
        head["base_model"] = base.partition("@")[0]
    rows = "".join(f"| {key} | {_cell(value)} |\n" for key, value in facts.items())
    return f"""\
---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---

# {name.partition("/")[2]}

A reward model for robots. It watches a robot try a task and says, for every frame, how far along the task is (progress,
0 to 1, with its spread), whether it is done (success probability), and which of two attempts is better.

## Use

With the package `{LIBRARY}`:

```python
import rbm

scorer = rbm.Scorer.from_pretrained("{name}")
scores = scorer.score("attempt.mp4", "open the drawer")
```

```bash
rbm score attempt.mp4 --task "open the drawer" --checkpoint {name}
```

## What it is

| | |
| --- | --- |
{rows}
## Licence

Not stated yet. Write here what others may do with this model, and add a line such as `license: apache-2.0` between the
first two lines of dashes of this file. Mind the licences of the base model and of the data.
"""


def _facts(model: Parcel) -> dict[str, str]:
    """What is known of a model, in the order of the card's table."""
    description: dict[str, Any] = model.config.get("model") or {}
    backbone: dict[str, Any] = description.get("backbone") or {}
    trained: dict[str, Any] = model.config.get("facts") or {}
    tasks = trained.get("tasks")
    frames, pair = description.get("context_frames"), description.get("pair")
    if model.kind == "published":
        frames, pair = _published(model).get("max_frames"), "causal"
    found = {
        "format": {"ours": LIBRARY, "published": "Robometer's", "adapter": f"{LIBRARY}, LoRA adapter"}[model.kind],
        "backbone": backbone.get("type") or model.config.get("model_type"),
        "base model": _base(model),
        "frames of a clip": frames,
        "pairs": pair and f"{pair}, {description.get('preference', 'joint')} preference",
        "trained on": trained.get("corpus") and f"corpus {trained['corpus']}, snapshot {trained.get('snapshot')}",
        "tasks": len(tasks) if isinstance(tasks, list) else tasks,
        "steps": trained.get("steps"),
        "written by": trained.get("version") and f"{LIBRARY} {trained['version']} {trained.get('revision') or ''}",
    }
    return {key: str(value).strip() for key, value in found.items() if value}


def _base(model: Parcel) -> str | None:
    """The model that this one started from: as written where it was made."""
    if model.kind == "adapter":
        return str(model.config["adapter"]["base"])
    if model.kind == "published":
        return _published(model).get("base_model_id")
    trained = model.config.get("facts") or {}
    run = trained.get("config") or {}
    start = (run.get("model") or {}).get("backbone") or {}
    found = trained.get("base") or start.get("base") or run.get("init")
    return str(found) if found and (found == "nano" or is_hub_id(str(found))) else None  # a folder means nothing there


def _published(model: Parcel) -> dict[str, Any]:
    """Settings of a published layout: in config.json, or in config.yaml beside it."""
    import yaml

    if "base_model_id" in model.config:
        return model.config
    try:
        found = yaml.safe_load((model.folder / "config.yaml").read_text())
        return {**(found.get("data") or {}), **(found.get("model") or {})}
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError):
        return {}  # the card then says less


def _cell(text: str) -> str:
    """A text as one cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}): push a copy of the folder") from error


def _short(error: BaseException) -> str:
    """The message of an error of the client's in one line, less the lines that it adds for programmers."""
    server = getattr(error, "server_message", None)
    text = " ".join(str(server or error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "…"


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where nobody watches them."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
