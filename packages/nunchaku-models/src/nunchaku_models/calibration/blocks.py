"""A transformer block by block: one block in memory, and the inputs it gets from the blocks before it."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nunchaku_models.calibration.records import Call, on_device
from nunchaku_models.checkpoints import CheckpointError, DiffusersView
from nunchaku_models.families import Block, Family
from nunchaku_models.layers import empty_model

Hook = Callable[[torch.Tensor], None]


class _Reached(Exception):
    """The first block was called: its arguments are known."""


class LoadedBlock:
    """One block with its weights, and the calls that reach it in the unquantised model.

    Attributes:
        path: e.g. "transformer_blocks.3".
        module: the block, on the device.
        calls: its arguments, tensors on the CPU.
        current: the call that the block runs on, for those who watch it.
    """

    def __init__(self, path: str, module: nn.Module, calls: list[Call], spec: Block, device: torch.device) -> None:
        self.path = path
        self.module = module
        self.calls = calls
        self.current = calls[0]
        self._spec = spec
        self._device = device

    def arguments(self, call: Call) -> dict[str, Any]:
        """The arguments of a call, on the device."""
        return {name: on_device(value, self._device) for name, value in call.arguments.items()}

    @torch.no_grad()
    def sweep(self) -> Iterator[Call]:
        """Run the block on every call, yielding the call after it ran."""
        for call in self.calls:
            self._run(call)
            yield call

    @torch.no_grad()
    def advance(self) -> Iterator[Call]:
        """`sweep`, after which `calls` are those of the next block."""
        for index, call in enumerate(self.calls):
            outputs = self._run(call)
            streams = {name: on_device(value, "cpu") for name, value in zip(self._spec.returns, outputs, strict=True)}
            self.calls[index] = Call(call.arguments | streams, call.held_out)
            yield call

    def _run(self, call: Call) -> tuple[Any, ...]:
        self.current = call
        outputs = self.module(**self.arguments(call))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    @contextmanager
    def watching(self, hooks: Iterable[tuple[str, Hook]]) -> Iterator[None]:
        """Within the context, call each hook with the input (M, K) of the linear at its path inside the block."""

        def watcher(hook: Hook) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
            return lambda _, inputs: hook(inputs[0].reshape(-1, inputs[0].shape[-1]))

        handles = [self.module.get_submodule(path).register_forward_pre_hook(watcher(hook)) for path, hook in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class BlockStream:
    """The blocks of a 16-bit transformer, in order, with what reaches them.

    Args:
        view: its weights.
        family: its page.
        config: its configuration.
        calls: recorded calls of the transformer.
        dtype: what blocks compute in.
        device: where they run.
    """

    def __init__(
        self,
        view: DiffusersView,
        family: Family,
        config: Mapping[str, Any],
        calls: Sequence[Call],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        import diffusers  # takes seconds

        self._view, self._family, self._dtype, self._device = view, family, dtype, device
        self.model = empty_model(getattr(diffusers, family.transformer_class), config).eval()
        self.paths = [f"{block.prefix}.{i}" for block in family.blocks for i in range(int(config[block.count]))]
        prefixes = tuple(f"{block.prefix}." for block in family.blocks)
        self._fill(name for name in view if not name.startswith(prefixes))
        self._calls = self._first_calls(calls)

    def __iter__(self) -> Iterator[LoadedBlock]:
        """Each block; whoever takes it must `advance` through it before asking for the next."""
        calls = self._calls
        specs = {block.prefix: block for block in self._family.blocks}
        for path in self.paths:
            names = [name for name in self._view if name.startswith(f"{path}.")]
            self._fill(names)
            module = self.model.get_submodule(path)
            accepted = inspect.signature(module.forward).parameters
            for name in calls[0].arguments.keys() - accepted.keys():
                raise CheckpointError(
                    f"{path} ({type(module).__name__}) does not take `{name}` as the block before does"
                )
            block = LoadedBlock(path, module, calls, specs[path.rpartition(".")[0]], self._device)
            yield block
            calls = block.calls
            module.to("meta")
            for name in names:
                self._view.release(name)

    def _fill(self, names: Iterable[str]) -> None:
        for name in names:
            path, _, leaf = name.rpartition(".")
            value = self._view.tensor(name).to(self._device, self._dtype)
            setattr(self.model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))

    @torch.no_grad()
    def _first_calls(self, calls: Sequence[Call]) -> list[Call]:
        """What reaches the first block: the model is run up to there."""
        first = self.model.get_submodule(self.paths[0])
        signature = inspect.signature(first.forward)
        reached: list[dict[str, Any]] = []

        def stop(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            reached.append(dict(signature.bind(*positional, **named).arguments))
            raise _Reached

        handle = first.register_forward_pre_hook(stop, with_kwargs=True)
        found = []
        try:
            for call in calls:
                try:
                    self.model(**on_device(call.arguments, self._device))
                except _Reached:
                    found.append(Call(on_device(reached.pop(), "cpu"), call.held_out))
        finally:
            handle.remove()
        return found
