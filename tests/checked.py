"""What checks the types and shapes of every call in tests: jaxtyping's import hook, made ten times as fast.

The hook measures every call for shapes, though one function in twenty names any, and it compiles its checks anew
whenever a function inside another is made: together a third of the time of all tests. Here a function that names no
shape gets the type checker alone, compiled once for all that come from the same lines. A wrong call raises
`jaxtyping.TypeCheckError` as before.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any, get_type_hints

import beartype
import jaxtyping

with_shapes = jaxtyping.jaxtyped
types_alone = beartype.beartype(conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError))
# A function's annotations and its checks, by its code, module and name.
compiled: dict[tuple[CodeType, str, str], tuple[dict[str, Any], FunctionType]] = {}


def checked(*, typechecker: Callable) -> Callable:
    """In place of `jaxtyping.jaxtyped`, which is what the hook writes above every function and class."""
    return functools.partial(decorated, typechecker=typechecker)


def decorated(made: Any, typechecker: Callable) -> Any:
    if isinstance(made, type):
        if dataclasses.is_dataclass(made) and "__init__" in vars(made):
            made.__init__ = decorated(made.__init__, typechecker)
        return made
    key = (made.__code__, made.__module__, made.__qualname__)
    annotations, checks = compiled.get(key, ({}, None))
    if checks is not None and annotations == made.__annotations__:
        again = FunctionType(checks.__code__, checks.__globals__)
        again.__kwdefaults__ = checks.__kwdefaults__ | {"__beartype_func": made}
        return functools.update_wrapper(again, made)
    try:
        shapes = "jaxtyping." in repr(get_type_hints(made, include_extras=True))
    except Exception:  # a name that only type checkers import, or that is defined further down: taken for any type
        shapes = True
    if shapes:
        return with_shapes(made, typechecker=typechecker)
    checks = types_alone(made)
    if checks is not made:  # else it has no annotation
        compiled[key] = (made.__annotations__, checks)
    return checks


@contextmanager
def unchecked() -> Iterator[None]:
    """Calls as users make them, where the checks would refuse before the code under test can."""

    def call(*args: Any, __beartype_func: Callable, **kwargs: Any) -> Any:
        return __beartype_func(*args, **kwargs)

    codes = [(checks, checks.__code__) for _, checks in compiled.values()]
    jaxtyping.config.update("jaxtyping_disable", True)
    for checks, _ in codes:
        checks.__code__ = call.__code__
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
        for checks, code in codes:
            checks.__code__ = code
