"""Shapes and types of every call are checked in tests, though nothing in the code checks them."""

import gc
import weakref

import beartype
import jaxtyping
import numpy as np
import pytest

from mentalglm_jax import files
from mentalglm_jax.model.attention import restarting_positions
from mentalglm_jax.text.tasks import Parsed
from tests.checked import unchecked

wrong = pytest.raises(jaxtyping.TypeCheckError)
checked = jaxtyping.jaxtyped(typechecker=beartype.beartype)


def test_a_wrong_type_is_seen():
    with wrong:
        files.write_text(3, "text")


def test_a_wrong_shape_is_seen():
    with wrong:
        restarting_positions(np.zeros(3, int))


def test_a_wrong_field_is_seen():
    with wrong:
        Parsed(("low",), 3, None, None, "ok")


def made(more):
    @checked
    def sum_of(x: int, *, y: int = 1) -> "int":  # as a name, which is what most of our modules hold
        return x + y + more

    return sum_of


def test_functions_of_the_same_lines_are_checked_by_the_same_code():
    one, two = made(1), made(2)
    assert one.__code__ is two.__code__ and one.__wrapped__ is not two.__wrapped__
    assert (one(1), two(1), two(1, y=3)) == (3, 4, 6)
    with wrong:
        two("a")
    with wrong:
        made(0.5)(1)  # what it returns


def test_so_are_those_that_hold_nothing():
    def plain():
        @checked
        def same(x: "int") -> "int":
            return x

        return same

    one, two = plain(), plain()
    assert one.__code__ is two.__code__ and two(3) == 3
    with wrong:
        two("a")


def test_annotations_are_those_of_each():
    def of(kind):
        @checked
        def same(x: kind) -> kind:
            return x

        return same

    assert of(int)(1) == 1 and of(str)("a") == "a"
    with wrong:
        of(str)(1)


def test_what_a_function_holds_is_not_kept():
    class Held:
        pass

    def around(held):
        @checked
        def holding(x: int) -> int:
            return x if held else 0

        return holding

    held = Held()
    assert around(held)(2) == 2
    gone = weakref.ref(held)
    del held
    gc.collect()
    assert gone() is None


def test_they_can_be_turned_off_for_a_while():
    with unchecked():
        assert made(0.5)(1) == 2.5
    with wrong:
        made(0.5)(1)
