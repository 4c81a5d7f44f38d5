"""Every form of a convolution is the convolution."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato import compiler
from sfumato.models.kernels import convolution, inside_loop, patiently, winograd
from sfumato.models.kernels.convolution import LAST, conv_general_dilated, form, native, taps
from sfumato.models.kernels.table import Table, using

from convolutions import BOUNDS, example, gap

FORMS = {"taps": taps} | {
    f"F{each.m}, {block}": functools.partial(winograd.convolve, form=each, block=block)
    for each in (winograd.F2, winograd.F4)
    for block in (2**7, 2**16)  # many blocks of tiles; several pictures a block
}
SHAPES = [(1, 8, 8, 5, 7), (2, 7, 9, 3, 4), (3, 1, 1, 2, 2), (1, 5, 2, 4, 3), (4, 6, 6, 16, 8), (6, 16, 16, 3, 2)]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_form_is_the_convolution(name, shape):
    x, kernel = example(shape)
    found = FORMS[name](x, kernel)
    assert found.dtype == x.dtype
    assert gap(found, native(x, kernel)) < BOUNDS["float32"]


@pytest.fixture(params=[0, 1], ids=["narrow", "wide"])
def wide(request):
    """With bfloat16 multiplied as it is, and as float32."""
    with using(Table(bfloat16_wide=request.param)):
        yield


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("places", [(1, 8, 8), (1, 32, 32), (2, 33, 31)], ids=str)
def test_what_a_processor_computes_and_its_gradients(monkeypatch, wide, dtype, places):
    """Against the backend's own in float32, whose gradients are those of the other form's, too."""
    monkeypatch.setattr(convolution, "WEIGHTS", dict.fromkeys(BOUNDS, 0))
    x, kernel = example((*places, 96, 128), dtype)
    assert form(x.shape, kernel.shape, x.dtype) is not None

    out, back = jax.vjp(same, x, kernel)
    wide = x.astype(jnp.float32), kernel.astype(jnp.float32)
    wanted, back_wanted = jax.vjp(native, *wide)
    assert out.dtype == x.dtype
    assert gap(out, wanted) < BOUNDS[dtype]
    gradient = jnp.cos(jnp.arange(out.size).reshape(out.shape)).astype(dtype)
    for found, expected in zip(back(gradient), back_wanted(gradient.astype(jnp.float32)), strict=True):
        assert found.dtype == x.dtype
        assert gap(found, expected) < BOUNDS[dtype]


STRIDED = [((2, 2), [(1, 1), (1, 1)]), ((2, 2), [(0, 1), (0, 1)]), ((1, 2), [(1, 1), (0, 0)])]


@pytest.mark.parametrize(("strides", "padding"), STRIDED, ids=str)
@pytest.mark.parametrize("size", [(8, 8), (9, 6)], ids=str)
def test_strides_and_their_gradients(monkeypatch, strides, padding, size):
    monkeypatch.setattr(convolution, "WEIGHTS", dict.fromkeys(BOUNDS, 0))
    x, kernel = example((2, *size, 96, 97))
    settings = {"dimension_numbers": LAST}
    out, back = jax.vjp(lambda *both: conv_general_dilated(*both, strides, padding, **settings), x, kernel)
    wanted, own = jax.vjp(lambda *both: jax.lax.conv_general_dilated(*both, strides, padding, **settings), x, kernel)
    for found, expected in zip((out, *back(out)), (wanted, *own(out)), strict=True):
        assert gap(found, expected) < BOUNDS["float32"]


@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", winograd.F2), ("float32", winograd.F4), ("bfloat16", winograd.F2)]
)  # fmt: skip
def test_filtered_with_a_kernel_turned_round(kind, dtype):
    x, kernel = example((2, 9, 10, 12, 20), dtype)
    wanted = native(x, kernel[::-1, ::-1])
    found = winograd.convolve(x, kernel.swapaxes(2, 3), kind, 2**10, around=True)
    assert found.dtype == x.dtype
    assert gap(found, wanted) < BOUNDS[dtype]


@pytest.mark.parametrize("block", [2**7, 2**16])
@pytest.mark.parametrize(
    ("dtype", "kind"), [("float32", winograd.F2), ("float32", winograd.F4), ("bfloat16", winograd.F2)]
)  # fmt: skip
@pytest.mark.parametrize(("reads", "over"), [(0, 12), (20, 0), (20, 8)])
def test_written_over_other_channels(kind, dtype, block, reads, over):
    """What is read and written is some channels of the picture, and each piece is given what lies there."""
    x, kernel = example((2, 16, 8, 32, 12), dtype)
    kernel = kernel[:, :, :12]
    wanted = native(x[..., reads : reads + 12], kernel) + x[..., over : over + 12]
    run = jax.jit(
        functools.partial(
            winograd.convolve, form=kind, block=block, epilogue=lambda made, _, __, lying: made + lying
        ),
        static_argnames=("reads", "over"),
    )  # fmt: skip
    found = run(x, kernel, reads=reads, over=over)
    assert gap(found[..., over : over + 12], wanted) < BOUNDS[dtype]
    np.testing.assert_array_equal(found[..., :over], x[..., :over])
    np.testing.assert_array_equal(found[..., over + 12 :], x[..., over + 12 :])


def test_gradients_of_gradients_of_what_is_filtered():
    x, kernel = example((1, 32, 32, 96, 96))
    assert form(x.shape, kernel.shape, x.dtype) is not None

    def slope(convolve):
        def loss(x, kernel):
            return jnp.sin(convolve(x, kernel)).sum()

        def size(x, kernel):
            return sum(jnp.cos(part).sum() for part in jax.grad(loss, (0, 1))(x, kernel))

        return jax.grad(size, (0, 1))(x, kernel)

    for found, wanted in zip(slope(same), slope(native), strict=True):
        assert gap(found, wanted) < 1e-3


def same(x, kernel):
    return conv_general_dilated(x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=LAST)


@pytest.mark.parametrize("loop", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("inputs", "outputs", "kind"), [(3, 8, "summed"), (8, 8, "paired"), (16, 5, "paired")])
def test_few_channels_and_their_gradients(inputs, outputs, kind, dtype, loop):
    x, kernel = example((2, 7, 10, inputs, outputs), dtype)
    assert form(x.shape, kernel.shape, x.dtype) is getattr(convolution, kind)
    assert form((2, 7, 9, inputs), kernel.shape, x.dtype) is None  # of an odd width
    with inside_loop() if loop else contextlib.nullcontext():
        out, back = jax.vjp(same, x, kernel)
        gradient = jnp.cos(jnp.arange(out.size).reshape(out.shape)).astype(dtype)
        slopes = back(gradient)
    wide = x.astype(jnp.float32), kernel.astype(jnp.float32)
    wanted, back_wanted = jax.vjp(native, *wide)
    for found, expected in zip((out, *slopes), (wanted, *back_wanted(gradient.astype(jnp.float32))), strict=True):
        assert found.dtype == x.dtype
        assert gap(found, expected) < BOUNDS[dtype]


def test_patience_takes_small_tiles_for_small_kernels():
    shapes = (16, 4, 4, 192), (3, 3, 192, 64)
    assert form(*shapes, "float32") is None
    with patiently():
        found = form(*shapes, "float32")
        assert isinstance(found, functools.partial)
        assert found.keywords == {"form": winograd.F2, "block": 2**18}
        assert form((1, 4, 4, 192), (3, 3, 192, 64), "float32") is None
        assert form((16, 4, 4, 192), (3, 3, 192, 63), "float32") is None
        with patiently(False):
            assert form(*shapes, "float32") is None


def test_one_place_is_a_product_of_matrices():
    x, kernel = example((2, 5, 6, 4, 3))
    program = jax.make_jaxpr(lambda x, kernel: point(x, kernel))(x, kernel[:1, :1])
    assert "dot_general" in str(program)
    assert "conv" not in str(program)
    wanted = jax.lax.conv_general_dilated(x, kernel[:1, :1], (1, 1), "VALID", dimension_numbers=LAST)
    np.testing.assert_allclose(point(x, kernel[:1, :1]), wanted, atol=1e-6)


def point(x, kernel):
    return conv_general_dilated(x, kernel, (1, 1), [(0, 0), (0, 0)], dimension_numbers=LAST)


WIDE = Table(bfloat16_wide=1)
SMALL = Table(float32_f2=256)


@pytest.mark.parametrize(("table", "side", "dtype", "kind", "block"), [
    (Table(), 64, "float32", winograd.F4, 2**18), (Table(), 64, "bfloat16", winograd.F2, 2**18),
    (Table(), 32, "bfloat16", winograd.F2, convolution.FEW), (WIDE, 32, "bfloat16", winograd.F4, 2**18),
    (SMALL, 32, "float32", winograd.F4, 2**18),
], ids=lambda value: str(value)[:12])  # fmt: skip
def test_what_is_filtered_by_which_form(table, side, dtype, kind, block):
    with using(table):
        found = form((2, side, side, 320), (3, 3, 320, 320), dtype)
    assert isinstance(found, functools.partial)
    assert (found.func, found.keywords) == (winograd.convolve, {"form": kind, "block": block})


@pytest.mark.parametrize(
    ("side", "kind"), [(64, winograd.F4), (48, winograd.F2), (12, winograd.F2), (8, taps)], ids=["64", "48", "12", "8"]
)
def test_large_kernels_of_few_places_take_small_tiles(side, kind):
    """Where that is said to pay; small tiles need twice a kernel's room, large ones four times."""
    with using(SMALL):
        found = form((2, side, side, 1024), (3, 3, 1024, 1024), "float32")
    assert isinstance(found, functools.partial)
    assert (found.keywords.get("form") or found.func) == kind


def test_what_takes_which_form():
    """Few channels, other kernels, other types, and anything that a mesh divides, are left to the backend."""
    for shape, dtype in ((1280, jnp.float32), (1280, jnp.bfloat16), (192, jnp.bfloat16)):
        with using(Table()):
            found = form((2, 8, 8, shape), (3, 3, shape, shape), dtype)
        assert isinstance(found, functools.partial)
        assert found.func is taps
    assert form((2, 8, 8, 192), (3, 3, 192, 192), jnp.float32) is None
    assert form((2, 64, 64, 4), (3, 3, 4, 320), jnp.float32) is None
    assert form((2, 64, 64, 320), (5, 5, 320, 320), jnp.float32) is None
    assert form((2, 64, 64, 320), (3, 3, 320, 320), jnp.float16) is None
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        assert form((2, 64, 64, 320), (3, 3, 320, 320), jnp.float32) is None


def test_large_pictures_are_not_copied(monkeypatch):
    x, kernel = example((1, 32, 32, 96, 96))
    monkeypatch.setattr(convolution, "LARGEST", x.size - 1)
    program = str(jax.make_jaxpr(lambda x, kernel: point(x, kernel))(x, kernel[:1, :1]))
    assert "conv_general_dilated" in program


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float32", winograd.F4), ("bfloat16", winograd.F2), ("bfloat16", winograd.F4)],
    ids=["float32 F4", "bfloat16 F2", "bfloat16 F4"],
)
def test_filtering_keeps_no_copy_of_a_picture(wide, dtype, kind):
    """Neither one with zeros around it, nor a place that several layers share, nor bfloat16 as float32."""
    x, kernel = example((1, 256, 256, 96, 96), dtype)

    def layers(x, kernel):
        for _ in range(3):
            x = winograd.convolve(x, kernel, kind, 2**16)
        return x

    run = jax.jit(layers, compiler_options=compiler.options())
    analysis = run.lower(x, kernel).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 3 * x.nbytes  # what goes into a layer, what comes out, and blocks


@pytest.mark.parametrize(("shape", "most"), [((1, 64, 64, 96, 96), 950), ((2, 16, 16, 96, 96), 850)], ids=str)
def test_filtering_is_a_short_program(shape, most):
    """A loaded program takes 4 KB for each of its instructions, and each layer has one of its own."""
    x, kernel = example(shape, "bfloat16")
    run = jax.jit(functools.partial(winograd.convolve, form=winograd.F2, block=2**16))
    text = run.lower(x, kernel).compile().as_text()
    assert text is not None
    assert text.count(" = ") < most


def test_elsewhere_it_is_the_backends_own():
    """The program for another kind of device has the convolution as it was asked for."""
    x, kernel = example((1, 32, 32, 96, 96))

    for platform, own in (("cuda", True), ("tpu", True), ("cpu", False)):
        text = jax.export.export(jax.jit(same), platforms=[platform])(x, kernel).mlir_module()
        assert ("stablehlo.convolution" in text) == own, platform
