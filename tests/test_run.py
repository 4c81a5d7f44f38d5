"""The parts of a run by themselves."""

from __future__ import annotations

import types

import jax
import pytest

from sfumato import run


@pytest.mark.parametrize(
    ("stats", "side", "wish", "tiled"),
    [
        (None, 64, None, False), (None, 96, None, False), (None, 128, None, True), (None, 128, False, False),
        (None, 64, True, True), ({}, 128, None, True), ({"bytes_limit": 8 * 2**30}, 128, None, True),
        ({"bytes_limit": 8 * 2**30}, 64, None, False), ({"bytes_limit": 20 * 2**30}, 128, None, False),
        ({"bytes_limit": 20 * 2**30}, 256, None, True), ({"bytes_limit": 100 * 2**30}, 256, None, False),
    ],
)  # fmt: skip
def test_large_pictures_pass_the_autoencoder_by_tiles_unless_a_device_has_the_memory(
    stats, side, wish, tiled, monkeypatch
):
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert run.tiling((side, side, 4), wish) is tiled
