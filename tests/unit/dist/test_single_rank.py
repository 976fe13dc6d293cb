"""The axis of one rank."""

from __future__ import annotations

import torch

from cluster.dist.communicator import Communicator, SingleRank


def test_every_collective_is_the_identity() -> None:
    communicator: Communicator = SingleRank()
    tensor = torch.arange(4.0)
    assert (communicator.rank, communicator.size) == (0, 1)
    assert communicator.all_reduce(tensor) is tensor
    assert communicator.all_gather(tensor, dim=0) is tensor
    assert communicator.broadcast(tensor) is tensor
    communicator.barrier()
    communicator.close()
    communicator.close()
