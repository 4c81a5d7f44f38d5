"""`sfumato generate` and `sfumato samplers` as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from cli.test_cli import run
from sfumato import cli
from sfumato.cli.watch import covered
from sfumato.io.picture_metadata import read_metadata

from pictures import drawing
from pipelines import SMALL_NET, net_config


@pytest.fixture(scope="module")
def place(saved, tmp_path_factory):
    """A folder with a model, a ControlNet, and pictures."""
    from diffusers import ControlNetModel

    from oracle import seeded

    folder = tmp_path_factory.mktemp("place")
    (folder / "model").symlink_to(saved("sd1-small")[0])
    seeded(lambda: ControlNetModel(**net_config("sd1") | SMALL_NET), 0).save_pretrained(folder / "net")
    drawing(32, 32).save(folder / "photo.png")
    half = np.zeros((32, 32), np.uint8)
    half[:, 16:] = 255
    Image.fromarray(half).save(folder / "mask.png")
    (folder / "text.png").write_text("no picture")
    return folder


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch, tmp_path_factory):
    """Every test runs where the files are; what is compiled is kept for the next one."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def generate(*arguments: str, steps: int = 2, **kwargs) -> subprocess.CompletedProcess:
    return run("generate", "a red fox", "-m", "model", "--size", "16x16", "--steps", str(steps), *arguments, **kwargs)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.mark.slow
def test_one_picture_and_what_is_told_about_it(place, tmp_path):
    out = tmp_path / "new" / "fox.png"
    done = generate("-o", str(out), "--negative", "blurry", "--seed", "7", "--guidance", "5", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert Image.open(out).size == (16, 16)
    told = json.loads(done.stdout)
    assert told["files"] == [str(out)]
    assert told["seeds"] == [7]
    assert told["seconds"].keys() == {"load", "compile", "sample", "decode"}
    assert all(seconds >= 0 for seconds in told["seconds"].values())
    inside = read_metadata(out)
    assert inside["prompt"] == told["prompt"] == "a red fox"
    assert inside["negative"] == "blurry"
    assert inside["settings"]["seed"] == 7
    assert inside["settings"]["guidance"] == 5
    assert inside["settings"] == told["settings"] | {"seed": 7}


@pytest.mark.slow
def test_seeds_batches_and_sheets(place, tmp_path):
    done = generate("-o", str(tmp_path / "fox.png"), "--seed", "3", "-n", "3", "--batch", "2")
    files = [tmp_path / f"fox-{number}.png" for number in range(3)]
    assert done.stdout.split() == [str(file) for file in files]
    assert "Loaded in " in done.stderr
    assert "Sampled in " in done.stderr
    assert generate("-o", str(tmp_path / "one.png"), "--seed", "4", "--quiet").stderr == ""
    np.testing.assert_array_equal(pixels(tmp_path / "one.png"), pixels(files[1]))
    assert (pixels(files[0]) != pixels(files[1])).any()
    done = generate("-o", str(tmp_path / "sheet.png"), "--seed", "3", "-n", "3", "--grid")
    assert done.stdout.split() == [str(tmp_path / "sheet.png")]
    sheet = pixels(tmp_path / "sheet.png")
    assert sheet.shape == (32, 32, 3)
    assert np.abs(sheet[:16, 16:].astype(int) - pixels(files[1])).max() <= 1
    assert read_metadata(tmp_path / "sheet.png")["grid"]["seeds"] == [3, 4, 5]


@pytest.mark.slow
def test_from_a_picture(place, tmp_path):
    small = Image.open("photo.png").resize((16, 16))
    small.save(tmp_path / "small.png")
    out = tmp_path / "out.png"
    told = json.loads(
        generate("-o", str(out), "--image", str(tmp_path / "small.png"), "--strength", "0.5", "--json", steps=4).stdout
    )
    assert told["settings"]["strength"] == 0.5
    done = generate("-o", str(out), "--image", "photo.png", "--mask", "mask.png", "--json")
    assert [control["name"] for control in json.loads(done.stdout)["controls"]] == ["CFG", "Inpaint"]
    known = np.asarray(Image.open("photo.png").resize((16, 16), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(pixels(out)[:, :7], known[:, :7])
    assert (pixels(out)[:, 9:] != known[:, 9:]).any()


@pytest.mark.slow
def test_controls(place, tmp_path):
    plain, edges, twice = (tmp_path / name for name in ("plain.png", "edges.png", "twice.png"))
    assert generate("-o", str(plain)).returncode == 0
    done = generate("-o", str(edges), "--control", "canny=photo.png,low=20,net=net,scale=0.8,start=0,stop=0.6,guess",
                    "--json")  # fmt: skip
    (_, control) = json.loads(done.stdout)["controls"]
    assert control["name"] == "ControlNet"
    assert control["guess"] is True
    assert control["scale"] == pytest.approx(0.8)
    assert control["window"] == {"start": 0.0, "stop": pytest.approx(0.6)}
    assert (pixels(plain) != pixels(edges)).any()
    done = generate("-o", str(twice), "--control", "none=photo.png,net=net", "--control", "grayscale=photo.png,net=net",
                    "--sampler", "euler a", "--literal", "--guidance", "1", "--json")  # fmt: skip
    told = json.loads(done.stdout)
    assert [control["name"] for control in told["controls"]] == ["CFG", "ControlNet", "ControlNet"]
    assert told["settings"]["sampler"] == "euler a"


@pytest.mark.slow
def test_int8_kernels_draw_nearly_the_same(place, tmp_path):
    floats, whole = (tmp_path / name for name in ("floats.png", "int8.png"))
    control = ("--control", "none=photo.png,net=net", "--json")
    assert "adapters" not in json.loads(generate("-o", str(floats), *control).stdout)
    assert json.loads(generate("-o", str(whole), *control, "--int8").stdout)["adapters"] == ["int8 weights"]
    apart = np.abs(pixels(floats).astype(int) - pixels(whole))
    assert 0 < apart.mean() < 5


def test_faster(place, tmp_path):
    plain, faster = tmp_path / "plain.png", tmp_path / "faster.png"
    assert generate("-o", str(plain), steps=4).returncode == 0
    done = generate("-o", str(faster), "--deepcache", "2", "--token-merging", "0.5", "--json", steps=4)
    (_, cache, merging) = json.loads(done.stdout)["controls"]
    assert (cache["name"], cache["every"]) == ("DeepCache", 2)
    assert (merging["name"], merging["ratio"]) == ("TokenMerging", 0.5)
    assert (pixels(plain) != pixels(faster)).any()


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(place, tmp_path):
    out = tmp_path / "fox.png"
    arguments = ["generate", "a fox", "-m", "model", "-o", str(out), "--size", "64x64", "--steps", "999"]
    process = subprocess.Popen([sys.executable, "-m", "sfumato", *arguments], stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"SFUMATO_CACHE": "off"})  # fmt: skip
    try:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        assert lines[1].startswith("Compiled in"), lines
        process.send_signal(signal.SIGINT)
        began = time.time()
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert rest == "sfumato: Interrupted.\n"
    assert time.time() - began < 20
    assert [*tmp_path.iterdir()] == []


GOOD = ["-o", "out.png"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["-o", "out.gif"], "out.gif does not end in .png"),
    (["-o", "{foo}.png"], "{foo}.png is no pattern for names"),
    (["-o", "photo.png/deeper.png"], "cannot be written"),
    (["-o", "a{seed}.png", "-n", "2", "--grid", "--steps", "0"], "--steps must be a whole number from 1 on, not 0."),
    ([*GOOD, "-n", "0"], "--count must be a whole number from 1 on, not 0."),
    ([*GOOD, "--seed", "-1"], "A seed must be a whole number from 0 to 2^63 - 1, not -1."),
    ([*GOOD, "--size", "big"], "--size takes WIDTHxHEIGHT in pixels, such as 768x512, not 'big'."),
    ([*GOOD, "--size", "17x16"], "the nearest sizes are 16x16 and 18x16."),
    ([*GOOD, "--sampler", "eular"], "Unknown sampler 'eular'; known are, for example, euler"),
    ([*GOOD, "--guidance", "nan"], "--guidance must be a finite number, not nan."),
    ([*GOOD, "--deepcache", "0"], "--deepcache must be a whole number from 1 on, not 0."),
    ([*GOOD, "--token-merging", "0.9"], "--token-merging must lie in [0, 0.75], not be 0.9."),
    ([*GOOD, "--image", "none.png"], "none.png is not there."),
    ([*GOOD, "--image", "text.png"], "text.png is not a picture in a known format."),
    ([*GOOD, "--strength", "0.5"], "so it needs --image and no --mask."),
    ([*GOOD, "--image", "photo.png", "--strength", "1.5"], "--strength must lie in [0, 1], not be 1.5."),
    ([*GOOD, "--mask", "mask.png"], "give the picture as --image."),
    ([*GOOD, "--control", "canny"], "--control takes ANNOTATOR=PICTURE"),
    ([*GOOD, "--control", "canny=photo.png"], "names no ControlNet; add net= with a path or hub id."),
    ([*GOOD, "--control", "cany=photo.png,net=net"], "There is no annotator 'cany'; did you mean canny?"),
    ([*GOOD, "--control", "canny=photo.png,net=net,lo=5"], "The annotator canny has no option 'lo'; did you mean low?"),
    ([*GOOD, "--control", "canny=photo.png,net=net,stark"], "'stark' has no value"),
    ([*GOOD, "--control", "canny=photo.png,net=net,scale=x"], "ControlNet's scale must be a number, not 'x'."),
    ([*GOOD, "--control", "canny=photo.png,net=net,start=0.8,stop=0.2"], "starts at 0.8 and stops before that"),
    ([*GOOD, "--control", "canny=photo.png,net=nowhere/at/all"], "nowhere/at/all"),
    ([*GOOD, "--dtype", "int3"], "int3"),
    ([*GOOD, "-m", "nowhere/at/all"], "nowhere/at/all"),
])  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_a_mistake_is_one_sentence_and_nothing_is_written(place, arguments, message, monkeypatch, capsys):
    before = sorted(place.iterdir())
    monkeypatch.setenv("SFUMATO_CACHE", "off")  # the setting would stay with this process
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the command line sets its own
    monkeypatch.setattr(sys, "argv", ["sfumato", "generate", "a fox", "-m", "model", "--size", "16x16", *arguments])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    out, err = capsys.readouterr()
    *said, sentence = err.splitlines()
    assert raised.value.code == 2
    assert sentence.startswith("sfumato: ")
    assert message in sentence
    assert all(line.startswith("Loaded in") for line in said)
    assert out == ""
    assert sorted(place.iterdir()) == before


def test_the_samplers_are_listed():
    lines = run("samplers").stdout.splitlines()
    assert any(line.startswith("euler a ") and "Euler's method with fresh noise" in line for line in lines)
    listed = json.loads(run("samplers", "--json").stdout)
    assert len(listed) == len(lines)
    assert all(listed.values())
    assert "karras" in listed["dpm++ 2m karras"]


def test_time_inside_of_spans_counts_once():
    spans = [(0.0, 2.0), (1.0, 1.5), (3.0, 5.0), (4.0, 9.0)]
    assert covered(spans, 0, 10) == 8
    assert covered(spans, 1, 4) == 2
    assert covered([], 0, 10) == 0
