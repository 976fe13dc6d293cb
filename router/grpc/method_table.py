"""Methods by path, filled by the generated `add_...Servicer_to_server` functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Method: TypeAlias = Any
"""A `grpc.RpcMethodHandler` of coroutines; its published types know only blocking ones."""


class MethodTable:
    """Stands where generated code expects a server; only registered methods are served."""

    def __init__(self) -> None:
        self._methods: dict[bytes, Method] = {}

    def find(self, path: bytes) -> Method | None:
        """The method at `/package.Service/Method`."""
        return self._methods.get(path)

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, Method]
    ) -> None:
        """See `grpc.Server`."""
        for name, method in method_handlers.items():
            self._methods[f"/{service_name}/{name}".encode()] = method

    def add_generic_rpc_handlers(self, handlers: Sequence[object]) -> None:
        """Generated code registers every method by name as well; these are not needed."""
