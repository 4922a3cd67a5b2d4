"""Texts to fit a quantised encoder to, and the ways of fitting it."""

from nunchaku_t5.calibration.blocks import EncoderBlocks, FittedBlock
from nunchaku_t5.calibration.methods import METHODS, Method, choose_eight_bits
from nunchaku_t5.calibration.texts import Batch, find_tokenizer, read_texts, tokenized

__all__ = [
    "METHODS",
    "Batch",
    "EncoderBlocks",
    "FittedBlock",
    "Method",
    "choose_eight_bits",
    "find_tokenizer",
    "read_texts",
    "tokenized",
]
