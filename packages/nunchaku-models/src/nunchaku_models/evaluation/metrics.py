"""How near a picture comes to its reference (PSNR, SSIM), and how sure a mean over prompts is (bootstrap)."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import conv2d

PSNR_CAP = 100.0
"""dB; what identical pictures count as, so that means stay finite."""
WINDOW, SIGMA = 11, 1.5
K1, K2, DATA_RANGE = 0.01, 0.03, 255.0
RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 1 << 22

Values = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean over prompts and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def psnr(picture: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit RGB pictures in dB, at most `PSNR_CAP`.

    Raises:
        ValueError: the pictures differ in size.
    """
    error = np.square(_pixels(picture, reference) - _pixels(reference, picture)).mean()
    return PSNR_CAP if error == 0 else min(PSNR_CAP, float(10 * np.log10(DATA_RANGE**2 / error)))


def ssim(picture: Image.Image, reference: Image.Image) -> float:
    """Structural similarity of two 8-bit RGB pictures: the mean of the three channels' (Wang et al. 2004).

    Gaussian window of 11x11 with sigma 1.5, K1 = 0.01, K2 = 0.03; only windows that lie inside the picture count.

    Raises:
        ValueError: the pictures differ in size, or are smaller than the window.
    """
    x, y = _pixels(picture, reference), _pixels(reference, picture)
    if min(x.shape[:2]) < WINDOW:
        raise ValueError(
            f"SSIM needs pictures of at least {WINDOW}x{WINDOW} pixels, got {picture.width}x{picture.height}"
        )
    planes = torch.from_numpy(np.stack([x, y, x * x, y * y, x * y])).permute(0, 3, 1, 2)
    mean_x, mean_y, xx, yy, xy = _blurred(planes)
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = (K1 * DATA_RANGE) ** 2, (K2 * DATA_RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


def bootstrap(values: Values, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The mean, and its 95 % percentile bootstrap interval over prompts.

    Prompts are drawn with replacement, each with all its pictures: two seeds of one prompt are not independent. For a
    paired difference, pass the differences.

    Args:
        values: (P,) one number per prompt, or (P, S) with S pictures per prompt; P at least 2.
        seed: of the resampling; the same seed gives the same interval.
        resamples: number of resampled means.

    Raises:
        ValueError: fewer than two prompts, or a value that is not finite.
    """
    if values.ndim not in (1, 2) or values.shape[0] < 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"an interval needs finite values of at least two prompts, got shape {values.shape}")
    prompts = values.astype(np.float64).reshape(values.shape[0], -1).mean(axis=1)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _CHUNK // len(prompts))
    for first in range(0, resamples, step):
        size = min(step, resamples - first)
        means[first : first + size] = prompts[generator.integers(len(prompts), size=(size, len(prompts)))].mean(axis=1)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(prompts.mean()), float(low), float(high))


def share(right: NDArray[np.bool_], *, seed: int = 0) -> Interval:
    """The share of pictures that are right, in percent, with its interval over prompts.

    Where all are right (or all wrong) there is nothing to resample, and the bootstrap would claim certainty: the exact
    binomial bound (Clopper-Pearson) of P prompts stands in.

    Args:
        right: (P,) or (P, S).

    Raises:
        ValueError: see `bootstrap`.
    """
    interval = bootstrap(100 * right.astype(np.float64), seed=seed)
    bound = 100 * ((1 - LEVEL) / 2) ** (1 / right.shape[0])
    if right.all():
        return interval._replace(low=bound)
    if not right.any():
        return interval._replace(high=100 - bound)
    return interval


def _pixels(picture: Image.Image, other: Image.Image) -> Values:
    """(H, W, 3) float64 in 0..255."""
    if picture.size != other.size:
        raise ValueError(f"pictures to compare must be of one size, got {picture.size} and {other.size}")
    return np.asarray(picture.convert("RGB"), dtype=np.float64)


def _blurred(planes: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) under the Gaussian window, (B, 3, H - 10, W - 10)."""
    distance = torch.arange(WINDOW, dtype=planes.dtype) - WINDOW // 2
    window = torch.exp(-(distance**2) / (2 * SIGMA**2))
    window = window / window.sum()
    flat = planes.flatten(0, 1).unsqueeze(1)
    flat = conv2d(conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return flat.view(*planes.shape[:2], *flat.shape[2:])
