"""Several processes of one run: how they start, share the weights, agree on what happens next, and end together.

- `ddp`: every process has the whole model; gradients are averaged. `fsdp`: every process holds a share of weights,
  gradients and optimiser state (FSDP2), and a block's weights are put together while it computes.
- Losses are shares of one sum and Lightning's averages are undone in `RewardModule`, so both compute what one process
  would.
- What one process alone finds out (a signal, a pair that cannot be read, a full disk) all of them learn at the same
  place, so that none waits for another that has left.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from rbm.errors import UserError
from rbm.model import RewardModel
from rbm.model.lightning_file import REST, ShardReader, cause

STRATEGIES = ("auto", "ddp", "fsdp")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true")

PATIENCE = timedelta(days=2)
"""How long processes wait for the first one, which finishes the run alone."""

LEAVE = 30.0
"""Seconds that the others have to end when the first one has ended."""


class Elsewhere(UserError):
    """Another process has failed, and has said why."""


# what processes tell each other


@cache
def _group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group that talks over the network, whatever the weights go over: no device has to wait for it."""
    found = dist.new_group(backend="gloo")
    assert isinstance(found, dist.ProcessGroup)
    return found


def _control() -> dist.ProcessGroup | None:
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    world = dist.group.WORLD
    assert world is not None
    return _group(world)


def summed(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over all processes of values that all have, float64."""
    group = _control()
    if group is None:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return dict(zip(values, total.tolist(), strict=True))


def anywhere(flag: bool) -> bool:
    """Whether it is so in any process."""
    return summed({"": float(flag)})[""] > 0


@contextmanager
def together(patience: timedelta | None = None) -> Iterator[None]:
    """All processes leave this block at the same time; where one fails, all fail, and that one says why.

    Args:
        patience: how long they wait for each other; none for the usual half hour.

    Raises:
        Elsewhere: in the processes that did not fail (or not first), when one did.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    group = _control()
    if group is None:
        if failure is not None:
            raise failure
        return
    if patience is not None:
        dist.monitored_barrier(group, timeout=patience)
    if not anywhere(failure is not None):
        return
    said: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, None if failure is None else f"{type(failure).__name__}: {failure}", group=group)
    first = next(rank for rank, words in enumerate(said) if words is not None)
    if failure is not None and dist.get_rank() == first:
        raise failure
    raise Elsewhere(f"process {first} has failed: {said[first]}") from failure


def leave() -> None:
    """End the talk of the processes; without it one whose threads still wait for others can abort as it exits."""
    if dist.is_available() and dist.is_initialized():
        _group.cache_clear()
        dist.destroy_process_group()


# how they start


def processes(accelerator: str, devices: Any) -> int:
    """How many processes a node gets, by `trainer.devices`: a number, a list of devices, or `auto` for all GPUs."""
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, int) and devices > 0:
        return devices
    if isinstance(devices, list):
        return len(devices)
    return max(1, torch.cuda.device_count()) if accelerator in ("auto", "gpu", "cuda") else 1


def placement(options: dict[str, Any]) -> dict[str, Any]:
    """Options for Lightning's Trainer out of strategy, devices, num_nodes, accelerator and precision of the run's.

    Raises:
        UserError: a strategy or precision that does not exist, or more processes than were asked for.
    """
    name, precision = options["strategy"], options["precision"]
    if name not in STRATEGIES:
        raise UserError(f"trainer.strategy={name}: choose {', '.join(STRATEGIES)}")
    if precision not in PRECISIONS:
        raise UserError(f"trainer.precision={precision}: choose {', '.join(PRECISIONS)}")
    devices, nodes = options["devices"], options["num_nodes"]
    wanted = processes(options["accelerator"], devices) * nodes
    for there, started, by in (
        (TorchElasticEnvironment.detect(), "WORLD_SIZE", "torchrun"),
        (SLURMEnvironment.detect(), "SLURM_NTASKS", "SLURM"),
    ):
        if there and int(os.environ.get(started, "1")) != wanted:
            raise UserError(
                f"{by} has started {os.environ[started]} processes, but trainer.devices={devices} on "
                f"trainer.num_nodes={nodes} makes {wanted}: say in both the same"
            )
    if precision == "auto":
        bf16 = options["accelerator"] != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16-mixed" if bf16 else "32-true"
    plugins: list[Any] = []
    if precision == "bf16-true":
        plugins.append(BriefPrecision())
        precision = None
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # SIGTERM and the next start of the job do it here
    strategy: str | Strategy = "auto"
    if name == "fsdp":
        strategy = Sharded(data_parallel_size=wanted, tensor_parallel_size=1)
    elif name == "ddp" or wanted > 1:
        strategy = Replicated(gradient_as_bucket_view=True, broadcast_buffers=False)
    # weights that were gathered in inference mode could not be trained on
    return {"strategy": strategy, "precision": precision, "plugins": plugins or None, "inference_mode": name != "fsdp"}


class BriefPrecision(Precision):
    """`bf16-true`: parameters, and with them gradients and optimiser state, in bfloat16.

    Buffers keep their precision: angles of rotary positions in bfloat16 would be wrong by radians. So do the targets.
    """

    precision = "bf16-true"

    def convert_module(self, module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.dtype != torch.bfloat16:
                parameter.data = parameter.data.to(torch.bfloat16)
        return module


class Replicated(DDPStrategy):
    """DDP; a checkpoint that cannot be written ends all processes."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        with together():
            super().save_checkpoint(checkpoint, filepath, storage_options)


class Sharded(ModelParallelStrategy):
    """FSDP2. A checkpoint is a folder, each process writes its share; it appears whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        part = path.with_name(f"{path.name}.part")
        with together():
            if self.is_global_zero and part.exists():
                shutil.rmtree(part)
        with together():
            try:
                super().save_checkpoint(checkpoint, part, storage_options)
            except (CheckpointException, RuntimeError) as error:  # a stream that cannot be written is a RuntimeError
                reason = cause(error)
                raise reason if isinstance(reason, OSError) else OSError(str(reason)) from error
        with together():
            if self.is_global_zero:
                old = before(path)
                if path.exists():
                    shutil.rmtree(old, ignore_errors=True)
                    os.replace(path, old)
                os.replace(part, path)
                shutil.rmtree(old, ignore_errors=True)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        model = self.model
        assert model is not None
        state: dict[str, Any] = {"state_dict": get_model_state_dict(model)}
        for index, optimizer in enumerate(self.optimizers):
            state[f"optimizer_{index}"] = get_optimizer_state_dict(model, optimizer)
        load(state, storage_reader=ShardReader(path), planner=_PlainValues())
        set_model_state_dict(model, state["state_dict"])
        for index, optimizer in enumerate(self.optimizers):
            set_optimizer_state_dict(model, optimizer, state[f"optimizer_{index}"])
        rest: dict[str, Any] = torch.load(path / REST, map_location="cpu", weights_only=True)
        return rest


class _PlainValues(DefaultLoadPlanner):
    """Takes numbers and names beside the tensors (learning rates), and no other objects."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        torch.load(value, weights_only=True)  # raises for anything that would run code
        value.seek(0)
        super().load_bytes(read_item, value)


def before(path: Path) -> Path:
    """Where the checkpoint `path` lies for the moment in which a newer one takes its place."""
    return path.with_name(f"{path.name}.old")


def latest(path: Path) -> Path | None:
    """The checkpoint `path`; or, where a run was killed in the moment of replacing it, the one before; or none."""
    return next((found for found in (path, before(path)) if found.exists()), None)


@contextmanager
def company(trainer: L.Trainer) -> Iterator[None]:
    """No process that this one has started outlives the block; what waits for a lost one is killed."""
    try:
        yield
    finally:
        for process in getattr(trainer.strategy.launcher, "procs", []):
            try:
                process.wait(timeout=LEAVE)
            except subprocess.TimeoutExpired:
                process.kill()


# how they share a model


def outline(model: RewardModel) -> RewardModel:
    """A copy without memory for its parameters: what a whole model is put together in."""
    empty: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty)


def shard(model: RewardModel, mesh: DeviceMesh, precision: Precision) -> None:
    """Share the parameters out over the processes, in place: block by block, then the heads, then the rest.

    With `bf16-mixed` weights travel and compute in bfloat16; shares, gradients and their sums are float32.

    Raises:
        UserError: trained weights of several precisions.
    """
    precision.convert_module(model)
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if len(trained) > 1:
        raise UserError(
            f"trainer.strategy=fsdp needs all trained weights in one precision, here they are in "
            f"{', '.join(sorted(map(str, trained)))}: set trainer.precision=bf16-true, or start from float32 weights"
        )
    policy = MixedPrecisionPolicy()
    if isinstance(precision, MixedPrecision):
        # autocast brings the inputs of each operation to the right precision
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # A part that not every process runs equally often (the tower: once for each size of frames; sentences that are
    # known already) goes with the rest, which is gathered once a step: else one process waits for weights for ever.
    parts = [model.backbone.tower, *(getattr(model.backbone, name) for name in model.backbone.never_trained)]
    apart = {id(module) for part in parts for module in part.modules()}
    found = [module for module in model.backbone.modules() if id(module) not in apart]
    lists = [module for module in found if isinstance(module, nn.ModuleList)]
    blocks = [block for blocks in reversed(lists) for block in blocks]
    heads = [module for module in model.children() if module is not model.backbone]
    for module in [*blocks, *heads, model]:
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh["data_parallel"], mp_policy=policy)


def whole(sharded: RewardModel, empty: RewardModel) -> RewardModel | None:
    """The model with all its weights, on the CPU of the first process; none in the others. All must call it.

    Args:
        empty: `outline` of the model, which is filled.
    """
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank():
        return None
    empty.load_state_dict(state, assign=True)
    return empty


def first_process(trainer: L.Trainer | None = None) -> bool:
    """Whether this process speaks for the run."""
    if trainer is not None:
        return trainer.is_global_zero
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0")))) == 0
