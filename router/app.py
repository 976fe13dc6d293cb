"""The gateway as a Ray Serve deployment: models' text side, directory, handler, both fronts.

Thin: it builds the parts from the plan and starts and stops them. Clients connect to the ports it
opens itself (shared by all gateway replicas of a node), never through Serve's proxy.
"""

from __future__ import annotations

import asyncio
from importlib import metadata
from typing import Any

import ray

from cluster.base import names
from cluster.base.errors import UnavailableError
from cluster.base.ids import new_epoch
from cluster.base.interpreter import settle_for_serving
from cluster.base.log import log_under_ray
from cluster.base.plan import ClusterPlan, from_json
from cluster.base.process_limits import raise_open_files
from replicas.leader.record import ReplicaRecord
from router.access.front_access import FrontAccess
from router.directory import ReplicaDirectory
from router.dispatcher import Dispatcher
from router.gateway_metrics import GatewayMetrics
from router.grpc.server import GrpcFront
from router.handler import GatewayHandler, GatewayIdentity
from router.hop_settings import HopSettings
from router.http.app import build_http_app
from router.http.server import serve_http
from router.listen import listening_socket
from router.measured_handler import MeasuredHandler
from router.policies.prefix_affinity import PrefixAffinity
from router.resume import Move
from router.served_model import serve_models

_CALL_MARGIN_S = 5.0


class RayMembership:
    """`MembershipSource` over the cluster's directory actor."""

    def __init__(self, cluster: str) -> None:
        self._name = names.directory_actor(cluster)
        self._actor: Any = None

    async def watch(self, version: int, timeout_s: float) -> tuple[int, list[ReplicaRecord]]:
        """The directory's records as soon as they differ from `version`.

        Raises:
            UnavailableError: the directory does not answer now.
        """
        try:
            if self._actor is None:
                self._actor = ray.get_actor(self._name, namespace=names.NAMESPACE)
            version, records = await asyncio.wait_for(
                self._actor.watch.remote(version, timeout_s), timeout_s + _CALL_MARGIN_S
            )
        except (ValueError, TimeoutError, ray.exceptions.RayError) as error:
            self._actor = None
            raise UnavailableError(f"The directory does not answer: {error}.") from error
        return version, [from_json(ReplicaRecord, record) for record in records]


class GatewayReplica:
    """One gateway process.

    Args:
        plan: JSON of the `ClusterPlan`.
        dashboard_url: shown by Status.
    """

    # Ray Serve awaits an async constructor; the replica is ready when it has returned.
    async def __init__(  # type: ignore[misc]
        self, plan: dict[str, Any], dashboard_url: str
    ) -> None:
        log_under_ray()
        raise_open_files()
        cluster = from_json(ClusterPlan, plan)
        gateway, self._drain_s = cluster.gateway, cluster.drain_s
        self._access = FrontAccess(gateway)
        self._models = serve_models(cluster.models)
        policy = PrefixAffinity()
        self._directory = ReplicaDirectory(
            RayMembership(cluster.name),
            gateway_id=new_epoch("gateway"),
            hop=HopSettings(),
            on_gone=policy.forget,
        )
        self._handler = GatewayHandler(
            self._models,
            gateway.limits,
            self._directory,
            Dispatcher(self._directory, policy, gateway.limits, self._note_move),
            GatewayIdentity(
                cluster=cluster.name,
                version=metadata.version("penstock"),
                dashboard_url=dashboard_url,
            ),
        )
        self._directory.start()
        self._metrics = GatewayMetrics(self._handler.list_models)
        measured = MeasuredHandler(self._handler, self._metrics)
        self._grpc = GrpcFront(measured, gateway, self._access)
        guard, tls = self._access.guard, self._access.tls
        self._http = await serve_http(
            build_http_app(measured, gateway, self._metrics.registry, guard=guard),
            listening_socket(gateway.host, gateway.http_port, "gateway.http_port"),
            drain_s=cluster.drain_s,
            tls=tls.http if tls else None,
        )
        settle_for_serving()
        await self._grpc.start()
        self._access.start()

    def _note_move(self, move: Move) -> None:
        self._metrics.note_move(move)

    async def reconfigure(self, plan: dict[str, Any]) -> None:
        """Follow another plan: its models, replica counts and limits; Serve's `user_config`.

        Ports and sizes of messages stay. Serve calls this once more after the constructor.
        """
        cluster = from_json(ClusterPlan, plan)
        # Tokenizers of new models are read beside the requests that run.
        self._models = await asyncio.to_thread(serve_models, cluster.models, self._models)
        self._handler.serve(self._models, cluster.gateway.limits)
        self._metrics.follow_models()
        self._drain_s = cluster.drain_s

    async def __del__(self) -> None:
        """Serve is taking this replica down: stop accepting, let running calls finish, leave."""
        await asyncio.gather(self._grpc.stop(self._drain_s), self._http.stop(self._drain_s))
        await self._access.stop()
        await self._directory.close()
