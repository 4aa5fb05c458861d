"""`rbm bench serve` against real servers: what it reports is there and adds up; how fast it is, no test asks."""

import json

import pytest
from click.testing import CliRunner

from rbm.bench.cli import bench
from rbm.bench.serving import run
from rbm.errors import UserError


def test_a_small_run_reports_everything(tmp_path, tiny_checkpoint):
    given = ["serve", "threads=1", "device=cpu", f"checkpoint={tiny_checkpoint}", "--clients", "4", "--seconds", "1"]
    more = ["--rounds", "1", "--side", "32", "--sessions", "9", "--session-bytes", "190000", "--soak", "6"]
    CliRunner().invoke(bench, [*given, *more, "--json", str(tmp_path / "serve.json")], catch_exceptions=False)
    facts = json.loads((tmp_path / "serve.json").read_text())
    batched, single = facts["pushes"]["batched"], facts["pushes"]["batch=1"]
    assert facts["batching_gain"] == pytest.approx(batched["pushes_per_s"] / single["pushes_per_s"])
    assert batched["p50_ms"] <= batched["p99_ms"]
    many = facts["many_sessions"]
    assert many["sessions"] == 9
    assert many["evictions"] > 0
    assert 0 < many["most_bytes"] <= many["budget_bytes"] == 190000
    assert len(facts["soak"]["pushes_per_s_by_fifth"]) == 5
    assert facts["soak"]["megabytes_by_fifth"][0] > 50


def test_a_server_that_does_not_start_is_told(tmp_path):
    with pytest.raises(UserError, match=r"did not start.*nowhere"):
        run([f"checkpoint={tmp_path / 'nowhere'}"])
