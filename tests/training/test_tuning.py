"""What is trained and in which precision, over real steps of Lightning on a tiny Qwen3-VL and on nano."""

import copy
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from tiny_vlm import TOKENIZER, qwen2_5_model, qwen3_model, smolvlm_model
from torch import Tensor

from rbm.config import compose, instantiate
from rbm.corpus import Corpus
from rbm.errors import UserError
from rbm.model import RewardModel, reward_losses
from rbm.model.adapter import LORA_CONFIG, WEIGHTS, complete, has_lora, load_adapter, save_trained
from rbm.model.backbones import NanoBackbone
from rbm.model.losses import LossWeights
from rbm.training.data import Onward, PairDataModule, Share
from rbm.training.fit_success import fit_success
from rbm.training.module import RewardModule, learning_rate_factor
from rbm.training.run import train
from rbm.training.tuning import Tuning, named_parts

LORA = {"r": 4, "alpha": 8, "dropout": 0.1}


def nano() -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(NanoBackbone(image_size=32, width=8, hidden=32, layers=1, heads=2), context_frames=8)


def data_module(model: RewardModel, corpus: Corpus, **options: Any) -> PairDataModule:
    options = {"pairs_per_step": 2, "workers": 0, "validation_pairs": 0} | options
    return PairDataModule(model, str(corpus.location), heldout_per_quality=1, validation_per_quality=1, **options)


def trainer(steps: int, stop: int | None = None, **options: Any) -> L.Trainer:
    """Ends at `stop` of `steps`."""
    return L.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[Stop(stop or steps)],
        **options,
    )  # fmt: skip


class Stop(L.Callback):
    def __init__(self, step: int) -> None:
        self.step, self.losses = step, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))
        trainer.should_stop = trainer.global_step >= self.step


def module(tuning: Tuning | None = None, model: RewardModel | None = None, **options: Any) -> RewardModule:
    """The same at every call."""
    model = (model or qwen3_model()).train()
    torch.manual_seed(5)
    return RewardModule(model, lr=1e-2, warmup=0.2, tuning=tuning, **options)


def trained_parts(model: RewardModel) -> set[str]:
    """The trained parameters, each by the piece of its name that tells which part it is."""
    found = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("backbone.").removeprefix("model.")
            if ".lora_" in name:
                found.add(name.split(".")[0] + ".lora")
            else:
                found.add(
                    ".".join(name.split(".")[: 3 if name.startswith("visual.blocks") else 2 if "." in name else 1])
                )
    return found


HEADS = {f"{head}_head.{part}" for head in ("progress", "success", "preference") for part in (0, 1, 4)}
OWN = {"markers.weight", *HEADS}
LANGUAGE = {"language_model.embed_tokens", "language_model.layers", "language_model.norm"}
BEHIND = {"visual.merger", "visual.deepstack_merger_list"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LANGUAGE),
        ({"language": "none"}, set()),
        ({"language": "lora"}, {"language_model.lora"}),
        ({"language": "lora", "vision": "lora"}, {"language_model.lora", "visual.lora"}),
        ({"language": "none", "vision": "last", "vision_blocks": 1}, {"visual.blocks.1", *BEHIND}),
        ({"vision": "last", "vision_blocks": 2}, {"visual.blocks.0", "visual.blocks.1", *BEHIND, *LANGUAGE}),
        (
            {"language": "none", "vision": "full"},
            {"visual.patch_embed", "visual.pos_embed", "visual.blocks.0", "visual.blocks.1", *BEHIND},
        ),
    ],
)
def test_what_is_trained(options, expected):
    model = qwen3_model()
    Tuning(**options).apply(model)
    assert trained_parts(model) == expected | OWN


@pytest.mark.parametrize("make", [qwen3_model, qwen2_5_model, smolvlm_model])
def test_every_family_has_its_last_blocks_and_its_lora(make):
    model = make()
    Tuning(language="lora", lora=LORA, vision="last", vision_blocks=1).apply(model)
    towers = [(name, x) for name, part, x in named_parts(model) if part == "vision"]
    blocks = {int(found[1]) for name, _ in towers if (found := re.search(r"(?:blocks|layers)\.(\d+)\.", name))}
    for name, parameter in towers:
        found = re.search(r"(?:blocks|layers)\.(\d+)\.", name)
        assert parameter.requires_grad == (int(found[1]) == max(blocks) if found else "embed" not in name), name
    frames = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    assert model.backbone.encode(model.preprocess(frames)).requires_grad

    model = make()
    Tuning(language="lora", lora=LORA, vision="lora").apply(model)
    names = {name.split(".lora_A")[0].rpartition(".")[2] for name, _, _ in named_parts(model) if ".lora_A." in name}
    assert names > {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {part for name, part, _ in named_parts(model) if ".lora_A." in name} == {"language", "vision"}


def test_pooling_and_views_are_trained_where_they_are_used():
    model = qwen3_model(backbone={"views": ["a", "b"], "view_tags": "embedding"})
    Tuning(language="none").apply(model)
    assert trained_parts(model) == OWN | {"view_embedding.weight"}
    words = vars(model.backbone.prompt) | {"frame": ""}
    model = qwen3_model(backbone={"prompt": words, "pooling": "attention"})
    Tuning(language="none").apply(model)
    assert trained_parts(model) == OWN | {"frame_pool_attn.weight"}


def test_nano_is_trained_as_a_whole_unless_told_otherwise():
    model = nano()
    before = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    Tuning().apply(model)
    assert [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] == before
    Tuning(language="none", vision="none").apply(model)
    assert {name for name, x in model.named_parameters() if x.requires_grad} == {
        "backbone.marker_embedding.weight",
        *(name for name, _ in model.named_parameters() if "_head." in name),
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"language": "half"}, "must be one of full, lora, none"),
        ({"vision": "first"}, "must be one of null, none, full, lora, last"),
        ({"frozen_dtype": "int4"}, "must be one of null, bfloat16"),
        ({"vision": "last"}, "needs tuning.vision_blocks of 1 or more"),
        ({"vision": "full", "vision_blocks": 2}, "nothing else has use for it"),
        ({"vision": "none", "vision_lr": 1e-5}, "vision_lr has nothing to train"),
        ({"lora": {"rank": 3}}, "tuning.lora has r, alpha and dropout, not rank"),
    ],
)
def test_options_without_a_meaning_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Tuning(**options)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (nano, {"language": "lora"}, "nano is none"),
        (nano, {"vision": "last", "vision_blocks": 1}, "the tower of nano has no blocks"),
        (nano, {"gradient_checkpointing": True}, "nano has no gradient checkpointing"),
        (qwen3_model, {"vision": "last", "vision_blocks": 3}, "tower of this qwen3_vl has 2 blocks"),
        (qwen3_model, {"vision_lr": 1e-5}, "the tower of qwen3_vl is frozen unless"),
    ],
)
def test_what_a_backbone_does_not_have_is_refused(make, options, words):
    with pytest.raises(UserError, match=words):
        Tuning(**options).apply(make())


def optimizer(found: RewardModule, steps: int = 10) -> Any:
    found.trainer = trainer(steps)
    return found.configure_optimizers()


def test_the_groups_of_nano_are_what_they_were():
    """Optimiser states are kept by place: an order that changed would mix them up in a resumed run."""
    model = nano()
    groups = optimizer(RewardModule(model, lr=1e-3))["optimizer"].param_groups
    matrices = [x for name, x in model.named_parameters() if x.ndim >= 2 and "embedding" not in name]
    others = [x for name, x in model.named_parameters() if x.ndim < 2 or "embedding" in name]
    assert [[id(x) for x in group["params"]] for group in groups] == [
        [id(x) for x in part] for part in (matrices, others)
    ]
    assert [(group["weight_decay"], group["betas"]) for group in groups] == [(0.01, (0.9, 0.95)), (0.0, (0.9, 0.95))]


def test_the_tower_has_its_own_rate_and_the_same_schedule():
    tuning = Tuning(language="lora", lora=LORA, vision="last", vision_blocks=1, vision_lr=1e-4)
    found = module(tuning, betas=(0.8, 0.9), final_lr=0.5)
    made = optimizer(found)
    groups, schedule = made["optimizer"].param_groups, made["lr_scheduler"]["scheduler"]
    names = {id(x): name for name, x in found.model.named_parameters()}
    grouped = [{names[id(x)] for x in group["params"]} for group in groups]
    assert sum(map(len, grouped)) == sum(x.requires_grad for x in found.model.parameters())
    assert all(".lora_" in name or "_head." in name for name in grouped[0])
    assert "backbone.markers.weight" in grouped[1]
    assert all("visual." in name for name in grouped[2] | grouped[3])
    assert "backbone.model.visual.blocks.1.attn.qkv.weight" in grouped[2]
    assert "backbone.model.visual.blocks.1.attn.qkv.bias" in grouped[3]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.01, 0.0]
    assert {group["betas"] for group in groups} == {(0.8, 0.9)}
    for step in range(10):
        factor = learning_rate_factor(step, 10, 0.2, 0.5)
        assert [group["lr"] for group in groups] == pytest.approx([1e-2 * factor] * 2 + [1e-4 * factor] * 2)
        made["optimizer"].step()
        schedule.step()
    assert groups[3]["lr"] == pytest.approx(0.5e-4)


def test_tables_of_a_language_model_do_not_decay():
    found = module(Tuning(vision="full"))
    decayed = {id(x) for x in optimizer(found)["optimizer"].param_groups[0]["params"]}
    names = {name for name, x in found.model.named_parameters() if x.ndim >= 2 and id(x) not in decayed}
    table = "backbone.model.language_model.embed_tokens.weight"
    assert names - {"backbone.frame_pool_attn.weight"} == {
        table, "backbone.markers.weight", "backbone.model.visual.pos_embed.weight"
    }  # fmt: skip


def test_a_learning_rate_can_end_anywhere():
    assert learning_rate_factor(100, 100, 0.1, 0.0) == pytest.approx(0.0)
    assert learning_rate_factor(55, 100, 0.1, 0.2) == pytest.approx(0.2 + 0.8 / 2)
    with pytest.raises(ValueError, match="final_lr is a fraction"):
        RewardModule(nano(), final_lr=2)


def state(model: RewardModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_frozen_tower_makes_no_graph():
    frames = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    for tuning, graph in ((Tuning(), False), (Tuning(vision="last", vision_blocks=1), True)):
        model = qwen3_model()
        tuning.apply(model)
        assert model.backbone.encode(frames).requires_grad == graph


MIXED = [
    {"language": "lora", "lora": LORA},
    {"language": "lora", "lora": LORA, "vision": "lora"},
    {"language": "none"},
    {"language": "lora", "lora": LORA, "vision": "last", "vision_blocks": 1},
    {"language": "full"},
    {"language": "none", "vision": "full"},
]


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("options", MIXED, ids=lambda options: "-".join(map(str, options.values())))
def test_frozen_weights_in_bf16_train_with_and_without_autocast(dot_corpus, options, precision):
    found = module(Tuning(frozen_dtype="bfloat16", gradient_checkpointing=True, **options))
    before = state(found.model)
    data = data_module(found.model, dot_corpus)
    run = trainer(3, precision=precision)
    run.fit(found, datamodule=data)
    after = found.model.state_dict()
    moved = 0
    for name, parameter in found.model.named_parameters():
        assert torch.isfinite(parameter).all()
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            moved += not torch.equal(before[name], after[name])
        else:
            assert parameter.dtype == torch.bfloat16
            assert torch.equal(before[name], after[name])
    trained = [name for name, parameter in found.model.named_parameters() if parameter.requires_grad]
    assert moved > 0.9 * len(trained)  # a bias of a key moves nothing, and the like

    plain = module(Tuning(**options))  # the same run in float32
    exact = trainer(3)
    exact.fit(plain, datamodule=data_module(plain.model, dot_corpus))
    assert run.callbacks[0].losses == pytest.approx(exact.callbacks[0].losses, rel=0.03)
    found.model.eval()
    fit_success(found.model, data)  # without autocast
    assert float(found.model.success_temperature) != 1.0


def gradients(model: RewardModel, corpus: Corpus) -> dict[str, Tensor]:
    data = data_module(model, corpus)
    (order,) = Onward(data.sampler.planner, Share(2), 0, 1)
    batch = data.dataset(data.sampler, Share(2))[order].batch
    reward_losses(model(batch.clips, batch.pairs), batch.targets, batch.counts, LossWeights()).total.backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(dot_corpus):
    found = []
    for on in (False, True):
        model = qwen3_model(dropout=0.0).train()
        torch.manual_seed(1)
        Tuning(language="lora", lora=LORA | {"dropout": 0.0}, gradient_checkpointing=on).apply(model)
        assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules()) == on
        found.append(gradients(model, dot_corpus))
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected)


@pytest.mark.parametrize(
    "options",
    [{"language": "lora", "lora": LORA}, {"language": "lora", "lora": LORA, "vision": "last", "vision_blocks": 1},
     {"language": "none"}],
)  # fmt: skip
def test_an_interrupted_run_continues_as_the_unbroken_one_from_a_small_checkpoint(dot_corpus, tmp_path, options):
    tuning = Tuning(frozen_dtype="bfloat16", **options)

    def run(steps: int | None = None, resume: Path | None = None) -> tuple[RewardModule, L.Trainer]:
        found, going = module(tuning), trainer(6, steps)
        going.fit(found, datamodule=data_module(found.model, dot_corpus), ckpt_path=resume, weights_only=True)
        return found, going

    unbroken, whole = run()
    _, first = run(3)
    last = tmp_path / "last.ckpt"
    first.save_checkpoint(last)
    resumed, second = run(resume=last)
    assert first.callbacks[0].losses + second.callbacks[0].losses == whole.callbacks[0].losses
    expected = unbroken.model.state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in resumed.model.state_dict().items())

    kept = torch.load(last, weights_only=True)["state_dict"]
    names = {f"model.{name}" for name, x in unbroken.model.named_parameters() if x.requires_grad}
    assert kept.keys() - names == {
        "model.success_temperature", "model.success_bias", "model.backbone.frame_pool_attn.weight"
    }  # fmt: skip

    other = module(tuning, qwen3_model(seed=9))
    with pytest.raises(UserError, match="have changed since"):
        trainer(6).fit(other, datamodule=data_module(other.model, dot_corpus), ckpt_path=last, weights_only=True)


def test_what_was_trained_is_saved_small_and_read_back_also_from_a_checkpoint(dot_corpus, tmp_path):
    base = tmp_path / "base"
    qwen3_model(seed=2).save_pretrained(str(base))
    tuning = Tuning(language="lora", lora=LORA, vision="last", vision_blocks=1)
    found = module(tuning, RewardModel.from_pretrained(str(base)))
    run = trainer(3)
    data = data_module(found.model, dot_corpus)
    run.fit(found, datamodule=data)
    model = found.model.eval()
    save_trained(model, tmp_path / "model", {"steps": 3}, str(base))
    assert has_lora(model)
    (order,) = Onward(data.sampler.planner, Share(2), 0, 1)
    clips = data.dataset(data.sampler, Share(2))[order].batch.clips
    read = load_adapter(tmp_path / "model")
    with torch.no_grad():
        for ours, theirs in zip(model.decode(model(clips)), read.decode(read(clips)), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    run.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    kept = {name.removeprefix("model."): x for name, x in checkpoint["state_dict"].items()}
    again = complete(qwen3_model(), kept, "last.ckpt", LORA["alpha"], str(base), checkpoint["left_out"])
    assert all(torch.equal(x, read.state_dict()[name]) for name, x in again.state_dict().items())
    with pytest.raises(UserError, match="does not say what it started from"):
        complete(qwen3_model(), kept, "last.ckpt", LORA["alpha"])


def test_a_run_says_it_in_its_configuration():
    config = compose("train", ["optimization.tuning.language=none", "optimization.tuning.vision=none",
                               "optimization.betas=[0.9,0.999]"])  # fmt: skip
    found = instantiate(config.optimization, model=nano())
    assert found.tuning == Tuning(language="none", vision="none")
    assert found.betas == (0.9, 0.999)
    for option, words in (("language=lora", "nano is none"), ("vision_blocks=2", "nothing else has use for it")):
        config = compose("train", [f"optimization.tuning.{option}"])
        with pytest.raises(UserError, match=words):
            instantiate(config.optimization, model=copy.deepcopy(nano()))


def test_a_whole_run_with_lora_on_a_plain_vision_language_model(dot_corpus, tmp_path):
    base: Any = qwen3_model(seed=4).backbone
    base.model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text(TOKENIZER)
    folder = train(
        compose(
            "train",
            ["model=qwen3_vl", f"model.backbone.base='{tmp_path / 'base'}'", "model.context_frames=4",
             f"run_dir='{tmp_path / 'run'}'", f"data.corpus='{dot_corpus.location}'", "data.workers=0",
             "data.pairs_per_step=2", "data.validation_pairs=2", "data.heldout_tasks=[]", "data.heldout_per_quality=1",
             "data.validation_per_quality=1", "trainer.max_steps=3", "trainer.checkpoint_every=3", "threads=1",
             "trainer.accelerator=cpu", "trainer.precision=bf16-mixed", "optimization.lr=1e-2",
             "optimization.tuning.language=lora", "optimization.tuning.lora.r=4",
             "optimization.tuning.frozen_dtype=bfloat16", "optimization.tuning.gradient_checkpointing=true"],
        )
    )  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {"config.json", LORA_CONFIG, WEIGHTS, "tokenizer.json"}
    found = RewardModel.from_pretrained(str(folder)).state_dict()
    last = RewardModel.from_pretrained(str(tmp_path / "run" / "checkpoints" / "last.ckpt")).state_dict()
    calibration = {"success_temperature", "success_bias"}  # fitted after the last step
    assert all(torch.equal(x, last[name]) for name, x in found.items() if name not in calibration)
    before = base.state_dict(prefix="backbone.")
    moved = {name.rpartition(".")[0].rpartition(".")[2] for name, x in before.items() if
             name.startswith("backbone.model.") and (x.bfloat16() - found[name]).abs().max() > 1e-4}  # fmt: skip
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
