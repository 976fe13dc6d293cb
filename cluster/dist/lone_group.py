"""torch's default process group for a process that is alone, for libraries that insist on one.

Nothing of ours communicates over it: it listens on no port and its collectives return at once.
"""

from __future__ import annotations

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from cluster.base.env import set_lone_rank


def ensure_lone_group() -> None:
    """Make the group, unless this process has it already."""
    if not dist.is_initialized():
        set_lone_rank()
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
