"""The driver's calls to the coordinator, which block until the coordinator has answered.

Invariant: a failure of the train workers arrives here as `PeerFailed` with its reason, whichever call meets it.
"""

from __future__ import annotations

from typing import Any, Generic, Protocol, TypeVar

from aft_ray.cluster.colocated_placement import WorkerPlacement
from aft_ray.coordination.coordinator import OfferedVersion, call

Manifest = TypeVar("Manifest", bound=OfferedVersion)


class CallCoordinator(Protocol):
    """Calls a method of `coordination.coordinator.Coordinator` by name and returns its value."""

    def __call__(self, method: str, *arguments: Any) -> Any: ...


class CoordinatorClient(Generic[Manifest]):
    """What the driver asks of the coordinator of a run. A simulation gives it a coordinator without an actor."""

    def __init__(self, call_coordinator: CallCoordinator) -> None:
        self._call = call_coordinator

    @classmethod
    def of_actor(cls, actor: Any) -> CoordinatorClient[Manifest]:
        """The client of a coordinator that runs as a Ray actor."""
        return cls(lambda method, *arguments: call(getattr(actor, method), *arguments))

    def publish(self, manifest: Manifest) -> None:
        """Offers a version to the samplers."""
        self._call("publish", manifest)

    def wait_version(self, version: int, timeout_s: float) -> tuple[Manifest, float]:
        """The newest version once it is at least `version`, and the seconds waited. Raises PeerFailed."""
        manifest, waited_s = self._call("wait_version", version, timeout_s)
        return manifest, waited_s

    def is_durable(self, version: int) -> bool:
        """Whether the model directory of a version is complete."""
        return bool(self._call("is_durable", version))

    def wait_durable(self, version: int, timeout_s: float) -> None:
        """Waits until the model directory of a version is complete. Raises PeerFailed."""
        self._call("wait_durable", version, timeout_s)

    def set_ready(self, round_number: int) -> None:
        """Tells the train workers that every group of the round is in the ledger."""
        self._call("set_ready", round_number)

    def wait_gpus_released(self, round_number: int, timeout_s: float) -> list[WorkerPlacement]:
        """Where the train workers run, once all of them have released their GPUs before a round. Raises PeerFailed.

        The GPUs are the samplers' until `return_gpus`.
        """
        placements: list[WorkerPlacement] = self._call("wait_gpus_released", round_number, timeout_s)
        return placements

    def end_samplers_turn(self) -> None:
        """Lets no further process of a sampler use the shared GPUs."""
        self._call("end_samplers_turn")

    def samplers_on_gpus(self) -> dict[int, str]:
        """The samplers whose processes have begun to use the shared GPUs, and the nodes of these processes."""
        samplers: dict[int, str] = self._call("samplers_on_gpus")
        return samplers

    def return_gpus(self) -> None:
        """Gives the shared GPUs back to the train workers."""
        self._call("return_gpus")

    def drain_events(self) -> list[dict[str, Any]]:
        """The events that train workers have sent since the last call."""
        events: list[dict[str, Any]] = self._call("drain")
        return events

    def check(self) -> None:
        """Raises PeerFailed when training has failed."""
        self._call("check")

    def fail(self, reason: str) -> None:
        """Ends every wait of the train workers with this reason."""
        self._call("fail", reason)
