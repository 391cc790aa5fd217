"""Checks of arguments, one by one: each failure names the owner, the argument, its value, and what was expected."""

from __future__ import annotations

from partial_fc.errors import ConfigError


def require(ok: bool, owner: str, name: str, value: object, expected: str) -> None:
    """Raise a ConfigError unless ``ok``."""
    if not ok:
        raise ConfigError(f"{owner}: {name}={value!r}, expected {expected}")


class Checked:
    """Base of the three axes of the loss: arguments are checked under the name of their class."""

    def _require(self, ok: bool, name: str, expected: str) -> None:
        require(ok, type(self).__name__, name, getattr(self, name), expected)

    def _require_share(self, share: float) -> None:
        require(0 <= share <= 1, f"{type(self).__name__}.weakened", "share", share, "a share in [0, 1]")
