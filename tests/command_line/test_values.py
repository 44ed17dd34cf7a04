"""What stands behind a flag: whatever is written is read exactly, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp.command_line.values import amount, indices, spread_lists
from sae.common.errors import BadInput


@given(st.integers(1, 10**9), st.sampled_from(["", "k", "K", "M", "G", "B"]))
def test_amounts_are_exact(thousandths: int, suffix: str) -> None:
    """Three decimals of any size: what is a whole number is taken as just that, and nothing else is."""
    scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}[suffix.lower()]
    text = f"{thousandths // 1000}.{thousandths % 1000:03d}{suffix}"
    whole, rest = divmod(thousandths * scale, 1000)
    if rest or not 1 <= whole <= 10**15:
        with pytest.raises(BadInput, match="not an amount"):
            amount("--tokens", text)
    else:
        assert amount("--tokens", text) == whole


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 20)), min_size=1, max_size=6))
def test_indices_are_what_they_say(spans: list[tuple[int, int]]) -> None:
    text = ",".join(f"{first}-{first + n}" if n else str(first) for first, n in spans)
    expected = {i for first, n in spans for i in range(first, first + n + 1)}
    found = indices(text)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert indices(text.replace(",", ", ")) == found
    assert indices(None) == ()


@given(st.lists(st.sampled_from(["train", "--seeds", "--text", "--name", "--json", "0", "1", "a.txt"]), max_size=12))
def test_lists_may_be_given_at_once(arguments: list[str]) -> None:
    """Nothing but list options' names is added, and in a list option every value has its name before it."""
    spread = spread_lists(arguments)
    lists = {"--seeds", "--text", "--against"}
    assert [a for a in spread if a not in lists] == [a for a in arguments if a not in lists]
    assert {a for a in spread if a in lists} <= {a for a in arguments if a in lists}
    assert spread_lists(spread) == spread
