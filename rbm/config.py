"""The one configuration system: Hydra over `conf/`, which is installed as the package `rbm.conf`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from rbm.errors import UserError


def compose(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration `name` of `conf/` with command-line `overrides` such as `data.pairs_per_step=8`.

    Raises:
        UserError: a name that does not exist (the message lists those that do), or a bad override.
    """
    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise UserError(f"{text!r} is no setting: write KEY=VALUE; --cfg shows every key")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("rbm.conf", version_base="1.3"):
            config = hydra_compose(name, overrides=[_quoted(text) for text in overrides])
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"configuration {name!r}: {_sentence(error)}") from error
    return config


def override(key: str, value: object) -> str:
    """`key=value` for Hydra with the value quoted: paths with spaces, commas, apostrophes, letters of any language."""
    # in Hydra's quotes a backslash stands for itself, except before the quote
    text = str(value).replace("\\'", "\\\\'").replace("'", "\\'")
    return f"{key}='{text}'"


def _quoted(text: str) -> str:
    """An override as it was typed, or quoted where Hydra's grammar has no place for it (`run_dir=läufe/1`)."""
    key, equals, value = text.partition("=")
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        return override(key, value) if equals else text
    return text


def instantiate(config: DictConfig, **more: Any) -> Any:
    """The object that `_target_` names, made with the other keys as constructor arguments.

    Raises:
        UserError: an argument that the constructor does not take, or a value that it refuses.
    """
    try:
        return hydra_instantiate(config, _convert_="all", **more)
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        if isinstance(error, MissingMandatoryValue):
            raise UserError(f"the configuration needs a value for {error.full_key}: give it as key=value") from error
        raise UserError(f"configuration of {config.get('_target_')}: {_sentence(error)}") from error


def plain(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain dicts, lists and scalars, to be stored with a checkpoint."""
    container = OmegaConf.to_container(config, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _sentence(error: Exception) -> str:
    """One line of an error of Hydra's, without its search path; the cause alone where there is one."""
    cause = error.__cause__
    if cause is not None and str(cause) and not isinstance(cause, OmegaConfBaseException):
        return " ".join(str(cause).split())
    words = " ".join(str(error).split()).split(" Config search path")[0]
    if "Could not override" in words:
        words = words.split(". To append")[0] + ": no such key; --cfg prints those that there are"
    return words.replace(" Available options in", "; there are, in")
