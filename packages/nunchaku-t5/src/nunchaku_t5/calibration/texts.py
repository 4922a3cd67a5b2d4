"""From a file of texts to batches of tokens, as pipelines give them to their encoder."""

import os
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nunchaku_t5.errors import CheckpointError
from nunchaku_t5.sources import encoder_part, pipeline_index

BATCH_SIZE = 16
PADDED_LENGTH = 128
"""Tokens of the texts that are padded and not masked. Pipelines pad to up to 512, all the same token; this many show
what it does to the others at a quarter of the time."""
TEXT_LIMIT = 4096
TOKEN_LIMIT = 512
UNKNOWN_LIMIT = 0.2


class Batch(NamedTuple):
    """Tokens (B, T).

    Attributes:
        input_ids: int64 (B, T).
        attention_mask: int64 (B, T); None where all are attended to, padding too, as FLUX runs T5.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None

    @property
    def counted(self) -> torch.Tensor | None:
        """Which tokens the result counts for, bool (B, T); None for all."""
        return None if self.attention_mask is None else self.attention_mask.bool()

    def to(self, device: torch.device | str) -> "Batch":
        """The same on a device."""
        mask = self.attention_mask
        return Batch(self.input_ids.to(device), None if mask is None else mask.to(device))


def read_texts(path: Path) -> list[str]:
    """The lines of a text file, at most `TEXT_LIMIT`; not those that are empty or begin with #.

    Raises:
        CheckpointError: it cannot be read, or holds none.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors begin a file with a mark
            lines = (line.strip() for line in file)
            texts = list(islice((line for line in lines if line and not line.startswith("#")), TEXT_LIMIT))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}") from error
    if not texts:
        raise CheckpointError(f"{path} holds no texts; one per line is needed")
    return texts


def find_tokenizer(source: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None) -> Any:
    """The tokenizer of an encoder.

    Args:
        source: folder or hub id of a pipeline (the tokenizer that goes with its T5 is taken) or of an encoder that has
            its tokenizer's files beside it.
        tokenizer: folder or hub id of the tokenizer instead.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    folder, part = tokenizer or source, ""
    if tokenizer is None and not Path(source).expanduser().is_file():
        index = pipeline_index(source)
        if index is not None:
            part = re.sub(r"^text_encoder", "tokenizer", encoder_part(index))
    elif tokenizer is None:
        raise CheckpointError(f"{source} is a single file, without a tokenizer; name one with --tokenizer")
    try:
        return AutoTokenizer.from_pretrained(os.fspath(folder), subfolder=part)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{folder} has no tokenizer that can be read; name one with --tokenizer: {error}"
        ) from error


def tokenized(tokenizer: Any, texts: Sequence[str], vocabulary: int) -> list[Batch]:
    """Batches of texts of like length as they are read, masked; and of every second text padded, without a mask.

    Args:
        tokenizer: of transformers.
        texts: at least one.
        vocabulary: number of embeddings.

    Raises:
        CheckpointError: the tokenizer gives ids that the encoder does not have, or knows hardly anything in the texts:
            where a folder has no tokenizer's files, transformers makes one up.
    """
    ordered = sorted(texts, key=lambda text: (len(text), text))
    batches = []
    for first in range(0, len(ordered), BATCH_SIZE):
        tokens = tokenizer(
            ordered[first : first + BATCH_SIZE], padding=True, truncation=True, max_length=TOKEN_LIMIT,
            return_tensors="pt",
        )  # fmt: skip
        batches.append(Batch(tokens.input_ids, tokens.attention_mask))
    for first in range(0, len(ordered), 2 * BATCH_SIZE):
        tokens = tokenizer(
            ordered[first : first + 2 * BATCH_SIZE : 2], padding="max_length", truncation=True,
            max_length=PADDED_LENGTH, return_tensors="pt",
        )  # fmt: skip
        batches.append(Batch(tokens.input_ids, None))
    largest = max(int(batch.input_ids.max()) for batch in batches)
    if largest >= vocabulary:
        raise CheckpointError(f"the tokenizer gives the id {largest}, the encoder has {vocabulary}: it is another's")
    ids = torch.cat([batch.input_ids[batch.counted] for batch in batches if batch.counted is not None])
    unknown = float((ids == tokenizer.unk_token_id).float().mean()) if tokenizer.unk_token_id is not None else 0.0
    if unknown > UNKNOWN_LIMIT:
        raise CheckpointError(
            f"the tokenizer does not know {unknown:.0%} of the texts' tokens: it is another's, or none; name the "
            "encoder's with --tokenizer"
        )
    return batches
