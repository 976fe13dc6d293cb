"""Activation functions by the name a checkpoint's config gives them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from cluster.base.errors import ConfigError
from replicas.kernels.ops import Kernels

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


def kernel_activation(name: str, kernels: Kernels) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same by a set of kernels, where they have it, on rows (T, F).

    Raises:
        ConfigError: there is no such activation.
    """
    plain = activation(name)
    if plain not in (functional.gelu, _tanh_gelu):
        return plain
    return functools.partial(kernels.gelu, with_tanh=plain is _tanh_gelu)
