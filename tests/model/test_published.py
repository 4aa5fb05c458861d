"""Published checkpoints: read with the numbers that they have, written without changing one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vlm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rbm.errors import UserError
from rbm.model import ClipBatch, RewardModel
from rbm.model.backbones import PairMode
from rbm.model.published import save_published
from rbm.model.weights import read_folder

EXPECTED: dict[str, Any] = json.loads((tiny_vlm.FIXTURE / "expected.json").read_text())
INPUTS = np.load(tiny_vlm.FIXTURE / "inputs.npz")
TABLE = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def published() -> RewardModel:
    return RewardModel.from_pretrained(str(tiny_vlm.FIXTURE))


def clips(model: RewardModel, task: str | None = None, which=("clip1", "clip2")) -> ClipBatch:
    tasks = {entry["clip"]: task or entry["task"] for entry in EXPECTED["progress"]}
    return ClipBatch.from_clips([(model.preprocess(INPUTS[name]), tasks[name]) for name in which])


@torch.inference_mode()
def everything(model: RewardModel, batch: ClipBatch | None = None) -> list[torch.Tensor]:
    """All that a model says of the two clips, alone and as a pair."""
    batch = batch or clips(model)
    alone, pair = model(batch), model(batch, torch.tensor([[0, 1]]))
    found = [alone.progress_logits, alone.success_logits, pair.progress_logits, pair.success_logits]
    return [*found, pair.preference_logits]


def copied(target: Path) -> Path:
    shutil.copytree(tiny_vlm.FIXTURE, target)
    return target


def rewritten(target: Path, change) -> Path:
    """The fixture in one file, its tensors changed."""
    copied(target)
    state = read_folder(target)
    for path in [*target.glob("model-*"), target / "model.safetensors.index.json"]:
        path.unlink()
    save_file(change(state), target / "model.safetensors")
    return target


def edited(path: Path, change) -> None:
    text = path.read_text()
    value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    change(value)
    path.write_text(yaml.safe_dump(value) if path.suffix == ".yaml" else json.dumps(value))


def test_the_tokens_are_those_of_the_reference(published):
    for entry in EXPECTED["progress"]:
        batch = clips(published, which=(entry["clip"],))
        assert published.backbone.pack(batch, PairMode.CLIPS).ids.tolist() == entry["input_ids"]
        height, width = batch.frames[0].shape[1:3]
        assert [[1, height // 16, width // 16]] * len(batch.frames[0]) == entry["image_grid_thw"]
    pair = EXPECTED["pair"]
    packed = published.backbone.pack(clips(published, pair["task"]), PairMode.CAUSAL, torch.tensor([[0, 1]]))
    assert packed.ids.tolist() == pair["input_ids"]


def test_progress_and_success_are_those_of_the_reference(published):
    together = clips(published)
    with torch.inference_mode():
        progress, _, success = published.decode(published(together))
    start = 0
    for entry in EXPECTED["progress"]:
        with torch.inference_mode():
            output = published(clips(published, which=(entry["clip"],)))
        alone, _, alone_success = published.decode(output)
        mine = slice(start, start := start + len(entry["progress"]))
        for found in (alone, progress[mine]):
            torch.testing.assert_close(found, torch.tensor(entry["progress"]), atol=1e-5, rtol=0)
        for found in (alone_success, success[mine]):
            torch.testing.assert_close(found, torch.tensor(entry["success"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            output.progress_logits, torch.tensor(entry["progress_head_output"]), atol=1e-4, rtol=0
        )


def test_a_pair_is_that_of_the_reference(published):
    pair = EXPECTED["pair"]
    with torch.inference_mode():
        output = published(clips(published, pair["task"]), torch.tensor([[0, 1]]))
    progress, _, success = published.decode(output)
    assert output.preference_logits.sigmoid().item() == pytest.approx(pair["preference"], abs=1e-5)
    expected = torch.tensor(pair["first_progress"] + pair["second_progress"])
    torch.testing.assert_close(progress, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(success, torch.tensor(pair["first_success"] + pair["second_success"]), atol=1e-5, rtol=0)


def test_the_scorer_reads_it(published):
    import rbm

    entry = EXPECTED["progress"][0]
    scores = rbm.Scorer(published, "cpu").score(INPUTS["clip1"], entry["task"])
    np.testing.assert_allclose(scores.progress, entry["progress"], atol=1e-5)


@pytest.mark.parametrize("layout", ["robometer", "lerobot"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_changes_no_number(tmp_path, layout, dtype):
    model = RewardModel.from_pretrained(str(tiny_vlm.FIXTURE), dtype)
    save_published(model, tmp_path / "out", layout)
    again = RewardModel.from_pretrained(str(tmp_path / "out"))
    assert again.config() == model.config()
    one, two = model.state_dict(), again.state_dict()
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)
    original, written = read_folder(tiny_vlm.FIXTURE), read_folder(tmp_path / "out")
    if layout == "robometer":
        assert written.keys() == original.keys()
        if dtype == "float32":
            assert all(torch.equal(original[name], written[name]) for name in original)


def test_from_one_layout_to_ours_to_the_other(tmp_path, published):
    save_published(published, tmp_path / "a", "lerobot")
    RewardModel.from_pretrained(str(tmp_path / "a")).save_pretrained(str(tmp_path / "b"))
    model = RewardModel.from_pretrained(str(tmp_path / "b"))
    for one, two in zip(everything(published), everything(model), strict=True):
        assert torch.equal(one, two)


def test_the_second_layout_keeps_its_table_under_lm_head_alone(tmp_path, published):
    save_published(published, tmp_path, "lerobot")
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        assert file.metadata()["model.model.language_model.embed_tokens.weight"] == "model.lm_head.weight"
    assert "model.lm_head.weight" in keys
    assert not any("embed_tokens" in key for key in keys)
    assert json.loads((tmp_path / "config.json").read_text())["type"] == "robometer"


@pytest.mark.parametrize("names", [["lm_head.weight"], ["lm_head.weight", TABLE], [TABLE]])
def test_the_embedding_table_may_have_either_name_or_both(tmp_path, published, names):
    def change(state):
        table = state.pop(TABLE)
        return state | {name: table.clone() for name in names}

    model = RewardModel.from_pretrained(str(rewritten(tmp_path / "m", change)))
    for one, two in zip(everything(published), everything(model), strict=True):
        assert torch.equal(one, two)


def test_the_newer_form_of_the_rotary_configuration(tmp_path, published):
    folder = copied(tmp_path / "m")

    def change(config):
        text = config["text_config"]
        text["rope_parameters"] = {"rope_theta": text.pop("rope_theta"), **text.pop("rope_scaling")}

    edited(folder / "config.json", change)
    model = RewardModel.from_pretrained(str(folder))
    for one, two in zip(everything(published), everything(model), strict=True):
        assert torch.equal(one, two)


def test_other_dimensions_and_a_head_width_of_its_own(tmp_path):
    model = tiny_vlm.qwen3_model(
        pair="causal",
        preference="joint",
        target="clip_relative",
        sizes=tiny_vlm.architecture(
            head_dim=32, num_hidden_layers=2, rope_scaling={"mrope_section": [8, 4, 4], "rope_type": "default"}
        ),
        backbone={"prompt": "published"},
    )
    save_published(model, tmp_path, "robometer")
    again = RewardModel.from_pretrained(str(tmp_path))
    assert again.backbone.prompt == model.backbone.prompt
    for one, two in zip(everything(model), everything(again), strict=True):
        assert torch.equal(one, two)


def test_clips_of_unequal_length_in_a_pair(published):
    frames = published.preprocess(INPUTS["clip1"])
    short = published.preprocess(INPUTS["clip2"])[:3]
    batch = ClipBatch.from_clips([(frames, "fold it"), (short, "fold it")])
    with torch.inference_mode():
        output = published(batch, torch.tensor([[0, 1]]))
        # the second clip does not change what stands before it
        other = published(ClipBatch.from_clips([(frames, "fold it"), (short[:1], "fold it")]), torch.tensor([[0, 1]]))
    assert output.progress_logits.shape == (11, 10)
    torch.testing.assert_close(output.progress_logits[:8], other.progress_logits[:8], atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_the_continuous_head_follows_the_loss_type_not_the_number_of_bins(tmp_path, published, loss):
    def change(state):
        state["progress_head.4.weight"] = state["progress_head.4.weight"][3:4].clone()
        state["progress_head.4.bias"] = state["progress_head.4.bias"][3:4].clone()
        return state

    folder = rewritten(tmp_path / "m", change)

    def settings(config):
        config["model"]["progress_loss_type"] = config["loss"]["progress_loss_type"] = loss
        config["model"]["progress_discrete_bins"] = 10

    edited(folder / "config.yaml", settings)
    model = RewardModel.from_pretrained(str(folder))
    with torch.inference_mode():
        progress, spread, _ = model.decode(model(clips(model)))
        expected = published(clips(published)).progress_logits[:, 3].sigmoid()
    torch.testing.assert_close(progress, expected, atol=1e-6, rtol=0)
    assert spread.isnan().all()
    save_published(model, tmp_path / "out", "robometer")
    again = RewardModel.from_pretrained(str(tmp_path / "out"))
    assert again.progress_bins == 1


@pytest.mark.parametrize("pooling", ["mean", "boundary", "attention"])
def test_older_models_pool_a_frames_own_tokens(tmp_path, pooling):
    folder = copied(tmp_path / "m")

    def settings(config):
        config["model"] |= {
            "use_per_frame_progress_token": False,
            "frame_pooling": pooling,
            "frame_pooling_attn_temperature": 0.5,
        }

    edited(folder / "config.yaml", settings)
    model = RewardModel.from_pretrained(str(folder))
    batch = clips(model)
    seen: list[torch.Tensor] = []
    model.backbone.language.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state[0]))
    with torch.inference_mode():
        states = model.backbone(batch, PairMode.CLIPS)
    pack = model.backbone.pack(batch, PairMode.CLIPS)
    assert 498 not in pack.ids.tolist()  # no progress tokens
    pictures = (pack.ids == 492).nonzero().flatten()
    spans = [*pictures[: 8 * 80].split(80), *pictures[8 * 80 :].split(64)]
    for frame, span in enumerate(spans):
        hidden = seen[0][span]
        if pooling == "mean":
            expected = hidden.mean(0)
        elif pooling == "boundary":
            expected = hidden[-1]
        else:
            score = (hidden @ model.backbone.frame_pool_attn.weight[0]) / 0.5
            expected = score.softmax(0) @ hidden
        torch.testing.assert_close(states.frames[frame], expected, atol=1e-5, rtol=0)
    save_published(model, tmp_path / "out", "lerobot")
    again = RewardModel.from_pretrained(str(tmp_path / "out"))
    assert again.backbone.pooling == model.backbone.pooling
    assert again.backbone.pool_temperature == 0.5


def test_the_shorter_pair_prompt(tmp_path, published):
    folder = copied(tmp_path / "m")
    edited(folder / "config.yaml", lambda config: config["training"].update(predict_pref_progress=False))
    model = RewardModel.from_pretrained(str(folder))
    batch, pairs = clips(model, "x"), torch.tensor([[0, 1]])
    short, long = (m.backbone.pack(batch, PairMode.CAUSAL, pairs).ids for m in (model, published))
    assert 0 < len(short) < len(long)


def test_calibration_goes_into_the_last_layer(tmp_path):
    model = RewardModel.from_pretrained(str(tiny_vlm.FIXTURE))
    model.calibrate(2.5, -0.75)
    save_published(model, tmp_path, "robometer")
    again = RewardModel.from_pretrained(str(tmp_path))
    with torch.inference_mode():
        one, two = (m.decode(m(clips(m)))[2] for m in (model, again))
    torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


# what is refused


def test_missing_and_unknown_keys_are_listed(tmp_path):
    def change(state):
        del state["success_head.4.bias"], state["model.visual.merger.norm.weight"]
        return state | {"surplus.weight": torch.zeros(2)}

    folder = rewritten(tmp_path / "m", change)
    with pytest.raises(UserError, match="missing keys") as error:
        RewardModel.from_pretrained(str(folder))
    for name in ("success_head.4.bias", "model.visual.merger.norm.weight", "surplus.weight"):
        assert name in str(error.value)


def test_a_head_of_another_size_than_the_configuration_says(tmp_path):
    def change(state):
        state["progress_head.4.weight"] = state["progress_head.4.weight"][:1].clone()
        state["progress_head.4.bias"] = state["progress_head.4.bias"][:1].clone()
        return state

    with pytest.raises(UserError, match="progress head has 1 outputs"):
        RewardModel.from_pretrained(str(rewritten(tmp_path / "m", change)))


def test_a_truncated_shard_is_named(tmp_path):
    folder = copied(tmp_path / "m")
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors cannot be read.*truncated"):
        RewardModel.from_pretrained(str(folder))
    shard.unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors is missing"):
        RewardModel.from_pretrained(str(folder))


def test_an_index_cannot_point_out_of_its_folder(tmp_path):
    folder = copied(tmp_path / "m")

    def change(index):
        index["weight_map"]["frame_pool_attn.weight"] = "../elsewhere.safetensors"

    edited(folder / "model.safetensors.index.json", change)
    with pytest.raises(UserError, match="no file of this folder"):
        RewardModel.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda config: config["model"].update(use_multi_image=False), "as a video"),
        (
            lambda config: config["model"].update(use_per_frame_progress_token=False, frame_pooling="max"),
            "frame_pooling",
        ),
    ],
)
def test_kinds_that_are_not_read_are_refused_with_a_sentence(tmp_path, change, what):
    folder = copied(tmp_path / "m")
    edited(folder / "config.yaml", change)
    with pytest.raises(UserError, match=what):
        RewardModel.from_pretrained(str(folder))


def test_a_configuration_that_is_none(tmp_path):
    folder = copied(tmp_path / "m")
    (folder / "config.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        RewardModel.from_pretrained(str(folder))
    edited(folder / "config.json", lambda config: config.update(model_type="llava"))
    (folder / "config.yaml").write_text("model: {}\n")
    with pytest.raises(UserError, match="'llava'"):
        RewardModel.from_pretrained(str(folder))


@pytest.mark.parametrize("layout", ["robometer", "lerobot"])
def test_a_model_that_the_layout_cannot_hold(tmp_path, layout):
    with pytest.raises(UserError, match=r"isolated.*prompt is another"):
        save_published(tiny_vlm.qwen3_model(), tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_that_belongs_to_other_weights(tmp_path):
    def change(state):
        state[TABLE] = state[TABLE][:490].clone()
        return state

    folder = rewritten(tmp_path / "m", change)
    edited(folder / "config.json", lambda config: config["text_config"].update(vocab_size=490))
    with pytest.raises(UserError, match="tokenizer"):
        RewardModel.from_pretrained(str(folder))


def test_weights_of_the_fixture_are_all_used(published):
    ours = published.state_dict()
    for path in tiny_vlm.FIXTURE.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            mine = name if "head" in name else f"backbone.{name}"
            assert torch.equal(ours[mine], tensor)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda config: config["text_config"].update(hidden_act="swoosh")),
        ("config.json", lambda config: config["text_config"].update(hidden_size="wide")),
        ("config.json", lambda config: config["text_config"].update(hidden_size=-1)),
        ("config.json", lambda config: config["vision_config"].update(deepstack_visual_indexes=[9])),
        ("config.yaml", lambda config: config.update(model=[1])),
        ("config.yaml", lambda config: config["model"].update(frame_pooling_attn_temperature="hot")),
        ("model.safetensors.index.json", lambda index: index.update(weight_map=["a"])),
        ("model.safetensors.index.json", lambda index: index["weight_map"].update({"frame_pool_attn.weight": 3})),
    ],
)
def test_damaged_configurations_end_in_a_sentence(tmp_path, name, change):
    folder = copied(tmp_path / "m")
    edited(folder / name, change)
    with pytest.raises(UserError, match=r"cannot be (loaded|read)") as error:
        RewardModel.from_pretrained(str(folder))
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_is_no_text_or_of_another_model(tmp_path):
    folder = copied(tmp_path / "m")
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text"):
        RewardModel.from_pretrained(str(folder))

    def more(tokenizer):
        tokenizer["added_tokens"].append(
            {**tokenizer["added_tokens"][0], "id": 499, "content": "pick", "special": False}
        )

    shutil.copy(tiny_vlm.FIXTURE / "tokenizer.json", folder)
    edited(folder / "tokenizer.json", more)
    with pytest.raises(UserError, match=r"500 words and the embedding table 499 rows"):
        RewardModel.from_pretrained(str(folder))

    def less(tokenizer):
        tokenizer["added_tokens"] = [x for x in tokenizer["added_tokens"] if x["content"] != "<|vision_start|>"]

    shutil.copy(tiny_vlm.FIXTURE / "tokenizer.json", folder)
    edited(folder / "tokenizer.json", less)
    with pytest.raises(UserError, match=r"lacks <\|vision_start\|>"):
        RewardModel.from_pretrained(str(folder))


def test_heads_in_another_precision_than_the_backbone(tmp_path, published):
    def change(state):
        return {name: x if "head" in name else x.bfloat16() for name, x in state.items()}

    model = RewardModel.from_pretrained(str(rewritten(tmp_path / "m", change)))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    for one, two in zip(everything(published), everything(model), strict=True):
        torch.testing.assert_close(one, two, atol=0.5, rtol=0)  # logits, of a backbone in bfloat16


def test_weights_that_are_no_floating_numbers_are_refused(tmp_path):
    def change(state):
        return state | {"success_head.4.bias": state["success_head.4.bias"].to(torch.int32)}

    with pytest.raises(UserError, match=r"success_head\.4\.bias.*int32"):
        RewardModel.from_pretrained(str(rewritten(tmp_path / "m", change)))


def test_what_a_layout_would_lose_is_refused_or_kept(tmp_path):
    model = RewardModel.from_pretrained(str(tiny_vlm.FIXTURE))
    model.target = "absolute"
    with pytest.raises(UserError, match="counts from the start of the trajectory"):
        save_published(model, tmp_path / "out", "lerobot")
    folder = copied(tmp_path / "m")
    edited(folder / "config.yaml", lambda config: config["model"].update(base_model_id="Qwen/Qwen3-VL-2B-Instruct"))
    save_published(RewardModel.from_pretrained(str(folder)), tmp_path / "again", "lerobot")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["base_model_id"] == "Qwen/Qwen3-VL-2B-Instruct"


def test_loading_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    RewardModel.from_pretrained(str(tiny_vlm.FIXTURE))  # once, so that all is imported
    torch.manual_seed(5)
    RewardModel.from_pretrained(str(tiny_vlm.FIXTURE))
    assert torch.equal(torch.rand(3), expected)


def test_it_is_evaluated(tmp_path):
    command = [str(Path(sys.executable).with_name("rbm")), "eval", f"checkpoint={tiny_vlm.FIXTURE}", "device=cpu"]
    command += [f"report={tmp_path / 'report'}", "bootstrap=0", "most_instructions=1", "most_in_pairs=1"]
    command += ["split.heldout_per_quality=1", "split.heldout_tasks=[]", "split.validation_per_quality=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "metrics.json").is_file()
