"""How long a step will take and how long it takes to plan one: when to plan on top of a step.

A plan made late honours more of what happened meanwhile; one made too late lets the workers wait.
The forecast is on the early side: mean less twice the mean deviation, both exponentially weighted
as in RFC 6298 (2.3), over steps of similar size. Where the workers say early enough that a step is
nearly done, their sign is the moment, for nothing is surer; the forecast only stands in when it
fails to come. Memory is bounded by the number of size classes.

Whether that was early enough, the workers tell: how long they stood idle before a step. On a busy
machine the leader's thread gets its turn later than it can see itself; it then plans earlier, as
far as the idle time is worth it: a request that comes after the plan waits for one step more.
"""

from __future__ import annotations

from dataclasses import dataclass

from replicas.engine.step_source import PlannedStep

_MEAN_GAIN = 1 / 8
_DEVIATION_GAIN = 1 / 4
# Waking up and handing the plan to the ranks, neither of which can be measured from here.
_LEAST_MARGIN_S = 0.3e-3
_MOST_MARGIN_S = 3e-3
# A plan that is there takes less to receive.
_LATE_S = 50e-6
# What lies above is a stall of the machine, which no plan could have been made early enough for.
_MOST_LOST_S = 1e-3
_LOST_SHARE = 0.005
_MARGIN_GAIN = 1 / 4

# A step that should have given its sign by so many of its mean durations.
_SIGN_LATE = 2.0

_SizeClass = tuple[int, int]


@dataclass(slots=True)
class _Estimate:
    mean_s: float
    deviation_s: float

    def add(self, value_s: float) -> None:
        error_s = value_s - self.mean_s
        self.deviation_s += _DEVIATION_GAIN * (abs(error_s) - self.deviation_s)
        self.mean_s += _MEAN_GAIN * error_s


class StepForecast:
    """Learns from finished steps. Durations are seconds."""

    def __init__(self) -> None:
        self._durations: dict[_SizeClass, _Estimate] = {}
        self._signs: dict[_SizeClass, _Estimate] = {}
        self._planning = _Estimate(0.2e-3, 0.0)
        self._margin_s = _LEAST_MARGIN_S

    def plan_after_s(self, plan: PlannedStep) -> float:
        """From the start of this step to the moment to plan the next; 0 when that is unknown."""
        size_class = _size_class(plan)
        duration = self._durations.get(size_class)
        if duration is None:
            return 0.0
        planning = self._planning
        latest_s = planning.mean_s + 2 * planning.deviation_s + self._margin_s
        sign = self._signs.get(size_class)
        if sign is not None and sign.mean_s - sign.deviation_s >= latest_s:
            return _SIGN_LATE * duration.mean_s
        return max(0.0, duration.mean_s - 2 * duration.deviation_s - latest_s)

    def ends_after_s(self, plan: PlannedStep) -> float:
        """From the start of this step to the earliest end that is likely; 0 when unknown."""
        duration = self._durations.get(_size_class(plan))
        if duration is None:
            return 0.0
        return max(0.0, duration.mean_s - 2 * duration.deviation_s)

    def add_step(self, plan: PlannedStep, duration_s: float, sign_s: float = 0.0) -> None:
        """Learn from a step; with the link's time in it, waiting would feed itself.

        `sign_s` as in `StepOutput`.
        """
        size_class = _size_class(plan)
        for known, value_s in ((self._durations, duration_s), (self._signs, sign_s)):
            if size_class in known:
                known[size_class].add(value_s)
            else:
                known[size_class] = _Estimate(value_s, value_s / 4)

    def add_idle(self, idle_s: float, duration_s: float) -> None:
        """Learn from how long workers waited for the plan of a step that was planned in advance.

        The margin goes to where they lose half a hundredth of their time: it grows with what they
        lost and shrinks with what they may lose. So a short step is planned upon early, which costs
        a newcomer little, and a long one late, which costs the workers little.

        Args:
            duration_s: of the step.
        """
        lost_s = min(idle_s, _MOST_LOST_S) if idle_s > _LATE_S else 0.0
        self._margin_s += _MARGIN_GAIN * (lost_s - _LOST_SHARE * duration_s)
        self._margin_s = min(max(self._margin_s, _LEAST_MARGIN_S), _MOST_MARGIN_S)

    def add_planning(self, duration_s: float) -> None:
        """From waking up to the next plan's hand-over."""
        self._planning.add(duration_s)


def _size_class(plan: PlannedStep) -> _SizeClass:
    """Steps with as many tokens and requests, to a factor of two."""
    num_tokens, num_requests = plan.heaviest
    return num_tokens.bit_length(), num_requests.bit_length()
