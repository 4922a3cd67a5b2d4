"""Kernels on raw addresses; `nunchaku_kernels.ops` checks the tensors and calls these.

Every tensor argument is the address of its first element, 0 where the tensor is absent. Dtype codes: 0 fp32, 1 fp16,
2 bf16. `isa` is a name from `isas()`, or "" for the best one. All functions release the GIL and raise ValueError for
sizes, codes or instruction sets they cannot serve.

Where CUDA kernels were built there is a submodule `cuda` with the same functions; instead of `threads`
they take a `device` and the address of a `stream`, on which they launch without waiting, and raise
RuntimeError for errors of the CUDA runtime. Its `isas(device)` names the kernel sets that run on a device. Two more of
its functions return whether a kernel takes their arguments: `w4a8_quantize_norm` has those of `w4a8_quantize` without
`shift`, and behind `Kp` the addresses `scale` and `shift` of [rows, K] tensors of the dtype of x, `rows` and `eps`;
`w4a8_linear_heads` has those of `w4a8_linear` up to `Kp`, then `samples`, `heads`, `norm_q`, `norm_k` and their dtypes,
`eps`, `rotary`, `first_token`, `out_tokens`, `out` and its dtype.
"""

from types import ModuleType

cuda: ModuleType

def isas() -> list[str]:
    """Instruction sets this build has and this processor runs, best last."""

def w4a8_fold_scales(
    qweight: int,
    wscales: int,
    wscales_dtype: int,
    Np: int,
    Kp: int,
    row_scales: int,
    multipliers: int,
    threads: int,
    isa: str,
) -> None: ...
def w4a8_quantize(
    x: int,
    x_dtype: int,
    M: int,
    K: int,
    x_stride: int,
    Kp: int,
    smooth: int,
    smooth_dtype: int,
    shift: float,
    proj_down: int,
    proj_down_dtype: int,
    R: int,
    codes: int,
    ascales: int,
    lora_act: int,
    threads: int,
    isa: str,
) -> None: ...
def w4a8_accumulate(
    codes: int, qweight: int, multipliers: int, M: int, Np: int, Kp: int, out: int, threads: int, isa: str
) -> None: ...
def w4a8_linear(
    codes: int,
    ascales: int,
    lora_act: int,
    R: int,
    qweight: int,
    row_scales: int,
    multipliers: int,
    proj_up: int,
    proj_up_dtype: int,
    rank_scale: int,
    wcscales: int,
    wcscales_dtype: int,
    bias: int,
    bias_dtype: int,
    M: int,
    Np: int,
    Kp: int,
    out_features: int,
    activation: int,
    gate: int,
    gate_dtype: int,
    gate_rows: int,
    residual: int,
    residual_dtype: int,
    out: int,
    out_dtype: int,
    threads: int,
    isa: str,
) -> None: ...
def w4a16_linear(
    x: int,
    x_dtype: int,
    M: int,
    K: int,
    x_stride: int,
    qweight: int,
    wscales: int,
    wzeros: int,
    scales_dtype: int,
    bias: int,
    bias_dtype: int,
    N: int,
    group_size: int,
    out: int,
    out_dtype: int,
    threads: int,
    isa: str,
) -> None: ...
def l1_change(
    current: int,
    current_sample_stride: int,
    current_token_stride: int,
    origin: int,
    origin_sample_stride: int,
    origin_token_stride: int,
    previous: int,
    previous_sample_stride: int,
    previous_token_stride: int,
    dtype: int,
    B: int,
    T: int,
    C: int,
    counted: int,
    block_tokens: int,
    blocks: int,
    sums: int,
    threads: int,
    isa: str,
) -> None: ...
