"""Callbacks: a progress bar that counts optimiser steps, a clean stop on Ctrl-C, what goes into logs and checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rbm.training.data import PairDataModule
from rbm.training.parallel import anywhere

console = Console(stderr=True)


class StepProgress(Callback):
    """A bar over the optimiser steps with the losses beside it; without a terminal a line every tenth of the run."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (trainer.is_global_zero and console.is_terminal),
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, facts="")
        self._last = trainer.global_step
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero or trainer.global_step == self._last:
            return
        self._last = trainer.global_step
        values = trainer.callback_metrics
        names = {"loss": "train/total", "preference": "val/preference_accuracy"}
        facts = "  ".join(f"{short} {float(values[name]):.3f}" for short, name in names.items() if name in values)
        self._bar.update(self._task, completed=self._last, facts=facts)
        if not console.is_terminal and self._last % max(1, trainer.max_steps // 10) == 0:
            seconds = time.monotonic() - self._began
            console.print(f"  step {self._last} of {trainer.max_steps}  {facts}  {seconds:.0f} s")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._bar.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_bar"):
            self._bar.stop()


class StopCleanly(Callback):
    """The first Ctrl-C (or SIGTERM) ends training after the current optimiser step; a checkpoint is written then.

    A second Ctrl-C interrupts at once; the last checkpoint written stays. Of several processes it is enough that one
    gets the signal: all stop at the same step.

    Args:
        path: of that checkpoint.
    """

    SAME = 2.0
    """Seconds in which another signal is the same one again: who starts the processes passes on what all have got."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked = False
        self._speaks = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self._since = now
            self._accept()
        elif number == signal.SIGINT and now - self._since > self.SAME:
            raise KeyboardInterrupt

    def _accept(self) -> None:
        self.asked = True
        if self._speaks:
            console.print("stopping after this step (once more to stop at once)")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._speaks = trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and anywhere(self.asked):
            if not self.asked:
                self._accept()
            trainer.save_checkpoint(self.path, weights_only=False)  # in the midst of it, as the regular ones are
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Facts(Callback):
    """Writes what a checkpoint stands on into it: corpus snapshot, configuration, revision."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["rbm"] = self.facts


class ReplacedPairs(Callback):
    """Logs how many pairs have been replaced since their trajectories could not be decoded: `data/replaced`."""

    def __init__(self, data: PairDataModule) -> None:
        self.data = data

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            pl_module.log("data/replaced", float(self.data.replaced))
