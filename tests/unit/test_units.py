from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import UserError
from launcher.units import format_bytes, format_count, format_seconds, parse_bytes, parse_count, parse_seconds


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("2GiB", 2 * 2**30), ("1.5 MB", 1_500_000), ("512", 512), ("10B", 10)],
)
def test_parse_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("1d", 86400)]
)
def test_parse_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "count"), [("1.2M", 1_200_000), ("500k", 500_000), ("7B", 7 * 10**9), ("1_000", 1000)]
)
def test_parse_count(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("parse", [parse_bytes, parse_seconds, parse_count])
@pytest.mark.parametrize("text", ["", "five", "-5GB", "5 XB", "5GBs", "1h 2", "."])
def test_nonsense_is_refused_with_a_hint(parse: object, text: str) -> None:
    with pytest.raises(UserError) as raised:
        parse(text)  # type: ignore[operator]
    assert raised.value.hint


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1.5 * 2**30, "1.5 GiB"), (139 * 2**30, "139 GiB")],
)
def test_format_bytes(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1000, "1.0k"), (7.9e6, "7.9M"), (999_999, "1.0M"), (8.03e9, "8.0B")]
)
def test_format_count(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4s"), (9.97, "10s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (97200, "1d03h")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.integers(min_value=1, max_value=10**15))
def test_formatted_counts_read_back_within_rounding(number: int) -> None:
    assert abs(parse_count(format_count(number)) - number) <= number * 0.05
