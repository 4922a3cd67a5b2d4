"""`NunchakuT5EncoderModel.from_pretrained`: a 4-bit T5 or UMT5 from wherever it is."""

import os
from pathlib import Path
from typing import Any

from nunchaku_t5.architecture import MODELS, make_config, skeleton
from nunchaku_t5.config import parse_quantization
from nunchaku_t5.errors import CheckpointError, shown
from nunchaku_t5.files import CONFIG_NAME, TensorFiles, TensorInfo, read_json
from nunchaku_t5.layers import swap_layers
from nunchaku_t5.published import original_shapes, read_config, state_dict
from nunchaku_t5.quantizer import check_tensors
from nunchaku_t5.sources import HUB_ID, SUFFIXES, encoder_part, pipeline_index, repository


class NunchakuT5EncoderModel:
    """Loads 4-bit T5 and UMT5 encoders; what it gives is a `T5EncoderModel` or `UMT5EncoderModel` of transformers."""

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a quantised encoder.

        Args:
            path: a published single file; a folder that `save_pretrained` or `nunchaku-t5 quantize` wrote, or with a
                published file in it; that of a pipeline with such a part; a hub id of such a folder, or of a file in
                one: "org/repo/file.safetensors".
            kwargs: those of `from_pretrained` of transformers: `dtype` (or `torch_dtype`), `device_map`,
                `attn_implementation`, `revision`, `token`, `cache_dir`, `subfolder`, ...; and `device`, short for
                `device_map`.

        Returns:
            The model, in evaluation mode.

        Raises:
            CheckpointError: a file is damaged, not whole, or something else. Nothing was allocated then.
            OSError: there is no such file or repository.
        """
        if kwargs.get("device") is not None:
            kwargs["device_map"] = kwargs.pop("device")
        kwargs.pop("device", None)
        hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in kwargs}
        source = _local(path, **hub)
        if not kwargs.get("subfolder"):
            index = pipeline_index(source or path, **hub)
            if index is not None:
                kwargs["subfolder"] = encoder_part(index)
        if source is None:
            source = repository(path, kwargs.get("subfolder"), **hub)
        folder = source / kwargs.get("subfolder", "") if source.is_dir() else None
        if folder is None or not (folder / CONFIG_NAME).is_file():
            kwargs.pop("subfolder", None)
            return _from_file(folder or source, kwargs)
        config = _folder_config(folder)
        return MODELS[config.model_type][1].from_pretrained(source, **{**kwargs, "use_safetensors": True})


def _folder_config(folder: Path) -> Any:
    """The config in a folder, compared with its tensors: transformers would first build a model as large as it says."""
    where = str(folder)
    entries = read_json(folder / CONFIG_NAME)
    kind, said = entries.get("model_type"), entries.get("quantization_config")
    if kind not in tuple(MODELS):
        raise CheckpointError(f"{where} holds a {shown(kind)}, not a T5 or UMT5")
    if said is None:
        raise CheckpointError(f"{where} is not quantised; run `nunchaku-t5 quantize {where} -o OUT`")
    layers = parse_quantization(said, f"{where}: `quantization_config`").layers
    files = TensorFiles.of(folder)
    return make_config(original_shapes({name: files.info(name) for name in files}, layers), entries, where)


def _from_file(path: Path, kwargs: dict[str, Any]) -> Any:
    where = str(path)
    files = TensorFiles.of(path)
    config, quantization = read_config(files, where)
    expected = skeleton(config, where)
    try:
        swap_layers(expected, quantization.layers)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    tensors = state_dict(files)
    stored = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()}
    check_tensors(expected, stored, where)
    unknown = sorted(tensors.keys() - expected.state_dict().keys())
    if unknown:
        raise CheckpointError(f"{where} holds {len(unknown)} tensors of no use, the first is {shown(unknown[0])}")
    config.quantization_config = quantization.to_dict()
    return type(expected).from_pretrained(None, config=config, state_dict=tensors, **kwargs)


def _local(path: str | os.PathLike[str], **hub: Any) -> Path | None:
    """A file or folder of this disk, or a file of the hub, downloaded; None for what can only be a repository."""
    local, parts = Path(path).expanduser(), os.fspath(path).split("/")
    if local.exists():
        return local
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    if HUB_ID.fullmatch(repo) and file.endswith(SUFFIXES):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, file, **hub))
    return None
