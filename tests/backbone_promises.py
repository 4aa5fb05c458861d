"""What every backbone promises, as checks of a model: its own test file runs them."""

from pathlib import Path

import numpy as np
import torch

from rbm.model import ClipBatch, RewardModel
from rbm.model.backbones import PairMode, States

TASK, OTHER = "open the drawer", "close it"
PAIRS = torch.tensor([[0, 1], [2, 3]])


def clip(model: RewardModel, seed: int, frames: int, height: int = 120, width: int = 150) -> torch.Tensor:
    """Noise through the model's preprocessor."""
    rng = np.random.default_rng(seed)
    return model.preprocess(rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8))


@torch.inference_mode()
def states(model: RewardModel, clips, mode: PairMode = PairMode.READOUT, pairs: torch.Tensor | None = None) -> States:
    return model.backbone(ClipBatch.from_clips(clips), mode, pairs)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def clips_of_any_length_score_in_a_batch_as_alone(model: RewardModel) -> None:
    clips = [(clip(model, 0, 5), TASK), (clip(model, 1, 1, 60, 40), TASK), (clip(model, 2, 8), OTHER)]
    together = states(model, clips)
    alone = [states(model, [one]) for one in clips]
    close(together.frames, torch.cat([one.frames for one in alone]))
    close(together.readouts, torch.cat([one.readouts for one in alone]))


def a_neighbours_pixels_change_nothing(model: RewardModel) -> None:
    for mode in (PairMode.CLIPS, PairMode.READOUT, PairMode.JOINT, PairMode.CAUSAL):
        pairs = PAIRS if mode in (PairMode.JOINT, PairMode.CAUSAL) else None
        clips = [
            (clip(model, 0, 4), TASK),
            (clip(model, 1, 3), TASK),
            (clip(model, 2, 4), OTHER),
            (clip(model, 3, 6), OTHER),
        ]
        one = states(model, clips, mode, pairs)
        two = states(model, [(clip(model, 7, 4), TASK), *clips[1:]], mode, pairs)
        assert not torch.allclose(one.frames[:4], two.frames[:4], atol=1e-4)
        seen = 7 if mode is PairMode.CAUSAL else 4  # there the second clip of the pair reads the first
        assert torch.equal(one.frames[seen:], two.frames[seen:])
        if pairs is not None:
            assert not torch.allclose(one.readouts[0], two.readouts[0], atol=1e-5)
            assert torch.equal(one.readouts[1], two.readouts[1])


def a_clip_reads_the_same_alone_as_first_and_as_second(model: RewardModel) -> None:
    a, b = (clip(model, 0, 4), TASK), (clip(model, 1, 6), TASK)
    alone = states(model, [a], PairMode.CLIPS).frames
    for mode in (PairMode.JOINT, PairMode.READOUT):
        close(states(model, [a, b], mode, PAIRS[:1]).frames[:4], alone)
        close(states(model, [b, a], mode, PAIRS[:1]).frames[6:], alone)


def words_matter(model: RewardModel) -> None:
    frames = clip(model, 0, 4)
    found = states(model, [(frames, TASK), (frames, OTHER)])
    assert (found.frames[:4] - found.frames[4:]).abs().max() > 1e-3


def features_stand_for_frames(model: RewardModel) -> None:
    """As many levels and tokens as the backbone says, and the same hidden states."""
    frames = clip(model, 0, 4)
    with torch.inference_mode():
        features = model.backbone.encode(frames)
    assert features.ndim == 5
    assert len(features) == 4
    close(states(model, [(features, TASK)]).frames, states(model, [(frames, TASK)]).frames)


def a_round_trip_changes_no_number(model: RewardModel, folder: Path) -> None:
    model.save_pretrained(str(folder))
    again = RewardModel.from_pretrained(str(folder))
    assert again.config() == model.config()
    assert again.backbone.files() == model.backbone.files()
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    batch = ClipBatch.from_clips([(clip(model, 0, 4), TASK), (clip(model, 1, 3), TASK)])
    with torch.inference_mode():
        one, two = model(batch, PAIRS[:1]), again(batch, PAIRS[:1])
    for name in ("progress_logits", "success_logits", "preference_logits"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), atol=1e-6, rtol=0)


def gradients_are_the_same_when_blocks_are_computed_again(model: RewardModel) -> None:
    """Of a vision-language model, tower included, in training mode."""
    batch = ClipBatch.from_clips([(clip(model, 0, 3), TASK), (clip(model, 1, 2), OTHER)])
    found = []
    for again in (False, True):
        model.backbone.set_gradient_checkpointing(again)
        model.zero_grad()
        states = model.train().backbone(batch, PairMode.READOUT)
        (states.frames.square().mean() + states.readouts.square().mean()).backward()
        found.append({name: x.grad.clone() for name, x in model.backbone.named_parameters() if x.grad is not None})
    model.backbone.set_gradient_checkpointing(False)
    model.zero_grad()
    model.eval()
    assert found[0].keys() == found[1].keys()
    assert any(found[0][name].abs().max() > 0 for name in found[0] if "vis" in name)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)
