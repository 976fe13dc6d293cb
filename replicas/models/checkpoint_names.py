"""Which tensors of a checkpoint a rank's specs name, and which ones nobody does.

Torch-free. Every tensor of the checkpoint has to be used and every one that is needed has to be
there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from cluster.base.errors import CorruptWeightsError
from replicas.layers.weights import WeightUnit
from replicas.models.checkpoint_files import StoredTensor

_BUFFERS = re.compile(
    r"rotary_emb\.inv_freq$|^(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)$"
)  # constants that old checkpoints carry; recomputed, never read
_PREFIXES = (("model.decoder.", "decoder."), ("transformer.", ""), ("model.", ""))
"""Names as a causal-LM class saves them, and as the bare base model does."""


def canonical(
    units: tuple[WeightUnit, ...], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The checkpoint under the names that the specs use."""
    wanted = [source.name for unit in units for spec in unit.tensors for source in spec.sources]
    wanted += [name for unit in units for name in unit.unused]
    used = [prefix for prefix in _PREFIXES if any(name.startswith(prefix[0]) for name in wanted)]
    for full, short in used[:1]:
        if not any(name.startswith(full) for name in stored):
            longer = {short + name.removeprefix(full): name for name in wanted}
            return {longer.get(name, name): tensor for name, tensor in stored.items()}
    return dict(stored)


def check_names(
    root: Path, units: tuple[WeightUnit, ...], stored: Mapping[str, StoredTensor]
) -> None:
    """Every needed name is there and nothing else is."""
    missing: set[str] = set()
    used: set[str] = set()
    for spec in (spec for unit in units for spec in unit.tensors):
        used.update(spec.duplicates)
        for source in spec.sources:
            used.add(source.name)
            if not any(name in stored for name in (source.name, *spec.duplicates)):
                missing.add(source.name)
    unused = [name for unit in units for name in unit.unused]
    used.update(name for name in unused if not name.endswith("."))
    prefixes = tuple(name for name in unused if name.endswith("."))
    unexpected = {
        name
        for name in stored
        if name not in used and not name.startswith(prefixes) and not _BUFFERS.search(name)
    }
    if missing or unexpected:
        complaints = [naming("missing", missing), naming("unexpected", unexpected)]
        raise CorruptWeightsError(
            f"{root}: {'; '.join(filter(None, complaints))}.",
            "Check that config.json belongs to these weights.",
        )


def naming(what: str, names: set[str], shown: int = 8) -> str:
    """`2 missing tensors: a, b`; empty for no names."""
    if not names:
        return ""
    listed = sorted(names)
    rest = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return f"{len(listed)} {what} tensors: {', '.join(listed[:shown])}{rest}"
