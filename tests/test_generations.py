"""Numbers of generations only rise, also for names that were forgotten."""

from __future__ import annotations

from loraswarm.adapters import generations
from loraswarm.adapters.generations import Generations


def test_each_name_counts_for_itself():
    numbers = Generations()
    assert [numbers.next("a"), numbers.next("b"), numbers.next("a")] == [1, 1, 2]
    assert (numbers.last("a"), numbers.last("new")) == (2, 0)


def test_forgotten_names_go_on_above_what_they_had(monkeypatch):
    monkeypatch.setattr(generations, "MAX_NAMES", 2)
    numbers = Generations()
    for _ in range(7):
        numbers.next("a")
    numbers.next("b")
    numbers.next("c")
    assert numbers.next("a") == 8
