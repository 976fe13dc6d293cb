"""What a model's ranks compute with: settings that cannot be kept or change nothing are refused.

Whether a node has a compiler, and whether a backend takes a model's heads, its ranks find out: they
end with the same kind of error.
"""

from __future__ import annotations

from cluster.base.errors import ConfigError
from cluster.planner.decisions import Decision, DeviceChoice
from cluster.planner.sources import ModelSource

_DEVICE_OF = {"cpu_paged": "cpu", "cpu": "cpu", "triton_paged": "cuda", "flashinfer": "cuda"}
_COMPILED_DTYPES = ("float32", "bfloat16")


def refuse_kernels(source: ModelSource, device: DeviceChoice, dtype: Decision[str]) -> None:
    """Check `kernels` and `attention_backend` of a model whose device and dtype are decided.

    Raises:
        ConfigError: one of them contradicts the device, the dtype or the other.
    """
    spec = source.spec
    if spec.kernels == "native" and device.device == "cpu" and dtype.value not in _COMPILED_DTYPES:
        raise ConfigError(
            f"kernels: native cannot compute in {dtype.value} on cpu.",
            f"Set dtype to {' or '.join(_COMPILED_DTYPES)}, or kernels to auto or torch.",
            param=source.param("kernels"),
        )
    if spec.kernels == "torch" and spec.quantization == "fp8":
        raise ConfigError(
            "kernels: torch cannot make the products of quantization: fp8.",
            "Leave one of them out.",
            param=source.param("kernels"),
        )
    wanted = _DEVICE_OF.get(spec.attention_backend, device.device)
    why = ""
    if wanted != device.device:
        why = f"runs on {wanted}, and the ranks on {device.device}"
    elif spec.attention_backend == "cpu_paged" and spec.kernels == "torch":
        why = "is one of the compiled kernels, which kernels: torch does without"
    if why:
        raise ConfigError(
            f"attention_backend: {spec.attention_backend} {why}.",
            "Use attention_backend: auto.",
            param=source.param("attention_backend"),
        )


def refuse_foreign_kernels(source: ModelSource) -> None:
    """Neither key has an effect on a model that transformers computes.

    Raises:
        ConfigError: one of them is set.
    """
    spec = source.spec
    for key, value in (("kernels", spec.kernels), ("attention_backend", spec.attention_backend)):
        if value != "auto":
            raise ConfigError(
                f"{key}: {value} has no effect: transformers computes this model.",
                f"Leave {key} out.",
                param=source.param(key),
            )


def kernel_reasons(source: ModelSource, device: DeviceChoice) -> dict[str, str]:
    """What `auto` means where it is not for the planner to decide."""
    spec, on_cpu = source.spec, device.device == "cpu"
    native = "compiled on each rank's node at first use" if on_cpu else "Triton's"
    first = "cpu_paged with compiled kernels, else cpu" if on_cpu else "triton_paged"
    return {
        "kernels": f"{native}, torch's where those cannot be" if spec.kernels == "auto" else "",
        "attention_backend": (
            f"{first}; torch_ref where none takes the model's heads"
            if spec.attention_backend == "auto"
            else ""
        ),
    }
