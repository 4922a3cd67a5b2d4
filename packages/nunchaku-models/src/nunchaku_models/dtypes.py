"""Names of dtypes, as users write them."""

import torch

BY_NAME = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


def parse_dtype(
    value: object,
    *,
    argument: str = "dtype",
    allowed: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32),
) -> torch.dtype:
    """A dtype given as such or by name ("bfloat16", "bf16", "torch.bfloat16").

    Raises:
        ValueError: anything but one of `allowed`.
    """
    found = BY_NAME.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    for dtype in allowed:
        if found is dtype:
            return dtype
    names = [str(dtype).removeprefix("torch.") for dtype in allowed]
    raise ValueError(f"{argument} must be {', '.join(names[:-1])} or {names[-1]}, got {value}")
