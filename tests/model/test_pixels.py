"""Frames become patches as in the published preprocessing; sizes by hand, pixels against transformers' on Pillow."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from rbm.model.pixels import AsIs, PillowResize, fitting_size, normalised, patches, tensor_resize

HALF = (0.5, 0.5, 0.5)
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (1, h, w, 3): blobs, an edge and some noise; blurred noise alone would hide what a filter does."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    frame = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    frame[:, width // 2 :] = 255 - frame[:, width // 2 :]
    return np.clip(frame + rng.integers(-20, 21, frame.shape), 0, 255).astype(np.uint8)[None]


def published(frame: np.ndarray, patch: int, mean: tuple[float, ...], std: tuple[float, ...], **options) -> np.ndarray:
    """transformers' patches of one frame, float32 (cells, 3 · 2 · patch²)."""
    unit = 2 * patch
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, temporal_patch_size=2, image_mean=list(mean), image_std=list(std),
        size={"shortest_edge": 4 * unit**2, "longest_edge": 16384 * unit**2}, **options,
    )  # fmt: skip
    return processor(images=[Image.fromarray(frame[0])], return_tensors="np")["pixel_values"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((240, 320), (256, 320)),  # 7.5 cells: the even 8
        ((144, 256), (128, 256)),  # 4.5: the even 4
        ((208, 272), (192, 256)),  # 6.5 and 8.5: 6 and 8
        ((272, 240), (256, 256)),
        ((240, 240), (256, 256)),
        ((256, 320), (256, 320)),
        ((112, 112), (128, 128)),  # 3.5: the even 4
        ((1080, 1920), (1088, 1920)),  # 33.75: 34 × 60 = 2040 cells
        ((33, 47), (64, 96)),  # 1 × 1 is fewer than 4 cells: × 1.63 gives 53.7 × 76.5, rounded up
        ((32, 32), (64, 64)),
        ((1, 1), (64, 64)),
        ((16, 300), (32, 288)),  # 0 cells high (.5: the even 0): × .92 gives 14.8 × 277, rounded up
        ((31, 129), (32, 128)),  # 1 × 4 is enough
    ],
)
def test_sizes_by_hand(before, after):
    assert fitting_size(*before, unit=32, least=4, most=16384) == after


def test_most_and_least_by_hand():
    # 2040 cells are scaled by sqrt(256 · 1024 / (1080 · 1920)) = .3556: 12 × 21.3 cells, rounded down
    assert fitting_size(1080, 1920, 32, 4, 256) == (384, 672)
    assert fitting_size(1080, 1920, 32, 4, 2040) == (1088, 1920)
    assert fitting_size(1080, 1920, 32, 4, 2039) == (1056, 1920)  # × 1.003: 33.9 × 60.2
    assert fitting_size(32, 6400, 32, 4, 100) == (32, 4512)  # never less than one cell high, even if that is too many
    assert fitting_size(64, 64, 32, 5, 100) == (96, 96)
    assert fitting_size(64, 64, 32, 16, 100) == (128, 128)


sides = st.integers(1, 3000)


@given(sides, sides, st.sampled_from([28, 32]), st.sampled_from([1, 4, 64]), st.sampled_from([100, 1280, 16384]))
def test_sizes_are_the_published_ones(height, width, unit, least, most):
    size = fitting_size(height, width, unit, least, most)
    assert all(side % unit == 0 and side > 0 for side in size)
    if max(height, width) <= 200 * min(height, width):  # the published one refuses others
        assert size == smart_resize(height, width, unit, least * unit**2, most * unit**2)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([28, 32]), st.sampled_from([100, 256, 1280]))
def test_sizes_at_exact_multiples_are_the_published_ones(a, b, unit, most):
    """Where a scaled side is a whole number of cells but for its rounding."""
    for scale in (unit // 2, unit, 33 * unit // 8, 19):
        if max(a, b) <= 200 * min(a, b):
            expected = smart_resize(a * scale, b * scale, unit, 4 * unit**2, most * unit**2)
            assert fitting_size(a * scale, b * scale, unit, 4, most) == expected


SIZES = [(240, 320), (144, 256), (208, 272), (256, 320), (37, 100), (20, 20), (480, 640), (321, 199)]


@pytest.mark.parametrize("patch", [16, 14])
@pytest.mark.parametrize("size", SIZES)
def test_resized_and_cut_as_published_bit_for_bit(size, patch):
    frame = picture(*size)
    theirs = published(frame, patch, HALF, HALF, do_rescale=False, do_normalize=False)
    resized = PillowResize(2 * patch)(frame)
    ours = patches(resized.permute(0, 3, 1, 2), patch, 2, 2)
    assert ours.dtype == torch.uint8
    np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize(("patch", "mean", "std", "ulp"), [(16, HALF, HALF, 1.2e-7), (14, *CLIP, 4.8e-7)])
@pytest.mark.parametrize("size", SIZES)
def test_normalised_as_published_up_to_the_last_bit(size, patch, mean, std, ulp):
    """transformers rounds after each of two steps, we after one: a unit in the last place of values up to 2."""
    frame = picture(*size)
    theirs = published(frame, patch, mean, std)
    ours = patches(normalised(PillowResize(2 * patch)(frame), torch.float32, mean, std), patch, 2, 2).numpy()
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= ulp


def test_every_value_of_a_pixel():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    found = normalised(values, torch.float32, HALF, HALF)
    expected = np.arange(256) / 127.5 - 1
    assert np.abs(found[0, 0].flatten().numpy() - expected).max() <= 1.2e-7  # a unit in the last place
    assert found[0, :, 0, 0].tolist() == [-1, -1, -1]
    assert found[0, :, 15, 15].tolist() == [1, 1, 1]
    assert normalised(values, torch.bfloat16, HALF, HALF).dtype == torch.bfloat16


def test_frames_of_a_clip_are_cut_each_by_itself():
    frames = np.concatenate([picture(64, 96, seed) for seed in range(3)])
    together = patches(normalised(PillowResize()(frames), torch.float32, HALF, HALF), 16, 2, 2)
    alone = [patches(normalised(PillowResize()(frame[None]), torch.float32, HALF, HALF), 16, 2, 2) for frame in frames]
    assert torch.equal(together, torch.cat(alone))


def test_frames_that_fit_are_left_as_they_are():
    frame = picture(256, 320)
    np.testing.assert_array_equal(PillowResize()(frame).numpy(), frame)
    np.testing.assert_array_equal(AsIs()(frame).numpy(), frame)
    given = torch.from_numpy(frame)
    assert tensor_resize(given, (256, 320)) is given


@pytest.mark.parametrize("size", [(240, 320), (144, 256), (208, 272), (1080, 1920), (100, 140), (20, 20)])
@pytest.mark.parametrize("kind", ["picture", "noise"])
def test_the_tensors_resize_is_pillows_but_for_a_rounding_here_and_there(size, kind):
    """At most 1 of 255 off, in at most two values of a thousand, also where the filter overshoots."""
    noise = np.random.default_rng(1).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    frame = picture(*size) if kind == "picture" else noise
    after = fitting_size(*size, 32, 4, 16384)
    pillow = PillowResize()(frame).int()
    tensors = tensor_resize(torch.from_numpy(frame), after)
    assert tensors.dtype == torch.uint8
    assert pillow.shape == tensors.shape == (1, *after, 3)
    difference = (pillow - tensors.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 2e-3
    # another filter is far away
    bilinear = Image.fromarray(frame[0]).resize(after[::-1], Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(bilinear).astype(int) - pillow[0].numpy()).mean() > 0.5
