"""What was traced once is not traced again by the next process, and draws the same pictures bit for bit."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from sfumato import CFG, Window, branches, fingerprint, kept, run
from sfumato.kept import Kept
from sfumato.sample import AWAKE, _changes, _one_row, _whole, sample_rows
from sfumato.samplers import DDIM
from sfumato.text.prompt import _encode_all, tokenize_prompt

from drive import prepared
from table import PROMPTS, TABLE

TRACED = []


@functools.partial(Kept, static_argnames=("how", "mesh"), donate_argnames="x")
def scaled(x, factors, how="sum", mesh=None):
    TRACED.append(how)
    return {"all": (x * factors["scale"], jnp.cumsum(x))[how == "cumulated"], "how": jnp.sin(factors["scale"])}


def arguments(size: int = 6, dtype: str = "float32"):
    return jnp.arange(size, dtype=dtype), {"scale": jnp.float32(3)}


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """What lies in the folder; the functions of this file count as known code."""
    monkeypatch.setattr(kept, "enabled_folder", lambda: tmp_path)
    monkeypatch.setattr(fingerprint, "KNOWN", (*fingerprint.KNOWN, __name__.partition(".")[0]))
    TRACED.clear()
    jax.clear_caches()
    return lambda: sorted((tmp_path / "traced").iterdir()) if (tmp_path / "traced").exists() else []


def another_process() -> None:
    """As far as programs go."""
    jax.clear_caches()
    TRACED.clear()


def same(got, want) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_program_is_traced_by_the_first_process_alone(files):
    first = scaled(*arguments())
    scaled(*arguments())
    assert TRACED == ["sum"]
    assert len(files()) == 1
    another_process()
    second = scaled(*arguments())
    assert TRACED == []
    same(second, first)
    same(second, scaled.ways(True).plain(*arguments()))


@pytest.fixture
def compiled():
    """The names of the programs that the compiler was given since."""
    names: list[str] = []

    def listen(event: str, _: float, fun_name: str | None = None, **__: object) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(str(fun_name))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("shapes", [True, False])
def test_what_was_prepared_is_not_compiled_again(shapes, compiled):
    program = Kept(lambda x, how: jnp.sin(x) if how == "sine" else x, static_argnames="how")
    x = jnp.arange(6.0)
    given = jax.ShapeDtypeStruct(x.shape, x.dtype) if shapes else x
    for _ in range(2):
        program.prepare(given, "sine")()
    before = compiled.count("jit(<lambda>)")
    np.testing.assert_allclose(program(x, "sine"), np.sin(x), rtol=1e-6)
    assert (before, compiled.count("jit(<lambda>)")) == (1, 1)


def test_what_cannot_be_prepared_fails_when_it_is_called():
    def refuse(_):
        raise ValueError("no")

    program = Kept(refuse)
    program.prepare(jnp.zeros(3))()
    with pytest.raises(ValueError, match="no"):
        program(jnp.zeros(3))


def test_a_run_compiles_its_decoder_once(models, compiled):
    sfumato.generate(models("sd1"), "a fox", steps=1)
    assert sorted(name for name in compiled if "decode" in name or "_whole" in name) == ["jit(_whole)", "jit(decode)"]


def test_so_it_does_its_parts(models, compiled, monkeypatch):
    """One program for rows with guidance and one for those without, each made ready in the background."""
    monkeypatch.setattr(branches, "SMALL", 0)
    settings = {"steps": 4, "output": "latents", "sampler": "lms", "controls": [CFG(5.0, window=Window(0.25, 0.75))]}
    for progress, name in ((None, "jit(_stretch)"), (lambda *_: True, "jit(_one_row)")):
        compiled.clear()
        sfumato.generate(models("sd1"), "a fox", **settings, progress=progress)
        assert [each for each in compiled if each in ("jit(_whole)", "jit(_stretch)", "jit(_one_row)")] == [name] * 2


def test_others_can_put_nothing_there(files):
    scaled(*arguments())
    assert files()[0].parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "changed",
    [
        lambda _: scaled(*arguments(size=7)),
        lambda _: scaled(*arguments(dtype="int32")),
        lambda _: scaled(*arguments(), "cumulated"),
        lambda _: scaled(arguments()[0], {"scale": 3.0}),  # a number by itself, which does not widen other types
        lambda patch: (patch.setattr(fingerprint, "_code", lambda: ("edited",)), scaled(*arguments())),
        lambda patch: (patch.setattr(fingerprint, "_device", lambda: ("cpu", "other")), scaled(*arguments())),
    ],
    ids=["shape", "type", "static", "weak type", "code", "device"],
)
def test_what_changes_the_program_changes_its_name(files, monkeypatch, changed):
    scaled(*arguments())
    another_process()
    changed(monkeypatch)
    assert len(TRACED) == 1
    assert len(files()) == 2


def test_settings_of_jax_change_its_name(files):
    scaled(*arguments())
    with jax.default_matmul_precision("highest"):
        scaled(*arguments())
    assert len(files()) == 2


def test_an_edit_of_any_file_changes_the_code(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "unet.py").write_text("one")
    monkeypatch.setattr(fingerprint, "__file__", str(tmp_path / "fingerprint.py"))
    before = fingerprint._code.__wrapped__()
    (tmp_path / "models" / "unet.py").write_text("two")
    assert fingerprint._code.__wrapped__() != before


def test_an_edit_under_a_running_process_keeps_nothing(files, monkeypatch):
    """Its programs may be those of the old files."""
    monkeypatch.setattr(fingerprint, "LOADED", fingerprint.LOADED[1:])
    scaled(*arguments())
    assert files() == []


@pytest.mark.parametrize(
    "broken", [b"", b"no program", lambda whole: whole[:-1], lambda whole: whole[:99] + b"?" + whole[100:]],
    ids=["empty", "foreign", "cut", "changed"],
)  # fmt: skip
def test_a_broken_file_is_written_anew(files, broken):
    want = scaled(*arguments())
    (file,) = files()
    whole = file.read_bytes()
    file.write_bytes(broken(whole) if callable(broken) else broken)
    another_process()
    same(scaled(*arguments()), want)
    assert TRACED == ["sum"]
    another_process()
    same(scaled(*arguments()), want)
    assert TRACED == []


class Unknown:
    """Compares by identity, as code of the user's own may."""


@pytest.mark.parametrize("how", [lambda: 0, Unknown(), functools.partial(max, 1)], ids=["lambda", "object", "partial"])
def test_what_has_no_stable_name_is_not_kept(files, how):
    same(scaled(*arguments(), how), scaled.ways(True).plain(*arguments(), how))
    assert files() == []


def test_code_that_is_not_sfumatos_is_not_kept(files, monkeypatch):
    monkeypatch.setattr(fingerprint, "KNOWN", fingerprint.KNOWN[:-1])
    scaled(*arguments())
    assert files() == []


def test_a_run_on_a_mesh_is_not_kept(files):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    same(scaled(*arguments(), "sum", mesh), scaled.ways(True).plain(*arguments()))
    assert files() == []


@functools.partial(Kept)
def calling(x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_a_call_into_this_process_is_not_kept(files):
    same(calling(jnp.float32(1)), np.sin(np.float32(1)))
    assert files() == []


def test_inside_of_a_trace_it_is_an_ordinary_function(files):
    x, scales = jnp.ones((3, 6)), jnp.arange(3.0)
    same(jax.vmap(lambda x, scale: scaled(x, {"scale": scale})["how"])(x, scales), jnp.sin(scales))
    assert files() == []


def test_donated_arrays_are_given_away(files):
    for way in scaled.ways(True):
        assert way.lower(*arguments()).compile().memory_analysis().alias_size_in_bytes == 24
    x, factors = arguments()
    scaled(x, factors)
    assert x.is_deleted()


def test_the_least_used_go_first(files, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 2)
    names = []
    for number, size in enumerate((3, 4, 5)):
        scaled(*arguments(size))
        (new,) = set(files()) - set(names)
        os.utime(new, (number, number))
        names.append(new)
        if number == 1:
            another_process()
            scaled(*arguments(3))  # used again
            monkeypatch.setattr(os, "utime", lambda *_: None)
    assert files() == sorted((names[0], names[2]))


def test_a_full_disk_is_a_warning(tmp_path):
    (tmp_path / "traced").write_text("a file in the folder's place")
    with pytest.warns(UserWarning, match=r"A traced program is not kept \("):
        same(scaled(*arguments()), scaled.ways(True).plain(*arguments()))


def test_without_a_folder_it_is_an_ordinary_function(monkeypatch):
    monkeypatch.setattr(kept, "enabled_folder", lambda: None)
    assert scaled.way(*arguments()) is scaled.ways(True).plain


# ---- The programs of a run


@pytest.fixture
def once(monkeypatch):
    """once(kept): from now on it must not be traced."""

    def refuse(program: Kept) -> None:
        jax.clear_caches()
        monkeypatch.setattr(program, "function", functools.wraps(program.function)(lambda *_: pytest.fail("traced")))

    return refuse


ROWS = {"sd1": ("CFG", "ControlNet", "SEGA", "Attend-and-Excite"), "sdxl": ("Pix2Pix-Zero",)}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in ROWS.items() for name in names])
def test_the_loop_is_the_same_bit_for_bit(kind, name, models, once, files):
    model = models(kind)
    (row,) = (row for row in TABLE if row.name == name)
    unet, steps, controls, x, base = prepared(model, row.both(kind))
    given = model.schedule.prediction_type
    before = len(files())

    def drawn(program):
        return program(unet, DDIM(), steps, controls, jnp.array(x), base, given, None, AWAKE)

    want = drawn(_whole.ways(True).plain)
    same(drawn(_whole), want)
    assert len(files()) == before + 1
    once(_whole)
    same(drawn(_whole), want)


@pytest.mark.slow
def test_so_are_rows_pictures_and_texts(models, once, files, monkeypatch):
    model = models("sd1")
    unet, steps, controls, x, base = prepared(model, TABLE[2].both("sd1"))
    tokens = list(tokenize_prompt(model, PROMPTS).values())
    encoders = list(model.text_encoders.values())
    pixels = jnp.linspace(-1, 1, 2 * 16 * 16 * 3).reshape(2, 16, 16, 3)
    programs = (_changes, _one_row, run.decode, run._encode, _encode_all)

    def made():
        rows = sample_rows(unet, DDIM(), steps, controls, jnp.array(x), base, model.schedule.prediction_type)
        return (
            list(rows), run.decode(model.vae, x, False), run.encode_image(model.vae, pixels, False),
            _encode_all(encoders, tokens, 0, False),
        )  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(kept, "enabled_folder", lambda: None)
        want = made()
    for _ in range(2):
        same(made(), want)
        assert {file.name.rsplit("-", 1)[0] for file in files()} == {program.__name__ for program in programs}
        for program in programs:
            once(program)


PROGRAM = """
import functools, hashlib, json, sys
import sfumato
from sfumato import run, sample
from sfumato.text import prompt

def refused(function):
    def refuse(*_):
        raise AssertionError(f"{function.__name__} is traced")

    return functools.wraps(function)(refuse)

if "again" in sys.argv:
    for program in (sample._whole, run.decode, prompt._encode_all):
        program.function = refused(program.function)
picture = sfumato.generate(sfumato.load(sys.argv[1]), "a red fox", steps=2, size=(16, 16), sampler="euler")[0]
print(json.dumps(hashlib.sha256(picture.array.tobytes()).hexdigest()))
"""


@pytest.mark.slow
def test_a_second_process_traces_nothing(saved, tmp_path):
    def process(*words: str, cache: str) -> str:
        command = [sys.executable, "-c", PROGRAM, str(saved("sd1-small")[0]), *words]
        environment = os.environ | {"SFUMATO_CACHE": cache}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    cache = str(tmp_path / "cache")
    want = process(cache="off")
    assert process(cache=cache) == want
    assert process("again", cache=cache) == want
    with pytest.raises(subprocess.CalledProcessError) as error:
        process("again", cache=str(tmp_path / "empty"))
    assert "_encode_all is traced" in error.value.stderr
