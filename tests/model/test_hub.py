"""Models from the hub and to it: the hub's own client, in processes of its own, against a server on loopback."""

from __future__ import annotations

import json
import os
import pty
import resource
import shutil
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hub_server import Cut, Hub, serve_hub
from tiny_vlm import FIXTURE, qwen3_model

import rbm
from rbm.model import RewardModel
from rbm.model.adapter import add_lora, merge_lora, save_adapter
from rbm.model.hub import is_hub_id

MODEL_FILES = {"config.json", "model.safetensors"}
PUBLISHED_FILES = {path.name for path in FIXTURE.iterdir()} - {"expected.json", "inputs.npz"}
CLIENT = """
import json, sys
from rbm.errors import UserError
from rbm.model import hub
for name, arguments, options in json.loads(sys.argv[1]):
    try:
        print(json.dumps(["said", str(getattr(hub, name)(*arguments, **options))]))
    except UserError as error:
        print(json.dumps(["refused", str(error)]))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as running:
        yield running


@pytest.fixture
def nowhere() -> str:
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@dataclass
class Client:
    """Runs the code of `rbm.model.hub` in a process of its own, with an own home; `err` is what the last one wrote."""

    home: Path
    err: str = ""

    def environment(self, url: str, **more: str) -> dict[str, str]:
        hidden = ("HF_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(hidden)}
        own = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return kept | own | more

    def run(self, url: str, *calls: tuple[str, list[Any], dict[str, Any]], **more: str) -> list[tuple[str, str]]:
        """For each call `said` with its result, or `refused` with the sentence."""
        command = [sys.executable, "-c", CLIENT, json.dumps(calls)]
        done = subprocess.run(command, env=self.environment(url, **more), capture_output=True, text=True, timeout=120)
        self.err = done.stderr
        assert done.returncode == 0, done.stderr
        return [(kind, text) for kind, text in map(json.loads, done.stdout.splitlines())]

    def fetch(self, url: str, *names: str, **more: str) -> list[tuple[str, str]]:
        return self.run(url, *(("fetch", [name], {}) for name in names), **more)

    def fetched(self, url: str, name: str, **more: str) -> Path:
        ((kind, text),) = self.fetch(url, name, **more)
        assert kind == "said", text
        return Path(text)

    def push(self, url: str, folder: Path, name: str, token: str = "hf_alice", **options: Any) -> tuple[str, str]:
        (found,) = self.run(url, ("push", [str(folder), name], options), **({"HF_TOKEN": token} if token else {}))
        return found


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path / "home")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def refused(outcome: tuple[str, str], *words: str) -> None:
    kind, text = outcome
    assert kind == "refused", text
    assert "\n" not in text
    assert len(text) < 600
    for word in words:
        assert word in text, text


def same_weights(a: Path, b: Path) -> None:
    one, other = RewardModel.from_pretrained(str(a)), RewardModel.from_pretrained(str(b))
    assert one.config() == other.config()
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


# names


@pytest.mark.parametrize(
    "place",
    [
        "robometer/Robometer-4B", "lab/a", "a_b/c.d-e", "Qwen/Qwen2.5-VL-3B", "lab/model@main", "lab/m@refs/pr/3",
        "lab/m@v1.0", "lab/m@0123456789abcdef0123456789abcdef01234567",
    ],
)  # fmt: skip
def test_ids_of_the_hub(place):
    assert is_hub_id(place)


@pytest.mark.parametrize(
    "place",
    [
        "", "model", "a/b/c", "/a/b", "/a", "./a", "../a", "~/a", ".a/b", "runs/last.ckpt", "runs/model.safetensors",
        "runs/config.yaml", "a b/c", "ä/b", "a/", "/b", "a//b", "a/b@", "a/b@/x", "a/b@x y", "a/b@..", "a..b/c",
        "a--b/c", "a/b.git", "a/b.", "-a/b", "https://huggingface.co/a/b", "a\\b", "a/b\n", "a/" + "b" * 97,
    ],
)  # fmt: skip
def test_what_is_no_id_of_the_hub(place):
    assert not is_hub_id(place)


def test_what_exists_here_is_no_id_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("runs/first")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    assert not is_hub_id("runs/first")
    (tmp_path / "runs" / "link").symlink_to("gone")
    assert not is_hub_id("runs/link")


# fetching


def test_a_model_is_fetched_and_scores_as_it_did(hub, client, tiny_checkpoint):
    hub.put_folder("lab/tiny", tiny_checkpoint)
    frames = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
    code = (
        "import sys, numpy as np, rbm\n"
        "frames = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)\n"
        "print(rbm.Scorer.from_pretrained('lab/tiny', device='cpu').score(frames, 'open it').progress.tobytes().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=client.environment(hub.url), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    local = rbm.Scorer.from_pretrained(tiny_checkpoint, device="cpu").score(frames, "open it").progress
    np.testing.assert_allclose(np.frombuffer(bytes.fromhex(done.stdout), np.float32), local, atol=1e-6)
    assert done.stderr == ""


def test_only_what_a_model_needs_is_fetched(hub, client):
    unneeded = {"pytorch_model.bin": b"\x80", "optimizer.pt": b"\x80", "a.pkl": b"\x80", "old/config.json": b"{}"}
    hub.put_folder("robometer/tiny", FIXTURE)
    hub.put("robometer/tiny", unneeded | {"merges.txt": b""})
    folder = client.fetched(hub.url, "robometer/tiny")
    assert names(folder) == PUBLISHED_FILES - {"README.md", "chat_template.jinja"} | {"merges.txt", "expected.json"}
    assert not any(word in path for _, path in hub.requests for word in (".bin", ".pt", ".pkl", "old"))
    same_weights(folder, FIXTURE)


def test_some_files_alone(hub, client):
    hub.put_folder("robometer/tiny", FIXTURE)
    ((kind, folder),) = client.run(hub.url, ("fetch", ["robometer/tiny", ["tokenizer*"]], {}))
    assert kind == "said"
    assert names(Path(folder)) == {"tokenizer.json", "tokenizer_config.json"}


def test_revisions(hub, client):
    first = hub.put("lab/m", {"model.safetensors": b"one", "config.json": b"{}"})
    hub.put("lab/m", {"model.safetensors": b"two"})
    hub.repositories["lab/m"].branches["fix/a"] = first
    found = client.fetch(hub.url, "lab/m", "lab/m@main", f"lab/m@{first}", "lab/m@fix/a", "lab/m@v9")
    weights = [(Path(folder) / "model.safetensors").read_bytes() for _, folder in found[:4]]
    assert weights == [b"two", b"two", b"one", b"one"]
    refused(found[4], "lab/m has no revision 'v9'")


def test_models_that_may_not_be_read(hub, client):
    model = {"model.safetensors": b"w", "config.json": b"{}"}
    hub.put("lab/secret", model, private=True)
    hub.put("lab/gated", model, gated=True)
    nobody = client.fetch(hub.url, "lab/none", "lab/secret", "lab/gated")
    refused(nobody[0], "lab/none is neither a folder here nor a model at", "spelling", "hf auth login")
    refused(nobody[1], "lab/secret is neither a folder here nor a model", "hf auth login")
    refused(nobody[2], f"lab/gated is gated: ask for access at {hub.url}/lab/gated")
    stranger = client.fetch(hub.url, "lab/none", "lab/secret", "lab/gated", HF_TOKEN="hf_bob")
    refused(stranger[0], "lab/none is neither")
    refused(stranger[1], "lab/secret is neither")
    refused(stranger[2], "lab/gated is gated")
    member = client.fetch(hub.url, "lab/secret", "lab/gated", HF_TOKEN="hf_alice")
    assert [kind for kind, _ in member] == ["said", "said"]


def test_a_token_that_is_not_valid(hub, client):
    hub.put("lab/m", {"model.safetensors": b"w", "config.json": b"{}"})
    refused(*client.fetch(hub.url, "lab/m", HF_TOKEN="hf_old"), f"{hub.url} refuses the access token", "hf auth login")


def test_without_a_network_the_cache_does(hub, client, nowhere):
    hub.put("lab/m", {"model.safetensors": b"w", "config.json": b"{}"})
    (fetched,) = client.fetch(hub.url, "lab/m")
    asked = len(hub.requests)
    cached, other = client.fetch(hub.url, "lab/m", "lab/other", HF_HUB_OFFLINE="1")
    assert cached == fetched
    refused(other, "lab/other is not wholly in the cache", "unset HF_HUB_OFFLINE")
    assert len(hub.requests) == asked
    cached, other = client.fetch(nowhere, "lab/m", "lab/other")
    assert cached == fetched
    refused(other, f"{nowhere} cannot be reached", "check the network")
    hub.down = 503
    cached, other = client.fetch(hub.url, "lab/m", "lab/other")
    assert cached == fetched
    refused(other, "answers 503 for lab/other", "try again later")


def test_a_transfer_that_breaks_off_goes_on(hub, client):
    weights = os.urandom(300_000)
    hub.put("lab/m", {"model.safetensors": weights, "config.json": b"{}"})
    hub.cut.append(Cut("model.safetensors", 100_000, times=2))
    folder = client.fetched(hub.url, "lab/m")
    assert (folder / "model.safetensors").read_bytes() == weights
    assert hub.cut[0].times == 0


def test_a_transfer_that_never_ends_is_told_and_nothing_half_stays(hub, client):
    weights = os.urandom(300_000)
    hub.put("lab/m", {"model.safetensors": weights, "config.json": b"{}"})
    hub.cut.append(Cut("model.safetensors", 100_000, times=1000))
    refused(*client.fetch(hub.url, "lab/m"), "lab/m could not be fetched wholly", "run the same again")
    assert "model.safetensors" not in names(client.home)
    refused(*client.fetch(hub.url, "lab/m", HF_HUB_OFFLINE="1"), "lab/m is not wholly in the cache")
    hub.cut.clear()
    whole = hub.asked("GET /lab/m/resolve")
    folder = client.fetched(hub.url, "lab/m")
    assert (folder / "model.safetensors").read_bytes() == weights
    assert hub.asked("GET /lab/m/resolve") == whole  # config.json was not sent again; weights come from their own host


def test_a_full_disk(hub, client):
    hub.put("lab/m", {"model.safetensors": os.urandom(300_000), "config.json": b"{}"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        found = client.fetch(hub.url, "lab/m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(*found, "no space left for lab/m in", "HF_HOME")


def test_a_cache_that_is_no_folder(hub, client):
    hub.put("lab/m", {"model.safetensors": b"w", "config.json": b"{}"})
    client.home.mkdir()
    (client.home / "hub").write_text("")
    refused(*client.fetch(hub.url, "lab/m"), "cannot write to the cache", "HF_HOME")


def test_a_model_without_safetensors(hub, client):
    hub.put("lab/old", {"pytorch_model.bin": b"\x80", "config.json": b"{}"})
    refused(*client.fetch(hub.url, "lab/old"), "lab/old has no weights as safetensors")
    assert hub.asked("pytorch_model.bin") == 0


def test_progress_is_shown_to_people_alone(hub, client):
    hub.put("lab/m", {"model.safetensors": b"w", "config.json": b"{}"})
    client.fetched(hub.url, "lab/m")
    assert client.err == ""
    shutil.rmtree(client.home)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    command = [sys.executable, "-c", CLIENT, json.dumps([("fetch", ["lab/m"], {})])]
    done = subprocess.run(command, env=client.environment(hub.url), stdout=-1, stderr=theirs, timeout=120)
    os.close(theirs)
    assert done.returncode == 0
    shown = os.read(ours, 1 << 16)
    os.close(ours)
    assert b"100%" in shown


# pushing


def test_a_pushed_model_comes_back_as_it_was(hub, client, tiny_model, tmp_path):
    facts = {"corpus": "dots", "snapshot": "S1", "tasks": ["a", "b", "c"], "steps": 40, "version": "9", "revision": "r"}
    tiny_model.save_pretrained(str(tmp_path / "run" / "model"), facts)
    (tmp_path / "run" / "model" / "notes.json").write_text("{}")
    (tmp_path / "run" / "model" / "optimizer.pt").write_bytes(b"\x80")
    said = client.push(hub.url, tmp_path / "run", "lab/dots", message="first")
    assert said == ("said", f"{hub.url}/lab/dots")
    assert client.err == ""
    assert set(hub.files("lab/dots")) == MODEL_FILES | {"README.md", ".gitattributes"}
    assert hub.repositories["lab/dots"].private
    assert hub.repositories["lab/dots"].messages == ["initial commit", "first"]
    folder = client.fetched(hub.url, "lab/dots", HF_TOKEN="hf_alice")
    assert names(folder) == MODEL_FILES
    same_weights(folder, tmp_path / "run" / "model")
    assert json.loads((folder / "config.json").read_text())["facts"] == facts
    assert hub.asked("POST /lab/dots.git/info/lfs/objects/batch") == 1


def test_the_card(hub, client, tiny_model, tmp_path):
    facts = {
        "corpus": "a|b", "snapshot": "S1", "tasks": ["a", "b", "c"], "steps": 40,
        "config": {"init": "nano", "data": {"corpus": "/home/me/secret"}},
    }  # fmt: skip
    tiny_model.save_pretrained(str(tmp_path / "model"), facts)
    assert client.push(hub.url, tmp_path / "model", "lab/dots")[0] == "said"
    text = hub.files("lab/dots")["README.md"].decode()
    assert text == (tmp_path / "model" / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head == {"library_name": "robot-rbm", "pipeline_tag": "robotics", "tags": ["robotics", "reward-model"]}
    assert 'rbm.Scorer.from_pretrained("lab/dots")' in text
    assert "| trained on | corpus a\\|b, snapshot S1 |\n| tasks | 3 |\n| steps | 40 |" in text
    assert "| backbone | nano |\n| base model | nano |" in text
    assert "Not stated yet" in text
    assert "/home" not in text
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    assert client.push(hub.url, tmp_path / "model", "lab/dots")[0] == "said"
    assert hub.files("lab/dots")["README.md"] == b"---\nlicense: mit\n---\nmine\n"
    (tmp_path / "model" / "README.md").unlink()
    assert client.push(hub.url, tmp_path / "model", "lab/dots")[0] == "said"
    assert hub.files("lab/dots")["README.md"] == b"---\nlicense: mit\n---\nmine\n"
    assert not (tmp_path / "model" / "README.md").exists()


def test_a_published_layout_is_pushed_and_its_card_names_the_base(hub, client, tmp_path):
    folder = shutil.copytree(FIXTURE, tmp_path / "model")
    (folder / "README.md").unlink()
    (folder / "stray.safetensors").write_bytes(b"")
    assert client.push(hub.url, folder, "lab/copy", private=False)[0] == "said"
    assert set(hub.files("lab/copy")) == PUBLISHED_FILES | {".gitattributes"}
    assert not hub.repositories["lab/copy"].private
    text = hub.files("lab/copy")["README.md"].decode()
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "Qwen/Qwen3-VL-4B-Instruct"
    assert "| frames of a clip | 8 |\n| pairs | causal, joint preference |" in text
    same_weights(client.fetched(hub.url, "lab/copy"), FIXTURE)


def test_weights_of_an_earlier_push_do_not_stay(hub, client, tiny_checkpoint):
    assert client.push(hub.url, FIXTURE, "lab/m")[0] == "said"
    assert "model.safetensors.index.json" in hub.files("lab/m")
    hub.put("lab/m", {"notes.md": b"mine"})
    assert client.push(hub.url, tiny_checkpoint, "lab/m")[0] == "said"
    assert set(hub.files("lab/m")) == MODEL_FILES | {"README.md", ".gitattributes", "notes.md"}
    assert hub.files("lab/m")["README.md"] == (FIXTURE / "README.md").read_bytes()
    same_weights(client.fetched(hub.url, "lab/m", HF_TOKEN="hf_alice"), tiny_checkpoint)
    before = list(hub.repositories["lab/m"].messages)
    assert client.push(hub.url, tiny_checkpoint, "lab/m") == ("said", f"{hub.url}/lab/m")
    assert hub.repositories["lab/m"].messages == before  # nothing has changed: no commit


def test_a_branch(hub, client, tiny_checkpoint):
    assert client.push(hub.url, tiny_checkpoint, "lab/m")[0] == "said"
    first = hub.files("lab/m")
    assert client.push(hub.url, FIXTURE, "lab/m", revision="v2/a") == ("said", f"{hub.url}/lab/m/tree/v2%2Fa")
    assert hub.files("lab/m") == first
    same_weights(client.fetched(hub.url, "lab/m@v2/a", HF_TOKEN="hf_alice"), FIXTURE)


def test_an_adapter_travels_with_the_id_of_its_base(hub, client, tmp_path):
    model = qwen3_model()
    model.save_pretrained(str(tmp_path / "base"))
    add_lora(model, r=2, alpha=4)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, tmp_path / "adapter", "lab/base")
    assert client.push(hub.url, tmp_path / "base", "lab/base")[0] == "said"
    assert client.push(hub.url, tmp_path / "adapter", "lab/adapter")[0] == "said"
    sent = {"config.json", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"}
    assert set(hub.files("lab/adapter")) == sent | {".gitattributes"}
    assert b"base_model: lab/base\n" in hub.files("lab/adapter")["README.md"]
    code = "import sys, rbm.model as m; m.RewardModel.from_pretrained('lab/adapter').save_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "merged")]
    subprocess.run(command, env=client.environment(hub.url, HF_TOKEN="hf_alice"), check=True, timeout=120)
    merge_lora(model)
    merged = RewardModel.from_pretrained(str(tmp_path / "merged")).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0, msg=name)
    save_adapter(with_lora(), tmp_path / "local", str(tmp_path / "base"))
    refused(client.push(hub.url, tmp_path / "local", "lab/local"), "which others do not have", "rbm export")


def with_lora() -> RewardModel:
    model = qwen3_model()
    add_lora(model)
    return model


def test_who_may_not_push(hub, client, nowhere, tiny_checkpoint):
    hub.put("lab/open", {"a.txt": b""})
    alice, bob = {"token": "hf_alice"}, {"token": "hf_bob"}
    options = [{}, {"token": "hf_old"}, bob]
    calls: list[tuple[str, list[Any], dict[str, Any]]] = [("push", [str(tiny_checkpoint), "lab/m"], o) for o in options]
    calls += [("push", [str(tiny_checkpoint), "lab/open"], o) for o in (alice, bob | {"private": False})]
    found = client.run(hub.url, *calls)
    refused(found[0], "not logged in", "hf auth login", "HF_TOKEN")
    refused(found[1], "refuses the access token")
    refused(found[2], "may not write to lab/m", "'lab'")
    refused(found[3], "lab/open is public", "--public")
    refused(found[4], "may not write to lab/open")
    assert hub.repositories.keys() == {"lab/open"}
    assert set(hub.files("lab/open")) == {"a.txt"}
    refused(client.push(nowhere, tiny_checkpoint, "lab/m"), f"{nowhere} cannot be reached", "push again")
    asked = len(hub.requests)
    (offline,) = client.run(hub.url, ("push", [str(tiny_checkpoint), "a/b"], alice), HF_HUB_OFFLINE="1")
    refused(offline, "HF_HUB_OFFLINE forbids to push")
    assert len(hub.requests) == asked


def test_what_is_no_model(hub, client, tiny_checkpoint, tmp_path):
    plain = shutil.copytree(FIXTURE, tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text()) | {"architectures": ["Qwen3VLForConditionalGeneration"]}
    (plain / "config.json").write_text(json.dumps(config))
    missing = shutil.copytree(FIXTURE, tmp_path / "missing")
    (missing / "model-00002-of-00003.safetensors").unlink()
    short = shutil.copytree(FIXTURE, tmp_path / "short")
    with (short / "model-00003-of-00003.safetensors").open("r+b") as file:
        file.truncate(200_000)
    outside = shutil.copytree(FIXTURE, tmp_path / "outside")
    (outside / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    newer = shutil.copytree(tiny_checkpoint, tmp_path / "newer")
    text = (newer / "config.json").read_text()
    (newer / "config.json").write_text(text.replace('"version": 1', '"version": 2'))
    (tmp_path / "last.ckpt").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    folders = [plain, missing, short, outside, newer, tmp_path / "last.ckpt", tmp_path / "empty", tmp_path / "none"]
    calls: list[tuple[str, list[Any], dict[str, Any]]] = [("push", [str(folder), "lab/m"], {}) for folder in folders]
    calls += [("push", [str(tiny_checkpoint), name], {}) for name in ("m", "lab/m@v1", "a/b/c", "lab/m.git")]
    found = client.run(hub.url, *calls, HF_TOKEN="hf_alice")
    refused(found[0], "does not hold a reward model", "rbm export")
    refused(found[1], "model-00002-of-00003.safetensors is missing")
    refused(found[2], "model-00003-of-00003.safetensors is truncated")
    refused(found[3], "'../secret.safetensors'")
    refused(found[4], "version 2")
    refused(found[5], "is a file", "rbm export")
    refused(found[6], "config.json is missing")
    refused(found[7], "does not exist")
    for outcome in found[8:]:
        refused(outcome, "is no name on the hub")
    assert hub.requests == []


def test_a_card_that_the_hub_does_not_take(hub, client, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    refused(client.push(hub.url, folder, "lab/m"), "does not take the first lines of README.md")
    assert set(hub.files("lab/m")) == {".gitattributes"}


# the command


def rbm_push(client: Client, url: str, *arguments: str | Path, answer: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rbm.cli", "push", *map(str, arguments)]
    environment = client.environment(url, HF_TOKEN="hf_alice")
    return subprocess.run(command, env=environment, input=answer, capture_output=True, text=True, timeout=120)


def test_the_command_lists_asks_and_sends(hub, client, tiny_model, tmp_path):
    tiny_model.save_pretrained(str(tmp_path / "model"))
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    done = rbm_push(client, hub.url, tmp_path / "model", "lab/m", answer="n\n")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("model.safetensors")]
    assert line.split()[1:] == [f"{size / 1000:.1f}", "kB"]
    assert "README.md is written" in done.stdout
    assert "as a private model?" in done.stdout
    assert "nothing was sent" in done.stdout
    done = rbm_push(client, hub.url, tmp_path / "model", "lab/m")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: there is nobody to ask: give --yes"
    assert hub.requests == []
    assert not (tmp_path / "model" / "README.md").exists()
    done = rbm_push(client, hub.url, tmp_path / "model", "lab/m", answer="y\n")
    assert done.stdout.endswith(f"[y/N]: {hub.url}/lab/m\n")
    done = rbm_push(
        client, hub.url, tmp_path / "model", "lab/n", "--public", "--revision", "v2", "--message", "so", "--yes"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/lab/n/tree/v2"
    assert not hub.repositories["lab/n"].private
    assert set(hub.files("lab/n", "v2")) == MODEL_FILES | {"README.md", ".gitattributes"}
    assert set(hub.files("lab/n")) == {".gitattributes"}
    assert hub.repositories["lab/n"].messages[-1] == "so"


def test_the_command_refuses_in_one_line(hub, client, tmp_path):
    done = rbm_push(client, hub.url, tmp_path / "none", "lab/m", "--yes")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'none'} does not exist: give the folder of a model\n"
