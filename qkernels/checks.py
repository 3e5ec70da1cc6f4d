"""What the ops ask of their arguments. Every refusal is one sentence: the op, the argument, what it is, what it
should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import ACTIVATIONS, ESTIMATORS, FLOATS, GROUP, INTEGERS, MAX_K, OFFSET, WEIGHT_GROUPS, WIDEST, Epilogue
from .layouts import vnni64_bytes
from .weights import Int4Weight, Int8Weight


def tensor(
    op: str,
    name: str,
    value: Any,
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
    owner: str = "x",
) -> Tensor:
    """A dense tensor of one of `dtypes`, on `device`, which is that of `owner`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device} but {owner} is on {device}; move one of them")
    return value


def rows(op: str, name: str, value: Any, dtypes: Sequence[torch.dtype]) -> Tensor:
    """`[..., K]` with K >= 1."""
    tensor(op, name, value, dtypes)
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must have shape [..., K] with K >= 1, got {tuple(value.shape)}")
    return value


def patch(op: str, x: Tensor, height: int, width: int) -> None:
    """A patch that fits into x of shape `[B, C, H, W]`, C >= 1."""
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(f"{op}: x must have shape [B, C, H, W] with C >= 1, got {tuple(x.shape)}")
    if not (1 <= height <= x.shape[2] and 1 <= width <= x.shape[3]):
        raise ValueError(f"{op}: a patch of {height} x {width} does not fit into x of shape {tuple(x.shape)}")


def pair(op: str, name: str, value: Any) -> tuple[int, int]:
    """Height and width, from two integers or one for both."""
    sizes = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, tuple | list) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        raise TypeError(f"{op}: {name} must be one integer or two (height, width), got {value!r}")
    return sizes[0], sizes[1]


def vector(
    op: str, name: str, value: Any, size: int, device: torch.device, dtype: torch.dtype | None = torch.float32
) -> Tensor | None:
    """Float `[size]`, contiguous and of `dtype` (None: its own), or None."""
    if value is None:
        return None
    tensor(op, name, value, FLOATS, device)
    if value.dim() != 1 or value.shape[0] != size:
        raise ValueError(f"{op}: {name} must have shape ({size},), got {tuple(value.shape)}")
    return (value if dtype is None or value.dtype is dtype else value.to(dtype)).contiguous()


def number(op: str, name: str, value: Any) -> float:
    """A Python number, as a float."""
    if not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    return float(value)


def flag(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")
    return value


def scalar(op: str, name: str, value: Any, device: torch.device) -> Tensor | None:
    """A number or a tensor of one element as float32 `[]` on `device`, or None."""
    if value is None:
        return None
    if isinstance(value, int | float):
        return torch.full((), float(value), dtype=torch.float32, device=device)
    tensor(op, name, value, (*FLOATS, *INTEGERS), device)
    if value.numel() != 1:
        raise ValueError(f"{op}: {name} must be one number for the whole tensor, got shape {tuple(value.shape)}")
    value = value.float()
    return value if value.dim() == 0 else value.reshape(())


def zero_point(op: str, value: Any, scale: Any, device: torch.device) -> Tensor | None:
    """A whole number as float32 `[]`, only together with a scale, or None."""
    if value is None:
        return None
    if scale is None:
        raise ValueError(f"{op}: zero_point is for static quantization; give scale as well, or leave both out")
    found = scalar(op, "zero_point", value, device)
    assert found is not None
    # Beyond it every code is the last one, and float32 has no whole numbers between.
    return found.clamp(-WIDEST, WIDEST) if getattr(value, "itemsize", 4) >= 4 else found


def whole(op: str, value: Any, when: str = "") -> None:
    """Raises TypeError unless the zero point, where one is given, is of an integer type."""
    if isinstance(value, float) or (isinstance(value, Tensor) and value.dtype not in INTEGERS):
        kind = value.dtype if isinstance(value, Tensor) else "float"
        raise TypeError(f"{op}: zero_point must be an integer{when}, got {kind}")


def outputs(
    op: str, out: Any, specs: Sequence[tuple[Sequence[int], torch.dtype]], device: torch.device
) -> list[Tensor]:
    """`out=` as a list that fits the op's results, contiguous."""
    given = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple | list) else None
    if given is None or len(given) != len(specs) or not all(isinstance(target, Tensor) for target in given):
        wanted = "a tensor" if len(specs) == 1 else f"{len(specs)} tensors"
        raise TypeError(f"{op}: out must be {wanted}, got {type(out).__name__}")
    for target, (shape, dtype) in zip(given, specs, strict=True):
        if target.dtype != dtype or tuple(target.shape) != tuple(shape) or target.device != device:
            raise ValueError(
                f"{op}: out must be {str(dtype).removeprefix('torch.')} of shape {tuple(shape)} on {device}, "
                f"got {str(target.dtype).removeprefix('torch.')} of shape {tuple(target.shape)} on {target.device}"
            )
        if not target.is_contiguous():
            raise ValueError(f"{op}: out of shape {tuple(shape)} must be contiguous, got strides {target.stride()}")
    return given


def apart(op: str, out: Sequence[Tensor], args: Sequence[Any], name: str = "out") -> None:
    """Refuse an out (called `name`) that shares memory with an argument or another out, which is read meanwhile."""
    taken = [(*_span(value), value.device, "an argument") for value in args if isinstance(value, Tensor)]
    for target in out:
        begin, end = _span(target)
        for start, stop, device, owner in taken:
            if begin < stop and start < end and target.device == device:
                raise ValueError(
                    f"{op}: {name} of shape {tuple(target.shape)} overlaps {owner} in memory; give it memory of its own"
                )
        taken.append((begin, end, target.device, "the other out"))


def _span(value: Tensor) -> tuple[int, int]:
    """The addresses between which the values lie."""
    if value.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()


def x_scale(op: str, x: Tensor, value: Any) -> Tensor:
    """Activation scales as contiguous float32: `[]`, a row `[...]`, or 128 inputs of a row `[..., ceil(K/128)]`."""
    if isinstance(value, int | float):
        return torch.full((), float(value), dtype=torch.float32, device=x.device)
    tensor(op, "x_scale", value, (torch.float32,), x.device)
    rows = x.shape[:-1]
    if value.shape == rows:
        return value.contiguous()
    groups = (*rows, -(-x.shape[-1] // GROUP))
    if tuple(value.shape) == groups:
        return value.contiguous()
    if value.numel() != 1:
        raise ValueError(
            f"{op}: x_scale of shape {tuple(value.shape)} does not fit x of shape {tuple(x.shape)}; "
            f"it must be one number, {tuple(rows)} or {groups}"
        )
    return value.reshape(())


def weight(op: str, value: Any, kind: type[Int8Weight] | type[Int4Weight]) -> None:
    """A weight of `kind` whose buffers have the sizes that its shape and layout say: kernels read without looking."""
    if not isinstance(value, kind):
        name = kind.__name__
        raise TypeError(f"{op}: weight must be an {name}, got {type(value).__name__}; make one with {name}.quantize")
    sizes = _int8_codes(value) if isinstance(value, Int8Weight) else _int4_codes(op, value)
    if sizes is None:
        raise ValueError(f"{op}: weight has the unknown layout {value.layout!r}; make it with {kind.__name__}.pack")
    _buffer(op, value, "codes", value.codes, *sizes)
    n, k = value.shape
    if isinstance(value, Int8Weight):
        return _buffer(op, value, "scales", value.scales, torch.float32, (n,))
    groups = -(-k // value.group)
    shape = (-(-n // 64), groups, 64) if value.layout == "nibble64" else (n, groups)
    _buffer(op, value, "scales", value.scales, torch.float16, shape)
    if value.zeros is not None:
        _buffer(op, value, "zeros", value.zeros, torch.float16, shape)


def _int8_codes(weight: Int8Weight) -> tuple[torch.dtype, tuple] | None:
    """Dtype and shape of the codes in the weight's layout, None where there is no such layout."""
    n, k = weight.shape
    if weight.layout == "vnni64":
        return torch.uint8, (vnni64_bytes(n, k),)
    if weight.layout == "rows16":
        return torch.int8, (n, -(-k // 16) * 16)
    return (torch.int8, (n, k)) if weight.layout == "canonical" else None


def _int4_codes(op: str, weight: Int4Weight) -> tuple[torch.dtype, tuple] | None:
    """As `_int8_codes`."""
    n, k = weight.shape
    if weight.group != k and weight.group not in WEIGHT_GROUPS:
        raise ValueError(f"{op}: weight has groups of {weight.group}; they must be 32, 64, 128 or K = {k}")
    if weight.layout == "nibble64":
        return torch.uint8, (256 * -(-n // 64) * -(-k // 8),)
    if weight.layout == "halves128":
        return torch.uint8, (n, -(-k // 128) * 64)
    return (torch.uint8, (n, -(-k // 2))) if weight.layout == "canonical" else None


def _buffer(op: str, weight: Int8Weight | Int4Weight, name: str, buffer: Any, dtype: torch.dtype, shape: tuple) -> None:
    if not isinstance(buffer, Tensor) or buffer.layout != torch.strided:
        tensor(op, f"weight.{name}", buffer, (getattr(buffer, "dtype", None),))  # type: ignore[arg-type]  # refuses it
    if buffer.dtype != dtype or buffer.shape != shape or buffer.device != weight.codes.device:
        raise ValueError(
            f"{op}: weight of shape {tuple(weight.shape)} in layout {weight.layout!r} must have {dtype} {name} of "
            f"shape {shape}, got {buffer.dtype} of shape {tuple(buffer.shape)}"
        )


def epilogue(op: str, x: Tensor, weight: Int8Weight | Int4Weight, given: Epilogue) -> Epilogue:
    """Checked and in the form that backends take (`contract.Epilogue`)."""
    bias, activation, residual, out_scale, out_zero_point, out_group, out_dtype = given
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(
            f"{op}: x of shape {tuple(x.shape)} does not fit a weight of shape {(n, k)}; its last axis must be {k}"
        )
    if k > MAX_K:
        raise ValueError(f"{op}: K = {k} is over {MAX_K}, where a 32-bit accumulator could overflow; split the weight")
    if weight.codes.device != x.device:
        raise ValueError(f"{op}: weight is on {weight.codes.device} but x is on {x.device}; move one of them")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {activation!r}; known: None, {', '.join(map(repr, ACTIVATIONS))}")
    if out_dtype not in FLOATS:
        raise TypeError(
            f"{op}: out_dtype must be float32, bfloat16 or float16, got {out_dtype}; "
            "for int8 give out_scale or out_group"
        )
    if out_group is not None and (out_group != GROUP or out_scale is not None):
        raise ValueError(f"{op}: out_group must be {GROUP} and excludes out_scale, got {out_group}")
    bias = vector(op, "bias", bias, n, x.device, None)
    if residual is not None:
        tensor(op, "residual", residual, FLOATS, x.device)
        shape = (*x.shape[:-1], n)
        if tuple(residual.shape) != shape:
            raise ValueError(f"{op}: residual must have shape {shape}, got {tuple(residual.shape)}")
        residual = residual.contiguous()
    zero = zero_point(op, out_zero_point, out_scale, x.device)
    if isinstance(out_scale, Tensor) and out_scale.numel() != 1:
        out_scale = vector(op, "out_scale", out_scale, n, x.device)
    else:
        out_scale = scalar(op, "out_scale", out_scale, x.device)
    return Epilogue(
        bias=bias,
        activation=activation,
        residual=residual,
        out_scale=out_scale,
        out_zero_point=zero,
        out_group=out_group,
        out_dtype=out_dtype,
    )


def fake_quantize_scale(
    op: str, x: Tensor, scale: Any, axis: int | None, group: int | None
) -> tuple[Tensor, int | None]:
    """The scale as contiguous float32 (its gradient flows through the cast), and a non-negative axis."""
    if not isinstance(scale, Tensor):
        scale = torch.full((), number(op, "scale", scale), dtype=torch.float32, device=x.device)
    tensor(op, "scale", scale, FLOATS, x.device)
    for name, value in (("axis", axis), ("group", group)):
        if value is not None and not isinstance(value, int):
            raise TypeError(f"{op}: {name} must be an integer or None, got {value!r}")
    if axis is not None and group is not None:
        raise ValueError(f"{op}: axis and group exclude each other; groups run along the last axis")
    if group is not None:
        if x.dim() == 0 or group < 1:
            raise ValueError(
                f"{op}: group must be at least 1 and x at least one-dimensional, got {group} and {tuple(x.shape)}"
            )
        wanted: tuple = (*x.shape[:-1], -(-x.shape[-1] // group))
        if tuple(scale.shape) != wanted:
            raise ValueError(f"{op}: with groups of {group}, scale must have shape {wanted}, got {tuple(scale.shape)}")
    elif axis is not None:
        if not -x.dim() <= axis < x.dim():
            raise ValueError(f"{op}: axis {axis} is not an axis of x of shape {tuple(x.shape)}")
        axis = axis % x.dim()
        if scale.dim() != 1 or scale.shape[0] != x.shape[axis]:
            raise ValueError(
                f"{op}: with axis {axis}, scale must have shape ({x.shape[axis]},), got {tuple(scale.shape)}"
            )
    elif scale.numel() != 1:
        raise ValueError(
            f"{op}: scale of shape {tuple(scale.shape)} needs axis or group; without them it is one number"
        )
    return scale.float().contiguous(), axis


def estimator(op: str, name: Any, qmin: Any, qmax: Any, delta: float) -> None:
    """A known estimator, a range of codes that float32 holds exactly, and a delta that the estimator knows."""
    if name not in ESTIMATORS:
        raise ValueError(f"{op}: unknown estimator {name!r}; known: {', '.join(map(repr, ESTIMATORS))}")
    if not (isinstance(qmin, int) and isinstance(qmax, int) and -WIDEST <= qmin < qmax <= WIDEST):
        raise ValueError(f"{op}: qmin and qmax must be integers with qmin < qmax within 2^23, got {qmin} and {qmax}")
    if name != "ewgs" and delta != 0:
        raise ValueError(f"{op}: delta has no meaning for estimator {name!r}; leave it at 0")
    if not 0 <= delta < float("inf"):
        raise ValueError(f"{op}: delta must be at least 0 and finite, got {delta}")


def fake_quantize_zero_point(op: str, scale: Tensor, value: Any, estimator: str) -> Tensor | None:
    """The zero point, or the offset (its gradient flows through), as contiguous float32 of the scale's shape; None
    where there is none."""
    if estimator in ("pact", "dorefa"):
        if value is not None and not (isinstance(value, int) and value == 0):
            raise ValueError(f"{op}: estimator {estimator!r} has no zero_point; leave it at None")
        return None
    if value is None:
        return None
    if isinstance(value, int | float):
        return torch.full(scale.shape, float(value), dtype=torch.float32, device=scale.device)
    tensor(op, "zero_point", value, FLOATS if estimator in OFFSET else (*FLOATS, *INTEGERS), scale.device)
    if value.numel() != 1 and value.shape != scale.shape:
        raise ValueError(f"{op}: zero_point must have the scale's shape {tuple(scale.shape)}, got {tuple(value.shape)}")
    value = value.float()
    return (value.reshape(()) if value.numel() == 1 else value).expand(scale.shape).contiguous()
