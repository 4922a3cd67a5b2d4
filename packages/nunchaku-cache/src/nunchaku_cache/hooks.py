"""What is put on a transformer and its blocks: on the instance, outside everything else, and gone without a trace.

A module's `_compiled_call_impl` is what `module(...)` calls if it is set; `module.compile()` sets it. A hook there is
outside the module's forward, whoever has wrapped that (offloading, layerwise casting, torch's own hooks), so that a
skipped block loads no weights; it is outside compiled code; copies of the module do not inherit it.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from torch import nn

SLOT = "_compiled_call_impl"

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class CallHook:
    """Lets a handler answer the calls of one module; the handler is given the call itself."""

    def __init__(self, module: nn.Module, handler: Handler, owner: Any) -> None:
        """
        Args:
            module: whose calls.
            handler: (inner, args, kwargs) -> result.
            owner: whoever uses the hook, to be found through it.
        """
        self.owner = owner
        self._module = module
        self._handler = handler
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._handler(self._compiled or self._module._call_impl, args, kwargs)

    def install(self) -> None:
        """Start answering."""
        self._compiled = getattr(self._module, SLOT)
        self._module.__dict__[SLOT] = self

    def is_installed(self) -> bool:
        """Whether it answers; compiling the module meanwhile takes its place."""
        return self._module.__dict__.get(SLOT) is self

    def remove(self) -> None:
        """Stop answering; nothing happens if another has taken the place."""
        if not self.is_installed():
            return
        if self._compiled is None:
            del self._module.__dict__[SLOT]
        else:
            self._module.__dict__[SLOT] = self._compiled


class ContextTap:
    """Listens to diffusers' `transformer.cache_context(name)`, which pipelines use to name passes of guidance."""

    def __init__(self, listener: Callable[..., Any] | None, transformer: Any) -> None:
        self._listener = listener
        self._transformer = transformer

    @contextlib.contextmanager
    def __call__(self, name: str, **details: Any) -> Any:
        plain = type(self._transformer).cache_context
        listening = contextlib.nullcontext() if self._listener is None else self._listener(name, **details)
        with listening, plain(self._transformer, name, **details):
            yield

    def install(self) -> None:
        """Start listening, to models that have it."""
        if hasattr(type(self._transformer), "cache_context"):
            self._transformer.__dict__["cache_context"] = self

    def remove(self) -> None:
        """Stop listening."""
        if self._transformer.__dict__.get("cache_context") is self:
            del self._transformer.__dict__["cache_context"]

    def __reduce__(self) -> Any:
        # a copy of the transformer has one that listens for nobody
        return ContextTap, (None, self._transformer)
