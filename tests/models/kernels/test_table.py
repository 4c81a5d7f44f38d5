"""Whatever numbers the kernels are tuned to, they compute the same; and where the numbers come from."""

from __future__ import annotations

import dataclasses as dc
import json
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.errors import FileError
from sfumato.models import kernels
from sfumato.models.kernels import table as tables
from sfumato.models.kernels.convolution import LAST, SAME, native
from sfumato.models.kernels.table import NEVER, VALUES, Table, in_use, measured, place, read, using, usual, written

EVERY = [(name, value) for name, values in VALUES.items() for value in values]
TUNED = Table(rows=1024, f2_block=2**16, bfloat16_f2_few=NEVER)


def normal(*shape: int, dtype: str = "float32"):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def whole(q, k, v):
    return kernels.weigh(kernels.attention_map(q, k), v)


def convolve(x, kernel):
    return kernels.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=LAST)


def multiply(x, kernel):
    return kernels.dot_general(x, kernel, (((2,), (0,)), ((), ())))


def convolution(side: int, inputs: int, outputs: int):
    return convolve, native, [(1, side, side, inputs), (3, 3, inputs, outputs)]


THRESHOLDS = [convolution(20, 96, 96), convolution(40, 192, 96), convolution(66, 96, 96)]
WIDE = [
    (kernels.attention, whole, [(1, 1100, 1, 4), (1, 490, 1, 4), (1, 490, 1, 4)]),
    (whole, whole, [(1, 20, 2, 4), (1, 30, 2, 4), (1, 30, 2, 4)]),
    convolution(34, 96, 96), convolution(9, 4, 4),
    (multiply, multiply, [(3, 20, 8), (8, 6)]),
]  # fmt: skip
WORKS = {
    "bfloat16_wide": WIDE,
    "query_block": [(kernels.attention, whole, [(1, 1100, 1, 4), (1, 490, 1, 4), (1, 490, 1, 4)])],
    "rows": [(lambda x: kernels.in_blocks(jnp.sin, x), jnp.sin, [(2, 4096, 2)])],
    "channels": [convolution(34, channels, channels) for channels in (64, 100, 130)],
    "float32_f4": THRESHOLDS,
    "float32_f2": [convolution(side, 512, 512) for side in (12, 20, 24)],
    "bfloat16_f2": THRESHOLDS, "bfloat16_f2_few": THRESHOLDS,
    "f4_block": [convolution(66, 1024, 96)], "f2_block": [convolution(66, 512, 96)],
}  # fmt: skip
"""By number: a kernel, its plain form and shapes, on either side of every threshold and of every size of a block."""


OTHERS = {"bfloat16_f2": Table(f2_block=2**16, bfloat16_f2_few=NEVER), "bfloat16_f2_few": Table(bfloat16_f2=NEVER)}
"""What else must be so for a number to matter to shapes as small as these."""


def programs(name: str, value: int):
    """What a value makes of all that: the program, the plain form, the arguments."""
    others = OTHERS.get(name, Table())
    for call, plain, shapes in WORKS[name]:
        for dtype in ("float32", "bfloat16"):
            arrays = [normal(*shape, dtype=dtype) * (0.02 if shape[:2] == (3, 3) else 1) for shape in shapes]
            with using(dc.replace(others, **{name: value})):
                yield jax.jit(call).lower(*arrays), plain, arrays


@pytest.fixture(scope="module")
def compared():
    """Programs that have been compared already: many values make the same of some shapes."""
    return set()


@pytest.mark.parametrize(("name", "value"), EVERY)
def test_every_value_computes_the_same(name, value, compared):
    """As the plain forms in float32. F(4x4) over 1024 channels is 1.3e-4 from the exact result where it is furthest."""
    for program, plain, arrays in programs(name, value):
        text = program.as_text()
        if text not in compared:
            found, wanted = program.compile()(*arrays), plain(*(each.astype(jnp.float32) for each in arrays))
            gap = np.abs(np.asarray(found, np.float32) - wanted).max() / np.asarray(wanted).std()
            assert found.dtype == arrays[0].dtype
            assert gap < {"float32": 3e-4, "bfloat16": 4e-2}[found.dtype.name]
            compared.add(text)


@pytest.mark.parametrize("name", VALUES)
def test_every_value_makes_another_program(name):
    """So that the law above is about each of them."""
    texts = {"".join(program.as_text() for program, _, _ in programs(name, value)) for value in VALUES[name]}
    assert len(texts) == len(VALUES[name])


def test_widened_products_have_no_narrow_one_among_them():
    for program, _, _ in programs("bfloat16_wide", 1):
        lines = [line for line in program.as_text().splitlines() if "dot_general" in line or "convolution(" in line]
        assert lines
        assert not any("bf16" in line for line in lines)


WIDE_TABLE = Table(bfloat16_wide=1)


@pytest.mark.parametrize(("flags", "table"), [
    ("", Table()), ("fphp asimdhp bf16", Table()), ("avx2", WIDE_TABLE), ("avx avx2 avx512f", WIDE_TABLE),
    ("avx2 avx512f avx512_bf16", Table()),
])  # fmt: skip
def test_the_numbers_depend_on_what_the_processor_can_do(monkeypatch, flags, table):
    monkeypatch.setattr(tables, "features", lambda: frozenset(flags.split()))
    assert usual() == table
    assert VALUES.keys() == dc.asdict(table).keys()
    assert all(value in VALUES[name] for name, value in dc.asdict(table).items())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert usual() == Table()


def test_a_table_holds_inside_only_also_for_what_was_traced_before():
    def rows(x):
        return x * in_use().rows

    call = jax.jit(rows)
    assert call(1) == 512
    with using(Table(rows=128)):
        assert call(1) == 128
        with using(Table(rows=256)):
            assert call(1) == 256
        assert call(1) == 128
    with pytest.raises(RuntimeError), using(Table(rows=128)):
        raise RuntimeError
    assert call(1) == 512
    assert in_use() == usual()


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where a table is looked for, in a process that has not looked yet."""
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    measured.cache_clear()
    yield place()
    measured.cache_clear()


def test_what_is_written_is_in_use(file):
    file.write_text(written(TUNED))
    assert read(file) == measured() == in_use() == TUNED
    with using(Table()):
        assert in_use() == Table()
    file.unlink()
    assert in_use() == TUNED, "it is fixed once it is read"


def test_without_a_file_or_a_folder_it_is_the_packages(file, monkeypatch):
    assert measured() is None
    assert in_use() == usual()
    monkeypatch.setenv("SFUMATO_CACHE", "off")
    measured.cache_clear()
    assert place() is None
    assert in_use() == usual()


def test_on_other_devices_it_is_the_packages(file, monkeypatch):
    file.write_text(written(TUNED))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert in_use() == Table()


def changed(**changes):
    def change(text: str) -> bytes:
        found = json.loads(text)
        for part, values in changes.items():
            found[part] = found[part] | values
        return json.dumps(found).encode()

    return change


def without(part: str, name: str):
    def change(text: str) -> bytes:
        found = json.loads(text)
        del found[part][name]
        return json.dumps(found).encode()

    return change


OTHER = "was measured on another machine or with another jax"
BROKEN = "holds no numbers for the kernels of this version"


@pytest.mark.parametrize(("change", "why"), [
    (changed(machine={"processor": "Another"}), OTHER),
    (changed(machine={"cores": 4096}), OTHER),
    (changed(machine={"jax": "0.0.1"}), OTHER),
    (without("machine", "jax"), OTHER),
    (lambda text: text.replace('"machine"', '"place"').encode(), OTHER),
    (changed(numbers={"rows": 513}), BROKEN),
    (changed(numbers={"rows": "512"}), BROKEN),
    (changed(numbers={"rows": 512.0}), BROKEN),
    (changed(numbers={"rows": [512]}), BROKEN),
    (changed(numbers={"more": 512}), BROKEN),
    (without("numbers", "rows"), BROKEN),
    (lambda text: text[:-9].encode(), BROKEN),
    (lambda text: b"", BROKEN),
    (lambda text: b"\xff\xfe\x00", BROKEN),
    (lambda text: b"[" * 100_000, BROKEN),
    (lambda text: b"[]", BROKEN),
    (lambda text: b'{"numbers": []}', BROKEN),
])  # fmt: skip
def test_a_file_that_does_not_fit_is_ignored_with_one_sentence(file, change, why):
    file.write_bytes(change(written(TUNED)))
    sentence = f"{file} is not used: it {why}; `sfumato bench --tune` writes another, or delete it."
    with pytest.raises(FileError) as raised:
        read(file)
    assert str(raised.value) == sentence
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [in_use(), in_use()] == [usual(), usual()]
    assert [str(each.message) for each in caught] == [sentence]


def test_another_process_reads_it_when_it_first_traces_a_kernel(file):
    file.write_text(written(TUNED))
    program = """
import jax, sfumato.models.kernels.table as t
from sfumato.models.kernels import in_blocks
assert t.measured.cache_info().currsize == 0, "nothing is read by importing"
print(str(jax.make_jaxpr(lambda x: in_blocks(jax.numpy.sin, x))(jax.numpy.ones((1, 4096, 2)))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True)
    assert "4,1024,2" in done.stdout.replace(" ", "")
    assert not done.stderr
