"""`python -m qkernels`: what was built, which tier runs, and a self-check of every tier against the reference. Exit
status 1 if it fails, 2 where the environment names a backend or tier that is not there.
"""

from __future__ import annotations

import sys

import torch

from qkernels import cpu, dispatch, reference
from qkernels.weights import Int4Weight, Int8Weight


def self_check() -> dict[str, str]:
    """Each CPU tier -> "ok", or what differed. Linear maps over odd sizes; results must agree with the reference."""
    generator = torch.Generator().manual_seed(0)
    m, n, k = 37, 131, 203
    x = torch.randint(-127, 128, (m, k), generator=generator, dtype=torch.int8)
    one = torch.ones(())
    matrix = torch.randn(n, k, generator=generator)
    weight8, weight4 = Int8Weight.quantize(matrix, torch.ones(n)), Int4Weight.quantize(matrix, 32, symmetric=False)
    wide8 = Int8Weight(torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8), torch.ones(n), (n, k))
    bound = x.abs().float() @ weight4.dequantize().abs().t()
    before, results = cpu.native.tier(), {}
    for tier in cpu.native.tiers():
        cpu.use_tier(tier)
        failed = []
        for weight in (weight8, wide8):
            if not torch.equal(cpu.int8_linear(x, one, weight.pack("vnni64")), reference.int8_linear(x, one, weight)):
                failed.append("int8_linear")
        got, want = cpu.int4_linear(x, one, weight4.pack("nibble64")), reference.int4_linear(x, one, weight4)
        if not ((got - want).abs() <= 1e-6 * bound + 1e-6).all():
            failed.append("int4_linear")
        tokens = torch.randn(m, k, generator=generator)
        for ours, theirs in zip(cpu.quantize_per_token(tokens), reference.quantize_per_token(tokens), strict=True):
            if not torch.equal(ours, theirs):
                failed.append("quantize_per_token")
        results[tier] = "ok" if not failed else "FAILED: " + ", ".join(sorted(set(failed)))
    cpu.use_tier(before)
    return results


def main() -> int:
    """Print the report; 0 if the self-check passed or there is nothing native to check."""
    try:
        info = dispatch.info()
    except dispatch.SettingError as error:
        print(f"qkernels: {error}", file=sys.stderr)
        return 2
    print(f"torch           {torch.__version__}")
    print(f"native code     {'built' if info['built'] else 'missing: ' + str(info['reason'])}")
    print(f"CUDA kernels    {'built' if info['cuda'] is None else 'missing: ' + info['cuda']}")
    print(f"CPU backend     {info['backend']}")
    print(f"GPU backend     {info['gpu_backend'] or 'none'}{': ' + info['gpu_reason'] if info['gpu_reason'] else ''}")
    if info["forced"]:
        print(f"environment     {' '.join(f'{name}={value}' for name, value in info['forced'].items())}")
    print(f"threads         {info['threads']}")
    if not info["built"]:
        return 0
    print(f"tier            {info['tier']} (of {', '.join(info['tiers'])})")
    print(f"int8 peak       {cpu.peak_gops():.0f} GOPS, registers only")
    results = self_check()
    for tier, result in results.items():
        print(f"self-check      {tier:<11} {result}")
    return 0 if all(result == "ok" for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
