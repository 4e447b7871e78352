import re

import pytest

from blipds.errors import UserError, nearest
from blipds.registry import Registry


def test_finds_what_was_registered():
    registry = Registry("animal")

    @registry.register("cat")
    class Cat:
        pass

    @registry.register("dog")
    @registry.register("hound")
    def dog():
        pass

    assert registry["cat"] is Cat
    assert registry["dog"] is registry["hound"] is dog
    assert registry.names() == ["cat", "dog", "hound"]


def test_unknown_name_names_the_kind_the_nearest_and_all():
    registry = Registry("animal")
    registry.register("horse")(str)
    registry.register("cat")(str)
    message = "unknown animal 'hrose'; did you mean 'horse'? allowed: cat, horse"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        registry["hrose"]


def test_a_name_is_taken_once():
    registry = Registry("animal")
    registry.register("cat")(str)
    with pytest.raises(ValueError, match="animal 'cat' is registered twice"):
        registry.register("cat")(int)
    assert registry["cat"] is str


def test_nearest_gives_no_hint_where_nothing_is_near():
    assert nearest("xyz", ["cat", "bird"]) == "allowed: bird, cat"
    assert nearest("brid", ["cat", "bird"]) == "did you mean 'bird'? allowed: bird, cat"
