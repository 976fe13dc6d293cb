"""The frontier of a streamed model as a drawing: tokens per second against time per token, SVG.

Both axes are logarithmic, because batches double. No library: an SVG is text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from cluster.base.plan import ModelPlan, SpeedPoint
from cluster.planner.explain_streaming import format_text, held_text, micro_batch_text, seconds_text

WIDTH, HEIGHT = 720, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 30, 50, 60


def frontier_svg(model: ModelPlan) -> str:
    """The drawing of one model that has a predicted speed."""
    speed = model.speed
    if speed is None:
        raise ValueError(f"{model.name} is not streamed")
    points = sorted({*speed.frontier, speed.chosen}, key=lambda point: point.tpot_s)
    x = _scale([point.tpot_s for point in points], _LEFT, WIDTH - _RIGHT)
    y = _scale([point.tokens_per_s for point in points], HEIGHT - _BOTTOM, _TOP)
    body = [
        *_frame(f"{escape(model.name)}: tokens per second against time per token"),
        *_ticks([point.tpot_s for point in points], x, seconds_text, horizontal=True),
        *_ticks([point.tokens_per_s for point in points], y, "{:.3g}".format, horizontal=False),
        _line(speed.frontier, x, y),
        *(_mark(point, x, y, chosen=point == speed.chosen) for point in points),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, *body, "</svg>"]) + "\n"


def _scale(values: Sequence[float], start: float, stop: float) -> Callable[[float], float]:
    """Logarithmic, with a little air at both ends."""
    low, high = math.log(min(values)) - 0.1, math.log(max(values)) + 0.1
    return lambda value: start + (math.log(value) - low) / (high - low) * (stop - start)


def _frame(title: str) -> Iterator[str]:
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    yield f'<text x="{_LEFT}" y="28" font-size="16">{title}</text>'
    yield (
        f'<path d="M{_LEFT} {_TOP}V{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}" fill="none" stroke="#444"/>'
    )
    yield f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">time per token</text>'
    yield (
        f'<text transform="translate(18 {HEIGHT / 2}) rotate(-90)" '
        'text-anchor="middle">tokens per second</text>'
    )


def _ticks(
    values: Sequence[float],
    scale: Callable[[float], float],
    text: Callable[[float], str],
    *,
    horizontal: bool,
) -> Iterator[str]:
    """Labels at both ends and in the middle."""
    low, high = min(values), max(values)
    for value in sorted({low, math.sqrt(low * high), high}):
        at = scale(value)
        if horizontal:
            place = f'x="{at:.1f}" y="{HEIGHT - _BOTTOM + 18}" text-anchor="middle"'
        else:
            place = f'x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end"'
        yield f"<text {place}>{text(value)}</text>"


def _line(
    points: Sequence[SpeedPoint], x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    corners = " ".join(f"{x(p.tpot_s):.1f},{y(p.tokens_per_s):.1f}" for p in points)
    return f'<polyline points="{corners}" fill="none" stroke="#2a6fb0" stroke-width="2"/>'


def _mark(
    point: SpeedPoint,
    x: Callable[[float], float],
    y: Callable[[float], float],
    *,
    chosen: bool,
) -> str:
    at_x, at_y = x(point.tpot_s), y(point.tokens_per_s)
    words = (
        f"{point.rows} requests, {point.resident_layers} resident layers, "
        f"{held_text(point.held_bytes)} held of records, "
        f"{format_text(point.precision, point.compression)}, "
        f"{micro_batch_text(point.micro_batch_tokens)} at a time, cache {point.kv_home}"
    )
    colour, radius = ("#c0392b", 6) if chosen else ("#2a6fb0", 4)
    return (
        f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="{radius}" fill="{colour}">'
        f"<title>{words}, {point.tokens_per_s:.3g} tokens/s, {seconds_text(point.tpot_s)}, "
        f"bound by {point.bound}</title></circle>"
        f'<text x="{at_x + 8:.1f}" y="{at_y - 6:.1f}">{point.rows}</text>'
    )
