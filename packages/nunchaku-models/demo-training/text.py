"""The two tokenizers and text encoders, in the sizes of the demo model.

Both tokenizers are learnt from the captions and know 1,024 pieces. CLIP's falls back to bytes, T5's
to single characters and then to ``<unk>``, so any text can be encoded.
"""

import json
import string
from collections.abc import Iterable

from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

VOCABULARY = 1024
CLIP_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def train_t5_tokenizer(captions: Iterable[str]) -> T5TokenizerFast:
    """A unigram model; every printable ASCII character is a piece of its own."""
    backend = T5TokenizerFast(extra_ids=0).backend_tokenizer
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=list(string.ascii_letters + string.digits + string.punctuation + "▁"),
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    pieces = [(piece, score) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def train_clip_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """Byte-pair encoding over all 256 bytes, with CLIP's end-of-word mark."""
    backend = CLIPTokenizer().backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [symbol + "</w>" for symbol in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    merges = merges[: VOCABULARY - len(symbols) - 2]
    vocabulary = {piece: i for i, piece in enumerate([*symbols, *(a + b for a, b in merges), START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def build_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Four layers of 256 channels, 1.6 M parameters; its output is the joint blocks' text stream."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=256,
        d_kv=64,
        num_heads=2,
        d_ff=256,
        num_layers=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of 128 channels, 0.4 M parameters; its pooled output joins the time embedding."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)
