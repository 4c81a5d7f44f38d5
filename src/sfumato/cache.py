"""Compiled programs are kept between processes, so that the second start of a program is quick."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import jax

VARIABLE = "SFUMATO_CACHE"
"""The environment variable that names the cache folder, or switches it off."""

OFF = ("", "0", "off")

BOUND = "jax_persistent_cache_min_compile_time_secs"
"""jax's name of the setting below, in capitals that of its environment variable."""

KEPT_FROM = 0.1
"""Seconds of compiling from which on a program is kept: of the programs of a small model none takes a whole second,
which is jax's own bound, and together they take several."""


def cache_folder() -> Path | None:
    """Where sfumato keeps what it can make again: `$SFUMATO_CACHE`, otherwise the user's cache folder.

    None if the variable says "off", "0" or nothing.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        return None if named.strip().lower() in OFF else Path(named).expanduser()
    if sys.platform == "darwin":
        usual = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        usual = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return usual / "sfumato"


def enable_cache() -> None:
    """Turns on jax's persistent compilation cache, for programs that take at least `KEPT_FROM` to compile (or what
    `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS` says).

    Does nothing where the user has named a folder to jax himself (`JAX_COMPILATION_CACHE_DIR`) or switched ours off
    (`SFUMATO_CACHE=off`). A folder that cannot be written to is a warning.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        folder = cache_folder()
        if folder is None:
            return
        folder = folder / "compiled"
        # What lies there is run, so nobody else may write to it.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
    except (OSError, RuntimeError) as error:  # the latter: there is no home folder
        warnings.warn(f"Compiled programs are not kept ({error}); {VARIABLE} names another folder.", stacklevel=3)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if BOUND.upper() not in os.environ:
        jax.config.update(BOUND, KEPT_FROM)


def enabled_folder() -> Path | None:
    """The cache folder if compiled programs are kept there in this process; None before `enable_cache`, too."""
    folder = cache_folder()
    used = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    return folder if folder is not None and used == str(folder / "compiled") else None
