"""What was compiled once is not compiled again by the next process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sfumato.cache import cache_folder, enable_cache

PROGRAM = """
import json, jax
from sfumato.cache import enable_cache
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
enable_cache()
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((64, 64))).block_until_ready()
hits = events.count("/jax/compilation_cache/cache_hits")
print(json.dumps({"hits": hits, "folder": jax.config.jax_compilation_cache_dir}))
"""


def process(**environment: str) -> dict:
    """What a fresh process says that compiles a program, however small, with the cache on."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SFUMATO", "JAX_COMP", "XDG"))}
    kept |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | environment
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=kept, check=True)
    return json.loads(done.stdout) | {"stderr": done.stderr}


def programs(folder: Path) -> list[Path]:
    return sorted(folder.rglob("jit_*"))


def test_the_second_process_finds_what_the_first_has_compiled(tmp_path):
    first = process(SFUMATO_CACHE=str(tmp_path))
    made = programs(tmp_path)
    second = process(SFUMATO_CACHE=str(tmp_path))
    assert first["hits"] == 0
    assert second["hits"] == len(made) > 0
    assert programs(tmp_path) == made
    assert first["stderr"] == second["stderr"] == ""
    assert (tmp_path / "compiled").stat().st_mode & 0o077 == 0, "others could put programs there"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other cache folders")
def test_by_default_it_lies_in_the_cache_folder_of_the_user(tmp_path):
    assert process(XDG_CACHE_HOME=str(tmp_path))["folder"] == str(tmp_path / "sfumato" / "compiled")
    assert process(HOME=str(tmp_path))["folder"] == str(tmp_path / ".cache" / "sfumato" / "compiled")


def test_a_folder_that_the_user_gave_to_jax_stays(tmp_path):
    told = process(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"), SFUMATO_CACHE=str(tmp_path / "ours"))
    assert told["folder"] == str(tmp_path / "own")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("word", ["off", "OFF", "0", ""])
def test_it_can_be_switched_off(word, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", word)
    assert cache_folder() is None
    enable_cache()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"Compiled programs are not kept .*; SFUMATO_CACHE names another folder\."):
        enable_cache()
    assert jax.config.jax_compilation_cache_dir is None
