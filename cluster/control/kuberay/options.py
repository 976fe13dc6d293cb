"""What a manifest needs to know beside the cluster file: pods, image, where checkpoints are."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from cluster.base.errors import ConfigError

GIB = 1 << 30
RAY_VERSION = "2.60.0"
"""Tells KubeRay which probes the image can answer; the image has this release line of Ray."""


class VolumeKind(enum.StrEnum):
    """Where pods find checkpoints."""

    CLAIM = "pvc"
    HOST_PATH = "hostPath"
    IMAGE = "image"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsVolume:
    """The volume with one directory for each checkpoint.

    Args:
        name: the claim, the path on every node, or the reference of an image. Empty with `CLAIM`:
            a claim that is rendered too.
    """

    kind: VolumeKind
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> ModelsVolume:
        """From `pvc`, `pvc:CLAIM`, `hostPath:/DIRECTORY` or `image:REFERENCE`.

        Raises:
            ConfigError: it is none of these.
        """
        kind, _, name = text.partition(":")
        is_named = bool(name) and (kind != VolumeKind.HOST_PATH or name.startswith("/"))
        if kind not in tuple(VolumeKind) or not (is_named or text == VolumeKind.CLAIM):
            raise ConfigError(
                f"{text!r} is no volume of checkpoints.",
                "Use pvc (a claim is rendered), pvc:CLAIM, hostPath:/DIRECTORY or image:REFERENCE.",
                param="--models",
            )
        return cls(kind=VolumeKind(kind), name=name)

    def source(self, cluster: str) -> dict[str, Any]:
        """The volume as a pod spells it."""
        match self.kind:
            case VolumeKind.CLAIM:
                claim = self.name or claim_name(cluster)
                return {"persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
            case VolumeKind.HOST_PATH:
                return {"hostPath": {"path": self.name, "type": "Directory"}}
            case VolumeKind.IMAGE:
                return {"image": {"reference": self.name, "pullPolicy": "IfNotPresent"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderOptions:
    """How pods look; sizes are of one pod of an engine."""

    image: str
    models: ModelsVolume = ModelsVolume(kind=VolumeKind.CLAIM)
    models_dir: str = "/models"
    cpus: int = 4
    memory_bytes: int = 16 * GIB
    gpus: int = 0
    gpu_memory_bytes: int = 80 * GIB
    gpu_resource: str = "nvidia.com/gpu"
    max_replicas: int = 8
    """Most replicas of a model that pods can be made for without another Ray cluster."""


def claim_name(cluster: str) -> str:
    """The rendered claim."""
    return f"{cluster}-models"
