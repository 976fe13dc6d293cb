"""Ray shell of a rank that streams its weights: the same worker, with another source of weights."""

from __future__ import annotations

import importlib
from typing import Any

from cluster.base.errors import InternalError
from replicas.worker.actor import WorkerActor
from replicas.worker.plan import WorkerPlan


class OffloadWorkerActor(WorkerActor):
    """One rank of an offload replica; torch is imported where it runs, as in its base."""

    def worker_options(self, plan: WorkerPlan) -> dict[str, Any]:
        """Streamed weights, and kernels and passes that know them; or the maker of the whole rank.

        Raises:
            InternalError: the plan is not one of an offload replica.
        """
        if plan.zero3 is not None:
            zero3 = importlib.import_module("offload.zero3.assembly")
            return {"make_runner": zero3.zero3_runner(plan.zero3)}
        if plan.offload is None:
            raise InternalError("An offload worker got a plan without an offload part.")
        assembly = importlib.import_module("offload.assembly")
        return {
            "weights_factory": assembly.streamed_weights(plan.offload),
            "adapt_kernels": assembly.kernel_adapter(plan.offload),
            "adapt_model": assembly.model_adapter(plan.offload),
        }
