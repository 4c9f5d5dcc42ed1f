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
from types import CellType, CodeType, FunctionType
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
    if not made.__annotations__:
        return made
    key = (made.__code__, made.__module__, made.__qualname__)
    said = dict(made.__annotations__)  # the type checker puts types in place of names
    annotations, checks = compiled.get(key, ({}, None))
    if checks is not None and annotations == said:
        return bound(checks, made)
    try:
        shapes = "jaxtyping." in repr(get_type_hints(made, include_extras=True))
    except Exception:  # a name that only type checkers import, or that is defined further down: taken for any type
        shapes = True
    if shapes:
        return with_shapes(made, typechecker=typechecker)
    checks = types_alone(emptied(made) if made.__closure__ else made)
    if not hasattr(checks, "__beartype_wrapper"):  # its annotations say that anything goes
        return made
    compiled[key] = (said, checks)
    return bound(checks, made) if made.__closure__ else checks


def bound(checks: FunctionType, made: FunctionType) -> FunctionType:
    """The same checks around another function of the same lines."""
    again = FunctionType(checks.__code__, checks.__globals__)
    again.__kwdefaults__ = checks.__kwdefaults__ | {"__beartype_func": made}
    return functools.update_wrapper(again, made)


def emptied(made: FunctionType) -> FunctionType:
    """The function without what it holds of the one around it, which would be kept as long as its checks are."""
    cells = tuple(CellType() for _ in made.__closure__)
    same = FunctionType(made.__code__, made.__globals__, made.__name__, made.__defaults__, cells)
    same.__kwdefaults__, same.__annotations__ = made.__kwdefaults__, dict(made.__annotations__)
    same.__module__, same.__qualname__ = made.__module__, made.__qualname__
    return same


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
