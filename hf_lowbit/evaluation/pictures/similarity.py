"""Likeness of pictures to those of the float model from the same seed: PSNR and SSIM, a number for each picture."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

_K1, _K2 = 0.01, 0.03  # of Wang et al. 2004


def psnr(pictures: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, float64 [n], of pictures [n, c, h, w]; infinite for equal ones.

    Raises:
        ValueError: different shapes.
    """
    _check(pictures, reference)
    error = (pictures.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / error)


def ssim(
    pictures: Tensor,
    reference: Tensor,
    window_size: int | None = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
) -> Tensor:
    """Structural similarity (Wang et al. 2004), float64 [n], of pictures [n, c, h, w]; 1 for equal ones.

    The mean over channels and over all places where the window lies inside the picture; torchmetrics also counts those
    at the border, of the picture mirrored there.

    Args:
        window_size: of the Gaussian window, in pixels; cut to the largest odd size that fits into the picture, which
            MixDQ's 511 needs on small ones. None: a global SSIM, one window with equal weights, the whole picture.
        sigma: of the Gaussian, in pixels.
        data_range: largest minus smallest possible value.

    Raises:
        ValueError: different shapes, or a window without a middle.
    """
    _check(pictures, reference)
    x, y = pictures.double(), reference.double()
    n, c, height, width = x.shape
    moments = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2).unsqueeze(1)  # [5 n c, 1, h, w]
    if window_size is None:
        means = moments.mean((-2, -1), keepdim=True)
    else:
        size = _fitting(window_size, min(height, width))
        offsets = torch.arange(size, dtype=x.dtype, device=x.device) - size // 2
        line = torch.exp(-offsets.square() / (2 * sigma**2))
        line /= line.sum()
        means = conv2d(conv2d(moments, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))
    mx, my, xx, yy, xy = means.unflatten(0, (5, n, c))
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    contrast = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
    return ((2 * mx * my + c1) / (mx * mx + my * my + c1) * contrast).flatten(1).mean(1)


def _fitting(window_size: int, smallest: int) -> int:
    if window_size < 1 or window_size % 2 == 0:
        raise ValueError(f"window_size={window_size}: an odd number of pixels is needed, or None for a global SSIM")
    return min(window_size, smallest - 1 + smallest % 2)


def _check(pictures: Tensor, reference: Tensor) -> None:
    if pictures.shape != reference.shape or pictures.ndim != 4:
        raise ValueError(
            f"pictures {list(pictures.shape)} and their references {list(reference.shape)} must both be [n, c, h, w]"
        )
