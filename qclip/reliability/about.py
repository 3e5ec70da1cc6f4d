"""What a model is, in rows: source, recipe, size, and how its arithmetic is computed."""

from __future__ import annotations

from torch import nn

from qclip.results import Results


def about_model(results: Results, label: str, model: nn.Module) -> None:
    """What the model is: source and recipe for all its rows, coverage where it was quantized here, and size."""
    quantization = getattr(model, "qclip_quantization", None)
    described = {"source": str(getattr(model, "qclip_source", "") or "")}
    if quantization is not None:
        recipe = quantization.recipe
        described = {
            "source": quantization.source,
            "recipe": recipe.name,
            "method": recipe.method,
            "bits": recipe.bits,
            "recipe_hash": recipe.hash,
        }
    results.meta.setdefault("models", {})[label] = described
    tensors = {t.data_ptr() or id(t): t for t in (*model.parameters(), *model.buffers())}  # tied weights once
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    results.add(model=label, metric="model_bytes", role="model", value=size, **described)
    if quantization is None:
        return
    coverage = quantization.coverage
    for state, shares in coverage.shares().items():
        for name, counted in (("coverage_macs", "macs"), ("coverage_params", "parameters")):
            value = shares[counted]
            results.add(model=label, metric=name, role="model", axis="state", at=state, value=value, **described)
    for row in coverage.rows:
        activation = "float" if row.activation_bits in (None, 16) else row.activation_bits
        bits = "" if row.weight_bits is None else f"{row.weight_bits}/{activation}"
        results.add(
            **described
            | {
                "model": label,
                "metric": "site_macs",
                "set": row.site,
                "role": "site",
                "axis": "state",
                "at": row.state,
                "backend": row.backend,
                "bits": bits,
                "value": row.macs,
                "n": row.parameters,
            }
        )
