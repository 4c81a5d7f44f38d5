"""--size."""

from __future__ import annotations

from sfumato.errors import SfumatoError
from sfumato.sizes import parse_size


def parsed_size(text: str | None) -> tuple[int, int] | None:
    """Width and height. Raises SfumatoError for what is none."""
    if text is None:
        return None
    size = parse_size(text)
    if size is None:
        raise SfumatoError(f"--size takes WIDTHxHEIGHT in pixels, such as 768x512, not {text!r}.")
    return size
