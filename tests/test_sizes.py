from __future__ import annotations

import pytest

from sfumato.sizes import parse_size


@pytest.mark.parametrize(("text", "size"), [
    ("768x512", (768, 512)), (" 64 X 32 ", (64, 32)), ("64×32", (64, 32)), ("64, 32", (64, 32)),
    ("768", None), ("768x", None), ("-8x8", None), ("8x8x8", None), ("", None),
])  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size
