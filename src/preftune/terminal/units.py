"""Numbers as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds as ``45 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(num_bytes: float) -> str:
    """Bytes in binary units: ``512 B``, ``1.5 GiB``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def count(number: float) -> str:
    """Large counts in short: ``950``, ``18.7 M``; below ten thousand with all digits."""
    if abs(number) < 10_000:
        return f"{number:,.0f}"
    for limit, unit in ((1e6, "k"), (1e9, "M"), (1e12, "B")):
        if abs(number) < limit:
            return f"{number / limit * 1e3:.1f} {unit}"
    return f"{number / 1e12:.1f} T"


def share(part: float, whole: float) -> str:
    """A share in per cent, ``0 %`` of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def plural(number: int, word: str) -> str:
    """A count with its word: ``1 pair``, ``2 pairs``."""
    return f"{number:,} {word}" + ("" if number == 1 else "s")
