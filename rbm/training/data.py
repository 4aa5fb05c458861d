"""From corpus and sampler to batches: what a loader worker does.

1. Optimiser step k owns the samples k B .. k B + B - 1, B pairs; they depend on the seed alone.
2. Micro-batch m of that step, on rank r, takes its share of them; ranks and workers only partition indices.
3. Targets of all B pairs give the counts over which the losses are means; frames are read for the share only.
4. Frames of one trajectory that several clips of a micro-batch show are decoded and sent once.
"""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rbm.assets import bundled_corpus
from rbm.corpus import Corpus
from rbm.corpus.split import Split, split_corpus
from rbm.errors import UserError
from rbm.model import ClipBatch, Counts, PairBatch, RewardModel, Targets
from rbm.model.backbones.base import Preprocessor
from rbm.sampling import ClipOptions, ClipTargets, Pair, Table
from rbm.sampling import Sampler as PairSampler
from rbm.training.augment import Augmentation

VALIDATION_SEED = 1_000_003
"""Added to the seed for the fixed validation pairs, so that they are not the first training pairs."""


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
class Refused:
    """A user's error in a loader process, on its way to the main one: as an exception it would lose its type."""

    message: str


class PairDataset(Dataset[PairBatch | Refused]):
    """Item i is micro-batch i: step i // micro, part i % micro. Any i is as good as any other: there is no epoch."""

    def __init__(
        self,
        corpus: Corpus,
        sampler: PairSampler,
        preprocess: Preprocessor,
        share: Share,
        supervise_both: bool,
        augment: Augmentation | None = None,
    ) -> None:
        self.corpus, self.sampler, self.preprocess = corpus, sampler, preprocess
        self.share, self.supervise_both, self.augment = share, supervise_both, augment

    def __getitem__(self, index: int) -> PairBatch | Refused:
        try:
            return self._batch(index)
        except UserError as error:
            return Refused(str(error))

    def _batch(self, index: int) -> PairBatch:
        step, part = divmod(index, self.share.micro)
        first = step * self.share.pairs_per_step
        pairs = [self.sampler.pair(n) for n in range(first, first + self.share.pairs_per_step)]
        targets = [self._targets(pair) for pair in pairs]
        counts = Counts.of(stack_targets(pairs, targets))
        begin = (part * self.share.world + self.share.rank) * self.share.pairs
        mine = slice(begin, begin + self.share.pairs)
        return PairBatch(
            clips=self._clips(pairs[mine], step),
            targets=stack_targets(pairs[mine], targets[mine]),
            counts=counts,
            strategies=tuple(pair.strategy for pair in pairs[mine]),
        )

    def _targets(self, pair: Pair) -> tuple[ClipTargets, ClipTargets]:
        first = self.sampler.targets(pair.first, self.corpus.progress)
        second = self.sampler.targets(pair.second, self.corpus.progress)
        if not self.supervise_both:
            nothing = np.zeros(len(pair.second.frames), bool)
            second = ClipTargets(second.progress, nothing, second.success, nothing)
        return first, second

    def _clips(self, pairs: Sequence[Pair], step: int) -> ClipBatch:
        clips = [(clip, pair.task) for pair in pairs for clip in (pair.first, pair.second)]
        wanted: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
        for clip, _ in clips:
            wanted[clip.number].append(clip.frames)
        stored: list[Tensor] = []
        place: dict[int, tuple[int, NDArray[np.int64]]] = {}
        total = 0
        for number, shown in wanted.items():
            distinct = np.unique(np.concatenate(shown))
            frames = self.preprocess(self.corpus.frames(number, distinct))
            if self.augment is not None:  # at the model's size, where it costs least
                frames = torch.from_numpy(self.augment(frames.numpy(), (self.sampler.seed, step, number)))
            stored.append(frames)
            place[number] = (total, distinct)
            total += len(distinct)
        ids = [place[clip.number][0] + np.searchsorted(place[clip.number][1], clip.frames) for clip, _ in clips]
        sizes = {tuple(frames.shape[1:]) for frames in stored}
        if len(sizes) > 1:
            raise UserError(f"the model's frames must have one size in a batch, got {sorted(sizes)}")
        return ClipBatch(
            frames=torch.cat(stored),
            frame_ids=torch.from_numpy(np.concatenate(ids)),
            lengths=torch.tensor([len(clip.frames) for clip, _ in clips]),
            tasks=tuple(task for _, task in clips),
        )


def stack_targets(pairs: Sequence[Pair], targets: Sequence[tuple[ClipTargets, ClipTargets]]) -> Targets:
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


class Onward(Sampler[int]):
    """start, start + 1, ... without end: a run stops by its number of steps, and resumes where it stopped."""

    def __init__(self, start: int, stop: int | None = None) -> None:
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        index = self.start
        while self.stop is None or index < self.stop:
            yield index
            index += 1


def _quiet_worker(_: int) -> None:
    """Ctrl-C is for the main process, which stops its workers itself; and a worker uses one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


class PairDataModule(L.LightningDataModule):
    """Training and validation pairs of a corpus.

    Args:
        model: tells context length, preprocessing, pair layout and kind of target.
        corpus: folder of the corpus; none for the bundled one.
        snapshot: of the corpus; none for the newest.
        heldout_tasks, heldout_per_quality, validation_per_quality, split_seed: the split (`rbm.corpus.split`).
        pairs_per_step: B, pairs of an optimiser step over all micro-batches and ranks.
        micro_batches: gradient accumulation: into how many parts a step is cut.
        weights: strategy -> relative weight.
        clips: options of `rbm.sampling.ClipOptions`, less context_frames, which the model says.
        use_dense: supervise progress by dense labels where a trajectory has them.
        paraphrases: draw among all wordings of an instruction.
        augment: change of pixels in training, shift and light (`Augmentation`); none for none.
        validation_pairs: fixed pairs on which the validation losses are computed; 0 for none.
        workers: loader processes; 0 reads in the main process.
        seed: of the draws.

    Raises:
        UserError: a corpus that is not there, a split that leaves nothing to train on, impossible numbers.
    """

    def __init__(
        self,
        model: RewardModel,
        corpus: str | None = None,
        snapshot: str | None = None,
        heldout_tasks: Sequence[str] = (),
        heldout_per_quality: float = 0.1,
        validation_per_quality: float = 0.05,
        split_seed: int = 0,
        pairs_per_step: int = 12,
        micro_batches: int = 1,
        weights: Mapping[str, float] | None = None,
        clips: Mapping[str, Any] | None = None,
        use_dense: bool = True,
        paraphrases: bool = True,
        augment: Mapping[str, float] | None = None,
        validation_pairs: int = 64,
        workers: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        Share(pairs_per_step, micro_batches)  # refused now rather than after the workers have started
        self.corpus = Corpus.open(corpus or bundled_corpus(), snapshot)
        self.split: Split = split_corpus(
            self.corpus, heldout_tasks, heldout_per_quality, validation_per_quality, split_seed
        )
        if not len(self.split.train):
            raise UserError(f"corpus {self.corpus.path}: the split leaves nothing to train on")
        self.pairs_per_step, self.micro_batches = pairs_per_step, micro_batches
        self.validation_pairs, self.workers, self.seed = validation_pairs, workers, seed
        self._sampler_options = {
            "weights": weights,
            "options": ClipOptions(context_frames=model.context_frames, **(clips or {})),
            "use_dense": use_dense,
            "relative": model.target == "clip_relative",
            "paraphrases": paraphrases,
        }
        self._preprocess = model.backbone.preprocessor
        self._augment = Augmentation(**augment) if augment else None
        self._supervise_both = model.pair == "isolated"
        self.sampler = self._sampler(self.split.train, seed)  # now, so that what is wrong is said before training

    @property
    def tasks(self) -> list[str]:
        """Instructions of the tasks that are trained on."""
        used = np.unique(self.corpus.columns.task[self.split.train])
        return [self.corpus.tasks[task].text for task in used]

    def _sampler(self, numbers: NDArray[np.int64], seed: int) -> PairSampler:
        table = Table.of(self.corpus.columns, self.corpus.tasks, numbers)
        return PairSampler(table, seed, **self._sampler_options)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[PairBatch | Refused]:
        trainer = self.trainer
        rank, world, step = (trainer.global_rank, trainer.world_size, trainer.global_step) if trainer else (0, 1, 0)
        share = Share(self.pairs_per_step, self.micro_batches, rank, world)
        dataset = PairDataset(self.corpus, self.sampler, self._preprocess, share, self._supervise_both, self._augment)
        return self._loader(dataset, Onward(step * self.micro_batches), self.workers)

    def val_dataloader(self) -> DataLoader[PairBatch | Refused] | list[Any]:
        if not self.validation_pairs or not len(self.split.validation):
            return []
        try:
            sampler = self._sampler(self.split.validation, self.seed + VALIDATION_SEED)
        except UserError:  # too few trajectories to make a pair of: train without validation losses
            return []
        batch = min(self.validation_pairs, 16)
        dataset = PairDataset(self.corpus, sampler, self._preprocess, Share(batch), self._supervise_both)
        return self._loader(dataset, Onward(0, self.validation_pairs // batch), 0)

    def _loader(self, dataset: PairDataset, order: Onward, workers: int) -> DataLoader[PairBatch | Refused]:
        # spawn: Icechunk's threads do not survive a fork
        more: dict[str, Any] = (
            {"multiprocessing_context": "spawn", "prefetch_factor": 6, "persistent_workers": True} if workers else {}
        )
        return DataLoader(
            dataset, batch_size=None, sampler=order, num_workers=workers, worker_init_fn=_quiet_worker, **more
        )

    def transfer_batch_to_device(
        self, batch: PairBatch | Refused, device: torch.device, dataloader_idx: int
    ) -> PairBatch:
        if isinstance(batch, Refused):
            raise UserError(batch.message)
        return batch.to(device)
