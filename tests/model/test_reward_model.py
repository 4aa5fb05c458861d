"""What the model promises: isolation, antisymmetry, batching that changes nothing, checkpoints that round-trip."""

import json

import numpy as np
import pytest
import torch

from rbm.errors import UserError
from rbm.model import ClipBatch, RewardModel
from rbm.model.backbones import NanoBackbone

TASK = "open the drawer"
BOTH = torch.tensor([[0, 1]])


def make(**options) -> RewardModel:
    torch.manual_seed(1)
    return RewardModel(
        NanoBackbone(image_size=32, width=8, hidden=32, layers=2, heads=2), context_frames=8, **options
    ).eval()


def clip(model: RewardModel, n: int, seed: int) -> torch.Tensor:
    frames = np.random.default_rng(seed).integers(0, 256, (n, 40, 48, 3), dtype=np.uint8)
    return model.preprocess(frames)


def scores(model, clips, pairs=None):
    with torch.inference_mode():
        return model(ClipBatch.from_clips(clips), pairs)


@pytest.mark.parametrize("preference", ["utility", "joint"])
def test_a_clip_scores_the_same_alone_first_and_second(preference):
    model = make(preference=preference)
    a, b = (clip(model, 8, 0), TASK), (clip(model, 5, 1), TASK)
    alone = scores(model, [b])
    first = scores(model, [b, a], BOTH)
    second = scores(model, [a, b], BOTH)
    for field in ("progress_logits", "success_logits"):
        torch.testing.assert_close(getattr(first, field)[:5], getattr(alone, field), atol=1e-5, rtol=0)
        torch.testing.assert_close(getattr(second, field)[8:], getattr(alone, field), atol=1e-5, rtol=0)


def test_in_a_causal_pair_the_second_sees_the_first_and_the_first_nothing():
    model = make(pair="causal", preference="joint")
    a, b, c = ((clip(model, 6, seed), TASK) for seed in range(3))
    alone, with_b, with_c = scores(model, [a]), scores(model, [a, b], BOTH), scores(model, [a, c], BOTH)
    torch.testing.assert_close(with_b.progress_logits[:6], alone.progress_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(with_c.progress_logits[:6], alone.progress_logits, atol=1e-5, rtol=0)
    behind_c = scores(model, [c, b], BOTH)
    assert (with_b.progress_logits[6:] - behind_c.progress_logits[6:]).abs().max() > 1e-3


def test_utility_is_antisymmetric_and_joint_sees_both_and_their_order():
    model = make(preference="utility")
    a, b = (clip(model, 8, 0), TASK), (clip(model, 5, 1), TASK)
    forth, back = scores(model, [a, b], BOTH), scores(model, [b, a], BOTH)
    torch.testing.assert_close(forth.preference_logits, -back.preference_logits, atol=1e-5, rtol=0)
    joint = make(preference="joint")
    forth, back = scores(joint, [a, b], BOTH), scores(joint, [b, a], BOTH)
    assert (forth.preference_logits - back.preference_logits).abs() > 1e-4  # the markers tell A from B
    other = scores(joint, [a, (clip(joint, 5, 2), TASK)], BOTH)
    assert (forth.preference_logits - other.preference_logits).abs() > 1e-5


@pytest.mark.parametrize("preference", ["utility", "joint"])
def test_neighbours_and_padding_change_nothing(preference):
    model = make(preference=preference)
    a, short = (clip(model, 8, 0), TASK), (clip(model, 2, 1), "a very much longer instruction than the other one")
    alone = scores(model, [short])
    together = scores(model, [a, short, (clip(model, 8, 3), TASK)])
    torch.testing.assert_close(together.progress_logits[8:10], alone.progress_logits, atol=1e-5, rtol=0)


def test_scores_are_causal():
    model = make()
    frames = clip(model, 8, 0)
    whole, prefix = scores(model, [(frames, TASK)]), scores(model, [(frames[:5], TASK)])
    torch.testing.assert_close(whole.progress_logits[:5], prefix.progress_logits, atol=1e-5, rtol=0)


def test_a_shared_frame_is_stored_once():
    model = make()
    frames = clip(model, 6, 0)
    batch = ClipBatch.from_clips([(frames, TASK), (frames, "close the drawer")])
    assert len(batch.frames[0]) == 6
    assert batch.frame_ids[:, 0].tolist() == [*range(6), *range(6)]
    with torch.inference_mode():
        shared = model(batch)
    apart = scores(model, [(frames, TASK), (frames.clone(), "close the drawer")])
    torch.testing.assert_close(shared.progress_logits, apart.progress_logits)
    assert (shared.progress_logits[:6] - shared.progress_logits[6:]).abs().max() > 1e-4  # the words matter


def test_one_frame_and_any_utf8():
    model = make()
    out = scores(model, [(clip(model, 1, 0), "öffne die Schublade 🤖 抽屉")])
    progress, spread, success = model.decode(out)
    assert progress.shape == spread.shape == success.shape == (1,)
    assert torch.isfinite(torch.cat([progress, spread, success])).all()


def test_preprocess_is_antialiased_and_keeps_the_right_size():
    model = make()
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert (model.preprocess(stripes)[0, 4:-4].float() - 127.5).abs().max() < 12  # averaged, not sampled
    same = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(model.preprocess(same).numpy(), same)


def test_calibration_is_applied_and_saved(tmp_path):
    model = make()
    out = scores(model, [(clip(model, 3, 0), TASK)])
    model.calibrate(2.0, -1.0)
    torch.testing.assert_close(model.decode(out)[2], torch.sigmoid(out.success_logits / 2 - 1))
    model.save_pretrained(str(tmp_path / "m"), {"note": "ü"})
    again = RewardModel.from_pretrained(str(tmp_path / "m"))
    assert (again.success_temperature, again.success_bias) == (2.0, -1.0)


@pytest.mark.parametrize(
    "options", [{}, {"preference": "joint"}, {"pair": "causal", "preference": "joint"}, {"target": "clip_relative"}]
)
def test_a_round_trip_changes_no_number(tmp_path, options):
    model = make(**options)
    model.save_pretrained(str(tmp_path / "mit Leerzeichen ü"))
    again = RewardModel.from_pretrained(str(tmp_path / "mit Leerzeichen ü"))
    assert again.config() == model.config()
    batch = [(clip(model, 4, 0), TASK), (clip(model, 3, 1), TASK)]
    one, two = scores(model, batch, BOTH), scores(again, batch, BOTH)
    assert torch.equal(one.progress_logits, two.progress_logits)
    assert torch.equal(one.preference_logits, two.preference_logits)


def test_meaningless_options_are_refused():
    for options, message in (
        ({"pair": "causal"}, "one read-out"),
        ({"pair": "both"}, "isolated"),
        ({"preference": "vote"}, "utility"),
        ({"target": "late"}, "absolute"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    joint = make(preference="joint")
    with pytest.raises(ValueError, match="exactly one pair"):
        scores(joint, [(clip(joint, 2, seed), TASK) for seed in range(3)], BOTH)


def test_what_is_wrong_with_a_checkpoint_is_said(tmp_path, tiny_checkpoint):
    import shutil

    def copy(name):
        return shutil.copytree(tiny_checkpoint, tmp_path / name)

    def refused(folder, message):
        with pytest.raises(UserError, match=message) as caught:
            RewardModel.from_pretrained(str(folder))
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere", "neither a file or folder nor an id on the hub")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json is missing")
    folder = copy("no weights")
    (folder / "model.safetensors").unlink()
    refused(folder, "is missing, the checkpoint is not complete")
    folder = copy("truncated")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(folder, "truncated")
    for change, message in (
        ({"version": 2}, "is of version 2"),
        ({"format": "else"}, "does not describe"),
        ({"model": None}, "'model' is missing"),
    ):
        folder = copy(f"changed {message[:4]} {len(change)}")
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        refused(folder, message)
    folder = copy("other backbone")
    path = folder / "config.json"
    description = json.loads(path.read_text())
    description["model"]["backbone"]["type"] = "giant"
    path.write_text(json.dumps(description))
    refused(folder, "'giant' does not exist here; there are: nano, qwen2_5_vl, qwen3_vl, rewind, smolvlm")
    description["model"]["backbone"] = {
        "type": "nano",
        "hidden": 64,
        "width": 8,
        "image_size": 32,
        "layers": 2,
        "heads": 2,
    }
    path.write_text(json.dumps(description))
    refused(folder, "has shape")
