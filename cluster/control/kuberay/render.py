"""Plan -> files for `kubectl apply -k`. Equal plans give equal bytes; nothing secret is in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from cluster.base.plan import ClusterPlan
from cluster.control.kuberay import objects
from cluster.control.kuberay.options import RenderOptions
from cluster.control.kuberay.ray_service import ray_service

_HEAD = "# Rendered by `penstock render`; edit the cluster file and render again.\n"


def render(plan: ClusterPlan, options: RenderOptions) -> dict[str, str]:
    """Name -> text of every file, the kustomization first."""
    parts = {
        "rayservice.yaml": [ray_service(plan, options)],
        "services.yaml": objects.services(plan),
        "disruption-budgets.yaml": objects.disruption_budgets(plan),
        "network-policies.yaml": objects.network_policies(plan),
        "models-claim.yaml": objects.models_claim(plan, options),
    }
    parts = {name: found for name, found in parts.items() if found}
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": list(parts),
    }
    return {
        "kustomization.yaml": _text([kustomization]),
        **{name: _text(found) for name, found in parts.items()},
    }


def _text(documents: Sequence[dict[str, Any]]) -> str:
    return _HEAD + "---\n".join(
        yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=100) for document in documents
    )


class _Dumper(yaml.SafeDumper):
    """Multi-line text as a block; no anchors, which some readers of manifests do not know."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


def _block_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block_text)
