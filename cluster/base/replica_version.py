"""Which replicas are alike: a digest of what each is built from.

Equal ones need no new processes, and a stream may go on from one to the other: they compute the
same tokens.
"""

from __future__ import annotations

import hashlib
import json

from cluster.base.plan import ModelPlan, to_json

_NOT_OF_A_REPLICA = ("replicas", "tool_call_parser", "overflow", "reasons", "nodes")


def replica_version(model: ModelPlan) -> str:
    """The digest, for each replica of a model."""
    fields = to_json(model)
    for name in _NOT_OF_A_REPLICA:
        del fields[name]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]
