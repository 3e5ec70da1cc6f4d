"""Static activation scales: one per tensor, the one with the least squared error on the calibration samples."""

from __future__ import annotations

from .. import calibration
from .base import Context, Method


class StaticScales(Method):
    name = "static"

    def run(self, context: Context) -> None:
        plans, states = context.plans, context.states
        sites = [site for site in context.quantized_sites() if plans[site.name].static]
        smooth = {site.shared: s for site in sites if (s := states[site.name].smooth) is not None}
        scales = calibration.static_scales(
            context.encoders,
            context.towers,
            context.need_samples(),
            sites,
            smooth,
            lambda site: plans[site.name].activation_bits,
            context.progress,
        )
        for site in sites:
            states[site.name].input_scale = scales[site.shared]
