"""A model may know what is tested, if it was trained with another split: that is said."""

from pathlib import Path

import pytest

from rbm.config import compose, plain
from rbm.evaluation.cli import split_differences
from rbm.model import RewardModel
from rbm.model.backbones import NanoBackbone


@pytest.mark.parametrize("experiment", ["lora_finetune", "finetune"])
def test_experiments_for_ones_own_data_are_evaluated_with_the_split_that_they_train_with(experiment: str) -> None:
    more = [] if experiment == "lora_finetune" else ["data=corpus"]
    train = compose("train", [f"experiment={experiment}", *more, "data.corpus=x"])
    test = compose("eval", ["data=corpus", "data.corpus=x"])
    for key in ("heldout_tasks", "heldout_scenes", "heldout_per_quality", "validation_per_quality"):
        assert train.data[key] == test.split[key], key
    assert train.data.split_seed == test.split.seed


def test_another_split_than_that_of_the_training_is_named(tmp_path: Path) -> None:
    config = plain(compose("train", ["data=corpus", "data.corpus=x", "data.heldout_per_quality=0.1"]))
    model = RewardModel(NanoBackbone(image_size=32, width=8, hidden=32, layers=1, heads=2))
    model.save_pretrained(str(tmp_path / "run" / "model"), {"config": config})
    split = plain(compose("eval", ["data=corpus", "data.corpus=x"]).split)
    assert split_differences(str(tmp_path / "run"), split) == [("heldout_per_quality", 0.15, 0.1)]
    assert split_differences(str(tmp_path / "run"), split | {"heldout_per_quality": 0.1}) == []
    assert split_differences(None, split) == []
