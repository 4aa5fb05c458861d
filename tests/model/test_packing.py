"""Packs: sequences end to end that do not see each other, and read what a plain forward of transformers reads."""

from typing import Any

import numpy as np
import pytest
import tiny_vlm
import torch

from rbm.errors import UserError
from rbm.model import ClipBatch, RewardModel
from rbm.model.backbones import PairMode
from rbm.model.packing import PACKED, packed_attention, streams_of

TASK = "open the drawer"


def clip(seed: int, frames: int, height: int = 64, width: int = 96) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8))


@torch.inference_mode()
def states(model: RewardModel, clips, mode=PairMode.READOUT, pairs=None):
    return model.backbone(ClipBatch.from_clips(clips), mode, pairs)


def test_streams_of_a_shared_question_by_hand():
    # a question of 2 places, clips of 3 and 2 places behind it, and a verdict of 1 behind all
    found = streams_of([(0, 2), (2, 5), (5, 7), (7, 8)], [(), (0,), (0,), (0, 1, 2)])
    # the verdict's stream gives question and first clip too; the second clip has its own, after the question
    assert found.sizes == ((1, 4), (1, 8))
    assert found.gather.tolist() == [0, 1, 5, 6, *range(8)]
    assert found.scatter.tolist() == [4, 5, 6, 7, 8, 2, 3, 11]


def test_streams_of_equal_length_run_together():
    found = streams_of([(0, 3), (3, 6), (6, 8)], [(), (), ()])
    assert found.sizes == ((1, 2), (2, 3))
    assert torch.equal(found.gather[found.scatter], torch.arange(8))


def test_attention_of_streams_against_a_mask():
    torch.manual_seed(0)
    branches, before = [(0, 2), (2, 5), (5, 7), (7, 8)], [(), (0,), (0,), (0, 1, 2)]
    q, k, v = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16)
    found, _ = packed_attention(torch.nn.Identity(), q, k, v, None, streams=streams_of(branches, before))
    owner = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])
    allowed = torch.zeros(8, 8, dtype=torch.bool)
    for a in range(8):
        for b in range(a + 1):
            allowed[a, b] = owner[b] == owner[a] or int(owner[b]) in before[owner[a]]
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-6, rtol=0)


def test_attention_without_streams_is_refused():
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(RuntimeError, match="needs its streams"):
        packed_attention(torch.nn.Identity(), x, x, x, None)


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return tiny_vlm.qwen3_model()


def plain_hidden(model: RewardModel, frames: torch.Tensor, task: str) -> torch.Tensor:
    """Hidden states of one clip by transformers' own forward, mask, positions and tower: (L, d)."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    backbone: Any = model.backbone
    pack = backbone.pack(ClipBatch.from_clips([(frames, task)]), PairMode.READOUT)
    plain = Qwen3VLModel._from_config(Qwen3VLConfig(**backbone.architecture), attn_implementation="sdpa").eval()
    plain.load_state_dict(backbone.model.state_dict())
    table = plain.language_model.embed_tokens.weight
    with torch.no_grad():
        table[backbone.words.markers] = backbone.markers.weight
    x = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    T, C, H, W = x.shape
    cut = x.reshape(T, 1, C, H // 32, 2, 16, W // 32, 2, 16).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    cut = cut.repeat_interleave(2, 6).reshape(-1, C * 2 * 256)
    ids = pack.ids[None]
    with torch.inference_mode():
        return plain(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=cut,
            image_grid_thw=torch.tensor([[1, H // 16, W // 16]] * T),
            mm_token_type_ids=(ids == plain.config.image_token_id).int(),
        ).last_hidden_state[0]


def test_a_clip_alone_equals_transformers_own_forward(model):
    frames = clip(0, 5)
    expected = plain_hidden(model, frames, TASK)
    pack = model.backbone.pack(ClipBatch.from_clips([(frames, TASK)]), PairMode.READOUT)
    found = states(model, [(frames, TASK)])
    torch.testing.assert_close(found.frames, expected[pack.frames], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.readouts, expected[pack.readouts], atol=1e-5, rtol=0)


def test_clips_of_any_length_and_size_score_in_a_batch_as_alone(model):
    clips = [(clip(0, 5), TASK), (clip(1, 1, 64, 64), TASK), (clip(2, 8, 96, 64), "close it"), (clip(3, 2), "close it")]
    together = states(model, clips)
    alone = [states(model, [one]) for one in clips]
    torch.testing.assert_close(together.frames, torch.cat([one.frames for one in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together.readouts, torch.cat([one.readouts for one in alone]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", [PairMode.READOUT, PairMode.CLIPS, PairMode.JOINT])
def test_a_neighbours_pixels_change_nothing(model, mode):
    pairs = torch.tensor([[0, 1], [2, 3]]) if mode is PairMode.JOINT else None
    first = [(clip(0, 4), TASK), (clip(1, 3), TASK), (clip(2, 4), TASK), (clip(3, 6), "close it")]
    second = [(clip(7, 4), TASK), *first[1:]]
    one, two = states(model, first, mode, pairs), states(model, second, mode, pairs)
    assert not torch.allclose(one.frames[:4], two.frames[:4], atol=1e-3)
    # in a pair the second clip does not see the first either: only the verdict sees both
    assert torch.equal(one.frames[4:], two.frames[4:])
    if mode is PairMode.JOINT:
        assert not torch.allclose(one.readouts[0], two.readouts[0], atol=1e-4)
        assert torch.equal(one.readouts[1], two.readouts[1])


def test_a_clip_reads_the_same_alone_as_first_and_as_second(model):
    a, b = (clip(0, 4), TASK), (clip(1, 6), TASK)
    alone = states(model, [a], PairMode.CLIPS).frames
    pairs = torch.tensor([[0, 1]])
    for mode in (PairMode.JOINT, PairMode.READOUT):
        as_first = states(model, [a, b], mode, pairs).frames[:4]
        as_second = states(model, [b, a], mode, pairs).frames[6:]
        torch.testing.assert_close(as_first, alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(as_second, alone, atol=1e-5, rtol=0)


def test_the_joint_verdict_sees_both_clips_and_their_order(model):
    a, b, c = ((clip(seed, 3), TASK) for seed in range(3))
    pairs = torch.tensor([[0, 1]])
    verdict = states(model, [a, b], PairMode.JOINT, pairs).readouts
    for other in ([c, b], [a, c], [b, a]):
        assert not torch.allclose(verdict, states(model, other, PairMode.JOINT, pairs).readouts, atol=1e-4)


def test_the_question_is_shared_by_clips_that_have_it(model):
    both = ClipBatch.from_clips([(clip(0, 2), TASK), (clip(1, 2), TASK)])
    apart = ClipBatch.from_clips([(clip(0, 2), TASK), (clip(1, 2), "close it")])
    pack, other = (model.backbone.pack(batch, PairMode.READOUT) for batch in (both, apart))
    question = len(model.backbone.words.encode(model.backbone.prompt.question(TASK)))
    second = len(model.backbone.words.encode(model.backbone.prompt.question("close it")))
    assert len(other.ids) - len(pack.ids) == second
    assert (pack.position[0] == 0).sum() == 1
    assert int(pack.position[0, question]) == question


def test_frames_that_clips_share_are_encoded_once(model, monkeypatch):
    seen = []
    encode = model.backbone._encode
    monkeypatch.setattr(model.backbone, "_encode", lambda frames: seen.append(len(frames)) or encode(frames))
    frames = clip(0, 6)
    backwards = ClipBatch(
        frames=(frames,),
        frame_ids=torch.tensor([*range(6), *reversed(range(6))])[:, None],
        lengths=torch.tensor([6, 6]),
        tasks=(TASK, TASK),
    )
    with torch.inference_mode():
        found = model.backbone(backwards, PairMode.READOUT)
    assert seen == [6]
    expected = states(model, [(frames, TASK), (frames.flip(0), TASK)])
    torch.testing.assert_close(found.frames, expected.frames, atol=1e-5, rtol=0)


def test_features_stand_for_frames(model):
    frames, other = clip(0, 4), clip(1, 3, 64, 128)
    with torch.inference_mode():
        features = model.backbone.encode(frames)
    assert features.shape == (4, 2, 2, 3, 64)  # the fixture's tower: merged tokens and one deepstack level
    expected = states(model, [(frames, TASK), (other, TASK)])
    found = states(model, [(features, TASK), (other, TASK)])
    torch.testing.assert_close(found.frames, expected.frames, atol=1e-6, rtol=0)


@pytest.mark.parametrize("frames", [1, 64])
def test_one_frame_and_sixty_four(model, frames):
    assert states(model, [(clip(0, frames), TASK)]).frames.shape == (frames, 64)


def test_gradients_of_a_pack_are_those_of_its_clips_alone():
    model = tiny_vlm.qwen3_model().train()
    for head in (model.progress_head, model.success_head, model.preference_head):
        head.eval()  # no dropout
    clips = [(clip(0, 3), TASK), (clip(1, 5), TASK), (clip(2, 2, 64, 64), "close it")]

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            output = model(ClipBatch.from_clips(batch))
            (output.progress_logits.square().sum() + output.utility.sum() + output.success_logits.sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together, alone = gradients([clips]), gradients([[one] for one in clips])
    assert together.keys() == alone.keys()
    assert "backbone.model.visual.patch_embed.proj.weight" in together
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], atol=2e-4, rtol=1e-3)


def test_checkpointing_changes_no_gradient():
    model = tiny_vlm.qwen3_model().train()
    for module in (model.progress_head, model.success_head, model.preference_head):
        module.eval()
    batch = ClipBatch.from_clips([(clip(0, 3), TASK), (clip(1, 4), TASK)])
    found = []
    for on in (False, True):
        model.backbone.set_gradient_checkpointing(on)
        model.zero_grad()
        model(batch).utility.sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-6, rtol=1e-5)


def test_a_task_longer_than_the_context_is_refused():
    model = tiny_vlm.qwen3_model(sizes=tiny_vlm.architecture(max_position_embeddings=64))
    with pytest.raises(UserError, match=r"takes \d+ places and the model reads 64: shorten"):
        states(model, [(clip(0, 2), "open the drawer " * 50)])


def test_an_instruction_with_a_special_token_is_refused(model):
    with pytest.raises(UserError, match=r"contains '<\|prog_token\|>'"):
        states(model, [(clip(0, 2), "open <|prog_token|> the drawer")])


def test_the_models_inside_cannot_be_called_without_streams(model):
    assert model.backbone.language.config._attn_implementation == PACKED
    with pytest.raises(RuntimeError, match="needs its streams"):
        model.backbone.language(inputs_embeds=torch.zeros(1, 3, 64))


def test_frequencies_and_calibration_keep_their_precision(model):
    import copy

    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.backbone.language.rotary_emb.inv_freq.dtype == torch.float32
    assert half.success_temperature.dtype == torch.float32
    one, two = states(model, [(clip(0, 4), TASK)]), states(half, [(clip(0, 4), TASK)])
    assert two.frames.dtype == torch.bfloat16
    torch.testing.assert_close(two.frames.float(), one.frames, atol=0.1, rtol=0)


def test_the_device_resize_is_close_to_pillows():
    pillow, device = tiny_vlm.qwen3_model(), tiny_vlm.qwen3_model(backbone={"resize": "device"})
    device.load_state_dict(pillow.state_dict())
    raw = np.repeat(np.random.default_rng(0).integers(0, 256, (4, 30, 40, 3), dtype=np.uint8), 4, 1).repeat(4, 2)
    found = []
    for model in (pillow, device):
        with torch.inference_mode():
            batch = ClipBatch.from_clips([(model.preprocess(raw), TASK)])
            found.append(model.decode(model(batch))[0])
    assert device.preprocess(raw).shape == (4, 120, 160, 3)
    torch.testing.assert_close(found[0], found[1], atol=2e-3, rtol=0)
