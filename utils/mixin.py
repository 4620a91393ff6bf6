"""An object that gets more than its class has, without a change to that class."""

from __future__ import annotations

from typing import Any


def mix_in(owner: Any, *mixins: type, **members: Any) -> None:
    """Make a class for `owner` alone, with its own one's name, where `members` and `mixins` come before what it has."""
    kind = type(owner)
    owner.__class__ = type(kind.__name__, (*mixins, kind), {"__module__": kind.__module__, **members})
