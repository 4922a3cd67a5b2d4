"""`nunchaku t5 quantize`: a 16-bit encoder's files to 4-bit ones, tensor by tensor."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nunchaku_t5.architecture import EMBEDDINGS
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
from nunchaku_t5.quantize import HALF_DTYPES, plan, quantize_weight
from nunchaku_t5.sources import EncoderSource, as_entries

Tensors = dict[str, torch.Tensor]
Progress = Callable[[str, int], None]
"""Called with the name of a module that is done and the bytes it took in 16 bits."""


@dataclass(frozen=True)
class ConversionReport:
    """What was written.

    Attributes:
        output: the file or folder.
        layers: number of quantised modules.
        kept: module path of a linear left in 16 bits -> why.
        bytes_before: of the encoder's tensors in 16 bits, embeddings once.
        bytes_after: of the tensors written.
    """

    output: str
    layers: int
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int


class Conversion:
    """An encoder's files to one file or folder with its linears in 4 bits.

    Everything is checked on construction; `run` then reads, quantises and writes one module after the other.

    Args:
        source: what to quantise.
        output: a file name ending in .safetensors (published layout), or a folder to make (layout of transformers).
        group_size, embedding_bits: see `quantize.plan`.
        dtype: of everything in 16 bits; None for that of the source, bfloat16 where that is wider or narrower.
        embeddings_twice: write the embeddings under both of their names, for loaders that insist; files only.

    Raises:
        CheckpointError: the output exists, or cannot be written.
        ValueError: an argument does not fit.
    """

    def __init__(
        self,
        source: EncoderSource,
        output: Path,
        *,
        group_size: int = 128,
        embedding_bits: int = 16,
        dtype: torch.dtype | None = None,
        embeddings_twice: bool = False,
    ) -> None:
        self.source, self.output = source, output
        self.is_file = output.suffix == ".safetensors"
        if dtype not in (None, *HALF_DTYPES):
            raise ValueError(f"`dtype` must be bfloat16 or float16, got {dtype}")
        if embeddings_twice and (not self.is_file or embedding_bits != 16):
            raise ValueError("embeddings are only written twice into a single file, in 16 bits")
        (check_writable if self.is_file else check_new_folder)(output)
        stored = source.dtype("encoder.final_layer_norm.weight")
        self.dtype = dtype or (stored if stored in HALF_DTYPES else torch.bfloat16)
        self.layers, self.kept = plan(source.model, group_size=group_size, embedding_bits=embedding_bits)
        if not self.layers:
            raise CheckpointError(f"{source.where}: no layer can be quantised: {self.kept}")
        self.config = W4A16Config(group_size, self.layers)
        self._twice = embeddings_twice
        self._modules, self._infos = self._layout()

    def _layout(self) -> tuple[dict[str, list[str]], dict[str, TensorInfo]]:
        """Module path -> its tensors in the output, and what each is."""
        modules: dict[str, list[str]] = {}
        infos: dict[str, TensorInfo] = {}
        for path, module in self.source.model.named_modules():
            if path in self.layers:
                stored = stored_tensors(module, self.layers[path])
            else:
                stored = {name: (tuple(value.shape), None) for name, value in module.named_parameters(recurse=False)}
            for name, (shape, dtype) in stored.items():
                whole = f"{path}.{name}"
                if whole == EMBEDDINGS[1] or (path == EMBEDDINGS[1].removesuffix(".weight")):
                    continue
                modules.setdefault(path, []).append(whole)
                infos[whole] = TensorInfo(shape, dtype or self.dtype)
        return modules, infos

    @property
    def bytes_before(self) -> int:
        """Of the encoder in 16 bits."""
        return sum(self._bytes_before(path) for path in self._modules)

    def _bytes_before(self, path: str) -> int:
        module = self.source.model.get_submodule(path)
        return 2 * sum(value.numel() for value in module.parameters(recurse=False))

    def make(self, path: str) -> Tensors:
        """The tensors of a module for the output, by their names in the model."""
        if path in self.layers:
            weight = self.source.get(f"{path}.weight")
            try:
                made = quantize_weight(weight, self.layers[path], self.dtype)
            except ValueError as error:
                raise CheckpointError(f"{self.source.where}: {path}: {error}") from error
            return {f"{path}.{name}": tensor for name, tensor in made.items()}
        made = {}
        for name in self._modules[path]:
            made[name] = self.source.get(name).to(self.dtype)
            if not made[name].isfinite().all():
                raise CheckpointError(f"{self.source.where}: {name} holds NaN, or values too large for {self.dtype}")
        return made

    def run(self, on_module: Progress | None = None, *, threads: int | None = None) -> ConversionReport:
        """Do it.

        Args:
            on_module: progress.
            threads: modules in work at a time; default: torch's number of threads.

        Raises:
            CheckpointError: a tensor is not finite, or the disk fails. What was at `output` is untouched, as it is when
                interrupted.
        """
        if self.is_file:
            self._write(self.output, on_module, threads)
        else:
            with new_folder(self.output) as folder:
                self._write(folder / WEIGHTS_NAME, on_module, threads)
                (folder / CONFIG_NAME).write_text(json.dumps(self._config_file(), indent=2) + "\n")
        after = sum(info.nbytes for info in self._written().values())
        return ConversionReport(str(self.output), len(self.layers), self.kept, self.bytes_before, after)

    def _write(self, file: Path, on_module: Progress | None, threads: int | None) -> None:
        said = metadata(self.source.config, self.config) if self.is_file else {"format": "pt"}
        with StreamingWriter(file, self._written(), said) as writer:
            for path, tensors in self._made(threads or torch.get_num_threads()):
                for name in self._modules[path]:
                    writer.write(self._name(name), tensors[name])
                    if name == EMBEDDINGS[0] and self._twice:
                        writer.write(EMBEDDINGS[1], tensors[name])
                if on_module is not None:
                    on_module(path, self._bytes_before(path))

    def _made(self, threads: int) -> Iterator[tuple[str, Tensors]]:
        """What `make` gives for each module, in order; a few are in work at a time, each by one thread."""
        with one_torch_thread(), ThreadPoolExecutor(threads) as pool:
            pending: deque[tuple[str, Future[Tensors]]] = deque()
            try:
                for path in self._modules:
                    pending.append((path, pool.submit(self.make, path)))
                    if len(pending) > threads:
                        done, future = pending.popleft()
                        yield done, future.result()
                while pending:
                    done, future = pending.popleft()
                    yield done, future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _name(self, name: str) -> str:
        return to_published_name(name) if self.is_file else name

    def _written(self) -> Mapping[str, TensorInfo]:
        written = {}
        for name, info in self._infos.items():
            written[self._name(name)] = info
            if name == EMBEDDINGS[0] and self._twice:
                written[EMBEDDINGS[1]] = info
        return written

    def _config_file(self) -> dict[str, object]:
        entries = as_entries(self.source.config, self.source.entries)
        entries.pop("torch_dtype", None)
        entries["architectures"] = [type(self.source.model).__name__]
        entries["dtype"] = str(self.dtype).removeprefix("torch.")
        entries["quantization_config"] = self.config.to_dict()
        return entries


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Threads of ours, each with torch's operators on one: torch's own wait for each other after every operator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
