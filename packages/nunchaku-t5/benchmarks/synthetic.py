"""A T5 encoder with random weights that quantise like trained ones: heavy tails, rows of all sizes, a few outlier
channels in the residual stream, attention that looks somewhere."""

import torch
from transformers import T5Config, T5EncoderModel

VOCABULARY = 4096
DEGREES_OF_FREEDOM = 4.0
OUTLIER_CHANNELS = 6
OUTLIER_FACTOR = 20.0


def synthetic_encoder(seed: int, *, width: int = 512, hidden: int = 1024, blocks: int = 3) -> T5EncoderModel:
    """In float32, the same for the same seed."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_ff=hidden,
        d_kv=64,
        num_heads=width // 64,
        num_layers=blocks,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model = T5EncoderModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    outliers = torch.randperm(width, generator=generator)[:OUTLIER_CHANNELS]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layer_norm.weight"):
                parameter.copy_(torch.randn(width, generator=generator).mul_(0.3).exp_())
            elif "relative_attention_bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() == 2:
                values = student_t(parameter.shape, generator)
                values *= torch.randn(parameter.shape[0], 1, generator=generator).mul_(0.3).exp_()
                if name.endswith(("embed_tokens.weight", "shared.weight")):
                    values[:, outliers] *= OUTLIER_FACTOR
                else:
                    values /= parameter.shape[1] ** 0.5
                    if name.endswith(".q.weight"):
                        values /= 64**0.5  # T5 does not divide logits
                    if name.endswith(("o.weight", "wo.weight")):
                        values[outliers] *= OUTLIER_FACTOR / 4
                parameter.copy_(values)
    return model


def student_t(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Of unit variance."""
    chi2 = torch.zeros(shape)
    for _ in range(int(DEGREES_OF_FREEDOM)):
        chi2 += torch.randn(shape, generator=generator).square_()
    values = torch.randn(shape, generator=generator) / (chi2 / DEGREES_OF_FREEDOM).sqrt()
    return values / (DEGREES_OF_FREEDOM / (DEGREES_OF_FREEDOM - 2)) ** 0.5


def synthetic_texts(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [count, 48]: lengths 8 to 48, ids as unevenly frequent as words (Zipf)."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(2.0, VOCABULARY)
    ids = 2 + torch.multinomial(frequencies, count * 48, replacement=True, generator=generator).view(count, 48)
    lengths = torch.randint(8, 49, (count, 1), generator=generator)
    mask = (torch.arange(48) < lengths).long()
    return ids * mask, mask
