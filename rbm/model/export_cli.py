"""`rbm export`."""

from __future__ import annotations

from pathlib import Path

import click

from rbm.errors import UserError

LAYOUTS = ("ours", "robometer", "lerobot")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--to", "layout", type=click.Choice(LAYOUTS), default="ours", show_default=True, help="Layout to write.")
@click.option("--dtype", help="Of the weights: float32, bfloat16, float16; default as they are stored.")
def export(checkpoint: str, folder: Path, layout: str, dtype: str | None) -> None:
    """Write a model in another layout, or its weights out of a training checkpoint.

    CHECKPOINT is a model's folder (ours, or a published one in either layout), a run's folder, a Lightning file, a
    folder of FSDP shards, a LoRA adapter (it is merged), or an id on the Hugging Face hub.

    \b
    Examples:
      rbm export robometer/Robometer-4B models/robometer
      rbm export runs/big/checkpoints/last.ckpt models/big         shards of FSDP become safetensors
      rbm export runs/lora/model models/merged --dtype bfloat16
      rbm export models/mine out --to lerobot
    """
    from rbm.model import RewardModel
    from rbm.model.checkpoint import calibrates_later, facts_of

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: give a new folder, or empty it")
    model = RewardModel.from_pretrained(checkpoint, dtype)
    if calibrates_later(checkpoint):
        click.echo(
            "note: success is calibrated at the end of a run, into its folder model/: this checkpoint is not",
            err=True,
        )
    if layout == "ours":
        model.save_pretrained(str(folder), facts_of(checkpoint))
    else:
        from rbm.model.published import save_published

        save_published(model, folder, layout)
    size = sum(path.stat().st_size for path in folder.iterdir())
    click.echo(f"{folder}: {layout} layout, {size / 1e6:.1f} MB")
