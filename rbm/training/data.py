"""From corpus and sampler to batches.

1. Optimiser step k owns the samples k B .. k B + B - 1, B pairs; they depend on the seed alone.
2. The main process has the table of all trajectories and plans: an `Order` says of what trajectories a step's pairs
   are made. A loader process has no table, only the corpus, whose columns are mapped, and makes the pairs.
3. Micro-batch m of a step, on rank r, takes its share of them; ranks and workers only partition indices.
4. Targets of all B pairs give the counts over which the losses are means; frames are read for the share only.
5. Frames of one trajectory that several clips of a micro-batch show are decoded and sent once.
6. A pair of which a trajectory can not be decoded is replaced by its next substitute (drawn by seed, index and
   attempt), so the same data come again with any number of workers and after a resume. Other micro-batches and ranks
   do not know, for they do not read its frames: they count the supervision of the pair as it was planned, so the
   means of that step are off by what the two pairs differ in, at most the share of one pair.
"""

from __future__ import annotations

import logging
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from rbm.sampling import Balance, ClipOptions, ClipTargets, Pair, Plan, Planner
from rbm.sampling import Sampler as PairSampler
from rbm.training.augment import Augmentation

log = logging.getLogger(__name__)

VALIDATION_SEED = 1_000_003
"""Added to the seed for the fixed validation pairs, so that they are not the first training pairs."""

ATTEMPTS = 10
"""So many substitutes in a row that can not be read: something is wrong with more than a few trajectories."""

READ_BEFORE_JUDGING = 200
"""Trajectories that are read before the share of bad ones can stop a run."""

PairTargets = tuple[ClipTargets, ClipTargets]
_T = TypeVar("_T")

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
    ) -> None:
        self.corpus, self.sampler, self.preprocess = corpus, sampler, preprocess
        self.share, self.supervise_both, self.augment, self.min_side = share, supervise_both, augment, min_side

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
        except CorruptPayload:
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
            except CorruptPayload as error:
                replaced.append(Unreadable(error.trajectory, error.what))
                last = error
                pair = self.sampler.pair(pair.index, pair.attempt + 1)
        raise UserError(
            f"{ATTEMPTS} pairs in a row could not be read: {last}; `rbm corpus check {self.corpus.location}` names "
            "all that is damaged"
        )

    def _targets(self, pair: Pair, masks_only: bool = False) -> PairTargets:
        first, second = (
            self.sampler.maker.targets(clip, self.corpus.progress, masks_only) for clip in (pair.first, pair.second)
        )
        if not self.supervise_both:
            nothing = np.zeros(len(pair.second.frames), bool)
            second = ClipTargets(second.progress, nothing, second.success, nothing)
        return first, second

    def _clips(self, pairs: Sequence[Pair], step: int) -> ClipBatch:
        clips = [(clip, pair.task) for pair in pairs for clip in (pair.first, pair.second)]
        wanted: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
        for clip, _ in clips:
            wanted[clip.row].append(clip.frames)
        pool = FramePool()
        place: dict[int, tuple[int, NDArray[np.int64]]] = {}
        for row, shown in wanted.items():
            distinct = np.unique(np.concatenate(shown))
            frames = self.preprocess(self.corpus.frames(row, distinct, min_side=self.min_side))
            if self.augment is not None:  # at the model's size, where it costs least
                frames = torch.from_numpy(self.augment(frames.numpy(), (self.sampler.seed, step, row)))
            place[row] = (pool.add(row, frames), distinct)
        ids = [place[clip.row][0] + np.searchsorted(place[clip.row][1], clip.frames) for clip, _ in clips]
        groups, renumber = pool.groups()
        return ClipBatch(
            frames=groups,
            frame_ids=renumber(torch.from_numpy(np.concatenate(ids)))[:, None],
            lengths=torch.tensor([len(clip.frames) for clip, _ in clips]),
            tasks=tuple(task for _, task in clips),
        )


def stack_targets(pairs: Sequence[Pair], targets: Sequence[PairTargets]) -> Targets:
    """Targets of pairs, flat in the order of their clips."""
    flat = [clip for both in targets for clip in both]
    return Targets(
        progress=torch.from_numpy(np.concatenate([clip.progress for clip in flat])),
        progress_mask=torch.from_numpy(np.concatenate([clip.progress_mask for clip in flat])),
        success=torch.from_numpy(np.concatenate([clip.success for clip in flat])),
        success_mask=torch.from_numpy(np.concatenate([clip.success_mask for clip in flat])),
        preference=torch.tensor([pair.preference or 0.0 for pair in pairs]),
        preference_mask=torch.tensor([pair.preference is not None for pair in pairs]),
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
        augment: change of pixels in training, shift and light (`Augmentation`); none for none.
        decode_short_side: decode frames at a reduced size, where that is cheaper, with a short side of at least so
            many pixels; none for the stored size.
        max_bad_share: stop when more than this share of the trajectories read could not be decoded.
        validation_pairs: fixed pairs on which the validation losses are computed; 0 for none.
        workers: loader processes; 0 reads in the main process.
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
        augment: Mapping[str, float] | None = None,
        decode_short_side: int | None = None,
        max_bad_share: float = 0.01,
        validation_pairs: int = 64,
        workers: int = 1,
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
        self.pairs_per_step, self.micro_batches = pairs_per_step, micro_batches
        self.validation_pairs, self.workers, self.seed = validation_pairs, workers, seed
        self.start_method, self.max_bad_share = start_method, max_bad_share
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
        self._supervise_both = model.pair == "isolated"
        self._min_side = decode_short_side
        self.sampler = self._sampler(self.split.train, seed)  # now, so that what is wrong is said before training

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
        return PairSampler(self.corpus, seed, rows, **self._sampler_options)

    def train_dataloader(self) -> DataLoader[Loaded | Refused]:
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
        return PairDataset(self.corpus, sampler, self._preprocess, share, self._supervise_both, augment, self._min_side)

    def loader(self, dataset: PairDataset, orders: Onward, workers: int) -> DataLoader[Loaded | Refused]:
        """Micro-batches in the order of `orders`, made by so many processes (0: by this one)."""
        more: dict[str, Any] = (
            {"multiprocessing_context": self.start_method, "prefetch_factor": 6, "persistent_workers": True}
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
        if isinstance(batch, Refused):
            raise UserError(batch.message)
        for trajectory, what in batch.replaced:
            if trajectory not in self._warned:
                self._warned.add(trajectory)
                log.warning("trajectory %r can not be decoded (%s): other pairs take its place", trajectory, what)
        if self.trainer is not None and self.trainer.training:
            self._count(batch)
        return batch.batch.to(device)

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
