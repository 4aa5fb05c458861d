"""`rbm export`, by its command."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_vlm
import torch

from rbm.model import RewardModel


def export(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("rbm"), "export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_from_layout_to_layout(tmp_path):
    for source, target, layout in (
        (tiny_vlm.FIXTURE, "a", "lerobot"),
        (tmp_path / "a", "b", "ours"),
        (tmp_path / "b", "c", "robometer"),
    ):
        done = export(source, tmp_path / target, "--to", layout)
        assert done.returncode == 0, done.stderr
        assert f"{layout} layout, 1." in done.stdout
    one, two = (RewardModel.from_pretrained(str(folder)).state_dict() for folder in (tiny_vlm.FIXTURE, tmp_path / "c"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_facts_travel_and_precision_is_chosen(tmp_path):
    tiny_vlm.qwen3_model().save_pretrained(str(tmp_path / "run" / "model"), {"snapshot": "ABC"})
    done = export(tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    from rbm.model.checkpoint import describe

    assert describe(tmp_path / "out")["facts"] == {"snapshot": "ABC"}
    assert RewardModel.from_pretrained(str(tmp_path / "out")).backbone.markers.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("nowhere.ckpt", "out"), "neither a file or folder nor an id"),
        ((tiny_vlm.FIXTURE, tiny_vlm.FIXTURE), "exists already"),
        ((tiny_vlm.FIXTURE, "out", "--dtype", "int8"), "'int8' does not exist"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, arguments, what):
    monkeypatch.chdir(tmp_path)
    done = export(*arguments)
    assert done.returncode == 2
    assert what in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_layout_that_cannot_hold_the_model(tmp_path):
    tiny_vlm.qwen3_model().save_pretrained(str(tmp_path / "model"))
    done = export(tmp_path / "model", tmp_path / "out", "--to", "robometer")
    assert done.returncode == 2
    assert "cannot hold this model: its pairs are isolated" in done.stderr
