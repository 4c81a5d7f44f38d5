"""Array types are checked in every test run: the hook must stand before the first import of sfumato."""

from __future__ import annotations

import functools
import gc
import os
import sys
from pathlib import Path

import jaxtyping
import pytest
from jaxtyping import config, install_import_hook

import typechecker

os.environ["SFUMATO_CACHE"] = "off"  # nothing is written into the home of who runs the tests
# Most of the time goes into compiling programs for tiny networks, which need not be fast.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
os.environ["OMP_NUM_THREADS"] = "1"  # handing out the work of a tiny torch module takes longer than doing it
jaxtyping.jaxtyped = typechecker.sparing(jaxtyping.jaxtyped)
install_import_hook("sfumato", "typechecker.checked")


def pytest_collection_finish():
    """What is there by now stays; to look through it for garbage again and again takes a twentieth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_runtest_setup():
    typechecker.begin()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(kind): a folder that diffusers saved, and the tiny pipeline (tests/pipelines.py) that it came from."""
    from pipelines import torch_pipeline

    @functools.cache
    def get(kind: str):
        folder = tmp_path_factory.mktemp(kind)
        pipeline = torch_pipeline(kind, folder)
        pipeline.save_pretrained(folder / "model")
        pipeline.set_progress_bar_config(disable=True)
        return folder / "model", pipeline

    return get


@pytest.fixture(scope="session")
def loaded(saved):
    """loaded(kind): the same as a model of ours. Nothing may change it, so it is read once."""
    import sfumato

    return functools.cache(lambda kind: sfumato.load(saved(kind)[0]))


@pytest.fixture(scope="session")
def pair(saved, loaded):
    """pair(kind): the tiny pipeline and the same model of ours (tests/runs.py); small=True for a smaller UNet."""
    from runs import Pair

    @functools.cache
    def get(kind: str, small: bool = False):
        both = Pair(saved(kind)[1], loaded(kind))
        return both.smaller(kind) if small else both

    return get


@pytest.fixture(scope="session")
def models(loaded):
    """models(kind): a model that compiles quickly."""
    from pipelines import small

    return functools.cache(lambda kind: small(kind, loaded(kind)))


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """What a file has compiled goes with it: thousands of programs take gigabytes, and in the end XLA crashes."""
    yield
    _forget()


@pytest.fixture(autouse=True)
def _forget_many_programs():
    """Not only then: each takes several mappings of memory, of which Linux gives a process 65,530 at most."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        _forget()


def _forget() -> None:
    """Compiled programs, and the text features that they made: those of a program from disk are bound to a device,
    for which others compile anew."""
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    if "sfumato.text.memory" in sys.modules:
        sys.modules["sfumato.text.memory"]._entries.clear()


@pytest.fixture
def compiled():
    """The names of the programs that were compiled meanwhile."""
    import jax

    names: list[str] = []

    def listen(event: str, duration: float, **facts: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(facts.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def unchecked():
    """Array types are not checked: users do not have these checks, and some bad input would never arrive."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


COMPILED = {
    "test_generate",
    "test_generate_controlnet",
    "test_generate_samplers",
    "test_laws",
    "test_unet",
    "test_controlnet",
    "test_vae",
    "test_tiling",
    "test_load",
    "test_hub",
}
"""Files whose every test compiles a network: all of them count as slow."""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in COMPILED:
            item.add_marker("slow")
