"""Sessions: every push is one full forward over `session.context`, whatever happened before it."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import tiny_vlm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rbm.errors import UserError
from rbm.frames import session_context, session_strides
from rbm.model import ClipBatch, FramePool, RewardModel
from rbm.model.adapter import add_lora
from rbm.model.backbones import NanoBackbone
from rbm.model.prompt import PUBLISHED
from rbm.scoring import Scorer, Session, SessionPool
from rbm.scoring import scorer as scoring
from rbm.scoring.sessions import PoolFull

TASK = "push the square to the right"
CONTEXT = 6
MODELS = (
    "nano",
    "nano in bfloat16",
    "qwen3_vl",
    "qwen3_vl in bfloat16",
    "published",
    "pooled",
    "lora",
    "qwen2_5_vl",
    "smolvlm",
    "rewind",
)
KINDS = {"nano": 1e-4, "qwen3_vl": 1e-4}
"""Models that everything is tried with."""


def louder(model: RewardModel) -> RewardModel:
    """Random heads hardly differ between frames; a test of equality needs that they do."""
    with torch.no_grad():
        for head in (model.progress_head, model.success_head):
            for parameter in head.parameters():
                parameter.mul_(4)
    return model


def model_of(kind: str) -> RewardModel:
    torch.manual_seed(0)
    name, _, precision = kind.partition(" in ")
    if name == "nano":
        backbone = NanoBackbone(image_size=32, width=8, hidden=32, layers=2, heads=2, words=64)
        model = RewardModel(backbone, CONTEXT, remaining=True)
    elif name == "pooled":
        prompt = replace(PUBLISHED, frame="")
        options = {"pair": "causal", "preference": "joint"}
        model = tiny_vlm.qwen3_model(backbone={"prompt": prompt, "pooling": "attention"}, **options)
    elif name == "lora":
        model = tiny_vlm.qwen3_model()
        add_lora(model, r=4)
        for weight in (weight for name, weight in model.named_parameters() if ".lora_B." in name):
            torch.nn.init.normal_(weight, std=0.1)
    elif name == "published":
        model = tiny_vlm.qwen3_model(backbone={"prompt": "published"}, pair="causal", preference="joint")
    else:
        make = {"qwen3_vl": "qwen3", "qwen2_5_vl": "qwen2_5", "smolvlm": "smolvlm", "rewind": "rewind"}
        model = getattr(tiny_vlm, f"{make[name]}_model")()
    model.context_frames = CONTEXT
    return louder(model).to(torch.bfloat16) if precision else louder(model)


@pytest.fixture(scope="module")
def scorers() -> dict[str, Scorer]:
    return {kind: Scorer(model_of(kind), "cpu") for kind in MODELS}


@pytest.fixture(params=KINDS)
def scorer(request: pytest.FixtureRequest, scorers: dict[str, Scorer]) -> Scorer:
    return scorers[request.param]


@pytest.fixture(scope="module")
def frames(clip_of) -> np.ndarray:
    return clip_of(3, 40)


def numbers(scores) -> np.ndarray:
    return np.array([(s.progress, s.progress_std, s.success) for s in scores])


def full(scorer: Scorer, frames: np.ndarray, task: str = TASK) -> np.ndarray:
    """What one full forward over each session's context says of its last frame."""
    contexts = [session_context(t, scorer.context_frames) for t in range(len(frames))]
    found = scorer.predict([(frames[context], task) for context in contexts])
    return np.array([(s.progress[-1], s.progress_std[-1], s.success[-1]) for s in found])


@pytest.mark.parametrize("kind", MODELS)
def test_every_push_is_one_forward_over_its_context(kind, scorers, frames):
    scorer, tolerance = scorers[kind], 2e-2 if "bfloat16" in kind else 1e-4
    session, said = scorer.stream(TASK), []
    for t, frame in enumerate(frames):
        said.append(session.push(frame))
        np.testing.assert_array_equal(session.context, session_context(t, CONTEXT))
    expected = full(scorer, frames)
    np.testing.assert_allclose(numbers(said), expected, atol=tolerance)
    assert expected.std(0)[:2].min() > 1e-3, "the model tells frames apart, else equality means nothing"
    np.testing.assert_allclose(numbers(scorer.stream(TASK).push_many(frames)), expected, atol=tolerance)


def test_many_sessions_of_any_length_advance_together(scorer, clip_of):
    pool = SessionPool(scorer)
    clips = [clip_of(seed, 25, 40 + 8 * (seed % 2), 56) for seed in range(5)]
    tasks = [f"{TASK} {seed % 3}" for seed in range(5)]
    sessions = [pool.open(task) for task in tasks]
    expected = [full(scorer, clip, task) for clip, task in zip(clips, tasks, strict=True)]
    at = [0] * 5
    rng = np.random.default_rng(0)
    for _ in range(30):
        chosen = [int(i) for i in rng.integers(0, 5, rng.integers(1, 8)) if at[i] < 25]  # some of them twice
        requests, places = [], []
        for i in chosen:
            if at[i] < 25:
                requests.append((sessions[i], clips[i][at[i]]))
                places.append((i, at[i]))
                at[i] += 1
        for (i, t), said in zip(places, numbers(pool.push(requests)).reshape(-1, 3), strict=True):
            np.testing.assert_allclose(said, expected[i][t], atol=1e-4)
    assert max(at) > 20


def test_frames_that_change_their_size_in_the_middle(scorer, clip_of):
    pictures = [clip_of(seed, 1, 40 + 13 * (seed % 3), 56 + 30 * (seed % 2))[0] for seed in range(20)]
    said = scorer.stream(TASK).push_many(pictures)
    tensors = [scorer.model.preprocess(picture[None]) for picture in pictures]
    for t in (0, 5, 6, 13, 19):
        pool = FramePool()
        ids = [pool.add(i, tensors[i]) for i in session_context(t, CONTEXT)]
        groups, renumber = pool.groups()
        batch = ClipBatch(groups, renumber(torch.tensor(ids))[:, None], torch.tensor([len(ids)]), (TASK,))
        with torch.inference_mode():
            progress = scorer.model.decode(scorer.model(batch))[0][-1]
        assert said[t].progress == pytest.approx(float(progress), abs=1e-4)


VIEWS = ("near", "wrist", "far")
SEEING = {
    "nano": lambda: RewardModel(NanoBackbone(image_size=32, width=8, hidden=32, layers=2, heads=2, views=VIEWS), 5),
    "names": lambda: tiny_vlm.qwen3_model(context_frames=5, backbone={"views": VIEWS}),
    "embedding": lambda: tiny_vlm.qwen3_model(context_frames=5, backbone={"views": VIEWS, "view_tags": "embedding"}),
}


@pytest.mark.parametrize("kind", SEEING)
def test_views_that_come_and_go(kind, clip_of):
    torch.manual_seed(0)
    model = louder(SEEING[kind]())
    if kind == "embedding":
        torch.nn.init.normal_(model.backbone.view_embedding.weight)
    scorer = Scorer(model, "cpu")
    films = {name: clip_of(seed, 16) for seed, name in enumerate(VIEWS)}
    there = [[name for view, name in enumerate(VIEWS) if (3 * t) % 7 + 1 >> view & 1] for t in range(16)]
    session = scorer.stream(TASK)
    said = session.push_many([{name: films[name][t] for name in names} for t, names in enumerate(there)])
    tensors = {name: scorer.model.preprocess(film) for name, film in films.items()}
    for t in range(16):
        context = session_context(t, 5)
        pool = FramePool()
        ids = [
            [pool.add((name, i), tensors[name][i : i + 1]) if name in there[i] else -1 for name in VIEWS]
            for i in context.tolist()
        ]
        groups, renumber = pool.groups()
        batch = ClipBatch(groups, renumber(torch.tensor(ids)), torch.tensor([len(ids)]), (TASK,))
        with torch.inference_mode():
            progress = scorer.model.decode(scorer.model(batch))[0][-1]
        assert said[t].progress == pytest.approx(float(progress), abs=1e-4)
    restored = SessionPool(scorer).restore(session.snapshot())
    last = {"wrist": films["near"][3]}
    assert restored.push(last).progress == pytest.approx(session.push(last).progress, abs=1e-4)


@settings(max_examples=15)
@given(data=st.data())
def test_whatever_is_evicted_comes_back_with_equal_scores(data, scorers, frames):
    scorer = scorers["nano"]
    expected = full(scorer, frames)
    hot = 9000  # bytes of a session that has all
    pool = SessionPool(scorer, budget_bytes=data.draw(st.integers(1, 4 * hot), label="budget"))
    sessions: list[Session] = []
    for _ in range(25):
        if not sessions or (len(sessions) < 5 and data.draw(st.booleans(), label="open")):
            try:
                sessions.append(pool.open(TASK))
            except PoolFull:
                assert pool.bytes >= pool.budget_bytes
                if not sessions:
                    return
        session = data.draw(st.sampled_from(sessions), label="session")
        count = min(data.draw(st.integers(1, 6), label="frames"), len(frames) - session.count)
        start = session.count
        try:
            said = session.push_many(frames[start : start + count])
        except PoolFull:
            assert pool.bytes >= pool.budget_bytes
            assert session.count == start
            continue
        np.testing.assert_allclose(numbers(said).reshape(-1, 3), expected[start : start + count], atol=1e-4)
        stats = pool.stats()
        assert stats["hot"] + stats["warm"] + stats["cold"] == len(sessions) == len(pool)
        assert stats["bytes"] <= pool.budget_bytes or stats["hot"] + stats["warm"] == 0


def test_the_idlest_lose_keys_then_features_and_frames_stay(scorer, frames):
    free = SessionPool(scorer)
    for _ in range(4):
        free.open(TASK).push_many(frames[:5])
    assert free.stats() | {"bytes": 0} == {"sessions": 4, "hot": 4, "warm": 0, "cold": 0, "bytes": 0, "evictions": 0}
    expected, seen = full(scorer, frames[:8]), set()
    alone = SessionPool(scorer, budget_bytes=1)
    alone.open(TASK).push_many(frames[:5])
    assert alone.stats()["cold"] == 1
    for budget in np.linspace(free.bytes, 4 * alone.bytes, 40).astype(int).tolist():
        pool = SessionPool(scorer, budget_bytes=budget)
        sessions = [pool.open(TASK) for _ in range(4)]
        for session in sessions:
            session.push_many(frames[:5])
        stats = pool.stats()
        tier = [2 if s._read else 1 if s._has_features() else 0 for s in sessions]
        assert tier == sorted(tier), "the idlest loses first"
        assert (tier.count(2), tier.count(1), tier.count(0)) == (stats["hot"], stats["warm"], stats["cold"])
        assert not (stats["hot"] and stats["cold"]), "all keys go before any features"
        assert stats["bytes"] <= budget
        seen.add(tuple(tier))
        pool.budget_bytes = None
        for session in sessions:
            np.testing.assert_allclose(numbers(session.push_many(frames[5:8])), expected[5:], atol=1e-4)
    assert {(2, 2, 2, 2), (0, 0, 0, 0)} <= seen
    assert len(seen) >= 5


def test_a_full_pool_takes_no_frames_until_a_session_is_closed(scorer, frames):
    pool = SessionPool(scorer, budget_bytes=1)
    first, second = pool.open(TASK), pool.open(TASK)
    first.push(frames[0])
    assert pool.stats()["cold"] == 2
    for refused in (lambda: second.push(frames[0]), lambda: pool.open(TASK), first.fork):
        with pytest.raises(PoolFull, match="close some"):
            refused()
    snapshot = first.snapshot()
    with pytest.raises(PoolFull):
        pool.restore(snapshot)
    first.close()
    np.testing.assert_allclose(numbers([second.push(frames[0])]), full(scorer, frames[:1]), atol=1e-4)


def test_a_budget_may_be_used_up_exactly_or_become_smaller(scorer, frames):
    pool = SessionPool(scorer)
    first, second = pool.open(TASK), pool.open(TASK)
    first.push_many(frames[:5])
    pool.budget_bytes = pool.bytes
    expected = full(scorer, frames[:6])
    np.testing.assert_allclose(numbers(second.push_many(frames[:5])), expected[:5], atol=1e-4)
    assert pool.bytes <= pool.budget_bytes
    pool.budget_bytes = pool.bytes - 1
    np.testing.assert_allclose(numbers([first.push(frames[5])]), expected[5:], atol=1e-4)
    assert pool.bytes <= pool.budget_bytes


def test_a_fork_shrinks_as_far_as_any_session(scorer, frames):
    pool = SessionPool(scorer)
    session = pool.open(TASK)
    session.push_many(frames[:6])
    forks = [session.fork(), session.fork()]
    pool.budget_bytes = 1
    with pytest.raises(PoolFull):
        pool.open(TASK)
    smallest = pool.bytes
    for fork in forks:
        fork.close()
    assert smallest == 3 * pool.bytes
    assert all(held.pixels is None and held.features is None for held in session._held)


def test_features_of_a_long_episode_are_not_held_all_at_once(scorers, frames, monkeypatch):
    scorer = Scorer(scorers["qwen3_vl"].model, "cpu")
    encoded: list[int] = []
    real = scorer.model.backbone.encode

    def encode(shown):
        encoded.append(len(shown))
        return real(shown)

    monkeypatch.setattr(scorer.model.backbone, "encode", encode)
    places = scorer.model.backbone.places(*frames.shape[1:3])
    monkeypatch.setattr(scoring, "FORWARD_PLACES_CPU", 8 * places)
    said = numbers(scorer.stream(TASK).push_many(frames))
    assert encoded == [8] * 5
    monkeypatch.undo()
    np.testing.assert_allclose(said, full(scorer, frames), atol=1e-4)


def test_memory_is_bounded(scorer, frames):
    pool = SessionPool(scorer)
    session = pool.open(TASK)
    most = 0
    for start in range(12):
        session.push_many(frames)
        if start < 2:
            most = max(most, pool.bytes)
        assert pool.bytes <= most
    assert session.count == 480
    assert len(session.context) <= CONTEXT
    session.close()
    assert (pool.bytes, len(pool)) == (0, 0)


def test_what_a_batch_brought_does_not_stay_in_memory(scorers, clip_of):
    pool = SessionPool(scorers["nano"])
    session = pool.open(TASK)
    session.push_many(clip_of(1, 40))
    held = [x for frame in session._held for part in (frame.pixels, frame.features) for x in part]
    assert len(held) == 2 * len(session._held)
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in held)
    assert pool.bytes == session._memory.bytes + sum(x.untyped_storage().nbytes() for x in held)


def test_a_fork_looks_ahead_and_leaves_the_session_alone(scorer, frames, clip_of):
    session = scorer.stream(TASK)
    session.push_many(frames[:9])
    other = clip_of(8, 10)
    fork = session.fork()
    ahead = numbers(fork.push_many(other))
    expected = full(scorer, np.concatenate([frames[:9], other]))
    np.testing.assert_allclose(ahead, expected[9:], atol=1e-4)
    np.testing.assert_allclose(numbers(session.push_many(frames[9:20])), full(scorer, frames[:20])[9:], atol=1e-4)
    assert (session.count, fork.count) == (20, 19)
    fork.close()
    session.push(frames[20])


@pytest.mark.parametrize("count", [0, 1, 6, 7, 17, 31])
def test_a_snapshot_goes_on_elsewhere(scorer, frames, count):
    session = scorer.stream(TASK)
    if count:
        session.push_many(frames[:count])
    restored = SessionPool(scorer).restore(session.snapshot())
    np.testing.assert_array_equal(restored.context, session.context)
    assert (restored.task, restored.count) == (TASK, count)
    np.testing.assert_allclose(numbers(restored.push_many(frames[count:])), full(scorer, frames)[count:], atol=1e-4)


def test_a_reset_forgets_everything(scorer, frames):
    session = scorer.stream("something else")
    session.push_many(frames[:10])
    session.reset(TASK)
    assert (session.count, len(session.context), session.task) == (0, 0, TASK)
    np.testing.assert_allclose(numbers(session.push_many(frames[:12])), full(scorer, frames[:12]), atol=1e-4)


def test_threads_take_turns(scorers, frames):
    scorer = scorers["nano"]
    pool, expected = SessionPool(scorer), full(scorer, frames)
    found: dict[int, np.ndarray] = {}

    def run(number: int) -> None:
        with pool.open(TASK) as session:
            found[number] = numbers([session.push(frame) for frame in frames])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        np.testing.assert_allclose(found[number], expected, atol=1e-4)
    assert pool.bytes == 0


def test_a_push_that_fails_changes_nothing(scorers, frames, monkeypatch):
    scorer = Scorer(scorers["nano"].model, "cpu")
    session = scorer.stream(TASK)
    session.push_many(frames[:8])
    real = scorer.model.backbone.advance

    def out_of_memory(*args):
        real(*args)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(scorer.model.backbone, "advance", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        session.push_many(frames[8:12])
    monkeypatch.undo()
    assert session.count == 8
    np.testing.assert_allclose(numbers(session.push_many(frames[8:20])), full(scorer, frames[:20])[8:], atol=1e-4)


@pytest.mark.parametrize("context", [2, 3, 6, 16])
def test_strides_are_those_of_session_contexts(context):
    for t, stride in enumerate(session_strides(200, context).tolist()):
        held = session_context(t, context)
        assert set(range(0, t + 1, stride)) | {t} == set(held.tolist())


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        [[1, 2, 3]],
        None,
    ],
)
def test_bad_frames_are_refused_and_nothing_is_pushed(scorers, frames, bad):
    session = scorers["nano"].stream(TASK)
    session.push(frames[0])
    with pytest.raises(UserError, match="frame"):
        session.push_many([frames[1], bad])
    assert session.count == 1
    np.testing.assert_allclose(numbers([session.push(frames[1])]), full(scorers["nano"], frames[:2])[1:], atol=1e-4)


def test_bad_calls_are_refused(scorers, frames):
    scorer = scorers["nano"]
    pool, other = SessionPool(scorer), SessionPool(scorer)
    with pytest.raises(UserError, match="empty"):
        pool.open(" ")
    session = pool.open(TASK)
    with pytest.raises(UserError, match="another pool"):
        other.push([(session, frames[0])])
    with pytest.raises(UserError, match="one view"):
        session.push({"near": frames[0]})
    session.close()
    session.close()
    for call in (lambda: session.push(frames[0]), session.fork, session.snapshot, session.reset):
        with pytest.raises(UserError, match="closed"):
            call()
    with pytest.raises(UserError, match="budget"):
        SessionPool(scorer, budget_bytes=0)


@pytest.mark.parametrize(("kind", "task"), [("nano", "open \ud800"), ("qwen3_vl", "open <|vision_start|>")])
def test_an_instruction_that_the_model_cannot_read_opens_no_session(scorers, kind, task):
    pool = SessionPool(scorers[kind])
    with pytest.raises(UserError, match="instruction"):
        pool.open(task)
    assert len(pool) == 0
    session = pool.open(TASK)
    with pytest.raises(UserError, match="instruction"):
        session.reset(task)
    assert session.task == TASK


@settings(max_examples=80)
@given(data=st.data())
def test_damaged_snapshots_end_in_a_sentence(data, scorers, frames):
    session = scorers["nano"].stream(TASK)
    session.push_many(frames[:9])
    good = session.snapshot()
    if data.draw(st.booleans()):
        bad = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        place = data.draw(st.integers(0, len(good) - 1))
        bad = good[:place] + bytes([data.draw(st.integers(0, 255))]) + good[place + 1 :]
    pool = SessionPool(scorers["nano"])
    try:
        restored = pool.restore(bad)
    except UserError:
        assert len(pool) == 0
    else:  # a change inside a picture or the instruction
        assert restored.count == 9
        restored.push(frames[9])


def test_snapshots_of_other_models_are_refused(scorers, frames):
    session = scorers["nano"].stream(TASK)
    session.push(frames[0])
    other = Scorer(RewardModel(NanoBackbone(image_size=16, width=4, hidden=16, layers=1, heads=2), CONTEXT), "cpu")
    with pytest.raises(UserError, match="another size"):
        SessionPool(other).restore(session.snapshot())
    longer = Scorer(RewardModel(NanoBackbone(image_size=32, width=4, hidden=16, layers=1, heads=2), 8), "cpu")
    with pytest.raises(UserError, match="8"):
        SessionPool(longer).restore(session.snapshot())
