"""The one configuration system: Hydra over `conf/`, which is installed as the package `rbm.conf`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rbm.errors import UserError


def compose(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration `name` of `conf/` with command-line `overrides` such as `data.batch_pairs=8`.

    Raises:
        UserError: a name that does not exist (the message lists those that do), or a bad override.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("rbm.conf", version_base="1.3"):
            config = hydra_compose(name, overrides=list(overrides))
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"configuration {name!r}: {_sentence(error)}") from error
    return config


def instantiate(config: DictConfig, **more: Any) -> Any:
    """The object that `_target_` names, made with the other keys as constructor arguments.

    Raises:
        UserError: an argument that the constructor does not take, or a value that it refuses.
    """
    try:
        return hydra_instantiate(config, _convert_="all", **more)
    except HydraException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"configuration of {config.get('_target_')}: {_sentence(error)}") from error


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts, lists and scalars, to be stored with a checkpoint."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _sentence(error: Exception) -> str:
    cause = error.__cause__
    text = f"{error} {cause}" if cause is not None and str(cause) not in str(error) else str(error)
    words = " ".join(text.split())
    if "Could not override" in words and "Key" in words:
        words += " (see the keys with --cfg)"
    return words
