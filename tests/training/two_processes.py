"""What one of two processes does in `test_distributed.py`: `torchrun --nproc-per-node 2 two_processes.py PLAN`.

PLAN is a JSON file, a list of jobs that are done one after the other in one process group:

    {"do": "gradients", "model": "nano", "out": FILE}    a step's clipped gradient under FSDP, put together
    {"do": "train", "model": "nano", "config": [KEY=VALUE, …], "stop": false, "limit": null}
    {"do": "fail", "out": FOLDER}                        the second process fails, and the first learns of it

With `stop` the second process, and only that one, gets a SIGTERM once there is a checkpoint. `limit` is the most bytes
that a file can have, as if the disk were full. How a job ended for each process stands in `ended-RANK.txt`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_vlm
import torch
from lightning.pytorch.plugins.precision import Precision
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from rbm.config import compose
from rbm.errors import UserError
from rbm.model import LossWeights, PairBatch, RewardModel, reward_losses
from rbm.model.backbones import NanoBackbone
from rbm.training.data import Onward, PairDataModule, Share
from rbm.training.parallel import before, outline, shard, together, whole
from rbm.training.run import train

RUN = ["data.workers=0", "data.validation_pairs=8", "data.heldout_tasks=[]", "data.heldout_per_quality=1",
       "data.validation_per_quality=1", "data.use_dense=false", "data.pairs_per_step=4", "trainer.accelerator=cpu",
       "data.weights={outcome: 3, rewind: 1, wrong_task: 0, reverse: 0, grade: 0}",
       "trainer.log_every_n_steps=1", "trainer.max_steps=4", "trainer.checkpoint_every=2", "trainer.validate_every=3",
       "trainer.gradient_clip_val=0.5", "optimization.lr=1e-4", "threads=1"]  # fmt: skip
CLIP = 0.5


def tiny(kind: str, seed: int = 0) -> RewardModel:
    """A small model; without dropout unless its kind says so."""
    torch.manual_seed(seed)
    if kind == "nano":
        backbone = NanoBackbone(image_size=32, width=8, hidden=32, layers=2, heads=2, words=64)
        return RewardModel(backbone, context_frames=6, dropout=0.0)
    dropout = 0.1 if kind.endswith("dropout") else 0.0
    return tiny_vlm.qwen3_model(seed, context_frames=4, dropout=dropout).train()


def config_of(kind: str, overrides: list[str]) -> DictConfig:
    config = compose("train", [*RUN, *overrides])
    config.model = OmegaConf.create({"_target_": "two_processes.tiny", "kind": kind, "seed": "${seed}"})
    return config


def first_step(model: RewardModel, corpus: str, rank: int = 0, world: int = 1) -> PairBatch:
    """This rank's share of the first step: the second of two ranks supervises no progress and no success in it."""
    more = {"heldout_per_quality": 1, "validation_per_quality": 1, "weights": {"outcome": 3, "rewind": 1}}
    data = PairDataModule(model, corpus, workers=0, use_dense=False, pairs_per_step=4, **more)
    dataset = data.dataset(data.sampler, Share(4, 1, rank, world))
    (order,) = Onward(data.sampler.planner, dataset.share, 0, 1)
    return dataset[order].batch


def loss_of(model: RewardModel, batch: PairBatch) -> torch.Tensor:
    return reward_losses(model(batch.clips, batch.pairs), batch.targets, batch.counts, LossWeights()).total


def gradients(job: dict[str, Any]) -> None:
    """As `RewardModule` and Lightning do it: the loss times the number of processes, averaged over them; clipped."""
    from torch.distributed.device_mesh import init_device_mesh

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = tiny(job["model"])
    model.backbone.tower.requires_grad_(job["model"] == "nano")
    empty = outline(model)
    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    batch = first_step(model, job["corpus"], rank, world)
    shard(model, mesh, Precision())
    (loss_of(model, batch) * world).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, CLIP).full_tensor()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name] = parameter.grad.full_tensor()
    restored = whole(model, empty)
    if rank == 0:
        start = tiny(job["model"]).state_dict()
        assert all(torch.equal(start[name], tensor) for name, tensor in restored.state_dict().items())
        save_file({"norm": norm, **found}, job["out"])


def run(job: dict[str, Any]) -> None:
    config = config_of(job["model"], job["config"])
    last = Path(config.run_dir) / "checkpoints" / "last.ckpt"
    if job.get("stop") and os.environ["RANK"] == "1":

        def watch() -> None:
            while not last.exists() and not before(last).exists():
                time.sleep(0.002)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=watch, daemon=True).start()
    before_it = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (job.get("limit") or before_it[0], before_it[1]))
    try:
        ended = ending(lambda: train(config))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before_it)
    Path(config.run_dir, f"ended-{os.environ['RANK']}.txt").write_text(ended)


def fail(job: dict[str, Any]) -> None:
    def one_fails() -> None:
        with together():
            if os.environ["RANK"] == "1":
                raise UserError("only here")

    Path(job["out"], f"ended-{os.environ['RANK']}.txt").write_text(ending(one_fails))


def ending(what: Callable[[], object]) -> str:
    try:
        what()
    except (UserError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        {"gradients": gradients, "train": run, "fail": fail}[job["do"]](job)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.modules["two_processes"] = sys.modules["__main__"]
    main()
