"""Instructions of any language become packs of the right shape; tokenizers that do not fit are refused or completed."""

import json
import logging

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_vlm import TOKENIZER, architecture

from rbm.errors import UserError
from rbm.model.backbones import PairMode
from rbm.model.backbones.qwen3_vl import Qwen3VLBackbone
from rbm.model.batch import ClipBatch
from rbm.model.packing import Pack
from rbm.model.prompt import ISOLATED, MARKERS, PREFERENCE, PROGRESS, PUBLISHED, PUBLISHED_WITH_PROGRESS, SPLIT, Prompt
from rbm.model.tokens import Words

PAD = "<|image_pad|>"
LANGUAGES = [
    "open the drawer", "öffne die Schublade", "打开抽屉", "引き出しを開けて", "서랍을 열어", "افتح الدرج",
    "פתח את המגירה", "ανοίξτε το συρτάρι", "откройте ящик", "दराज खोलो", "เปิดลิ้นชัก", "mở ngăn kéo", "e\u0301 = é",
    "🦾👩‍🍳 → 🗄️", "{task}", "'quoted' {k} {view}", "<|im_start", "|>", "a\nb\tc\u0000",
    "\u212b\u2126\ufb01 \u1e9b\u0323", " ", "", "<|prog_token|",
]  # fmt: skip
many = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def backbone(prompt: Prompt) -> Qwen3VLBackbone:
    return Qwen3VLBackbone(architecture(), TOKENIZER, prompt)


BACKBONES = {
    "isolated": backbone(ISOLATED),
    "published": backbone(PUBLISHED),
    "with progress": backbone(PUBLISHED_WITH_PROGRESS),
}
SPECIAL = sorted(
    token.content
    for token in BACKBONES["isolated"].words.tokenizer.get_added_tokens_decoder().values()
    if token.special
)
anything = st.one_of(st.sampled_from(LANGUAGES), st.text(max_size=60)).filter(
    lambda text: not any(token in text for token in SPECIAL)
)


def clips(tasks: list[str], lengths: list[int]) -> ClipBatch:
    return ClipBatch.from_clips(
        [(torch.zeros(n, 64, 96, 3, dtype=torch.uint8), task) for task, n in zip(tasks, lengths, strict=True)]
    )


def count(pack: Pack, words: Words, token: str) -> int:
    return int((pack.ids == words.id_of(token)).sum())


def tokenizer(*without: str, **changes: bool) -> str:
    """The tiny tokenizer less some of its added tokens; `changes` are made to the markers that stay."""
    found = json.loads(TOKENIZER)
    found["added_tokens"] = [token for token in found["added_tokens"] if token["content"] not in without]
    for token in found["added_tokens"]:
        if token["content"] in MARKERS:
            token.update(changes)
    return json.dumps(found)


@many
@given(st.sampled_from(sorted(BACKBONES)), st.lists(st.tuples(anything, st.integers(1, 9)), min_size=1, max_size=4))
@example("published", [(task, 3) for task in LANGUAGES])
@example("isolated", [(task, 3) for task in LANGUAGES])
def test_every_frame_has_its_place_whatever_the_instruction(name, shown):
    model = BACKBONES[name]
    tasks, lengths = map(list, zip(*shown, strict=True))
    pack = model.pack(clips(tasks, lengths), PairMode.READOUT)
    frames = sum(lengths)
    assert count(pack, model.words, PROGRESS) == frames == len(pack.frames)
    assert torch.equal(pack.ids[pack.frames], torch.full((frames,), model.words.id_of(PROGRESS)))
    assert count(pack, model.words, PREFERENCE) == len(tasks) == len(pack.readouts)
    assert len(pack.picture) == frames * 2 * 3 == count(pack, model.words, PAD)
    assert pack.owner.bincount().tolist() == [6] * frames
    # a clip's frames are read one after another, each behind its own picture
    last = torch.zeros(frames, dtype=torch.int64).scatter_reduce(0, pack.owner, pack.picture, "amax")
    assert bool((pack.frames > last).all())


@many
@given(st.sampled_from(["published", "with progress"]), anything, anything, st.integers(1, 9), st.integers(1, 9))
def test_a_published_pair_is_cut_at_one_token(name, task, other, first, second):
    model = BACKBONES[name]
    pairs = torch.tensor([[0, 1]])
    pack = model.pack(clips([task, other], [first, second]), PairMode.CAUSAL, pairs)
    (split,) = torch.nonzero(pack.ids == model.words.id_of(SPLIT)).flatten().tolist()
    assert len(pack.frames) == count(pack, model.words, PROGRESS) == first + second
    assert (pack.frames < split).tolist() == [True] * first + [False] * second
    assert pack.readouts.tolist() == [len(pack.ids) - 1 - len(model.words.encode(PUBLISHED.end))]
    alone = model.pack(clips([task], [second]), PairMode.CLIPS)
    assert len(alone.frames) == second


@many
@given(anything, anything, st.integers(1, 9), st.integers(1, 9))
def test_a_joint_pair_of_ours_has_one_readout(task, other, first, second):
    model = BACKBONES["isolated"]
    pack = model.pack(clips([task, other], [first, second]), PairMode.JOINT, torch.tensor([[0, 1]]))
    assert len(pack.frames) == count(pack, model.words, PROGRESS) == first + second
    assert pack.readouts.tolist() == [len(pack.ids) - 1]


@many
@given(st.text(max_size=20), st.sampled_from(SPECIAL), st.text(max_size=20))
def test_an_instruction_with_a_special_token_is_refused(before, token, after):
    model = BACKBONES["published"]
    with pytest.raises(UserError, match="leave it out") as refused:
        model.pack(clips([before + token + after], [2]), PairMode.CLIPS)
    assert "\n" not in str(refused.value)
    assert any(repr(known) in str(refused.value) for known in SPECIAL if known in before + token + after)


@given(anything)
def test_words_are_kept_up_to_their_normal_form(text):
    """Byte-level tokens: what goes in comes out again, but for Unicode's composed form (NFC)."""
    words = BACKBONES["isolated"].words
    back = words.tokenizer.decode(words.encode(text).tolist(), skip_special_tokens=False)
    normal = words.tokenizer.normalizer.normalize_str(text)
    assert back == normal


def test_text_that_is_none_is_refused():
    broken = b"open the dr\xffawer".decode(errors="surrogateescape")  # what a command line hands over
    with pytest.raises(UserError, match="UTF-8"):
        BACKBONES["published"].pack(clips([broken], [2]), PairMode.CLIPS)


def test_a_tokenizer_without_the_markers_gets_them(caplog):
    words = Words(tokenizer(*MARKERS), [PAD])
    assert words.markers == [494, 495, 496, 497, 498]  # the largest before was 493
    assert len(words) == 499
    assert words.added == list(MARKERS)
    assert [words.encode(token).tolist() for token in MARKERS] == [[i] for i in words.markers]
    Qwen3VLBackbone(architecture(), tokenizer(*MARKERS))
    assert "tokenizer and embedding get 5 tokens more" in caplog.text
    assert all(token in caplog.text for token in MARKERS)
    assert Words(words.to_str()).markers == words.markers  # stored, it stays
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert Words(TOKENIZER).added == []
    assert caplog.text == ""


@given(st.sets(st.sampled_from(MARKERS), min_size=1))
def test_only_markers_that_lack_are_added(without):
    words = Words(tokenizer(*without))
    assert set(words.added) == without
    assert sorted(words.markers) == [494, 495, 496, 497, 498]
    kept = {token: words.id_of(token) for token in MARKERS if token not in without}
    assert max(kept.values(), default=493) < min(words.id_of(token) for token in without)
    ids = words.encode("".join(f"a{token}" for token in MARKERS)).tolist()
    assert ids[1::2] == words.markers


def test_markers_are_refused_in_an_instruction_even_where_they_are_stored_as_plain_words():
    words = Words(tokenizer(special=False))
    assert words.added == []
    for token in MARKERS:
        with pytest.raises(UserError, match="leave it out"):
            words.check(f"open {token} it")
    words.check("open it")


def test_a_model_whose_table_is_too_small_for_new_markers_still_reads_them():
    model = Qwen3VLBackbone(architecture(vocab_size=494), tokenizer(*MARKERS))
    assert model.embedding.num_embeddings == 494
    pack = model.pack(clips(["open it"], [3]), PairMode.CLIPS)
    assert pack.ids[pack.frames].tolist() == [498] * 3
    embedded = model._embed(pack, *model._marked(pack.ids))
    assert torch.equal(embedded[pack.frames], model.markers.weight[MARKERS.index(PROGRESS)].expand(3, -1))


@pytest.mark.parametrize("needed", [PAD, "<|vision_end|>"])
def test_a_tokenizer_of_another_model_is_refused(needed):
    with pytest.raises(UserError, match="another model") as refused:
        Words(tokenizer(needed), [PAD, "<|vision_end|>"])
    assert needed in str(refused.value)


def test_a_backbone_refuses_a_tokenizer_of_another_model():
    with pytest.raises(UserError, match=r"lacks <\|image_pad\|>.*another model"):
        Qwen3VLBackbone(architecture(), tokenizer(PAD))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"text"', "{}", TOKENIZER[:-2], TOKENIZER[: len(TOKENIZER) // 2], "\0"]
)
def test_a_broken_tokenizer_is_refused(text):
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read") as refused:
        Words(text)
    assert "\n" not in str(refused.value)
