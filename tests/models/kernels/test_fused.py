"""What fused attention takes, what it computes, and that programs for GPUs and TPUs have it.

A processor cannot run cuDNN's; the TPU's kernel runs here by an interpreter.
"""

from __future__ import annotations

import importlib
import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas import tpu

from attentions import BOUNDS, example, same, shapes
from sfumato.models import kernels
from sfumato.models.kernels import fused
from sfumato.models.kernels.table import Table, using

place = importlib.import_module("sfumato.models.kernels.attention")  # the package has a function of this name
CALLS = {"cuda": "__cudnn$fmha", "tpu": "tpu_custom_call"}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of an earlier generation, as far as jax asks for it: the plugin for CUDA, which knows cuDNN's version, is
    not there where tests run."""
    monkeypatch.setattr(cudnn, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91000))
    fused._taken.cache_clear()
    yield "gpu"
    fused._taken.cache_clear()


def zeros(*args):
    return [jnp.zeros(a.shape, a.dtype) for a in shapes(*args)]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("queries", "keys", "width"), [(256, 256, 40), (130, 77, 16), (700, 300, 130)])
def test_the_kernel_of_tpus(dtype, queries, keys, width):
    """Values and gradients; with blocks that are not full, keys that are filled up and wide heads."""
    with tpu.force_tpu_interpret_mode():
        same(fused.flash, *example(queries, keys, 2, width, dtype))


@pytest.mark.parametrize(
    ("queries", "keys", "width", "dtype", "taken"),
    [
        (4096, 4096, 40, "bfloat16", True), (4096, 4096, 64, "float16", True), (5184, 5184, 80, "bfloat16", True),
        (4096, 4096, 40, "float32", False), (4096, 4096, 512, "bfloat16", False),
        (4096, 4096, 20, "bfloat16", False), (8192, 77, 40, "bfloat16", True), (77, 77, 64, "float16", True),
    ],
)  # fmt: skip
def test_what_cudnn_takes(gpu, queries, keys, width, dtype, taken):
    q, k, _ = zeros(queries, keys, 4, width, dtype)
    assert fused.fused(q, k, gpu) == ({"cuda": fused.cudnn} if taken else {})


def test_nothing_is_fused_without_a_kernel():
    """On processors, on GPUs without cuDNN, and for a TPU where there are few keys."""
    q, k, _ = zeros(4096, 4096, 4, 40, "bfloat16")
    assert fused.fused(q, k, "cpu") == {}
    assert fused.fused(q, k, "tpu") == {"tpu": fused.flash}
    assert fused.fused(q, zeros(8192, 77, 4, 40, "bfloat16")[1], "tpu") == {}
    fused._taken.cache_clear()
    assert fused.fused(q, k, "gpu") == {}


def program(call, platform, *arrays):
    with using(Table()):  # that of a machine with such a device, whatever this processor takes
        fresh = jax.jit(lambda *three: call(*three))  # jax remembers traces by function, whatever the platform
        return fresh.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def back(q, k, v):
    out, pull = jax.vjp(kernels.attention, q, k, v)
    return pull(out)


@pytest.mark.parametrize("platform", CALLS)
@pytest.mark.parametrize(("width", "places"), [(40, 4096), (80, 1024), (64, 4096), (64, 5184)])
def test_programs_for_gpus_and_tpus_have_it(monkeypatch, gpu, platform, width, places):
    """Forward and backward, at the sizes of SD 1.5, SDXL and a larger picture."""
    monkeypatch.setattr(place, "default_backend", lambda: {"cuda": gpu}.get(platform, platform))
    arrays = shapes(places, places, 4, width, "bfloat16")
    for call, most in ((kernels.attention, 1), (back, 4)):
        text = program(call, platform, *arrays)
        assert 0 < text.count(CALLS[platform]) <= most
        assert f"{places}x{places}x" not in text, "a whole map"
        assert platform != "cuda" or set(re.findall(r"@(__cudnn\S+?)\(", text)) <= set(fused.CALLS)


@pytest.mark.parametrize(("queries", "keys"), [(4096, 77), (64, 77), (64, 64), (81, 81)])
def test_small_maps_have_it_on_a_gpu(monkeypatch, gpu, queries, keys):
    """Attention to 77 words, and that of few places; jax makes gradients of even lengths alone."""
    monkeypatch.setattr(place, "default_backend", lambda: gpu)
    arrays = shapes(queries, keys, 4, 40, "bfloat16")
    for call, names in ((kernels.attention, fused.CALLS[:1]), (back, fused.CALLS)):
        text = program(call, "cuda", *arrays)
        assert set(re.findall(r"@(__cudnn\S+?)\(", text)) == set(names)
        assert f"{queries}x{keys}x" not in text, "a whole map"


def test_small_maps_that_have_none(monkeypatch, gpu):
    """With a mask, in float32, and on TPUs."""
    q, k, v = example(24, 5, 3, 8)
    mask = jnp.zeros((1, 1, 24, 5))
    for backend, arrays in (
        (gpu, (*(x.astype("bfloat16") for x in (q, k, v)), mask)),
        (gpu, (q, k, v)),
        ("tpu", (q, k, v)),
    ):
        monkeypatch.setattr(place, "default_backend", lambda backend=backend: backend)
        assert place._form(*arrays[:2], (*arrays, None)[3], backend) is None
        assert kernels.attention(*arrays).shape == q.shape
