"""Made-up models and machines for the cost model: a few round numbers each."""

from __future__ import annotations

from dataclasses import replace

from offload.model_shape import LayerShape, ModelShape, UnitShape
from offload.rates import GemmPoint, Rates

GB = 10**9


def uniform_model(
    num_layers: int = 40,
    layer_weights: int = 500_000_000,
    *,
    kv_bytes_per_token: int = 100_000,
    fixed_bytes: int = 0,
) -> ModelShape:
    layer = LayerShape(
        base=UnitShape(
            name="layer",
            linear_weights=layer_weights,
            native_bytes=2 * layer_weights,
            int8_bytes=layer_weights * 17 // 16,
            int4_bytes=layer_weights * 9 // 16,
        )
    )
    head = UnitShape(
        name="head",
        linear_weights=0,
        native_bytes=fixed_bytes,
        int8_bytes=fixed_bytes,
        int4_bytes=fixed_bytes,
    )
    return ModelShape(
        layers=(layer,) * num_layers,
        fixed_units=(head,),
        fixed_bytes=fixed_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        attention_flops_per_pair=0,
    )


def machine(
    *,
    disk: float = 3 * GB,
    link: float = 10 * GB,
    flops: float = 100e12,
    memory: float = 1000 * GB,
    dequant: float = 1e15,
) -> Rates:
    points = tuple(GemmPoint(tokens=tokens, flops_per_s=flops) for tokens in (1, 512))
    coded = tuple(
        replace(point, flops_per_s=2 * point.tokens / (point.seconds_per_weight + 1 / dequant))
        for point in points
    )
    return Rates(
        disk_bytes_per_s=disk,
        link_bytes_per_s=link,
        memory_bytes_per_s=memory,
        gemm=points,
        int8_gemm=coded,
        int4_gemm=coded,
        host_memory_bytes_per_s=100 * GB,
    )
