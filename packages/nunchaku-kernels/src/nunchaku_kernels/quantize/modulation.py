"""4-bit weights of an adaptive-norm linear, in the published order: channel-major rows, the 1 of `1 + scale` folded."""

import torch

from nunchaku_kernels._checks import FLOAT_DTYPES, require_multiple, require_tensor
from nunchaku_kernels.formats import fold_unit_scale, pack_awq, pack_awq_scales, to_channel_major
from nunchaku_kernels.formats.svdq import GROUP_SIZES
from nunchaku_kernels.quantize.awq import quantize_w4a16
from nunchaku_kernels.quantize.int4 import INT4_MAX
from nunchaku_kernels.quantize.moments import InputMoments
from nunchaku_kernels.quantize.refine import quantize_refined


def quantize_modulation(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    num_chunks: int,
    *,
    group_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    moments: InputMoments | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a `nn.ModulationLinear` (checkpoint_format.md 3, "Modulation linears").

    Args:
        weight: float [num_chunks * D, K] in diffusers' chunk order; K a multiple of `group_size`.
        bias: [num_chunks * D], or None for zeros.
        num_chunks: 6 or 3.
        group_size: inputs per scale.
        dtype: dtype of scales, zeros and bias.
        moments: of the layer's inputs, unsmoothed, arithmetic "w4a16": codes, scales and bias are fitted to them (see
            `quantize_refined`). Few distinct inputs reach these layers, which leaves much room to round well. None
            rounds to the nearest with searched scales.

    Returns:
        `qweight` int32, `wscales`, `wzeros`, `bias`, in the published order.

    Raises:
        ValueError: `weight` or `bias` is not finite or does not fit.
    """
    require_tensor("weight", weight, (None, None), FLOAT_DTYPES)
    rows = weight.shape[0]
    require_multiple("weight", "N", rows, 4)
    if moments is None:
        codes, scales, zeros = quantize_w4a16(weight, group_size, scale_search=True, dtype=dtype)
    else:
        if group_size != GROUP_SIZES["int4"]:
            raise ValueError(f"group_size: expected {GROUP_SIZES['int4']} with moments, got {group_size}")
        if moments.arithmetic != "w4a16" or moments.shift or not (moments.smooth == 1).all():
            raise ValueError(
                "moments: expected arithmetic 'w4a16', no shift and a smoothing vector of ones, got others"
            )
        # Stored codes mean -7..8, those of the quantiser -8..7: quantise the negative.
        negative = quantize_refined(-weight, None if bias is None else -bias, moments, rank=0, dtype=dtype).weights
        codes, scales = (INT4_MAX - negative.codes).to(torch.uint8), negative.scales
        zeros = -INT4_MAX * scales
        assert negative.bias is not None
        bias = -negative.bias
    if bias is None:
        bias = torch.zeros(rows, dtype=dtype, device=weight.device)
    require_tensor("bias", bias, (rows,), FLOAT_DTYPES)
    if not bias.isfinite().all():
        raise ValueError("bias: expected finite values, got NaN or infinity")
    # The 1 is added before rounding: a bias kept in 32 bits loses less than one that was rounded first.
    folded = fold_unit_scale(bias.float(), num_chunks).to(dtype)
    return {
        "qweight": pack_awq(to_channel_major(codes, num_chunks)),
        "wscales": pack_awq_scales(to_channel_major(scales, num_chunks), group_size),
        "wzeros": pack_awq_scales(to_channel_major(zeros, num_chunks), group_size),
        "bias": to_channel_major(folded, num_chunks).contiguous(),
    }
