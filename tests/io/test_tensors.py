"""Files of tensors are opened by what is in them, and read as the libraries that write them read them."""

import json
import resource
import struct
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save, save_file

from real_files import real_file
from sfumato.errors import FileError
from sfumato.io.safetensors_file import DTYPES
from sfumato.io.tensors import LazyTensor, open_tensors

from broken_files import NUMBERS, TENSORS, entry, header, tensor, torch_zip


def torch_state() -> dict[str, Any]:
    """Tensors of every type, contiguous or not, alone or sharing their storage."""
    import torch

    torch.manual_seed(0)
    base = torch.randn(6, 8)
    dtypes = [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int16, torch.int32,
              torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
              torch.uint16, torch.uint32, torch.uint64]  # fmt: skip
    state = {str(dtype): (base * 3).abs().to(dtype) for dtype in dtypes}
    return state | {
        "transposed": base.T, "sliced": base[1::2, ::3], "expanded": base[0].expand(4, 8), "shared": base.view(2, 24),
        "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "parameter": torch.nn.Parameter(base[:2]),
    }  # fmt: skip


def plain(tensor: Any) -> np.ndarray:
    """A torch tensor as bytes that numpy can compare."""
    import torch

    tensor = tensor.detach().contiguous()
    return tensor.flatten().view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)


def raw(lazy: LazyTensor) -> np.ndarray:
    return np.ascontiguousarray(lazy.read()).reshape(-1).view(np.uint8)


@pytest.mark.parity
@pytest.mark.parametrize("zip_form", [True, False])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": OrderedDict(state), "epoch": 3}])
def test_torch_files_are_read_as_torch_reads_them(zip_form: bool, wrap: Any, tmp_path: Path) -> None:
    import torch

    state = torch_state()
    if not zip_form:
        state = {key: value for key, value in state.items() if "torch.uint" not in key or key == "torch.uint8"}
    torch.save(wrap(state), tmp_path / "a.ckpt", _use_new_zipfile_serialization=zip_form)
    file = open_tensors(tmp_path / "a.ckpt")
    assert file.container == "pickle"
    assert list(file.tensors) == list(state)
    for key, theirs in state.items():
        lazy = file.tensors[key]
        assert lazy.shape == tuple(theirs.shape)
        assert lazy.read().shape == lazy.shape
        assert lazy.read().dtype == lazy.dtype
        assert lazy.dtype.name == str(theirs.dtype).removeprefix("torch."), key
        assert np.array_equal(raw(lazy), plain(theirs)), key


@pytest.mark.parity
def test_safetensors_of_torch(tmp_path: Path) -> None:
    from safetensors.torch import save_file as save_torch

    state = {key: value.clone().contiguous() for key, value in torch_state().items() if "int64" not in key}
    save_torch(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = open_tensors(tmp_path / "a.safetensors")
    assert (file.container, file.metadata) == ("safetensors", {"format": "pt"})
    assert file.tensors.keys() == state.keys()
    for key, theirs in state.items():
        assert file.tensors[key].shape == tuple(theirs.shape)
        assert np.array_equal(raw(file.tensors[key]), plain(theirs)), key


def test_every_type_of_safetensors(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items():
        data = np.arange(6).astype(dtype)
        path = header(tmp_path / name, {"a": entry(name, (2, 3), (0, data.nbytes))}, data.tobytes())
        found = open_tensors(path).tensors["a"]
        assert found.dtype == dtype
        assert found.read().tobytes() == data.tobytes()


ODD_HEADERS: dict[str, Any] = {
    "usual": ({"a": entry()}, 16),
    "nothing": ({}, 0),
    "empty tensor": ({"a": entry(shape=(0, 2**40), offsets=(0, 0)), "b": entry()}, 16),
    "empty tensor inside": ({"a": entry(), "b": entry(shape=(0,), offsets=(16, 16))}, 16),
    "empty tensor in the middle of another": ({"a": entry(), "b": entry(shape=(0,), offsets=(8, 8))}, 16),
    "scalar": ({"a": entry(shape=(), offsets=(0, 4))}, 4),
    "overlap": ({"a": entry(), "b": entry()}, 16),
    "gap": ({"a": entry(offsets=(4, 20))}, 20),
    "behind": ({"a": entry()}, 17),
    "short": ({"a": entry()}, 15),
    "reversed": ({"a": entry(offsets=(16, 0))}, 16),
    "float offsets": ({"a": entry(offsets=(0.0, 16.0))}, 16),
    "negative": ({"a": entry(shape=(-2, -2))}, 16),
    "wrong size": ({"a": entry(shape=(5,))}, 16),
    "unknown type": ({"a": entry("Q7")}, 16),
    "type of another kind": ({"a": entry([])}, 16),
    "overflow": ({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, 0),
    "no table": ([], 0),
    "entry no table": ({"a": 1}, 16),
    "metadata": ({"__metadata__": {"a": "b"}, "a": entry()}, 16),
    "metadata no table": ({"__metadata__": 3, "a": entry()}, 16),
}


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_verdicts_are_those_of_the_safetensors_library(name: str, tmp_path: Path) -> None:
    entries, size = ODD_HEADERS[name]
    path = header(tmp_path / "a.safetensors", entries, bytes(size))
    try:
        theirs = {key: tuple(value["shape"]) for key, value in deserialize(path.read_bytes())}
    except SafetensorError:
        theirs = None
    if theirs is None:
        with pytest.raises(FileError):
            open_tensors(path)
    else:
        ours = open_tensors(path).tensors
        assert {key: value.shape for key, value in ours.items()} == theirs
        assert all(value.read().shape == value.shape for value in ours.values())


def test_names_of_files_do_not_matter(tmp_path: Path) -> None:
    right = tmp_path / "right.safetensors"
    save_file(TENSORS, right)
    for name in ("a.ckpt", "b.bin", "c"):
        (tmp_path / name).write_bytes(right.read_bytes())
        file = open_tensors(str(tmp_path / name))
        assert np.array_equal(file.tensors["conv_in.weight"].read(), NUMBERS)
    assert open_tensors(right).notes == ()
    assert open_tensors(tmp_path / "a.ckpt").notes == ("a.ckpt is a safetensors file despite its name.",)
    assert open_tensors(tmp_path / "c").notes == ()
    file = open_tensors(torch_zip(tmp_path / "d.safetensors", {"a": tensor()}))
    assert file.notes == ("d.safetensors is a torch file (pickle) despite its name.",)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_one(suffix: str, tmp_path: Path) -> None:
    names = [f"model-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    if suffix == "safetensors":
        save_file({"a": NUMBERS}, tmp_path / names[0])
        save_file({"b": NUMBERS * 2, "unlisted": NUMBERS}, tmp_path / names[1])
    else:
        torch_zip(tmp_path / names[0], {"a": tensor()})
        torch_zip(tmp_path / names[1], {"b": tensor()}, {"0": (NUMBERS * 2).tobytes()})
    index = tmp_path / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": names[0], "b": names[1]}}))
    file = open_tensors(index)
    assert list(file.tensors) == ["a", "b"]
    assert file.container == ("safetensors" if suffix == "safetensors" else "pickle")
    assert np.array_equal(file.tensors["b"].read(), NUMBERS * 2)
    assert "part 1 of 2" in " ".join(open_tensors(tmp_path / names[0]).notes)


def test_shards_may_be_links(tmp_path: Path) -> None:
    """As in the cache of huggingface_hub, whose folders link to blobs elsewhere."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": NUMBERS}, tmp_path / "blobs/123")
    (tmp_path / "snapshot/1.safetensors").symlink_to("../blobs/123")
    index = tmp_path / "snapshot/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    assert np.array_equal(open_tensors(index).tensors["a"].read(), NUMBERS)


def test_wrappers_of_state_dicts(tmp_path: Path) -> None:
    weights = {"conv.weight": tensor()}
    for value, keys in (
        (weights, ["conv.weight"]),
        ({"state_dict": weights, "x": {"y": tensor()}}, ["conv.weight"]),
        ({"params": {"p": tensor()}, "params_ema": weights}, ["conv.weight"]),
        ({"model": weights, "optimizer": {"state": {0: {"exp_avg": tensor()}}}}, ["conv.weight"]),
        ({"string_to_param": {"*": tensor()}, "name": "x"}, ["string_to_param.*"]),
        ({"model": {}, "a": weights}, ["a.conv.weight"]),
        ([tensor(), {"b": tensor()}], ["0", "1.b"]),
    ):
        assert list(open_tensors(torch_zip(tmp_path / "a.pt", value)).tensors) == keys


def test_map_and_of() -> None:
    lazy = LazyTensor.of(NUMBERS).map((320, 64), np.transpose)
    assert lazy.shape == (320, 64)
    assert lazy.dtype == np.float32
    assert np.array_equal(lazy.read(), NUMBERS.T)
    lazy.release()


def test_reading_from_threads(tmp_path: Path) -> None:
    tensors = {str(i): np.full((1000, 100), i, np.float32) for i in range(40)}
    save_file(tensors, tmp_path / "a.safetensors")
    found = open_tensors(tmp_path / "a.safetensors").tensors

    def total(key: str) -> float:
        value = float(found[key].read().sum(dtype=np.float64))
        found[key].release()
        return value

    with ThreadPoolExecutor(8) as pool:
        keys = list(tensors) * 20
        assert list(pool.map(total, keys)) == [1e5 * int(key) for key in keys]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted by Linux's own file, and only there released")
def test_released_tensors_take_no_memory(tmp_path: Path) -> None:
    size = 1 << 22
    save_file({str(i): np.full(size, i, np.float32) for i in range(6)}, tmp_path / "a.safetensors")

    def mapped() -> int:
        """Bytes of files that this process has in memory."""
        return int(Path("/proc/self/statm").read_text().split()[2]) * resource.getpagesize()

    file = open_tensors(tmp_path / "a.safetensors")
    before = mapped()
    for lazy in file.tensors.values():
        lazy.read().sum()
        lazy.release()
        assert mapped() - before < 4 * size / 2
    for lazy in file.tensors.values():
        lazy.read().sum()
    assert mapped() - before > 5 * 4 * size, "without releasing, all of it stays"


def test_reading_needs_no_alignment(tmp_path: Path) -> None:
    text = json.dumps({"a": entry("BF16", (2, 3), (0, 12))}).encode()
    text += b" " * (1 - len(text) % 2)  # the data begins at an odd byte
    data = np.arange(6).astype(ml_dtypes.bfloat16)
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + data.tobytes())
    assert np.array_equal(open_tensors(tmp_path / "a").tensors["a"].read(), data.reshape(2, 3))


def test_big_file_is_opened_without_reading_it(tmp_path: Path) -> None:
    """A sparse file of 64 GB takes no time and no memory."""
    path = header(tmp_path / "a.safetensors", {"a": entry("F16", (1 << 35,), (0, 1 << 36))})
    start = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(start + (1 << 36))
    assert open_tensors(path).tensors["a"].read()[-3:].tolist() == [0, 0, 0]


REAL_FILES = ("sd15_lora_diffusers_old.bin", "sd15_textual_inversion.bin", "taef2_encoder.pth", "taef2_decoder.pth",
              "sd15_lora_diffusers_old.safetensors", "sd15_lora_cloneofsimo_with_tokens.safetensors")  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("name", REAL_FILES)
def test_real_files_are_read_as_their_libraries_read_them(name: str) -> None:
    import torch
    from safetensors.torch import load_file

    path = real_file(name)
    theirs = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu")
    ours = open_tensors(path).tensors
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key].read(), value.detach().numpy()) for key, value in theirs.items())


def test_saved_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(save({}))
    assert open_tensors(tmp_path / "a.safetensors").tensors == {}
