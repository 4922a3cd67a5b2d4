"""What a 4-bit T5 costs on this machine, and what 16 bits and NF4 cost."""

from nunchaku_t5.bench.block import TOKENS, bench_t5

__all__ = ["TOKENS", "bench_t5"]
