"""A device that is none: tensors elsewhere than on the CPU, whose numbers the host cannot look at.

Its tensors say that they are on `meta` and hold CPU tensors inside, so everything is computed for
real. What makes a CUDA host wait for its device is refused: reading a number, a copy that is not
told to go on in the background, anything whose shape depends on values. Mixing both kinds is too.
What is read back shows only when its mark was waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount")
_POISON = -(2**40)


class HostWaitsError(AssertionError):
    """The host would have waited for the device."""


class PretendTensor(torch.Tensor):
    """Lives on the device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} outside of `pretend_device`")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.held.shape}, {self.held.dtype})"

    # The kernels take a weight on `meta` for one that was packed away.
    is_meta = property(lambda self: False)  # type: ignore[assignment]


class PretendMark:
    """Done when it was waited for, and so is what came before."""

    def __init__(self, device: PretendDevice, at: int) -> None:
        self._device, self._at = device, at

    @property
    def is_done(self) -> bool:
        return self._device.passed >= self._at

    def wait(self) -> None:
        self._device.pass_(self._at)

    def seconds_since(self, earlier: PretendMark) -> float:
        assert self.is_done
        assert earlier.is_done
        return float(self._at - earlier._at)


class PretendDevice(TorchDispatchMode):
    """Implements `AsyncDevice`; to be entered by whoever uses it.

    Args:
        strict: refuse what makes the host wait; else it is counted.
    """

    def __init__(self, *, strict: bool) -> None:
        super().__init__()
        self.strict = strict
        self.num_waits = 0
        self.num_ahead = 0
        self.passed = 0
        self._given = 0
        self._unread: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def mark(self) -> PretendMark:
        self._given += 1
        return PretendMark(self, self._given)

    def read_back(self, tensor: torch.Tensor) -> torch.Tensor:
        assert isinstance(tensor, PretendTensor)
        host = torch.full(tensor.shape, _POISON, dtype=tensor.dtype)
        self._unread.append((self._given + 1, host, tensor.held.clone()))
        return host

    def pass_(self, at: int) -> None:
        self.num_ahead += at < self._given - 1
        self.passed = max(self.passed, at)
        for due, host, values in self._unread:
            if due <= at:
                host.copy_(values)
        self._unread = [entry for entry in self._unread if entry[0] > at]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        ours = [t for t in tensors if isinstance(t, PretendTensor)]
        name = func.overloadpacket.__name__
        target = kwargs.get("device")
        moves = name == "_to_copy" and target is not None
        if ours or moves:
            self._judge(name, args, kwargs, ours, tensors)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        wraps = target == DEVICE if target is not None else bool(ours)
        known = {id(t.held): t for t in ours}
        result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))

        def outside(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not wraps:
                return value
            return known[id(value)] if id(value) in known else PretendTensor(value)

        return tree_map(outside, result)

    def _judge(
        self,
        name: str,
        args: Any,
        kwargs: dict[str, Any],
        ours: list[PretendTensor],
        tensors: list[torch.Tensor],
    ) -> None:
        moves = name in ("_to_copy", "copy_")
        by_mask = name.startswith("index") and any(
            isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8)
            for t in (args[1] if isinstance(args[1], (list, tuple)) else ())
        )
        crosses = name == "_to_copy" and (kwargs.get("device") == DEVICE) != bool(ours)
        crosses |= name == "copy_" and 0 < len(ours) < len(tensors)
        blocks = moves and not kwargs.get("non_blocking", len(args) > 2 and args[2])
        if name in _LOOKS or by_mask or (crosses and (blocks or not _towards(ours, args))):
            self.num_waits += 1
            if self.strict:
                raise HostWaitsError(name)
        if not moves and any(t.dim() for t in tensors if not isinstance(t, PretendTensor)):
            raise AssertionError(f"{name} mixes tensors of the host and the device")


def _towards(ours: list[PretendTensor], args: Any) -> bool:
    """Whether a copy goes to the device."""
    return not ours or (len(args) > 1 and isinstance(args[0], PretendTensor))


def _inside(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


@contextmanager
def pretend_device(*, strict: bool = True) -> Iterator[PretendDevice]:
    """The device, for the length of a `with` block."""
    with PretendDevice(strict=strict) as device:
        yield device
