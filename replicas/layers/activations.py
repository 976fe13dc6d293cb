"""Activation functions by the name a checkpoint's config gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from cluster.base.errors import ConfigError

_tanh_gelu = functools.partial(functional.gelu, approximate="tanh")

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    # The same function; transformers writes the first out in elementary operations.
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": functional.relu,
}


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The elementwise function called `name`.

    Raises:
        ConfigError: there is no such activation.
    """
    if name not in _ACTIVATIONS:
        raise ConfigError(
            f"There is no activation {name!r}.", f"Use one of {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[name]
