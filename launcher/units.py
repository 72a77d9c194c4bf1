"""Numbers with units, as people write and read them: bytes, seconds, counts."""

from __future__ import annotations

import re

from launcher.errors import UserError

BYTES: dict[str, int] = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGTP", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

NUMBER = r"\d+(?:\.\d+)?|\.\d+"


def parse_bytes(text: str) -> int:
    """Bytes in `5GB` (5 * 1000**3), `512MiB` (512 * 1024**2) or `1024`. Raises UserError."""
    match = re.fullmatch(rf"({NUMBER})\s*([KMGTP]?I?B?)", text.strip().upper())
    if not match or match[2] not in BYTES:
        raise UserError(f"{text!r} is no size", "write it as 5GB, 500MB or 2GiB")
    return round(float(match[1]) * BYTES[match[2]])


def parse_seconds(text: str) -> float:
    """Seconds in `90s`, `30m`, `2h`, `1d` or `1h30m`. Raises UserError."""
    compact = text.replace(" ", "").lower()
    if not re.fullmatch(rf"(?:(?:{NUMBER})[smhd])+", compact):
        raise UserError(f"{text!r} is no length of time", "write it as 90s, 30m, 2h or 1h30m")
    return sum(float(number) * SECONDS[unit] for number, unit in re.findall(rf"({NUMBER})([smhd])", compact))


def parse_count(text: str) -> int:
    """The number in `1.2M`, `500k`, `7B` or `1_000`. Raises UserError."""
    match = re.fullmatch(rf"({NUMBER})([KMBT]?)", text.strip().replace("_", "").replace(",", "").upper())
    if not match:
        raise UserError(f"{text!r} is no count", "write it as 1200, 500k or 1.2M")
    return round(float(match[1]) * COUNTS[match[2]])


def format_bytes(num_bytes: float) -> str:
    """`1.5 GiB`: powers of 1024, because memory comes in them."""
    return _scaled(num_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), " ")


def format_count(number: float) -> str:
    """`1.2M`: three digits at most, as parameters and tokens are quoted."""
    return _scaled(number, 1000, ("", "k", "M", "B", "T"), "")


def format_seconds(seconds: float) -> str:
    """`0.4s`, `42s`, `3m05s`, `2h07m`, `4d03h`: the two largest units."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _scaled(number: float, base: int, units: tuple[str, ...], space: str) -> str:
    power = 0
    # 999.5 rather than 1000: three digits must not round up to four.
    while abs(number) >= (999.5 if base == 1000 else base) and power + 1 < len(units):
        number /= base
        power += 1
    exact = power == 0 and float(number).is_integer()
    digits = f"{number:.0f}" if exact or abs(number) >= 99.95 else f"{number:.1f}"
    return f"{digits}{space}{units[power]}"
