"""One training run, from a configuration to a folder.

    run_dir/
      config.yaml          the configuration, complete
      checkpoints/         last.ckpt (Lightning; what a run resumes from; under FSDP a folder)
      logs/version_*/      metrics.csv and TensorBoard events, a folder for each time it was started
      model/               the finished model: config.json, model.safetensors

The same command again continues an unfinished run at the step at which it stopped. Of several processes each runs all
of this; the first one writes what is not a share of a checkpoint, and speaks.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

import rbm
from rbm.assets import nano_weights
from rbm.config import instantiate, plain
from rbm.errors import UserError
from rbm.model import RewardModel
from rbm.model.adapter import NAME, has_lora, save_trained
from rbm.model.lightning_file import read_rest
from rbm.training.callbacks import Facts, ReplacedPairs, StepProgress, StopCleanly, console
from rbm.training.data import PairDataModule
from rbm.training.fit_success import fit_success
from rbm.training.module import RewardModule
from rbm.training.parallel import PATIENCE, Elsewhere, company, first_process, latest, placement, together

log = logging.getLogger(__name__)

MODEL_FOLDER = "model"

NO_RESULT = {"threads", "data.workers", "data.prefetch", "data.start_method", "data.max_bad_share",
             "trainer.checkpoint_every", "trainer.log_every_n_steps", "trainer.wandb"}  # fmt: skip
"""Keys that change nothing in what is computed: a run may go on with others."""


class Interrupted(UserError):
    """The run was stopped by the user; what it has is saved."""


def train(config: DictConfig) -> Path:
    """Run (or continue) what `conf/train.yaml` describes; the path of the finished model's folder.

    Raises:
        UserError: a run folder of another configuration, a corpus or option that does not fit, a full disk.
        Interrupted: after Ctrl-C, when the checkpoint is written.
        SystemExit: the same in a process that is not the first, or in one that has not failed when another has.
    """
    folder = Path(config.run_dir)
    finished = folder / MODEL_FOLDER
    if config.data.selection is not None and OmegaConf.is_missing(config.data, "corpus"):
        config.data.corpus = None  # the selection says which
    try:
        _check_claim(folder, config)
        if (finished / "config.json").exists():
            if first_process():
                console.print(f"{folder} is finished; its model is {finished}", markup=False)
            return finished
        return _train(config, folder, finished)
    except Elsewhere:
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"no space left on the disk of {folder}: free some, then run the same command again"
            ) from error
        raise UserError(f"cannot write to {folder}: {error}") from error


def _train(config: DictConfig, folder: Path, finished: Path) -> Path:
    _quiet()
    if config.threads:
        torch.set_num_threads(config.threads)
    L.seed_everything(config.seed, verbose=False)
    model = start_model(config)
    data: PairDataModule = instantiate(config.data, model=model)
    module: RewardModule = instantiate(config.optimization, model=model)
    data.check_frozen()
    facts = {
        "version": rbm.__version__,
        "revision": git_revision(),
        "corpus": str(data.corpus.location.name),
        "snapshot": data.corpus.snapshot,
        "rows": data.fingerprint,
        "tasks": data.tasks,
        "config": plain(config),
    }
    base = base_of(config)
    last = folder / "checkpoints" / "last.ckpt"
    trainer = _trainer(config, folder, data, facts | architecture(model, base), StopCleanly(last))
    if config.threads and trainer.world_size > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))  # else Lightning sets a number of its own
    if trainer.is_global_zero:
        _claim(folder, config)  # not before all that could be refused has been made
    resume = latest(last)
    if resume:
        _check_checkpoint(resume, data)
        if trainer.is_global_zero:
            console.print(f"continuing {folder} from its last checkpoint", markup=False)
    with company(trainer):
        try:
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        except RuntimeError as error:
            if isinstance(error.__context__, UserError):  # a loader process that died while stopped hides the reason
                raise error.__context__ from None
            raise
        if trainer.global_step < trainer.max_steps:
            if not trainer.is_global_zero:
                raise SystemExit(0)
            raise Interrupted(
                f"stopped at step {trainer.global_step} of {trainer.max_steps}; the same command continues from there"
            )
        if trainer.global_step % config.trainer.checkpoint_every:
            trainer.save_checkpoint(last)  # what comes now may fail, and is then done again without the training
        trained = module.trained()
        with together(PATIENCE):
            _forget_training(trainer)
            if trained is not None and trainer.is_global_zero:
                trained.to(trainer.strategy.root_device).eval()
                with trainer.precision_plugin.forward_context():
                    fit_success(trained, data)
                save_trained(trained, finished, facts | {"steps": trainer.global_step}, base)
    return finished


def _forget_training(trainer: L.Trainer) -> None:
    """Give back what only training needs, gradients and AdamW's moments, before the whole model is put on a device."""
    for parameter in trainer.lightning_module.parameters():
        parameter.grad = None
    trainer.strategy.optimizers = []
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def architecture(model: RewardModel, base: str | None) -> dict[str, Any]:
    """What makes a model of a checkpoint's tensors (`rbm.model.lightning_file`)."""
    lora: Any = model.peft_config if has_lora(model) else None
    frozen = {str(x.dtype).removeprefix("torch.") for x in model.backbone.parameters() if not x.requires_grad}
    return {
        "model": model.config(),
        "files": model.backbone.files(),
        "base": base,
        "lora_alpha": None if lora is None else lora[NAME].lora_alpha,
        "frozen_dtype": frozen.pop() if len(frozen) == 1 else None,
    }


def base_of(config: DictConfig) -> str | None:
    """Where the weights that a run starts from can be had again: a folder or a hub id; none for random ones."""
    if config.init is not None:
        return str(nano_weights() if config.init == "nano" else config.init)
    base = (config.model.get("backbone") or {}).get("base")
    return None if base is None else str(base)


def start_model(config: DictConfig) -> RewardModel:
    """The model that training starts from: random weights, or those of `init`."""
    if config.init is None:
        return instantiate(config.model)
    folder = nano_weights() if config.init == "nano" else config.init
    return RewardModel.from_pretrained(str(folder)).train()


def _trainer(
    config: DictConfig, folder: Path, data: PairDataModule, facts: dict[str, Any], stop: StopCleanly
) -> L.Trainer:
    options = plain(config.trainer)
    every = options.pop("checkpoint_every")
    wandb = options.pop("wandb")
    options |= placement(options)
    logs = folder / "logs"
    start = 1 + max((int(path.name.rpartition("_")[2]) for path in logs.glob("version_[0-9]*")), default=-1)
    loggers: list[Logger] = [
        CSVLogger(folder, name="logs", version=start, flush_logs_every_n_steps=options["log_every_n_steps"]),
        TensorBoardLogger(folder, name="logs", version=start),
    ]
    if wandb:
        if find_spec("wandb") is None:
            raise UserError("trainer.wandb=true needs the extra: pip install 'robot-rbm[wandb]'")
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(WandbLogger(project="rbm", save_dir=logs))
    checkpoints = ModelCheckpoint(
        folder / "checkpoints", filename="last", enable_version_counter=False,
        save_top_k=1, monitor=None, every_n_train_steps=every, save_on_train_epoch_end=False,
    )  # fmt: skip
    validate = options.pop("validate_every") * data.micro_batches
    has_validation = data.validation_pairs > 0
    return _checked(
        **options,
        max_epochs=-1,
        min_epochs=0,
        accumulate_grad_batches=data.micro_batches,
        val_check_interval=validate if has_validation else None,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if has_validation else 0,
        num_sanity_val_steps=0,
        logger=loggers,
        callbacks=[checkpoints, Facts(facts), stop, ReplacedPairs(data), StepProgress()],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def _claim(folder: Path, config: DictConfig) -> None:
    """Make the run folder, with its configuration."""
    path = folder / "config.yaml"
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(OmegaConf.to_yaml(config))
    os.replace(part, path)


def _checked(**options: Any) -> L.Trainer:
    """A Trainer, or what is wrong with its options in one line."""
    try:
        return L.Trainer(**options)
    except (MisconfigurationException, TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        if "gpu" in words.lower():
            words += " (on a machine without: trainer.accelerator=cpu trainer.devices=1 trainer.strategy=auto)"
        raise UserError(f"configuration of the trainer: {words}") from error


def _check_claim(folder: Path, config: DictConfig) -> None:
    """Check that a run folder, if it is there, belongs to the same configuration."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    before = plain(OmegaConf.load(path))  # type: ignore[arg-type]
    now = plain(config)
    old, new = _flat(before), _flat(now)
    changed = sorted(key for key in (old.keys() | new.keys()) - NO_RESULT if old.get(key) != new.get(key))
    if changed:
        raise UserError(
            f"{folder} holds a run of another configuration (differs in: {', '.join(changed)}): "
            "choose another run_dir=… (with init=…/model to go on from its weights), or delete that folder"
        )


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested configuration as dotted keys."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {key: value for name in config for key, value in _flat(config[name], f"{prefix}.{name}".strip(".")).items()}


def _check_checkpoint(path: Path, data: PairDataModule) -> None:
    """A checkpoint that cannot be read, or that stands on other data, is told before anything is loaded from it."""
    try:
        facts = read_rest(path)["rbm"]
    except UserError as error:
        raise UserError(
            f"{path} cannot be read, it may be truncated: delete it to start the run again ({error})"
        ) from error
    if facts["snapshot"] != data.corpus.snapshot:
        raise UserError(
            f"{path} was trained on snapshot {facts['snapshot']} of its corpus, now it is at {data.corpus.snapshot}: "
            f"pin data.snapshot={facts['snapshot']} or choose another run_dir"
        )
    if facts["rows"] != data.fingerprint:
        raise UserError(
            f"{path} was trained on other trajectories of this corpus than are selected now: restore the file "
            "data.selection, or choose another run_dir"
        )


def git_revision() -> str:
    """Revision of the checkout that this package runs from, "+" behind it if changed; empty for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def _quiet() -> None:
    """Lightning's notes on what we chose on purpose; its warnings that matter stay."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (".*does not have many workers.*", ".*Checkpoint directory.*exists.*", ".*isinstance.treespec.*",
                    ".*GPU available but not used.*", ".*is supported for historical reasons.*",
                    ".*resuming from a checkpoint that ended.*", ".*number of training batches.*",
                    ".*sync_dist=True.*", ".*broadcast_buffers.*", ".*returned a view tensor.*"):  # fmt: skip
        warnings.filterwarnings("ignore", message)
