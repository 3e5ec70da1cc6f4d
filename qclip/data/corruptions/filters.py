"""Filters and resampling on planes: float32 tensors `[C, H, W]`, values in 0..1. Each says what it assumes outside."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Border = Literal["nearest", "mirror"]  # the outermost pixel again; the image back to front, outermost pixel included


def planes(image: NDArray[np.floating[Any]]) -> Tensor:
    """`[H, W]` or `[H, W, C]` as float32 `[C, H, W]`."""
    tensor = torch.from_numpy(np.asarray(image, np.float32))
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()


def image_of(found: Tensor) -> NDArray[np.float32]:
    """`[H, W, C]`, a view of the planes."""
    return found.permute(1, 2, 0).numpy()


def smooth(found: Tensor, sigma: float, truncate: float = 4.0, border: Border = "nearest") -> Tensor:
    """Gaussian blur, cut at `truncate` deviations, as scipy.ndimage.gaussian_filter."""
    if sigma <= 0:
        return found
    height, width = found.shape[-2:]
    return _gaussian(height, sigma, truncate, border) @ found @ _gaussian(width, sigma, truncate, border).T


@functools.lru_cache(maxsize=64)
def _gaussian(n: int, sigma: float, truncate: float, border: Border) -> Tensor:
    """`[n, n]`: the filter along an axis of n pixels as a matrix, its border folded in. One product costs the same
    for every sigma."""
    radius = int(truncate * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    sources = np.arange(n)[:, None] + offsets
    if border == "nearest":
        sources = sources.clip(0, n - 1)
    else:
        sources %= 2 * n
        sources = np.minimum(sources, 2 * n - 1 - sources)
    matrix = np.zeros((n, n))
    np.add.at(matrix, (np.arange(n)[:, None], sources), weights / weights.sum())
    return torch.from_numpy(matrix.astype(np.float32))


def convolve(found: Tensor, spectrum: Tensor, radius: int) -> Tensor:
    """Convolution with a kernel of `2 radius + 1` pixels a side; the border is mirrored at the outermost pixel, as
    OpenCV does. spectrum: of the kernel, from `kernel_spectrum` for this height and width."""
    height, width = found.shape[-2:]
    rows, columns = _padded(height, radius), _padded(width, radius)
    around = F.pad(found[None], (radius,) * 4, mode="reflect")[0]
    product = torch.fft.irfft2(torch.fft.rfft2(around, s=(rows, columns)) * spectrum, s=(rows, columns))
    return product[..., 2 * radius : 2 * radius + height, 2 * radius : 2 * radius + width]


def kernel_spectrum(kernel: NDArray[np.float64], height: int, width: int) -> Tensor:
    """What `convolve` takes. kernel: `[2 radius + 1, 2 radius + 1]`."""
    radius = len(kernel) // 2
    padded = (_padded(height, radius), _padded(width, radius))
    return torch.fft.rfft2(torch.from_numpy(kernel.astype(np.float32)), s=padded)


def _padded(n: int, radius: int) -> int:
    """A length that the FFT is quick at."""
    return -(-(n + 2 * radius) // 64) * 64


def smear(found: Tensor, radius: int, sigma: float, angle: float) -> Tensor:
    """Motion blur as ImageMagick's: half a Gaussian of `2 radius + 1` whole pixels along `angle` (degrees), the border
    repeated outside."""
    height, width = found.shape[-2:]
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    weights /= weights.sum()
    radians = math.radians(angle)
    down = np.ceil(steps * math.sin(radians) - 0.5).astype(int)
    right = np.ceil(steps * math.cos(radians) - 0.5).astype(int)
    far = int(max(abs(down).max(), abs(right).max()))
    around = np.pad(found.numpy(), ((0, 0), (far, far), (far, far)), mode="edge")
    out = np.zeros(found.shape, np.float32)
    for weight, y, x in zip(weights.astype(np.float32), far + down, far + right, strict=True):
        out += weight * around[:, y : y + height, x : x + width]
    return torch.from_numpy(out)


def enlarge(found: Tensor, factor: float) -> Tensor:
    """The middle of the image, enlarged to its size: linear, corners on corners, as scipy.ndimage.zoom."""
    if factor == 1:
        return found
    height, width = found.shape[-2:]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = found[None, :, top : top + rows, left : left + columns]
    size = [round(rows * factor), round(columns * factor)]
    larger = F.interpolate(middle, size=size, mode="bilinear", align_corners=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return larger[:, top : top + height, left : left + width]


def sample(found: Tensor, y: Tensor, x: Tensor, edge_twice: bool) -> Tensor:
    """Values at the coordinates y, x `[H, W]` in pixels, linear between pixels. Outside the image is mirrored:
    edge_twice says whether the outermost pixel is seen again."""
    height, width = found.shape[-2:]
    if edge_twice:
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    else:
        grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)
    return F.grid_sample(found[None], grid[None].float(), "bilinear", "reflection", align_corners=not edge_twice)[0]
