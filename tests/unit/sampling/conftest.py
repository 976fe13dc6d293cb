"""Compiled kernels, where the machine can build them."""

from tests.support.compiled_kernels import cpu_kernels

__all__ = ["cpu_kernels"]
