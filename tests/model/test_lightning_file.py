"""Models out of Lightning's checkpoints: what is damaged is told in a sentence, and nothing in them runs."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import tiny_vlm
import torch
import torch.distributed.checkpoint

from rbm.errors import UserError
from rbm.model import RewardModel
from rbm.model.lightning_file import load_lightning, load_sharded, read_rest


def facts(model: RewardModel) -> dict:
    return {"model": model.config(), "files": model.backbone.files(), "base": None, "lora_alpha": None}


def named(model: RewardModel) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def write_file(path: Path, model: RewardModel, **more) -> Path:
    torch.save({"state_dict": named(model), "rbm": facts(model), "global_step": 3, **more}, path)
    return path


def write_shards(folder: Path, model: RewardModel) -> Path:
    """As two processes would, in that it has tensors, numbers, and the optimiser beside the model."""
    optimizer = {"state": {"model.x": {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}
    torch.distributed.checkpoint.save(
        {"state_dict": named(model), "optimizer_0": optimizer}, checkpoint_id=folder, no_dist=True
    )
    torch.save({"rbm": facts(model), "global_step": 3}, folder / "meta.pt")
    return folder


@pytest.fixture(params=["file", "shards"])
def written(request, tmp_path, tiny_model):
    """A checkpoint, and what reads it."""
    if request.param == "file":
        return write_file(tmp_path / "last.ckpt", tiny_model), load_lightning
    return write_shards(tmp_path / "last.ckpt", tiny_model), load_sharded


def same(a: RewardModel, b: RewardModel) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_a_model_comes_back(written, tiny_model):
    path, read = written
    found = read(path)
    assert same(found, tiny_model)
    assert not found.training
    assert found.config() == tiny_model.config()
    assert same(RewardModel.from_pretrained(str(path)), tiny_model)
    assert read_rest(path)["global_step"] == 3
    assert not torch.distributed.is_initialized()


def test_so_does_a_vision_language_model_with_its_tokenizer_and_precision(tmp_path):
    model = tiny_vlm.qwen3_model().to(torch.bfloat16)
    for found in (
        load_lightning(write_file(tmp_path / "a.ckpt", model)),
        load_sharded(write_shards(tmp_path / "b.ckpt", model)),
    ):
        assert same(found, model)
        assert found.backbone.files() == model.backbone.files()


def test_keys_that_are_missing_or_unknown_are_listed(tmp_path, tiny_model):
    state = named(tiny_model)
    state["model.progress_head.9.weight"] = state.pop("model.progress_head.0.weight")
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state, "rbm": facts(tiny_model)}, path)
    with pytest.raises(UserError, match=r"missing keys \[progress_head.0.weight\], unknown keys \[progress_head.9.wei"):
        load_lightning(path)


def test_a_truncated_file_is_told(tmp_path, tiny_model):
    path = write_file(tmp_path / "last.ckpt", tiny_model)
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated") as caught:
            load_lightning(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "meta.pt"])
def test_shards_that_are_missing_or_truncated_are_told(tmp_path, tiny_model, name):
    folder = write_shards(tmp_path / "last.ckpt", tiny_model)
    whole = (folder / name).read_bytes()
    for size in (0, len(whole) // 2, len(whole) - 10):
        (folder / name).write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated") as caught:
            load_sharded(folder)
        assert "\n" not in str(caught.value)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}.* is missing, the checkpoint is not complete"):
        load_sharded(folder)


def test_a_damaged_shard_of_the_right_size_is_told(tmp_path, tiny_model):
    folder = write_shards(tmp_path / "last.ckpt", tiny_model)
    shard = folder / "__0_0.distcp"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(UserError, match=r"shards of .* cannot be read"):
        load_sharded(folder)


class Runs:
    """Unpickled freely it makes a folder."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def test_nothing_in_a_checkpoint_runs(tmp_path, tiny_model):
    proof = tmp_path / "it-ran"
    file = write_file(tmp_path / "a.ckpt", tiny_model, more=Runs(proof))
    with pytest.raises(UserError, match="holds more than numbers"):
        load_lightning(file)
    for name in (".metadata", "meta.pt"):
        folder = write_shards(tmp_path / "b.ckpt", tiny_model)
        if name == ".metadata":
            metadata = pickle.loads((folder / name).read_bytes())
            metadata.planner_data = Runs(proof)
            (folder / name).write_bytes(pickle.dumps(metadata))
        else:
            torch.save({"rbm": facts(tiny_model), "more": Runs(proof)}, folder / name)
        with pytest.raises(UserError, match=r"mkdir|holds more than numbers"):
            load_sharded(folder)
        with pytest.raises(UserError):
            RewardModel.from_pretrained(str(folder))
        shutil.rmtree(folder)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Runs(proof)))  # so it would have
    assert proof.exists()


def test_shards_outside_of_the_folder_are_not_read(tmp_path, tiny_model):
    folder = write_shards(tmp_path / "last.ckpt", tiny_model)
    (folder / "__0_0.distcp").rename(tmp_path / "__0_0.distcp")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = "../__0_0.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="is no file of this folder"):
        load_sharded(folder)


def test_what_is_no_checkpoint_of_ours_is_told(tmp_path, tiny_model):
    path = tmp_path / "other.ckpt"
    path.write_text("hello")
    with pytest.raises(UserError, match="no checkpoint of Lightning's"):
        load_lightning(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match="not a checkpoint of `rbm train`"):
        load_lightning(path)
    torch.save({"state_dict": named(tiny_model), "rbm": {}}, path)
    with pytest.raises(UserError, match="does not say how its model is made"):
        load_lightning(path)
    with pytest.raises(UserError, match="is missing"):
        load_lightning(tmp_path / "nowhere.ckpt")


def test_weights_that_a_run_did_not_train_and_that_are_nowhere_are_told(tmp_path, tiny_model):
    path = write_file(tmp_path / "last.ckpt", tiny_model, left_out="0" * 32)
    found = torch.load(path, weights_only=True)
    del found["state_dict"]["model.backbone.word_embedding.weight"]
    torch.save(found, path)
    with pytest.raises(UserError, match="does not say what it started from"):
        load_lightning(path)
