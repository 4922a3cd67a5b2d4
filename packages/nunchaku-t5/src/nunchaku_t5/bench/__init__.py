"""What a 4-bit T5 costs on this machine, and what 16 bits and NF4 cost."""
