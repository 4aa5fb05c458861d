"""`rbm bench score`: it compares before it times, and reports what it says; how fast it is, no test asks."""

import json

import pytest
from click.testing import CliRunner

from rbm.bench.cli import bench
from rbm.bench.scoring import run
from rbm.errors import UserError


def test_a_small_run_reports_everything(tmp_path):
    given = ["score", "--dims", "tiny", "--frames", "6", "--rounds", "1", "--sessions", "1,3", "--device", "cpu"]
    done = CliRunner().invoke(bench, [*given, "--json", str(tmp_path / "score.json")], catch_exceptions=False)
    facts = json.loads((tmp_path / "score.json").read_text())
    assert json.loads(done.stdout) == facts
    assert facts["clip"]["difference"] < 1e-4
    assert facts["episode"]["difference"] < 1e-4
    assert facts["clip"]["forward_over_push"] == pytest.approx(
        facts["clip"]["forward_ms"] / facts["clip"]["last_push_ms"]
    )
    assert [pool["sessions"] for pool in facts["pools"]] == [1, 3]
    assert [pool["sessions"] for pool in facts["nano"]["pools"]] == [1, 8, 64]
    assert all(pool["frames_per_s"] > 0 and pool["bytes"] > 0 for pool in facts["pools"] + facts["nano"]["pools"])
    assert facts["visual_tokens_a_frame"] == 64


def test_bad_options_are_refused():
    with pytest.raises(UserError, match="accelerator"):
        run("4b", "cpu")
    for sessions in ("0", "a", "1,,2"):
        done = CliRunner().invoke(bench, ["score", "--sessions", sessions])
        assert done.exit_code == 2
        assert "--sessions" in done.output
