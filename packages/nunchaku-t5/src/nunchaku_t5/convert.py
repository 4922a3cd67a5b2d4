"""A 16-bit encoder's tensors to those of its 4-bit form, module by module: into a model, a file or a folder."""

import copy
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nunchaku_kernels.formats import pack_w4a16
from nunchaku_t5.architecture import EMBEDDINGS, tensor_names
from nunchaku_t5.calibration import METHODS, Batch, EncoderBlocks, FittedBlock, Method, choose_eight_bits
from nunchaku_t5.config import W4A16Config
from nunchaku_t5.errors import CheckpointError
from nunchaku_t5.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    StreamingWriter,
    TensorInfo,
    check_new_folder,
    check_writable,
    new_folder,
)
from nunchaku_t5.layers import stored_tensors
from nunchaku_t5.published import metadata, to_published_name
from nunchaku_t5.quantize import HALF_DTYPES, plan, quantize_module
from nunchaku_t5.sources import EncoderSource, as_entries

OTHER_FILES = (".bin", ".ckpt", ".gguf", ".pt", ".pth", ".sft")
"""Endings of files that nobody wants to be the name of a folder."""

Tensors = dict[str, torch.Tensor]
Progress = Callable[[str, int], None]
"""Called with the path of a module that is done, and the bytes it takes in 16 bits."""


class EncoderQuantization:
    """What becomes of an encoder's tensors.

    Attributes:
        source: what is quantised.
        dtype: of everything that stays in 16 bits.
        layers: module path -> form of what is quantised.
        kept: module path of a linear left in 16 bits -> why.
        config: the `quantization_config`.
        modules: path of each module with tensors -> the names they will have.
        infos: name -> shape and dtype of each of those.

    Args:
        source: what to quantise.
        group_size, embedding_bits: see `quantize.plan`.
        dtype: bfloat16 or float16; None for that of the source, bfloat16 where that is wider or narrower.

    Raises:
        ValueError: an argument does not fit.
        CheckpointError: nothing in the source can be quantised.
    """

    def __init__(
        self,
        source: EncoderSource,
        *,
        group_size: int = 128,
        embedding_bits: int = 16,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype not in (None, *HALF_DTYPES):
            raise ValueError(f"`dtype` must be bfloat16 or float16, got {dtype}")
        self.source = source
        stored = source.dtype("encoder.final_layer_norm.weight")
        self.dtype = dtype or (stored if stored in HALF_DTYPES else torch.bfloat16)
        self.layers, self.kept = plan(source.model, group_size=group_size, embedding_bits=embedding_bits)
        if not self.layers:
            raise CheckpointError(f"{source.where}: no layer can be quantised: {self.kept}")
        self._group_size = group_size
        self._fitting: _Fitting | None = None
        self._lay_out()

    def _lay_out(self) -> None:
        self.config = W4A16Config(self._group_size, self.layers)
        self.modules: dict[str, list[str]] = {}
        self.infos: dict[str, TensorInfo] = {}
        for path, module in self.source.model.named_modules():
            if f"{path}.weight" == EMBEDDINGS[1]:  # tied
                continue
            if path in self.layers:
                stored_as = stored_tensors(module, self.layers[path])
            else:
                stored_as = {name: (tuple(value.shape), None) for name, value in module.named_parameters(recurse=False)}
            for name, (shape, dtype_) in stored_as.items():
                self.modules.setdefault(path, []).append(f"{path}.{name}")
                self.infos[f"{path}.{name}"] = TensorInfo(shape, dtype_ or self.dtype)

    def calibrate(
        self,
        batches: Sequence[Batch],
        *,
        method: str = "fitted",
        rank: int = 0,
        eight_bits: float = 0.07,
        device: torch.device | str = "cpu",
        on_batch: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """Fit the linears to texts instead of rounding their weights to the nearest.

        Takes the 16-bit encoder into memory (on the CPU mapped, where its files are in bfloat16) and, for `eight_bits`,
        runs it forward and backward on each batch; the fitting itself is done while `made` is iterated.

        Args:
            batches: see `calibration.tokenized`.
            method: "fitted" (GPTQ and what goes with it) or "awq" (as the published file was made).
            rank: of a 16-bit low-rank branch beside each linear; 0 for none; "fitted" only.
            eight_bits: bytes that linears in 8 bits may add, relative to those of all linears in 4 bits; "fitted" only.
                By default an XXL stays below 2.9 GB.
            device: where it is done; what is made is on the CPU again.
            on_batch: progress of the search for what deserves 8 bits: batches begun, and of how many.

        Raises:
            ValueError: an argument does not fit.
        """
        if method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}")
        if not 0 <= eight_bits <= 1 or not batches:
            raise ValueError(f"`eight_bits` must be 0 to 1, `batches` not empty; got {eight_bits}, {len(batches)}")
        if method == "awq" and rank:
            raise ValueError(f"`rank` must be 0 with `method` 'awq', got {rank}")
        if method == "awq":
            eight_bits = 0.0
        linears = [name for name in self.layers if f"{name}.weight" not in EMBEDDINGS]
        self.layers |= {name: replace(self.layers[name], rank=rank) for name in linears}
        model, batches = self._sixteen_bit_model().to(device), [batch.to(device) for batch in batches]
        if eight_bits:
            self.layers = choose_eight_bits(model, batches, self.layers, eight_bits, on_batch)
        self._fitting = _Fitting(model, batches, METHODS[method], linears)
        self._lay_out()

    def _sixteen_bit_model(self) -> Any:
        """In float32 where the source is, else in bfloat16, which has the range that T5's activations need."""
        source = self.source
        stored = source.dtype("encoder.final_layer_norm.weight")
        tensors = {name: source.get(name) for name in tensor_names(source.model)}
        config = copy.deepcopy(source.config)
        dtype = torch.float32 if stored == torch.float32 else torch.bfloat16
        return type(source.model).from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)

    @property
    def bytes_before(self) -> int:
        """Of the encoder in 16 bits, embeddings once."""
        return sum(map(self.bytes_of, self.modules))

    def bytes_of(self, path: str) -> int:
        """Of one module in 16 bits."""
        return 2 * sum(value.numel() for value in self.source.model.get_submodule(path).parameters(recurse=False))

    def make(self, path: str) -> Tensors:
        """The tensors of a module, by their names in the model, without calibration.

        Raises:
            CheckpointError: one of them is not finite, or too large for `dtype`.
        """
        if path in self.layers:
            module, weight = self.source.model.get_submodule(path), self.source.get(f"{path}.weight")
            try:
                made = quantize_module(module, weight, self.layers[path], self.dtype)
            except ValueError as error:
                raise CheckpointError(f"{self.source.where}: {path}: {error}") from error
            return {f"{path}.{name}": tensor for name, tensor in made.items()}
        tensors = {}
        for name in self.modules[path]:
            tensors[name] = self.source.get(name).to(self.dtype)
            if not tensors[name].isfinite().all():
                raise CheckpointError(f"{self.source.where}: {name} holds NaN, or values too large for {self.dtype}")
        return tensors

    def made(self, *, threads: int | None = None) -> Iterator[tuple[str, Tensors]]:
        """What becomes of each module, in order.

        Args:
            threads: without calibration, modules in work at a time, each by one thread; default: torch's number of
                threads.
        """
        if self._fitting is not None:
            yield from self._fitted(self._fitting)
            return
        threads = threads or torch.get_num_threads()
        with _one_torch_thread(), ThreadPoolExecutor(threads) as pool:
            pending: deque[tuple[str, Future[Tensors]]] = deque()
            try:
                for path in self.modules:
                    pending.append((path, pool.submit(self.make, path)))
                    if len(pending) > threads:
                        done, future = pending.popleft()
                        yield done, future.result()
                while pending:
                    done, future = pending.popleft()
                    yield done, future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _fitted(self, fitting: "_Fitting") -> Iterator[tuple[str, Tensors]]:
        """Like `made`, block by block, behind blocks that are quantised already."""
        blocks = iter(EncoderBlocks(fitting.model, fitting.batches, fitting.linears))
        prefix, found = "", FittedBlock()
        for path in self.modules:
            if path.startswith("encoder.block.") and not (prefix and path.startswith(prefix)):
                block = next(blocks)
                prefix = f"{block.path}."
                try:
                    found = fitting.method(block, self.layers, self.dtype)
                except ValueError as error:
                    raise CheckpointError(f"{self.source.where}: {block.path}: {error}") from error
            if path in found.weights:
                packed = pack_w4a16(found.weights[path], torch.int16)
                yield path, {f"{path}.{name}": tensor.cpu() for name, tensor in packed.items()}
                continue
            tensors = self.make(path)
            for name in tensors.keys() & found.changed.keys():
                tensors[name] = found.changed[name].to("cpu", self.dtype)
            yield path, tensors

    def load(self, **kwargs: Any) -> Any:
        """The quantised model itself.

        Args:
            kwargs: for `from_pretrained` of transformers: `dtype`, `device_map`, ...
        """
        tensors: Tensors = {}
        for _, made in self.made():
            tensors.update(made)
        config = self.source.config
        config.quantization_config = self.config.to_dict()
        return type(self.source.model).from_pretrained(None, config=config, state_dict=tensors, **kwargs)


@dataclass(frozen=True)
class _Fitting:
    model: Any
    batches: Sequence[Batch]
    method: Method
    linears: Sequence[str]


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """For threads of ours that each run torch's operators: torch's own threads wait for each other after every one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class ConversionReport:
    """What was written.

    Attributes:
        output: the file or folder.
        four_bits, eight_bits: number of modules stored in so many bits.
        kept: module path of a linear left in 16 bits -> why.
        bytes_before: of the encoder's tensors in 16 bits, embeddings once.
        bytes_after: of the tensors written.
    """

    output: str
    four_bits: int
    eight_bits: int
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int


class Conversion:
    """Writes a quantised encoder: a file in the published layout, or a folder in that of transformers.

    Args:
        quantization: of what.
        output: a file name that ends in .safetensors, or a folder to make.
        embeddings_twice: write the embeddings under both of their names, for loaders that insist; files only.

    Raises:
        CheckpointError: the output cannot be written, or is a file of the source; a folder must be new or empty.
        ValueError: an argument does not fit.
    """

    def __init__(self, quantization: EncoderQuantization, output: Path, *, embeddings_twice: bool = False) -> None:
        self.quantization, self.output = quantization, output
        self.is_file = output.suffix == ".safetensors"
        if output.suffix in OTHER_FILES:
            raise ValueError(f"{output}: give a folder, or a file name that ends in .safetensors")
        if embeddings_twice and (not self.is_file or EMBEDDINGS[0].removesuffix(".weight") in quantization.layers):
            raise ValueError("embeddings are only written twice into a single file, and in 16 bits")
        self._twice = embeddings_twice
        target = (check_writable if self.is_file else check_new_folder)(output)
        if any(target == Path(os.path.realpath(file)) for file in quantization.source.files):
            raise CheckpointError(f"{output} is what is to be quantised; give another name")

    def run(self, on_module: Progress | None = None, *, threads: int | None = None) -> ConversionReport:
        """Quantise and write, one module after the other.

        Args:
            on_module: progress.
            threads: see `EncoderQuantization.made`.

        Raises:
            CheckpointError: a tensor is not finite, or the disk fails. What was at `output` is untouched then, as it is
                when interrupted.
        """
        if self.is_file:
            self._write(self.output, on_module, threads)
        else:
            with new_folder(self.output) as folder:
                self._write(folder / WEIGHTS_NAME, on_module, threads)
                (folder / CONFIG_NAME).write_text(json.dumps(self._config_file(), indent=2) + "\n")
        quantization = self.quantization
        after = sum(info.nbytes for info in self._written().values())
        bits = Counter(form.bits for form in quantization.layers.values())
        return ConversionReport(str(self.output), bits[4], bits[8], quantization.kept, quantization.bytes_before, after)

    def _write(self, file: Path, on_module: Progress | None, threads: int | None) -> None:
        quantization = self.quantization
        said = metadata(quantization.source.config, quantization.config) if self.is_file else {"format": "pt"}
        with StreamingWriter(file, self._written(), said) as writer:
            for path, tensors in quantization.made(threads=threads):
                for name in quantization.modules[path]:
                    for written in self._names(name):
                        writer.write(written, tensors[name])
                if on_module is not None:
                    on_module(path, quantization.bytes_of(path))

    def _names(self, name: str) -> list[str]:
        """The names in the output of a tensor of the model."""
        if name == EMBEDDINGS[0] and self._twice:
            return list(EMBEDDINGS)
        return [to_published_name(name) if self.is_file else name]

    def _written(self) -> Mapping[str, TensorInfo]:
        infos = self.quantization.infos
        return {written: info for name, info in infos.items() for written in self._names(name)}

    def _config_file(self) -> dict[str, object]:
        quantization = self.quantization
        entries = as_entries(quantization.source.config, quantization.source.entries)
        entries.pop("torch_dtype", None)
        entries["architectures"] = [type(quantization.source.model).__name__]
        entries["dtype"] = str(quantization.dtype).removeprefix("torch.")
        entries["quantization_config"] = quantization.config.to_dict()
        return entries
