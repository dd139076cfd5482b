"""Of a test's cases so many are run that every two values of its parameters meet."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from case_selection import pairs_of, pairwise

SIZES = ((1, 7), (7, 1), (7, 7), (1, 1))


def case(names, **params):
    """An item of pytest with these parameters, and marks that give them by lists of these names."""
    marks = [SimpleNamespace(args=(each,)) for each in names]
    return SimpleNamespace(
        callspec=SimpleNamespace(params=params), iter_markers=lambda name: iter(marks)
    )


def product(**lists):
    return [
        case(lists, **dict(zip(lists, values, strict=True)))
        for values in itertools.product(*lists.values())
    ]


def test_every_two_values_of_three_parameters_meet_in_few_cases():
    lists = {"a": (1, 3, 7), "b": ("x", "y"), "c": (None, 0.5, 133, 2)}
    chosen = [one.callspec.params for one in pairwise(product(**lists))]
    for (left, lefts), (right, rights) in itertools.combinations(lists.items(), 2):
        met = {(params[left], params[right]) for params in chosen}
        assert met == set(itertools.product(lefts, rights))
    assert len(chosen) == 12, "as many as the two longest lists make"


@pytest.mark.parametrize("lists", [{"a": range(9)}, {"a": range(5), "b": "xyz"}])
def test_with_one_parameter_or_two_all_cases_are_run(lists):
    cases = product(**{name: tuple(values) for name, values in lists.items()})
    assert len(pairwise(cases)) == len(cases)


def test_what_one_list_gives_together_is_one_value():
    """All four sizes are run, though two of them hold every number and every two."""
    cases = [
        case(["height, width", "dtype", "mode"], height=size[0], width=size[1], dtype=dtype, mode=m)
        for size, dtype, m in itertools.product(SIZES, "fb", "uv")
    ]
    chosen = [one.callspec.params for one in pairwise(cases)]
    assert {(params["height"], params["width"]) for params in chosen} == set(SIZES)
    assert len(chosen) < len(cases)


def test_parameters_of_fixtures_count_too():
    cases = [
        case(["a", "b"], a=a, b=b, backend=backend)
        for a, b, backend in itertools.product((1, 3), (5, 7), ("reference", "cpu"))
    ]
    chosen = pairwise(cases)
    assert set().union(*map(pairs_of, chosen)) == set().union(*map(pairs_of, cases))
    met = {(one.callspec.params["a"], one.callspec.params["backend"]) for one in chosen}
    assert met == set(itertools.product((1, 3), ("reference", "cpu")))


def test_the_choice_is_the_same_every_time():
    cases = product(a=(1, 3, 7), b=(2, 4), c=(5, 6, 8))
    assert [id(one) for one in pairwise(cases)] == [id(one) for one in pairwise(cases)]
