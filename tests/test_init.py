"""Importing sfumato is cheap: nothing heavy comes along and no device is started."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import sfumato

HEAVY = ("torch", "tensorflow", "transformers", "diffusers", "cv2", "gradio", "huggingface_hub")


def modules_after(statement: str) -> set[str]:
    program = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_importing_is_cheap():
    loaded = modules_after("import sfumato")
    assert not loaded & {*HEAVY, "jax", "flax"}


def test_using_the_models_needs_no_other_framework_and_starts_no_device():
    names = "; ".join(f"sfumato.{name}" for name in sfumato.__all__)
    loaded = modules_after(
        f"import sfumato; {names}\n"
        "import sfumato.cli, sfumato.models.controlnet, sfumato.models.tiny_vae, sfumato.models.tiling\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a device was started'"
    )
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("name", sfumato.__all__)
def test_public_names_are_there_and_documented(name):
    value = getattr(sfumato, name)
    assert name in dir(sfumato)
    assert isinstance(value, str) or value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'sfumato' has no attribute 'nothing'"):
        sfumato.nothing  # noqa: B018
