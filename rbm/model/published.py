"""Robometer's checkpoints in the two layouts in which they are published: read and written.

    layout       config                                      weights
    `robometer`  config.json (transformers) and config.yaml  shards; model.language_model.*, model.visual.*, heads
    `lerobot`    config.json with "type": "robometer"        one file; the backbone one level deeper (model.model.*),
                                                             its tied embedding table only as model.lm_head.weight

The heads' names are the same in both. Source of the facts: arXiv 2603.02115, huggingface.co/robometer/Robometer-4B,
huggingface.co/lerobot/Robometer-4B.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from rbm.errors import UserError
from rbm.model.backbones import backbone_class
from rbm.model.backbones.vlm import VisionLanguageBackbone, without_random_weights
from rbm.model.heads import PROGRESS_BINS
from rbm.model.prompt import PUBLISHED, PUBLISHED_WITH_PROGRESS, Prompt
from rbm.model.reward_model import RewardModel
from rbm.model.tokens import TOKENIZER
from rbm.model.weights import State, fill, listed, read_folder, read_text, write_folder

log = logging.getLogger(__name__)

SETTINGS = "config.yaml"
LEROBOT_TYPE = "robometer"
BASE = "Qwen/Qwen3-VL-4B-Instruct"
BACKBONES = ("qwen3_vl", "qwen2_5_vl")
POOLINGS = {"mean": "mean", "boundary": "last", "last": "last", "attention": "attention"}
TABLE = "language_model.embed_tokens.weight"
POOL = "frame_pool_attn.weight"
OURS_ALONE = ("backbone.markers.weight", "success_temperature", "success_bias")
"""Tensors that the published layouts hold elsewhere, or not at all."""


@dataclass(frozen=True)
class Settings:
    """What a published checkpoint says of itself; the defaults are those of the released weights."""

    base: str = BASE
    tokens: bool = True
    pictures: bool = True
    pooling: str = "mean"
    pool_temperature: float = 1.0
    progress_loss: str = "discrete"
    bins: int = PROGRESS_BINS
    pair_progress: bool = True
    frames: int = 8

    @classmethod
    def of_yaml(cls, path: Path) -> Settings:
        """From config.yaml, the training configuration beside the first layout."""
        try:
            found = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(found, dict):
            raise UserError(f"{path} does not hold a training configuration")
        model, data, training = ({**(found.get(part) or {})} for part in ("model", "data", "training"))
        return cls._of({**data, **model}, training.get("predict_pref_progress", True), data.get("max_frames"))

    @classmethod
    def of_lerobot(cls, config: Mapping[str, Any]) -> Settings:
        return cls._of(config, True, config.get("max_frames"))

    @classmethod
    def _of(cls, model: Mapping[str, Any], pair_progress: bool, frames: int | None) -> Settings:
        return cls(
            base=model.get("base_model_id") or BASE,
            tokens=bool(model.get("use_per_frame_progress_token", True)),
            pictures=bool(model.get("use_multi_image", True)),
            pooling=model.get("frame_pooling") or "mean",
            pool_temperature=float(model.get("frame_pooling_attn_temperature") or 1.0),
            progress_loss=model.get("progress_loss_type") or "discrete",
            pair_progress=bool(pair_progress),
            frames=int(frames or 8),
        )


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a published reward model, in either layout."""
    return config.get("type") == LEROBOT_TYPE or "RBM" in (config.get("architectures") or [])


def load_published(folder: Path, config: Mapping[str, Any]) -> RewardModel:
    """Read a published checkpoint; its tokenizer comes from the folder, or else from its base model.

    Raises:
        UserError: keys are missing or unknown (they are listed), a head has another size than the configuration
            says, a file is truncated, or the model is of a kind that is not read here.
    """
    lerobot = config.get("type") == LEROBOT_TYPE
    if lerobot:
        settings, architecture = Settings.of_lerobot(config), dict(config.get("vlm_config") or {})
    else:
        if not (folder / SETTINGS).is_file():
            log.warning("%s has no %s: taken for a model like the released one", folder, SETTINGS)
        settings = Settings.of_yaml(folder / SETTINGS) if (folder / SETTINGS).is_file() else Settings()
        architecture = dict(config)
    if not settings.pictures:
        raise UserError(
            f"{folder} feeds its frames as a video (use_multi_image: false): only models that read pictures can be used"
        )
    state = read_folder(folder)
    model = _empty(folder, architecture, settings, _bins(folder, settings, state))
    _fill(model, state, lerobot, str(folder))
    return model


def _bins(folder: Path, settings: Settings, state: State) -> int:
    """Outputs of the progress head: what the weights have, if that fits the configuration."""
    last = state.get("progress_head.4.weight")
    if last is None:
        return PROGRESS_BINS  # it will be listed as missing
    out = len(last)
    discrete = settings.progress_loss == "discrete"
    if discrete == (out == 1):
        wanted = "several bins" if discrete else "one output"
        raise UserError(
            f"{folder}: the progress head has {out} outputs, but progress_loss_type {settings.progress_loss!r} needs "
            f"{wanted}: the configuration belongs to other weights"
        )
    return out


def _empty(folder: Path, architecture: dict[str, Any], settings: Settings, bins: int) -> RewardModel:
    kind = architecture.get("model_type")
    if kind not in BACKBONES:
        raise UserError(f"{folder}: a published model over {kind!r} is not read here, only {' and '.join(BACKBONES)}")
    if not settings.tokens and settings.pooling not in POOLINGS:
        raise UserError(f"{folder}: frame_pooling {settings.pooling!r} is unknown; there are {', '.join(POOLINGS)}")
    words = PUBLISHED_WITH_PROGRESS if settings.pair_progress else PUBLISHED
    if not settings.tokens:
        words = Prompt.of(vars(words) | {"frame": ""})
    backbone = backbone_class(kind)
    assert issubclass(backbone, VisionLanguageBackbone)
    with without_random_weights():
        return RewardModel(
            backbone(
                architecture,
                _tokenizer(folder, settings),
                words,
                pooling="token" if settings.tokens else POOLINGS[settings.pooling],
                pool_temperature=settings.pool_temperature,
                base=settings.base,
            ),
            context_frames=max(2, settings.frames),
            pair="causal",
            preference="joint",
            target="clip_relative",
            progress_bins=bins,
        )


def _tokenizer(folder: Path, settings: Settings) -> str:
    if (folder / TOKENIZER).is_file():
        return read_text(folder / TOKENIZER)
    from rbm.model.hub import fetch

    base = Path(settings.base) if Path(settings.base).is_dir() else fetch(settings.base, ["tokenizer*"])
    if not (base / TOKENIZER).is_file():
        raise UserError(f"neither {folder} nor its base model {settings.base} has a {TOKENIZER}")
    return read_text(base / TOKENIZER)


def published_name(name: str, lerobot: bool) -> str:
    """What a tensor of ours is called in a published layout."""
    if not name.startswith("backbone."):
        return name
    name = name.removeprefix("backbone.")
    return f"model.{name}" if lerobot and name.startswith("model.") else name


def _fill(model: RewardModel, state: State, lerobot: bool, what: str) -> None:
    backbone = model.backbone
    assert isinstance(backbone, VisionLanguageBackbone)
    own = model.state_dict()
    names = {name: published_name(name, lerobot) for name in own if name not in OURS_ALONE}
    table = published_name(f"backbone.model.{TABLE}", lerobot)
    for alias in ("lm_head.weight", "model.lm_head.weight"):  # tied to the embedding table, under either name
        if alias in state:
            state.setdefault(table, state[alias])
            del state[alias]
    if POOL not in state and backbone.pooling != "attention":
        state[POOL] = torch.zeros(1, backbone.hidden)  # nobody reads it
    missing, unknown = sorted(set(names.values()) - state.keys()), sorted(state.keys() - set(names.values()))
    if missing or unknown:
        raise UserError(f"{what} is not complete: missing keys {listed(missing)}, unknown keys {listed(unknown)}")
    found = {name: state[theirs] for name, theirs in names.items()}
    rows = found[f"backbone.model.{TABLE}"]
    if max(backbone.words.markers) >= len(rows):
        raise UserError(
            f"{what}: the embedding table has {len(rows)} rows and the tokenizer {len(backbone.words)} tokens: the "
            "tokenizer is not the one that the model was trained with"
        )
    found["backbone.markers.weight"] = rows[backbone.words.markers]
    found["success_temperature"], found["success_bias"] = torch.ones(()), torch.zeros(())
    fill(model, found, what)


def save_published(model: RewardModel, folder: Path, layout: str) -> None:
    """Write `model` in the layout `robometer` or `lerobot`.

    Temperature and bias of the success head, which these layouts do not have, go into its last layer.

    Raises:
        UserError: the layout cannot hold this model.
    """
    backbone = _expressible(model)
    if backbone.resize == "device":
        log.warning("published models are given frames that Pillow has resized: scores will differ by about 1e-4")
    lerobot = layout == "lerobot"
    state = {
        published_name(name, lerobot): x.detach() for name, x in model.state_dict().items() if name not in OURS_ALONE
    }
    table = published_name(f"backbone.model.{TABLE}", lerobot)
    rows = state[table].new_zeros(len(backbone.words), backbone.hidden)
    kept = min(len(rows), len(state[table]))
    rows[:kept] = state[table][:kept]
    rows[backbone.words.markers] = backbone.markers.weight.detach().to(rows.dtype)
    state[table] = rows
    temperature, bias = float(model.success_temperature), float(model.success_bias)
    if (temperature, bias) != (1.0, 0.0):
        log.info("temperature and bias of the success head go into its last layer")
        state["success_head.4.weight"] = state["success_head.4.weight"] / temperature
        state["success_head.4.bias"] = state["success_head.4.bias"] / temperature + bias
    dtype = str(rows.dtype).removeprefix("torch.")
    architecture = backbone.architecture
    architecture["model_type"] = backbone.name
    architecture["text_config"] = _both_rope_forms(architecture["text_config"]) | {"vocab_size": len(rows)}
    settings = _settings(model, backbone)
    texts = {TOKENIZER: backbone.words.to_str()}
    if lerobot:
        state["model.lm_head.weight"] = state.pop(table)
        texts["config.json"] = _json(_lerobot_config(architecture, settings, dtype))
        write_folder(folder, state, texts, shard="1TB", metadata={table: "model.lm_head.weight"})
    else:
        texts["config.json"] = _json(architecture | {"architectures": ["RBM"], "dtype": dtype})
        texts[SETTINGS] = yaml.safe_dump(_yaml_config(settings, dtype), sort_keys=True)
        write_folder(folder, state, texts)


def _expressible(model: RewardModel) -> VisionLanguageBackbone:
    backbone = model.backbone
    problems = []
    if not isinstance(backbone, VisionLanguageBackbone) or backbone.name not in BACKBONES:
        raise UserError(f"published layouts hold models over {' or '.join(BACKBONES)}, not over {backbone.name}")
    if model.pair != "causal" or model.preference != "joint":
        problems.append(f"its pairs are {model.pair} with a {model.preference} preference (published: causal, joint)")
    words = {
        Prompt.of(vars(known) | {"frame": backbone.prompt.frame}) for known in (PUBLISHED, PUBLISHED_WITH_PROGRESS)
    }
    if backbone.prompt not in words:
        problems.append("its prompt is another")
    if backbone.views or backbone.view_tags == "embedding":
        problems.append("its steps show several views, or views with vectors of their own")
    if model.target != "clip_relative":
        problems.append("its progress counts from the start of the trajectory (published: from that of the clip)")
    if model.remaining:
        problems.append("it has a head for the time that remains")
    if problems:
        raise UserError(f"published layouts cannot hold this model: {'; '.join(problems)}")
    return backbone


def _settings(model: RewardModel, backbone: VisionLanguageBackbone) -> Settings:
    return Settings(
        base=backbone.base or BASE,
        bins=model.progress_bins if model.progress_bins > 1 else PROGRESS_BINS,
        tokens=backbone.pooling == "token",
        pooling={"token": "mean", "last": "boundary"}.get(backbone.pooling, backbone.pooling),
        pool_temperature=backbone.pool_temperature,
        progress_loss="discrete" if model.progress_bins > 1 else "l2",
        pair_progress=backbone.prompt.pair == PUBLISHED_WITH_PROGRESS.pair,
        frames=model.context_frames,
    )


def _model_settings(settings: Settings, dtype: str) -> dict[str, Any]:
    return {
        "base_model_id": settings.base,
        "torch_dtype": dtype,
        "use_multi_image": settings.pictures,
        "use_per_frame_progress_token": settings.tokens,
        "average_temporal_patches": False,
        "frame_pooling": settings.pooling,
        "frame_pooling_attn_temperature": settings.pool_temperature,
        "progress_loss_type": settings.progress_loss,
        "progress_discrete_bins": settings.bins,
    }


def _yaml_config(settings: Settings, dtype: str) -> dict[str, Any]:
    return {
        "model": _model_settings(settings, dtype),
        "data": {"max_frames": settings.frames, "progress_loss_type": settings.progress_loss, "use_multi_image": True},
        "loss": {"progress_loss_type": settings.progress_loss, "progress_discrete_bins": settings.bins},
        "training": {"predict_pref_progress": settings.pair_progress},
    }


def _lerobot_config(architecture: dict[str, Any], settings: Settings, dtype: str) -> dict[str, Any]:
    image = "observation.images.top"
    return {
        "type": LEROBOT_TYPE,
        "image_key": image,
        "task_key": "task",
        "max_frames": settings.frames,
        "reward_output": "progress",
        **_model_settings(settings, dtype),
        "vlm_config": architecture,
        "input_features": {image: {"type": "VISUAL", "shape": [3, 224, 224]}},
        "output_features": {name: {"type": "REWARD", "shape": [1]} for name in ("progress", "success")},
        "normalization_mapping": {"VISUAL": "IDENTITY", "REWARD": "IDENTITY"},
    }


def _both_rope_forms(text: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`, 4.57 reads `rope_theta` and `rope_scaling`: say both."""
    rope = dict(text.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None)
    return dict(text) | ({"rope_theta": theta, "rope_scaling": rope} if theta is not None else {})


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
