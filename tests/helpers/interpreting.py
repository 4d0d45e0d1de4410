"""Let Triton's interpreter, TRITON_INTERPRET=1, run the kernels in half of its time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import ismodule
from typing import Any


def hurry() -> None:
    """Leave out what the interpreter does over and over.

    At each call of one kernel's function by another it looks through the whole language for what is not its own yet,
    and at each sum of integers whether they overflow, which sizes of tests cannot.
    """
    from triton import language
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
    taken_over: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function within a kernel, for which `language` is the interpreter's already."""
        modules = {id(one) for one in self.fn.__globals__.values() if ismodule(one)} & {id(language.core)}
        if modules - taken_over:
            interpreter._patch_lang(self.fn)  # for as long as the process lives, as without this
            taken_over.update(modules)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def by_name(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that finds something for each type once; types of blocks have no hash."""
    found: dict[str, Any] = {}

    def find_once(kind: Any) -> Any:
        if kind.name not in found:
            found[kind.name] = find(kind)
        return found[kind.name]

    return find_once
