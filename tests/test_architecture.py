"""The arrows between the packages: who may import whom, checked in the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = {"rbm.errors", "rbm.trajectory", "rbm.frames"}
ALLOWED = {
    "rbm.errors": set(),
    "rbm.trajectory": set(),
    "rbm.frames": set(),
    "rbm.assets": set(),
    "rbm.config": {"rbm.errors"},
    "rbm.output": {"rbm.errors"},
    "rbm.video": BASE | {"rbm.output"},
    "rbm.corpus": BASE | {"rbm.video", "rbm.assets", "rbm.output"},
    "rbm.sampling": BASE,
    "rbm.model": BASE,
    "rbm.scoring": BASE | {"rbm.model", "rbm.video", "rbm.output"},
    "rbm.scoring.server": BASE | {"rbm.__version__", "rbm.config", "rbm.scoring", "rbm.video"},
    "rbm.training": BASE | {"rbm", "rbm.assets", "rbm.config", "rbm.corpus", "rbm.sampling", "rbm.model", "rbm.output"},
    "rbm.evaluation": BASE
    | {"rbm.assets", "rbm.config", "rbm.corpus", "rbm.model", "rbm.scoring", "rbm.output", "rbm.video"},
    "rbm.bench": BASE
    | {
        "rbm.config",
        "rbm.corpus",
        "rbm.model",
        "rbm.sampling",
        "rbm.scoring",
        "rbm.training",
        "rbm.output",
        "rbm.video",
    },
    "dataset_builder": BASE | {"rbm.config", "rbm.corpus", "rbm.video"},
    "policies": BASE
    | {"dataset_builder", "rbm.cli", "rbm.config", "rbm.corpus", "rbm.evaluation", "rbm.output", "rbm.scoring"}
    | {"rbm.assets", "rbm.video"},  # rbm.cli: an example that is run by itself is the command
}
ENTRY_POINTS = {"rbm", "rbm.cli", "rbm.report_cli", "rbm.demo"}
"""What ties the packages together may import all of them."""


def part_of(module: str) -> str:
    """`rbm.model.heads` belongs to the part `rbm.model`."""
    if module.startswith("rbm.scoring.server"):
        return "rbm.scoring.server"  # the one part of scoring that reads a configuration
    return (
        module.split(".")[0] if module.startswith(("dataset_builder", "policies")) else ".".join(module.split(".")[:2])
    )


def sources() -> list[tuple[str, Path]]:
    found = []
    for path in [*ROOT.glob("rbm/**/*.py"), *ROOT.glob("dataset_builder/**/*.py"), *ROOT.glob("policies/**/*.py")]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found.append((module, path))
    return found


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "rbm" else {node.module}
    return {name for name in found if name and name.split(".")[0] in ("rbm", "dataset_builder", "policies")}


def test_every_import_follows_an_arrow():
    seen = set()
    for module, path in sources():
        part = part_of(module)
        if part in ENTRY_POINTS:
            continue
        assert part in ALLOWED, f"{module}: say in this test what {part} may import"
        seen.add(part)
        for imported in imports(path):
            other = part_of(imported)
            assert other == part or other in ALLOWED[part], f"{module} imports {imported}, against the arrows"
    assert seen == set(ALLOWED)


def test_scoring_runs_without_what_training_and_collecting_need(tiny_checkpoint):
    blocked = [
        "lightning",
        "hydra",
        "omegaconf",
        "zarr",
        "icechunk",
        "metaworld",
        "mujoco",
        "matplotlib",
        "transformers",
        "peft",
    ]
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import numpy as np, rbm
scorer = rbm.Scorer.from_pretrained({str(tiny_checkpoint)!r}, device="cpu")
scores = scorer.score(np.zeros((5, 40, 40, 3), np.uint8), "open the drawer")
assert scores.progress.shape == (5,)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["policies", "conf", "dataset_builder"])
def test_a_users_own_folder_does_not_break_the_command(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    command = Path(sys.executable).with_name("rbm")
    done = subprocess.run([command, "train", "--cfg"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "max_steps" in done.stdout
    done = subprocess.run([command, "build", "source=videos", "--cfg"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
