"""Configuration: what an experiment changes, and values that Hydra's grammar does not know."""

import pytest

from rbm.config import compose, override
from rbm.errors import UserError


def test_an_experiment_changes_what_the_root_says():
    tuned = compose("train", ["experiment=finetune"])
    assert tuned.init == "nano"
    assert tuned.trainer.max_steps == 300
    assert compose("train", ["experiment=finetune", "init=null"]).init is None
    assert compose("train").init is None


@pytest.mark.parametrize(
    "path", ["läufe/ü", "with space/and, comma", "it's", "[brackets]", "a=b", "back\\slash", "日本語"]
)
def test_any_path_can_be_given(path):
    assert compose("train", [override("run_dir", path)]).run_dir == path


def test_a_path_that_hydra_cannot_parse_may_be_typed_as_it_is():
    assert compose("train", ["run_dir=läufe/ü"]).run_dir == "läufe/ü"
    assert compose("train", ["run_dir=runs/it's"]).run_dir == "runs/it's"


def test_unknown_names_and_keys_are_one_line():
    for overrides, says in (
        (["model=giant"], "there are, in 'model': nano"),
        (["seeed=1"], "no such key"),
        (["nonsense"], "'nonsense' is no setting: write KEY=VALUE"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            compose("train", overrides)
        assert "\n" not in str(caught.value)
