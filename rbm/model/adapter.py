"""LoRA: low-rank additions to the matrices of a vision-language model, and what was trained as a small folder.

An adapter's folder holds what its base does not:

    config.json                ours, with the entry `adapter`: the base, and how to know that it is still the same
    adapter_config.json        LoRA's, as peft writes it
    adapter_model.safetensors  LoRA's matrices and every other tensor that was trained, under peft's names
    tokenizer.json             the tokenizer

It is read as the plain model with the matrices added up. The sums are made in float64, so that every machine gets the
same weights.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rbm.errors import UserError
from rbm.model.backbones import backbone_class
from rbm.model.checkpoint import CONFIG, FORMAT, as_dtype, describe, described, empty, load
from rbm.model.reward_model import RewardModel
from rbm.model.weights import State, fill, listed, read_file, read_json, read_text, write_folder

WEIGHTS, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""What peft writes before every name."""
NAME = "default"
"""peft's name of the only adapter of a model."""
BASE = "backbone.model."
"""Where the weights stand that come from the base."""
SAMPLED = 64
"""Values of each tensor that the fingerprint looks at."""


def add_lora(
    model: RewardModel,
    r: int = 32,
    alpha: int = 64,
    dropout: float = 0.05,
    language: bool = True,
    vision: bool = False,
) -> None:
    """Put LoRA into all linear layers of the language model and of the vision tower, in place.

    A layer x -> W x becomes W x + alpha / r · B A x, A random and B zero: nothing changes yet. A and B are float32 and
    trained, the pretrained weights are frozen, and heads and markers stay as they are.

    Raises:
        ValueError: numbers that make no sense. UserError: the backbone is no vision-language model, or has LoRA.
    """
    if not (isinstance(r, int) and r >= 1 and alpha > 0 and 0 <= dropout < 1):
        raise ValueError(
            f"LoRA needs r ≥ 1, alpha > 0 and 0 ≤ dropout < 1, not r={r}, alpha={alpha}, dropout={dropout}"
        )
    backbone: Any = model.backbone
    if not hasattr(backbone, "language"):
        raise UserError(f"LoRA is for vision-language models, {backbone.name} is none: train it as a whole")
    if has_lora(model):
        raise UserError("the model has LoRA already")
    from peft import LoraConfig, inject_adapter_in_model

    chosen = [part for part, wanted in ((backbone.language, language), (backbone.tower, vision)) if wanted]
    inside = {id(module) for part in chosen for module in part.modules() if isinstance(module, nn.Linear)}
    targets = [name for name, module in model.named_modules() if id(module) in inside]
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    own = [x for name, x in model.named_parameters() if not name.startswith(BASE) and x.requires_grad]
    inject_adapter_in_model(config, model, NAME)
    for parameter in own:
        parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    model.train(model.training)


def has_lora(model: RewardModel) -> bool:
    return any(".lora_A." in name for name, _ in model.named_parameters())


def merge_lora(model: RewardModel) -> None:
    """Add LoRA to the matrices that it stands beside, in place: the architecture is the plain one again.

    Weights of several precisions all become float32, in which each keeps its value.
    """
    if not has_lora(model):
        return
    layers = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
    with torch.no_grad():
        for name, layer in layers:
            base = layer.get_base_layer()
            low, high = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            merged = _merged(base.weight, low, high, layer.scaling[NAME])
            base.weight = nn.Parameter(merged, requires_grad=False)
            model.set_submodule(name, base)
    del model.peft_config
    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        model.float()


def _merged(weight: Tensor, low: Tensor, high: Tensor, scaling: float) -> Tensor:
    """W + scaling · B A, float32: weight (out, in), low A (r, in), high B (out, r)."""
    added = high.detach().double() @ low.detach().double() * scaling
    return (weight.detach().double() + added).float()


def save_trained(
    model: RewardModel, folder: str | os.PathLike[str], facts: dict[str, Any] | None, base: str | None
) -> None:
    """Write a model at the end of its training: with LoRA an adapter's folder, else a whole model.

    Without a base (random weights) LoRA is merged, in place. Weights of several precisions are written as float32.

    Args:
        base: what training started from: a folder or an id on the hub, of a plain vision-language model or of a reward
            model.

    Raises:
        UserError: the folder cannot be written.
    """
    if has_lora(model) and base is not None:
        save_adapter(model, folder, base, facts)
        return
    merge_lora(model)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    write_folder(folder, uniform(state), model.backbone.files() | {CONFIG: described(model, facts)})


def save_adapter(
    model: RewardModel, folder: str | os.PathLike[str], base: str, facts: dict[str, Any] | None = None
) -> None:
    """Write what was trained; `base` as in `save_trained`. Each file appears whole or not at all.

    What has gradients on counts as trained, and all that the base does not have.

    Raises:
        UserError: the model has no LoRA, or the folder cannot be written.
    """
    if not has_lora(model):
        raise UserError("the model has no LoRA: save it as a whole")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept: State = {}
    replaced: list[str] = []
    frozen: State = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or not name.startswith(BASE):
            kept[PREFIX + plain_name(name)] = tensor
        elif name in trained:
            replaced.append(plain_name(name))
            kept[PREFIX + plain_name(name)] = tensor
        else:
            frozen[plain_name(name)] = tensor
    precisions = {tensor.dtype for tensor in frozen.values() if tensor.is_floating_point()}
    entry = {
        "base": os.path.abspath(base) if os.path.exists(base) else base,
        "fingerprint": fingerprint(frozen),
        "dtype": str(precisions.pop()).removeprefix("torch.") if len(precisions) == 1 else None,
        "replaced": sorted(replaced),
    }
    description = json.loads(described(model, facts)) | {"adapter": entry}
    layers = sorted(name for name, layer in model.named_modules() if hasattr(layer, "lora_A"))
    lora = {name: sorted(value) if isinstance(value, set) else value for name, value in _lora_config(model).items()}
    lora |= {"target_modules": layers, "base_model_name_or_path": entry["base"], "inference_mode": True}
    texts = model.backbone.files() | {LORA_CONFIG: _json(lora), CONFIG: _json(description)}
    _write(Path(folder), kept, texts)


def load_adapter(folder: str | os.PathLike[str]) -> RewardModel:
    """Read what `save_adapter` wrote, on top of its base: a plain model, LoRA merged, float32 if precisions differ.

    Raises:
        UserError: the base cannot be had or is not what the adapter was trained on, keys are missing or unknown (they
            are listed), a file is missing or truncated.
    """
    source = Path(folder)
    description, lora = describe(source), read_json(source / LORA_CONFIG)
    entry = description.get("adapter")
    if not isinstance(entry, dict) or not isinstance(entry.get("base"), str):
        raise UserError(
            f"{source / CONFIG} does not describe an adapter: the entry 'adapter' with its 'base' is missing"
        )
    try:
        alpha, layers = float(lora["lora_alpha"]), [str(name) for name in lora["target_modules"]]
        replaced = [str(name) for name in entry.get("replaced", [])]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source / LORA_CONFIG} is no configuration of LoRA: {error!r}") from error
    if Path(entry["base"]).exists() and Path(entry["base"]).resolve() == source.resolve():
        raise UserError(f"{source / CONFIG} names its own folder as its base: say where the base model is")
    texts = (path for path in sorted(source.glob("*.json")) if path.name not in (CONFIG, LORA_CONFIG))
    model = empty(description["model"], {path.name: read_text(path) for path in texts})
    kept = {name.removeprefix(PREFIX): tensor for name, tensor in read_file(source / WEIGHTS).items()}
    _check_names(model, kept, layers, replaced, str(source / WEIGHTS))

    return complete(
        model, kept, str(source), alpha, entry["base"], str(entry.get("fingerprint")), entry.get("dtype")
    ).eval()


def complete(
    model: RewardModel,
    state: Mapping[str, Tensor],
    what: str,
    alpha: float = 0.0,
    base: str | None = None,
    base_fingerprint: str | None = None,
    base_dtype: str | None = None,
) -> RewardModel:
    """Fill a plain model with what training left: LoRA is merged, and what is lacking comes from the base.

    Args:
        model: a plain one, filled in place.
        state: tensors under their names in a model with LoRA or in an adapter file.
        what: the place that they come from, for messages.
        alpha: of LoRA, where there is any.
        base: as in `base_weights`; needed where something is lacking.
        base_fingerprint: fingerprint of what is lacking.
        base_dtype: precision to which the base was rounded when it was trained on.

    Raises:
        UserError: the base cannot be had or is not the same any more, or keys or shapes do not fit.
    """
    named = {plain_name(name): tensor for name, tensor in state.items()}
    lacking = model.state_dict().keys() - named.keys()
    if lacking:
        if base is None:
            raise UserError(f"{what} leaves out what was not trained, and does not say what it started from")
        found = base_weights(base, model.backbone.name, what)
        taken = {name: found[name] for name in lacking & found.keys()}
        if fingerprint(taken) != base_fingerprint:
            raise UserError(
                f"{what} was trained on other weights than {base} holds now: bring back the base as it was, or say "
                f"where it is (in an adapter's folder under adapter.base in {CONFIG})"
            )
        if base_dtype is not None:
            kind = as_dtype(base_dtype)
            taken = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in taken.items()}
        named |= taken
    fill(model, uniform(merged_state(named, alpha, what)), what)
    return model


def _check_names(model: RewardModel, found: State, layers: Iterable[str], replaced: Iterable[str], what: str) -> None:
    own = {name for name in model.state_dict() if not name.startswith(BASE)}
    expected = own | set(replaced) | {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    missing, unknown = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if missing or unknown:
        raise UserError(
            f"{what} does not fit its configuration: missing keys {listed(missing)}, unknown keys {listed(unknown)}"
        )


def plain_name(name: str) -> str:
    """A tensor's name without the signs that LoRA in a model leaves in it; LoRA's own as in adapter files."""
    if ".lora_" in name:
        return name.replace(f".{NAME}.weight", ".weight")
    return name.replace(".base_layer.", ".")


def merged_state(state: Mapping[str, Tensor], alpha: float, what: str) -> State:
    """A state with LoRA in it (names of the model or of an adapter file) as that of the plain model.

    Raises:
        UserError: a half of a pair is missing, its layer is, or shapes do not fit.
    """
    named = {plain_name(name): tensor for name, tensor in state.items()}
    merged = {name: tensor for name, tensor in named.items() if ".lora_" not in name}
    for layer in sorted({name.split(".lora_")[0] for name in named if ".lora_" in name}):
        names = (f"{layer}.weight", f"{layer}.lora_A.weight", f"{layer}.lora_B.weight")
        missing = [name for name in names if name not in named]
        if missing:
            raise UserError(f"{what}: LoRA is not complete: missing keys {listed(missing)}")
        weight, low, high = (named[name] for name in names)
        if (high.shape[0], low.shape[1]) != tuple(weight.shape) or high.shape[1] != low.shape[0]:
            raise UserError(
                f"{what}: LoRA of {layer} has shapes {tuple(low.shape)} and {tuple(high.shape)}, which do not fit "
                f"{tuple(weight.shape)}: it belongs to another model"
            )
        merged[names[0]] = _merged(weight, low, high, alpha / low.shape[0])
    return merged


def base_weights(base: str, kind: str, what: str) -> State:
    """The weights of a base's backbone, under their names in a reward model (`backbone.…`).

    Args:
        base: folder, file or hub id of a plain vision-language model, or of a reward model of any layout.
        kind: name of the backbone.
        what: stands on it, for messages.

    Raises:
        UserError: the base cannot be had, or is another kind of model.
    """
    from rbm.model.backbones.vlm import found_base

    try:
        place = Path(base) if Path(base).exists() else found_base(base)
        backbone: Any = backbone_class(kind)
        if _is_plain(place):
            found = backbone.read_base(str(place)).model.state_dict(prefix=BASE)
        else:
            model = load(place)
            if model.backbone.name != kind:
                raise UserError(f"it is a reward model over {model.backbone.name}, not over {kind}")
            found = model.backbone.state_dict(prefix="backbone.")
    except UserError as error:
        raise UserError(
            f"{what} stands on {base}, which cannot be used ({error}); if it has moved, "
            f"correct adapter.base in {CONFIG}"
        ) from error
    return State(found)


def _is_plain(place: Path) -> bool:
    """Whether this is a vision-language model without heads."""
    if not (place / CONFIG).is_file():
        return False
    from rbm.model.published import is_published

    config = read_json(place / CONFIG)
    return config.get("format") != FORMAT and not is_published(config)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Of names, shapes, and at most `SAMPLED` values of each tensor, evenly spread and rounded to bfloat16.

    So it costs little, and the precision in which the weights are held does not matter.
    """
    digest = blake2b(digest_size=16)
    for name in sorted(weights):
        values = weights[name].detach().flatten()
        digest.update(f"{name} {tuple(weights[name].shape)}\n".encode())
        count = min(SAMPLED, len(values))
        chosen = torch.arange(count, device=values.device) * len(values) // max(count, 1)
        digest.update(values[chosen].to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def uniform(state: State) -> State:
    """Floating tensors as float32, if they are of several precisions; single numbers do not count."""
    if len({tensor.dtype for tensor in state.values() if tensor.is_floating_point() and tensor.ndim}) < 2:
        return state
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _lora_config(model: RewardModel) -> dict[str, Any]:
    kept: Any = model.peft_config
    return dict(kept[NAME].to_dict())


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write(target: Path, state: State, texts: Mapping[str, str]) -> None:
    """Weights, then texts, config.json last: a reader never finds half an adapter."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as scratch:
            for name, text in texts.items():
                Path(scratch, name).write_text(text)
            part = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            save_file(part, Path(scratch, WEIGHTS), metadata={"format": "pt"})
            shutil.copymode(Path(scratch, CONFIG), Path(scratch, WEIGHTS))  # safetensors makes it private
            for name in [WEIGHTS, *sorted(texts, key=lambda name: name == CONFIG)]:
                os.replace(Path(scratch, name), target / name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the adapter to {target}: {error}") from error
