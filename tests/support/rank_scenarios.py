"""What ranks do in the multi-process tests; each function runs on every rank of a group."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch

from cluster.dist.communicator import Communicator
from cluster.dist.torch_communicator import TorchCommunicator
from tests.support.shared_engine import copying_requests, shared_engine
from tests.support.stepping import Stepper


def collectives(communicator: TorchCommunicator) -> dict[str, Any]:
    """Every collective once, on values the test can predict."""
    rank = communicator.rank
    base = torch.arange(6.0).view(2, 3) + 100 * rank
    root = torch.full((3,), float(rank))
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(rank))
    transposed = torch.arange(6.0).view(3, 2).t() * (rank + 1)
    answer = {
        "all_reduce": communicator.all_reduce(torch.full((2,), rank + 1.0)).tolist(),
        "all_reduce_strided": communicator.all_reduce(transposed).tolist(),
        "all_gather_0": communicator.all_gather(base, dim=0).tolist(),
        "all_gather_1": communicator.all_gather(base, dim=1).tolist(),
        "all_gather_last": communicator.all_gather(base).tolist(),
        "contiguous": communicator.all_gather(base).is_contiguous(),
        "broadcast": communicator.broadcast(root, src=1).tolist(),
        "noise": [
            digest(communicator.all_reduce(noise.to(dtype)))
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ],
    }
    communicator.barrier()
    communicator.close()
    communicator.close()
    return answer


def one_rank_dies(communicator: TorchCommunicator) -> None:
    """The last rank exits; the others must notice."""
    communicator.barrier()
    if communicator.rank == communicator.size - 1:
        os._exit(7)
    communicator.all_reduce(torch.ones(4))


def one_rank_sleeps(communicator: TorchCommunicator, seconds: float) -> None:
    """The last rank is too late for a collective."""
    communicator.barrier()
    if communicator.rank == communicator.size - 1:
        time.sleep(seconds)
        return
    communicator.all_reduce(torch.ones(4))


def tiny_models(communicator: Communicator, root: str, prompts: dict[str, list[int]]) -> Any:
    """Greedy tokens and a digest of prefill logits for each checkpoint under `root`."""
    answers = {}
    for name, prompt in prompts.items():
        stepper = Stepper.load(Path(root, name), communicator)
        logits = stepper.step({"probe": prompt})["probe"]
        answers[name] = {
            "tokens": stepper.greedy(prompt, 16),
            "digest": digest(logits),
            "last_row": logits[-1].tolist(),
        }
    return answers


def speculation(communicator: Communicator, root: str) -> Any:
    """What each checkpoint under `root` says to mixed requests with drafts: tokens and counts."""
    answers = {}
    for path in sorted(Path(root).iterdir()):
        engine = shared_engine(path, communicator)
        completions = engine.generate(copying_requests())
        stats = engine.stats
        answers[path.name] = {
            "said": [(c.token_ids, [e.token_id for e in c.logprobs]) for c in completions],
            "drafted": stats.draft_tokens,
            "accepted": stats.accepted_draft_tokens,
        }
    return answers


def digest(tensor: torch.Tensor) -> str:
    """A hash of the exact bits."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
