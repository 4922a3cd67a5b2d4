"""PSNR and SSIM against closed forms and scikit-image; intervals against what statistics says of them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from nunchaku_models.evaluation import metrics
from nunchaku_models.evaluation.metrics import PSNR_CAP, bootstrap, psnr, share, ssim


def picture(width: int, height: int, seed: int, smooth: bool = False) -> Image.Image:
    generator = np.random.default_rng(seed)
    if not smooth:
        return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    small = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def nudged(original: Image.Image, amount: int, seed: int) -> Image.Image:
    pixels = np.asarray(original).astype(int)
    noise = np.random.default_rng(seed).integers(-amount, amount + 1, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(11, 40), st.integers(11, 40), st.integers(0, 99), st.booleans(), st.sampled_from([1, 5, 40, 255])
)  # fmt: skip
def test_against_scikit_image(width: int, height: int, seed: int, smooth: bool, amount: int) -> None:
    x = picture(width, height, seed, smooth)
    y = nudged(x, amount, seed + 1)
    wanted = structural_similarity(
        np.asarray(x),
        np.asarray(y),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=-1,
        data_range=255,
    )
    assert ssim(x, y) == pytest.approx(wanted, abs=1e-10)
    if x.tobytes() != y.tobytes():
        assert psnr(x, y) == pytest.approx(peak_signal_noise_ratio(np.asarray(x), np.asarray(y), data_range=255))


@given(st.integers(0, 254), st.integers(1, 255))
def test_psnr_of_a_constant_difference(level: int, difference: int) -> None:
    difference = min(difference, 255 - level)
    x, y = (Image.new("RGB", (16, 16), (value,) * 3) for value in (level, level + difference))
    assert psnr(x, y) == pytest.approx(20 * math.log10(255 / difference))
    assert psnr(x, y) == psnr(y, x)


def test_ssim_of_constant_pictures() -> None:
    x, y = Image.new("RGB", (16, 16), (50, 50, 50)), Image.new("RGB", (16, 16), (100, 100, 100))
    c1 = (0.01 * 255) ** 2  # no variance: the luminance term alone remains
    assert ssim(x, y) == pytest.approx((2 * 50 * 100 + c1) / (50**2 + 100**2 + c1))


def test_identical_and_nearly_identical_pictures_stay_finite() -> None:
    x = picture(600, 600, 0)
    assert psnr(x, x) == PSNR_CAP and ssim(x, x) == pytest.approx(1)
    near = x.copy()
    near.putpixel((0, 0), tuple(value ^ 1 for value in x.getpixel((0, 0))))  # type: ignore[arg-type,union-attr]
    assert psnr(near, x) == PSNR_CAP  # 103.7 dB by the formula, which must not rank above identity
    json.dumps([psnr(x, x), bootstrap(np.array([PSNR_CAP, PSNR_CAP]))], allow_nan=False)


def test_pictures_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="of one size"):
        psnr(picture(16, 16, 0), picture(16, 32, 0))
    with pytest.raises(ValueError, match="of one size"):
        ssim(picture(16, 16, 0), picture(32, 16, 0))
    with pytest.raises(ValueError, match="11x11"):
        ssim(picture(10, 16, 0), picture(10, 16, 1))


# ----------------------------------------------------------------- intervals


def test_interval_of_many_values_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(30, 2, 2000)
    mean, low, high = bootstrap(values)
    margin = 1.96 * values.std() / math.sqrt(len(values))
    assert mean == pytest.approx(values.mean())
    assert high - mean == pytest.approx(margin, rel=0.05)
    assert mean - low == pytest.approx(margin, rel=0.05)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        _, low, high = bootstrap(generator.exponential(1, 48), seed=trial, resamples=400)
        hits += low <= 1 <= high
    # the percentile bootstrap is known to be a little short with few, skewed values
    assert 0.88 <= hits / 300 <= 0.99


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30), st.integers(-100, 100), st.integers(0, 3))
def test_interval_moves_with_its_values(values: list[float], shift: int, seed: int) -> None:
    x = np.array(values)
    interval = bootstrap(x, seed=seed, resamples=200)
    assert x.min() - 1e-9 <= interval.low <= interval.high <= x.max() + 1e-9
    assert bootstrap(x + shift, seed=seed, resamples=200) == pytest.approx(tuple(np.array(interval) + shift), abs=1e-9)
    assert bootstrap(x, seed=seed, resamples=200) == interval


def test_seeds_of_one_prompt_are_not_independent_evidence() -> None:
    x = np.random.default_rng(2).normal(size=20)
    assert bootstrap(np.repeat(x[:, None], 8, axis=1)) == pytest.approx(bootstrap(x))
    independent = bootstrap(np.repeat(x, 8))
    assert independent.high - independent.low < 0.5 * (bootstrap(x).high - bootstrap(x).low)


def test_seed_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(3).normal(size=50)
    whole = bootstrap(x)
    assert bootstrap(x, seed=1) != whole
    monkeypatch.setattr(metrics, "_CHUNK", 777)
    assert bootstrap(x) == whole


@pytest.mark.parametrize("values", [[1.0], [], [[1.0, 2.0]], [1.0, math.nan], [1.0, math.inf], [[[1.0]], [[2.0]]]])
def test_values_without_an_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two prompts"):
        bootstrap(np.array(values))


def test_a_share_of_all_or_nothing_is_not_certain() -> None:
    right = np.ones((64, 1), dtype=bool)
    mean, low, high = share(right)
    assert (mean, high) == (100, 100)
    assert (low / 100) ** 64 == pytest.approx(0.025)  # what Clopper and Pearson ask of the bound
    mean, low, high = share(~right)
    assert (mean, low) == (0, 0) and (1 - high / 100) ** 64 == pytest.approx(0.025)
    right[:16] = False
    mean, low, high = share(right)
    margin = 196 * math.sqrt(0.25 * 0.75 / 64)
    assert mean == 75 and low == pytest.approx(75 - margin, abs=2) and high == pytest.approx(75 + margin, abs=2)
