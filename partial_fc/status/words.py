"""Numbers, times and foreign text as a terminal shows them; and numbers as untrusted files hold them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_LARGEST = 1e100
_LONGEST = 1e11  # seconds
_BARS = "▁▂▃▄▅▆▇█"
_PLAIN_BARS = "_.-=+*%#"


def plain(text: object, limit: int = 200) -> str:
    """Text of a file or of another process, harmless to a terminal: one line, nothing that steers it.

    Args:
        text: anything.
        limit: characters; longer text is cut.
    """
    given = str(text)
    shown = "".join(map(_harmless, given[:limit]))
    return shown + "..." if len(given) > limit else shown


def _harmless(sign: str) -> str:
    if sign in "\n\t\r":
        return " "
    # Control characters, and those that change the direction of what follows, aren't printable.
    return sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}"


def number(value: Any) -> float | None:
    """A number that can be reckoned with; None for anything else, and beyond 1e100, where sums and ratios overflow."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    # NaN compares with nothing.
    return converted if abs(converted) <= _LARGEST else None


def whole(value: Any) -> int | None:
    """A whole number of 0 or more that fits 64 bits; None for anything else."""
    found = number(value)
    return int(found) if found is not None and 0 <= found < 2**63 and found == int(found) else None


def duration(seconds: float) -> str:
    """Seconds as a person says them: ``340 ms``, ``3.2 s``, ``45 s``, ``12 min``, ``5 h 12 min``, ``3 d 4 h``."""
    if not seconds < _LONGEST:
        return "over 3,000 years"
    seconds = max(seconds, 0.0)
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h" if hours < 24 * 1000 else f"{hours // 24:,} d"


def moment(when: float, now: float) -> str:
    """A time as the clock on the wall shows it, with the day where that isn't today's; both in seconds of Unix time."""
    try:
        at, today = datetime.fromtimestamp(when), datetime.fromtimestamp(now)
    except (ValueError, OverflowError, OSError):
        return "an unknown time"
    if at.date() == today.date():
        return at.strftime("%H:%M:%S" if abs(now - when) < 3600 else "%H:%M")
    return at.strftime("%Y-%m-%d %H:%M")


def ago(when: float, now: float) -> str:
    """A time and how long ago that is."""
    return f"{moment(when, now)}, {since(when, now)}"


def since(when: float, now: float) -> str:
    """How long ago a time is. By the clocks of other machines it may be still to come: a minute of that is now."""
    if when - now >= 60:
        return f"{duration(when - now)} ahead of this clock"
    return "just now" if now - when < 0.95 else f"{duration(now - when)} ago"


def size(count: float) -> str:
    """Bytes in binary units."""
    power = 0
    while count >= 1023.5 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} {_UNITS[power]}" if not power or count >= 99.5 else f"{count:.3g} {_UNITS[power]}"


def figure(value: float) -> str:
    """A measured number in four digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def ranks(numbers: Sequence[int], most: int = 6) -> str:
    """``rank 3``, ``ranks 1, 2``, ``ranks 0, 1, 2, 3, 4, 5 and 58 more``."""
    shown = ", ".join(map(str, numbers[:most]))
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}{more}"


def sparkline(points: Iterable[tuple[float, float]], width: int, *, unicode: bool = True) -> str:
    """A curve as a line of characters: means of the values in equal parts of the first coordinate's range.

    Args:
        points: (position, value), in any order.
        width: characters; a part without a value is a blank.
        unicode: whether block characters can be shown.
    """
    known = list(points)
    if not known:
        return ""
    first, last = min(x for x, _ in known), max(x for x, _ in known)
    parts: list[list[float]] = [[] for _ in range(min(width, len(known)))]
    for x, value in known:
        place = (x - first) / (last - first) if last > first else 0.0
        parts[min(int(place * len(parts)), len(parts) - 1)].append(value)
    means = [math.fsum(part) / len(part) if part else math.nan for part in parts]
    real = [mean for mean in means if not math.isnan(mean)]
    low, high = min(real), max(real)
    signs = _BARS if unicode else _PLAIN_BARS

    def sign(mean: float) -> str:
        if math.isnan(mean):
            return " "
        share = (mean - low) / (high - low) if high > low else 0.0
        return signs[min(int(share * len(signs)), len(signs) - 1)]

    return "".join(map(sign, means))
