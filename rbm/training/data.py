"""From corpus and sampler to batches.

1. Optimiser step k owns the samples k B .. k B + B - 1, B pairs; they depend on the seed alone.
2. The main process has the table of all trajectories and plans: an `Order` says of what trajectories a step's pairs
   are made. A loader process has no table, only the corpus, whose columns are mapped, and makes the pairs.
3. Micro-batch m of a step, on rank r, takes its share of them; ranks and workers only partition indices.
4. Targets of all B pairs give the counts over which the losses are means; frames are read for the share only.
5. Frames of one trajectory that several clips of a micro-batch show are decoded and sent once, each view of them.
6. A pair of which a trajectory can not be decoded, or has none of the views that the model reads, is replaced by its
   next substitute (drawn by seed, index and attempt), so the same data come again with any number of workers and
   after a resume. Other micro-batches and ranks do not know, for they do not read its frames: they count the
   supervision of the pair as it was planned, so the means of that step are off by what the two pairs differ in, at
   most the share of one pair.
"""

from __future__ import annotations

import logging
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from rbm.corpus import Corpus, CorruptPayload
from rbm.corpus.split import Split, open_rows, split_corpus
from rbm.errors import UserError
from rbm.model import ClipBatch, Counts, FramePool, PairBatch, RewardModel, Targets
from rbm.model.backbones.base import Preprocessor
from rbm.sampling import Balance, ClipOptions, ClipTargets, Pair, Plan, Planner, with_completion
from rbm.sampling import Sampler as PairSampler
from rbm.training.augment import Augmentation
from rbm.training.features import FeatureCache
from rbm.training.parallel import together
from rbm.training.views import NoView, check_views, read_views

log = logging.getLogger(__name__)

VALIDATION_SEED = 1_000_003
"""Added to the seed for the fixed validation pairs, so that they are not the first training pairs."""

ATTEMPTS = 10
"""So many substitutes in a row that can not be read: something is wrong with more than a few trajectories."""

READ_BEFORE_JUDGING = 200
"""Trajectories that are read before the share of bad ones can stop a run."""

PairTargets = tuple[ClipTargets, ClipTargets]
_T = TypeVar("_T")

ABSENT = -1
"""In place of a frame of a view that a trajectory does not have."""

START_METHODS = ("spawn", "forkserver", "fork")


@dataclass(frozen=True)
class Share:
    """Which part of an optimiser step this process computes: micro-batch of `micro`, rank of `world`."""

    pairs_per_step: int
    micro: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        parts = self.micro * self.world
        if self.pairs_per_step < 1 or self.pairs_per_step % parts:
            raise UserError(
                f"pairs_per_step={self.pairs_per_step} cannot be shared out evenly over {self.micro} micro-batches on "
                f"{self.world} processes: choose a multiple of {parts}"
            )

    @property
    def pairs(self) -> int:
        """Pairs in one micro-batch of one rank."""
        return self.pairs_per_step // (self.micro * self.world)


@dataclass(frozen=True)
class Order:
    """What a loader process is asked for: part `part` of optimiser step `step`, all of whose pairs are in `plan`."""

    step: int
    part: int
    plan: Plan


class Unreadable(NamedTuple):
    """A trajectory that could not be decoded, and why."""

    trajectory: str
    what: str


@dataclass(frozen=True)
class Loaded:
    """A micro-batch on its way to the main process.

    Attributes:
        batch: what is trained on.
        read: how many trajectories were read for it, those that failed among them.
        replaced: one entry for each time that a pair was replaced.
    """

    batch: PairBatch
    read: int
    replaced: tuple[Unreadable, ...] = ()


@dataclass(frozen=True)
class Refused:
    """A user's error in a loader process, on its way to the main one: as an exception it would lose its type."""

    message: str


class PairDataset(Dataset[Loaded | Refused]):
    """Makes micro-batches to order. Any order is as good as any other: there is no epoch.

    It goes to the loader processes, and takes next to no room there: the corpus maps its files, and the sampler
    leaves its table behind (one that ever needs a substitute makes it again).
    """

    def __init__(
        self,
        corpus: Corpus,
        sampler: PairSampler,
        preprocess: Preprocessor,
        share: Share,
        supervise_both: bool,
        augment: Augmentation | None = None,
        min_side: int | None = None,
        views: tuple[str, ...] = (),
        remaining: bool = False,
        features: FeatureCache | None = None,
    ) -> None:
        self.corpus, self.sampler, self.preprocess = corpus, sampler, preprocess
        self.share, self.supervise_both, self.augment, self.min_side = share, supervise_both, augment, min_side
        self.views, self.remaining, self.features = views, remaining, features

    def __getitem__(self, order: Order) -> Loaded | Refused:
        try:
            return self._load(order)
        except UserError as error:
            return Refused(str(error))

    def _load(self, order: Order) -> Loaded:
        share, step = self.share, order.step
        pairs = self.sampler.maker.pairs(order.plan)
        begin = (order.part * share.world + share.rank) * share.pairs
        mine = slice(begin, begin + share.pairs)

        replaced: list[Unreadable] = []
        try:
            clips, own = self._read(pairs[mine], step)
        except (CorruptPayload, NoView):
            pairs[mine] = [self._readable(pair, lambda it: self._read([it], step), replaced)[0] for pair in pairs[mine]]
            clips, own = self._read(pairs[mine], step)
        # of the pairs of other shares only how much they supervise matters
        others = [self._readable(pair, self._masks, []) for pair in pairs[: mine.start] + pairs[mine.stop :]]
        counted = [*zip(pairs[mine], own, strict=True), *others]
        batch = PairBatch(
            clips=clips,
            targets=stack_targets(pairs[mine], own),
            counts=Counts.of(stack_targets([pair for pair, _ in counted], [targets for _, targets in counted])),
            strategies=tuple(pair.strategy for pair in pairs[mine]),
        )
        rows = {clip.row for pair in pairs[mine] for clip in (pair.first, pair.second)}
        return Loaded(batch, len(rows) + len(replaced), tuple(replaced))

    def _read(self, pairs: Sequence[Pair], step: int) -> tuple[ClipBatch, list[PairTargets]]:
        """Frames and targets of these pairs."""
        return self._clips(pairs, step), [self._targets(pair) for pair in pairs]

    def _masks(self, pair: Pair) -> PairTargets:
        return self._targets(pair, masks_only=True)

    def _readable(self, pair: Pair, read: Callable[[Pair], _T], replaced: list[Unreadable]) -> tuple[Pair, _T]:
        """The pair, or the first of its substitutes that can be read, with what is read; what cannot be is listed.

        Raises:
            UserError: substitute after substitute can not be read.
        """
        for _ in range(ATTEMPTS):
            try:
                return pair, read(pair)
            except (CorruptPayload, NoView) as error:
                replaced.append(Unreadable(error.trajectory, error.what))
                last = error
                pair = self.sampler.pair(pair.index, pair.attempt + 1)
        raise UserError(
            f"{ATTEMPTS} pairs in a row could not be read: {last}; `rbm corpus check {self.corpus.location}` names "
            "all that is damaged"
        )

    def _targets(self, pair: Pair, masks_only: bool = False) -> PairTargets:
        timestamps = self.corpus.timestamps if self.remaining else None
        first, second = (
            self.sampler.maker.targets(clip, self.corpus.progress, masks_only, timestamps)
            for clip in (pair.first, pair.second)
        )
        if not self.supervise_both:
            nothing = np.zeros(len(pair.second.frames), bool)
            second = replace(
                second,
                progress_mask=nothing,
                success_mask=nothing,
                remaining_mask=None if second.remaining_mask is None else nothing,
            )
        return first, second

    def _clips(self, pairs: Sequence[Pair], step: int) -> ClipBatch:
        clips = [(clip, pair.task) for pair in pairs for clip in (pair.first, pair.second)]
        wanted: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
        for clip, _ in clips:
            wanted[clip.row].append(clip.frames)
        pool = FramePool()
        place: dict[int, tuple[list[int], NDArray[np.int64]]] = {}
        for row, shown in wanted.items():
            distinct = np.unique(np.concatenate(shown))
            starts = []
            for view, frames in enumerate(self._pictures(row, distinct)):
                if frames is None:
                    starts.append(ABSENT)
                    continue
                if self.augment is not None:  # at the model's size, where it costs least
                    key = (self.sampler.seed, step, row, view)[: 4 if view else 3]
                    frames = torch.from_numpy(self.augment(frames.numpy(), key))
                starts.append(pool.add((row, view), frames))
            place[row] = (starts, distinct)
        ids = [frame_columns(*place[clip.row], clip.frames) for clip, _ in clips]
        groups, renumber = pool.groups()
        return ClipBatch(
            frames=groups,
            frame_ids=renumber(torch.from_numpy(np.concatenate(ids))),
            lengths=torch.tensor([len(clip.frames) for clip, _ in clips]),
            tasks=tuple(task for _, task in clips),
        )

    def _pictures(self, row: int, frames: NDArray[np.integer]) -> list[torch.Tensor | None]:
        if self.features is not None:
            return self.features.views_of(self.corpus, row, frames, self.views)
        return pixels(self.corpus, row, frames, self.views, self.preprocess, self.min_side)


def pixels(
    corpus: Corpus,
    row: int,
    frames: NDArray[np.integer],
    views: tuple[str, ...],
    preprocess: Preprocessor,
    min_side: int | None = None,
) -> list[torch.Tensor | None]:
    """`read_views`, preprocessed: of each view uint8 (n, h, w, 3), none for one that is absent."""
    shots = read_views(corpus, row, frames, views, min_side)
    return [None if shot is None else preprocess(shot) for shot in shots]


def frame_columns(starts: Sequence[int], distinct: NDArray[np.int64], shown: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers in the pool of the frames `shown` (n,), of each view, int64 (n, V), -1 for one that is absent.

    The frames of a view that were put in are the `distinct` ones, from number `starts[view]` on.
    """
    place = np.searchsorted(distinct, shown)
    return np.stack([np.full_like(place, ABSENT) if start == ABSENT else start + place for start in starts], axis=1)


def stack_targets(pairs: Sequence[Pair], targets: Sequence[PairTargets]) -> Targets:
    """Targets of pairs, flat in the order of their clips."""
    flat = [clip for both in targets for clip in both]
    seconds = [clip.remaining for clip in flat if clip.remaining is not None]
    timed = [clip.remaining_mask for clip in flat if clip.remaining_mask is not None]
    return Targets(
        progress=torch.from_numpy(np.concatenate([clip.progress for clip in flat])),
        progress_mask=torch.from_numpy(np.concatenate([clip.progress_mask for clip in flat])),
        success=torch.from_numpy(np.concatenate([clip.success for clip in flat])),
        success_mask=torch.from_numpy(np.concatenate([clip.success_mask for clip in flat])),
        preference=torch.tensor([pair.preference or 0.0 for pair in pairs]),
        preference_mask=torch.tensor([pair.preference is not None for pair in pairs]),
        remaining=torch.from_numpy(np.concatenate(seconds)) if seconds else None,
        remaining_mask=torch.from_numpy(np.concatenate(timed)) if timed else None,
    )


class Onward(Sampler[Order]):
    """Orders for step `start`, start + 1, ... without end (or until `stop`): a run stops by its number of steps, and
    resumes where it stopped."""

    def __init__(self, planner: Planner, share: Share, start: int = 0, stop: int | None = None) -> None:
        self.planner, self.share, self.start, self.stop = planner, share, start, stop

    def __iter__(self) -> Iterator[Order]:
        step, size = self.start, self.share.pairs_per_step
        while self.stop is None or step < self.stop:
            plan = self.planner.plan(step * size, size)
            for part in range(self.share.micro):
                yield Order(step, part, plan)
            step += 1


def _quiet_worker(_: int) -> None:
    """Ctrl-C is for the main process, which stops its workers itself; and a worker uses one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


class PairDataModule(L.LightningDataModule):
    """Training and validation pairs of a corpus.

    What can not be decoded is replaced by other pairs, named in a warning once, counted (`data/replaced` in the logs,
    and in the checkpoint), and ends the run where it is more than a share. Each process counts what it reads; the
    checkpoint has the counts of rank 0.

    Args:
        model: tells context length, preprocessing, pair layout and kind of target.
        corpus: folder or URL of the corpus; none for the selection's, or without one the bundled one.
        snapshot: of the corpus, an id or a tag; none for the newest (or the selection's).
        selection: file of a saved selection (`rbm corpus select`): only its trajectories are used; none for all.
        heldout_tasks, heldout_scenes, heldout_per_quality, validation_per_quality, split_seed: the split
            (`rbm.corpus.split`).
        pairs_per_step: B, pairs of an optimiser step over all micro-batches and ranks.
        micro_batches: gradient accumulation: into how many parts a step is cut.
        weights: strategy -> relative weight.
        source_weights, source_temperature, task_weights, task_temperature: which trajectories are drawn more often
            (`rbm.sampling.Balance`); by default all alike.
        clips: options of `rbm.sampling.ClipOptions`, less context_frames, which the model says.
        use_dense: supervise progress by dense labels where a trajectory has them.
        paraphrases: draw among all wordings of an instruction.
        completion: source -> cut-off c of its successes without an exactly known completion, instead of the corpus's.
        supervise_both: progress, success and remaining time of both clips of a pair; none for what the layout has:
            both where they are isolated, the first where the second sees it.
        augment: change of pixels in training, shift and light (`Augmentation`); none for none.
        decode_short_side: decode frames at a reduced size, where that is cheaper, with a short side of at least so
            many pixels; none for the stored size.
        features: folder of `rbm cache-features`: features stand for the frames, and the tower, which must be frozen,
            never runs; none for none.
        max_bad_share: stop when more than this share of the trajectories read could not be decoded.
        validation_pairs: fixed pairs on which the validation losses are computed; 0 for none.
        workers: loader processes; 0 reads in the main process.
        prefetch: micro-batches that each of them has ready; they lie in shared memory.
        start_method: how they start: `spawn`, `forkserver`, or `fork` (not with a corpus on object storage).
        seed: of the draws.

    Raises:
        UserError: a corpus that is not there, a split that leaves nothing to train on, impossible numbers.
    """

    def __init__(
        self,
        model: RewardModel,
        corpus: str | None = None,
        snapshot: str | None = None,
        selection: str | None = None,
        heldout_tasks: Sequence[str] = (),
        heldout_scenes: Sequence[str] = (),
        heldout_per_quality: float = 0.1,
        validation_per_quality: float = 0.05,
        split_seed: int = 0,
        pairs_per_step: int = 12,
        micro_batches: int = 1,
        weights: Mapping[str, float] | None = None,
        source_weights: Mapping[str, float] | None = None,
        source_temperature: float = 1.0,
        task_weights: Mapping[str, float] | None = None,
        task_temperature: float = 1.0,
        clips: Mapping[str, Any] | None = None,
        use_dense: bool = True,
        paraphrases: bool = True,
        completion: Mapping[str, float] | None = None,
        supervise_both: bool | None = None,
        augment: Mapping[str, float] | None = None,
        decode_short_side: int | None = None,
        features: str | None = None,
        max_bad_share: float = 0.01,
        validation_pairs: int = 64,
        workers: int = 1,
        prefetch: int = 6,
        start_method: str = "spawn",
        seed: int = 0,
    ) -> None:
        super().__init__()
        Share(pairs_per_step, micro_batches)  # refused now rather than after the workers have started
        if start_method not in START_METHODS:
            raise UserError(f"data.start_method={start_method}: choose {', '.join(START_METHODS)}")
        if not 0 <= max_bad_share <= 1:
            raise UserError(f"data.max_bad_share={max_bad_share}: it is a share, between 0 and 1")
        if decode_short_side is not None and decode_short_side < 1:
            raise UserError(f"data.decode_short_side={decode_short_side}: give pixels, or null for the stored size")
        self.corpus, rows = open_rows(corpus, snapshot, selection)
        self.split: Split = split_corpus(
            self.corpus, heldout_tasks, heldout_per_quality, validation_per_quality, split_seed, heldout_scenes, rows
        )
        if not len(self.split.train):
            raise UserError(f"corpus {self.corpus.location}: the split leaves nothing to train on")
        self.trajectories = with_completion(self.corpus, completion or {})  # as sampling and calibration see them
        self.views = model.backbone.views
        check_views(self.corpus, self.split.train, self.views)
        if supervise_both and model.pair == "causal":
            raise UserError(
                "data.supervise_both=true: the second clip of a causal pair sees the first, so it scores as no single "
                "clip ever will; set model.pair=isolated"
            )
        self.pairs_per_step, self.micro_batches = pairs_per_step, micro_batches
        self.validation_pairs, self.workers, self.seed = validation_pairs, workers, seed
        self.start_method, self.max_bad_share, self.prefetch = start_method, max_bad_share, prefetch
        self.read = self.replaced = 0
        self._warned: set[str] = set()
        self._sampler_options: dict[str, Any] = {
            "weights": weights,
            "balance": Balance(self.corpus, source_weights, source_temperature, task_weights, task_temperature),
            "options": ClipOptions(context_frames=model.context_frames, **(clips or {})),
            "use_dense": use_dense,
            "relative": model.target == "clip_relative",
            "paraphrases": paraphrases,
        }
        self._preprocess = model.backbone.preprocessor
        self._augment = Augmentation(**augment) if augment else None
        self._supervise_both = model.pair == "isolated" if supervise_both is None else supervise_both
        self._remaining = model.remaining
        self._min_side = decode_short_side
        self._model = model
        self._features: FeatureCache | None = None
        if features is not None:
            options = [] if selection is None else ["--selection", selection]
            options += [] if snapshot is None else ["--snapshot", snapshot]
            self._features = self._open_features(features, options)
        self.sampler = self._sampler(self.split.train, seed)  # now, so that what is wrong is said before training

    def _open_features(self, folder: str, options: Sequence[str]) -> FeatureCache:
        for name, value in (("augment", self._augment), ("decode_short_side", self._min_side)):
            if value is not None:
                raise UserError(f"data.{name} changes pixels, and data.features stands for them: set one to null")
        cache = FeatureCache.open(folder, self._model)
        cache.check_rows(self.corpus, np.union1d(self.split.train, self.split.validation), self.views, options)
        return cache

    def check_frozen(self) -> None:
        """Raises UserError: there are features, and the tower that made them is to be trained."""
        tower = self._model.backbone.tower
        if self._features is not None and any(weight.requires_grad for weight in tower.parameters()):
            raise UserError(
                "data.features are those of a vision tower that stays as it is, and this run trains it: set "
                "optimization.tuning.vision=none, or data.features=null"
            )

    def pictures(self, row: int, frames: NDArray[np.integer]) -> list[torch.Tensor | None]:
        """Frames of each view as scoring sees them, uint8 (n, h, w, 3), or their features; none for an absent one.

        Raises:
            CorruptPayload: they can not be decoded. NoView: the trajectory has none of the views.
        """
        if self._features is not None:
            return self._features.views_of(self.corpus, row, frames, self.views)
        return pixels(self.corpus, row, frames, self.views, self._preprocess)

    @property
    def tasks(self) -> list[str]:
        """Instructions of the tasks that are trained on."""
        used = np.unique(self.corpus.columns.task[self.split.train])
        return [self.corpus.tasks[task].text for task in used]

    @property
    def fingerprint(self) -> str:
        """Of the rows that are trained on: a resumed run must find the same."""
        return blake2b(self.split.train.astype("<i8").tobytes(), digest_size=16).hexdigest()

    def _sampler(self, rows: NDArray[np.int64], seed: int) -> PairSampler:
        return PairSampler(self.trajectories, seed, rows, **self._sampler_options)

    def train_dataloader(self) -> DataLoader[Loaded | Refused]:
        self.check_frozen()
        trainer = self.trainer
        rank, world, step = (trainer.global_rank, trainer.world_size, trainer.global_step) if trainer else (0, 1, 0)
        share = Share(self.pairs_per_step, self.micro_batches, rank, world)
        dataset = self.dataset(self.sampler, share, self._augment)
        return self.loader(dataset, Onward(self.sampler.planner, share, step), self.workers)

    def val_dataloader(self) -> DataLoader[Loaded | Refused] | list[Any]:
        if not self.validation_pairs or not len(self.split.validation):
            return []
        try:
            sampler = self._sampler(self.split.validation, self.seed + VALIDATION_SEED)
        except UserError:  # too few trajectories to make a pair of: train without validation losses
            return []
        share = Share(min(self.validation_pairs, 16))
        orders = Onward(sampler.planner, share, 0, self.validation_pairs // share.pairs)
        return self.loader(self.dataset(sampler, share), orders, 0)

    def dataset(self, sampler: PairSampler, share: Share, augment: Augmentation | None = None) -> PairDataset:
        """What loader processes get."""
        return PairDataset(
            self.corpus, sampler, self._preprocess, share, self._supervise_both, augment, self._min_side, self.views,
            self._remaining, self._features,
        )  # fmt: skip

    def loader(self, dataset: PairDataset, orders: Onward, workers: int) -> DataLoader[Loaded | Refused]:
        """Micro-batches in the order of `orders`, made by so many processes (0: by this one)."""
        more: dict[str, Any] = (
            {"multiprocessing_context": self.start_method, "prefetch_factor": self.prefetch, "persistent_workers": True}
            if workers
            else {}
        )
        return DataLoader(
            dataset, batch_size=None, sampler=orders, num_workers=workers, worker_init_fn=_quiet_worker, **more
        )

    def transfer_batch_to_device(self, batch: Loaded | Refused, device: torch.device, dataloader_idx: int) -> PairBatch:
        """Takes a batch out of its envelope.

        Raises:
            UserError: one that arose in a loader process; or too much of the corpus can not be decoded.
        """
        with together():  # what one process cannot read ends all of them
            self._judge(batch)
        assert isinstance(batch, Loaded)
        return batch.batch.to(device)

    def _judge(self, batch: Loaded | Refused) -> None:
        if isinstance(batch, Refused):
            raise UserError(batch.message)
        for trajectory, what in batch.replaced:
            if trajectory not in self._warned:
                self._warned.add(trajectory)
                log.warning("trajectory %r can not be decoded (%s): other pairs take its place", trajectory, what)
        if self.trainer is not None and self.trainer.training:
            self._count(batch)

    def _count(self, batch: Loaded) -> None:
        self.read += batch.read
        self.replaced += len(batch.replaced)
        if self.read >= READ_BEFORE_JUDGING and self.replaced > self.max_bad_share * self.read:
            raise UserError(
                f"{self.replaced} of {self.read} trajectories read could not be decoded, more than "
                f"data.max_bad_share={self.max_bad_share} allows ({', '.join(sorted(self._warned)[:3])}, ...): "
                f"`rbm corpus check {self.corpus.location}` names them all"
            )

    def state_dict(self) -> dict[str, int]:
        """What a resumed run goes on counting from."""
        return {"read": self.read, "replaced": self.replaced}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.read, self.replaced = state_dict["read"], state_dict["replaced"]
