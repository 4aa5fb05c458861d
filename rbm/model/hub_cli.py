"""`rbm push`: a trained model to the Hugging Face hub."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from rbm.errors import UserError


@click.command(short_help="Send a model to the Hugging Face hub.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("name", metavar="ORG/NAME")
@click.option("--public", is_flag=True, help="Everyone may read it; without this a new repository is private.")
@click.option("--revision", metavar="BRANCH", help="A branch, made if it does not exist; else main.")
@click.option("--message", metavar="TEXT", help="Of the commit.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def push(folder: Path, name: str, public: bool, revision: str | None, message: str | None, yes: bool) -> None:
    """Send the model in FOLDER to the repository ORG/NAME on the hub, which is made if it does not exist.

    FOLDER is the folder of a run or its model/, what `rbm export` wrote, or a LoRA adapter. Only the model's own files
    are sent; they are listed first. A README.md is written where there is none; an existing one is not touched.
    Log in with `hf auth login`, or set HF_TOKEN.

    \b
    Examples:
      rbm push runs/first/model lab/drawer-reward
      rbm push runs/first lab/drawer-reward --revision v2 --message "twice the data" --yes
      rbm score attempt.mp4 --task "open the drawer" --checkpoint lab/drawer-reward@v2
    """
    from rbm.model.hub import CARD, check_name, parcel
    from rbm.model.hub import push as send

    check_name(name)
    model = parcel(folder)
    console = Console(highlight=False)
    console.print(f"[bold]{escape(str(model.folder))}[/] → {escape(name)}{escape(f'@{revision}') if revision else ''}")
    sizes = model.sizes()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for file, size in sizes.items():
        table.add_row(escape(file), decimal(size))
    table.add_row(f"{len(sizes)} files", decimal(sum(sizes.values())), style="bold")
    console.print(table)
    if not model.has_card:
        console.print(f"{CARD} is written, unless the repository has one; the licence in it is yours to fill in")
    who = "public" if public else "private"
    if not yes and not _confirmed(f"Send this to {name}, as a {who} model?"):
        console.print("nothing was sent")
        return
    console.print(send(model.folder, name, not public, revision, message), soft_wrap=True)


def _confirmed(question: str) -> bool:
    try:
        return click.confirm(question)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise UserError("there is nobody to ask: give --yes") from None
