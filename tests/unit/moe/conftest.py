"""Fixtures of the mixture's tests."""

from tests.support.compiled_kernels import cpu_kernels

__all__ = ["cpu_kernels"]
