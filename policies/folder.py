"""The folder of a run: whose it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rbm.errors import UserError
from rbm.output import whole_file


def claim(folder: Path, config: Mapping[str, Any]) -> None:
    """Write what a run is asked for, `config.json`, or see that the folder's run was asked for the same.

    Raises:
        UserError: it holds another run, or something that is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    asked = json.dumps(config, indent=2, default=dict) + "\n"
    if not path.exists():
        with whole_file(path) as target:
            target.write_text(asked, encoding="utf-8")
        return
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == json.loads(asked)
    except ValueError as error:
        raise UserError(f"{path} is no run's configuration ({error}): give another run_dir, or delete it") from error
    if not same:
        raise UserError(f"{folder} holds another run (see config.json there): give another run_dir, or delete it")


def keep_lines(path: Path, count: int) -> None:
    """Drop all but the first lines of a file: what was written after a state that is gone back to."""
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    with whole_file(path) as target:
        target.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
