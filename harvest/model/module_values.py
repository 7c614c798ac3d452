"""The first input and the first output of a module in a pass: reading them, replacing them, and skipping the module.

Modules differ in how they are called (by position or by name) and in what they return (a tensor, a tuple, a mapping);
only this file knows. Nothing here costs more than the hook that it makes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Change = Callable[[Tensor], Tensor | None]
"""Takes a value and returns what takes its place; None leaves it."""


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return a module's first input."""
    return args[0] if args else next(iter(kwargs.values()), None)


def first_tensor(value: Any) -> Any:
    """Return a module's output, the first one if there are several; anything but a tensor as it is."""
    if isinstance(value, (tuple, list)) and value:
        return value[0]
    if isinstance(value, Mapping) and value:
        return next(iter(value.values()))
    return value


def with_first_argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], first: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a module's inputs with another first one."""
    if args:
        return (first, *args[1:]), dict(kwargs)
    return (), {**kwargs, next(iter(kwargs)): first}


def with_first_tensor(output: Any, first: Tensor) -> Any:
    """Return a module's output with another first tensor."""
    if isinstance(output, (tuple, list)):
        replaced = (first, *output[1:])
        return replaced if isinstance(output, tuple) else list(replaced)
    if isinstance(output, Mapping):
        return type(output)(**{**output, next(iter(output)): first})
    return first


def changing_input(change: Change) -> Callable[..., Any]:
    """Return a forward pre-hook, to be registered with keyword arguments, that changes a module's first input."""

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        new = change(first_argument(args, kwargs))
        return None if new is None else with_first_argument(args, kwargs, new)

    return before


def changing_output(change: Change) -> Callable[..., Any]:
    """Return a forward hook that changes a module's first output."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        new = change(first_tensor(output))
        return None if new is None else with_first_tensor(output, new)

    return after


@contextmanager
def skipping(module: nn.Module, output: Callable[[], Any]) -> Iterator[None]:
    """Let a module return what `output` gives meanwhile, without computing anything."""
    before = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output()
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:  # accelerate's, which moves weights to where they run
            module.forward = before
