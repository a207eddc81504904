"""Losses and regularizers of one's own, named ``module:Class`` in the recipe."""

from __future__ import annotations

import importlib

from torch import nn


def build_custom(where: str, name: str, model: nn.Module) -> nn.Module:
    """Return ``Class(model)``; ``where`` is the recipe's key, for messages.

    Raises ValueError where the module or class is not there, the class needs more than the model, or is no torch module.
    """
    module_name, _, class_name = name.partition(":")
    try:
        made_by = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise ValueError(f"{where} = {name!r}: cannot import {module_name} ({error}); put its folder on PYTHONPATH") from error
    except AttributeError as error:
        raise ValueError(f"{where} = {name!r}: {module_name} has no {class_name}; expected module:Class") from error
    try:
        made = made_by(model)
    except TypeError as error:
        raise ValueError(f"{where} = {name!r}: {class_name}(model) fails ({error}); give every other argument a default") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{where} = {name!r}: is a {type(made).__name__}, expected a subclass of torch.nn.Module")
    return made
