"""Tensors by name inside a state, and the check that they fit the model."""

import pytest
import torch

from swift_cl.errors import UserError
from swift_cl.methods._state import check_shapes, pack, shapes_of, unpack


def test_equal_names_and_shapes_fit_in_any_order() -> None:
    shapes = shapes_of({"a": torch.zeros(2, 3), "b": torch.zeros(())})
    assert shapes == {"a": [2, 3], "b": []}
    check_shapes("ewc", shapes, {"b": [], "a": [2, 3]})


@pytest.mark.parametrize(
    ("found", "current", "difference"),
    [
        ({"a": [2, 3]}, {"a": [3, 2]}, r"1 differ: a: \[2, 3\] in the state, \[3, 2\] now;"),
        ({"a": [2], "b": [1]}, {"a": [2]}, r"1 differ: b: \[1\] in the state, absent now;"),
        ({"a": [2]}, {"a": [2], "b": [1]}, r"1 differ: b: absent in the state, \[1\] now;"),
    ],
)
def test_a_state_of_other_parameters_is_refused(
    found: dict[str, list[int]], current: dict[str, list[int]], difference: str
) -> None:
    with pytest.raises(UserError, match=f"the state of method 'ewc' does not fit the trained parameters, {difference}"):
        check_shapes("ewc", found, current)


def test_five_differences_are_shown_and_all_are_counted() -> None:
    with pytest.raises(UserError, match="7 differ: ") as error:
        check_shapes("ewc", {}, {f"p{number}": [1] for number in range(7)})
    assert [f"p{number}:" in str(error.value) for number in range(7)] == [True] * 5 + [False] * 2


def test_groups_of_tensors_are_told_apart() -> None:
    one, two, three = (torch.full((1,), float(number)) for number in range(3))
    packed = pack(gradient={"a.b": one, "c": two}, gradient_2={"c": three})
    assert packed == {"gradient/a.b": one, "gradient/c": two, "gradient_2/c": three}
    assert unpack(packed, "gradient") == {"a.b": one, "c": two}
    assert unpack(packed, "gradient_2") == {"c": three}
    assert unpack(packed, "other") == {}
