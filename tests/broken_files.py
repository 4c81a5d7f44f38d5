"""Files as they circulate damaged, mistaken or malicious: how to make each, and what must be said about it.

`BROKEN` is a table for the tests of everything that opens files. A malicious one would create `ran` beside itself.
"""

from __future__ import annotations

import dataclasses as dc
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

NUMBERS = np.random.default_rng(0).standard_normal((64, 320)).astype(np.float32)
TENSORS = {"conv_in.weight": NUMBERS, "conv_out.weight": NUMBERS[:8] * 2}
MARK = "ran"


# Pickles, written instruction by instruction, so that they can claim anything.


@dc.dataclass(frozen=True)
class Name:
    """A global, as "module name"."""

    name: str


@dc.dataclass(frozen=True)
class Call:
    """What the unpickler is to call, and with which arguments."""

    function: Any
    args: tuple


@dc.dataclass(frozen=True)
class Stored:
    """A persistent id, as torch gives one to each storage."""

    pid: Any


def code(value: Any) -> bytes:
    """The instructions that put a value on an unpickler's stack; bytes are instructions already."""
    match value:
        case bytes():
            return value
        case bool():
            return b"\x88" if value else b"\x89"
        case None:
            return b"N"
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(code, value)) + b"e"
        case dict():
            return b"}(" + b"".join(code(key) + code(item) for key, item in value.items()) + b"u"
        case Name():
            return b"c" + "\n".join([*value.name.rsplit(" ", 1), ""]).encode()
        case Call():
            return code(value.function) + code(value.args) + b"R"
        case Stored():
            return code(value.pid) + b"Q"
    raise TypeError(value)


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + code(value) + b"."


def tensor(
    *, numbers: int = NUMBERS.size, shape: Any = (64, 320), strides: Any = (320, 1), offset: Any = 0, key: str = "0",
    kind: str = "torch FloatStorage", view: tuple = (),
) -> Call:  # fmt: skip
    """A tensor that makes these claims about a storage."""
    storage = Stored(("storage", Name(kind), key, "cuda:0", numbers, *view))
    return Call(Name("torch._utils _rebuild_tensor_v2"), (storage, offset, shape, strides, False, {}))


def torch_zip(path: Path, value: Any, storages: Mapping[str, bytes] | None = None, **entries: bytes) -> Path:
    """A file as `torch.save` writes it."""
    storages = {"0": NUMBERS.tobytes()} if storages is None else storages
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(value))
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return path


def torch_legacy(path: Path, value: Any, storages: Mapping[str, bytes] | None = None, size: int = 4) -> Path:
    """A file as torch wrote it before version 1.6; `size` is that of a number."""
    storages = {"0": NUMBERS.tobytes()} if storages is None else storages
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}, value, list(storages)]
    data = b"".join(struct.pack("<q", len(numbers) // size) + numbers for numbers in storages.values())
    path.write_bytes(b"".join(map(pickled, head)) + data)
    return path


def command(folder: Path) -> Call:
    """What a malicious pickle calls."""
    return Call(Name("os system"), (f"touch {folder / MARK}",))


# safetensors, with headers that can claim anything.


def header(path: Path, entries: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def sharded(folder: Path, names: Mapping[str, str]) -> Path:
    """An index, with the first of its shards beside it if that name is a usual one."""
    name = next(iter(names.values()))
    if "/" not in name:
        written(folder / name, save(TENSORS))
    return written(folder / "model.safetensors.index.json", json.dumps({"weight_map": names}).encode())


def npz(folder: Path) -> Path:
    buffer = io.BytesIO()
    np.savez(buffer, a=NUMBERS)
    return written(folder / "weights.pt", buffer.getvalue())


def tar(folder: Path) -> Path:
    with tarfile.open(folder / "old.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return folder / "old.pth"


def repacked(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled({"a": tensor()}))
        archive.writestr("archive/data/0", NUMBERS.tobytes())
    return folder / "model.ckpt"


def crlf(data: bytes) -> bytes:
    return data.replace(b"\n", b"\r\n")


def zipped(folder: Path) -> bytes:
    return torch_zip(folder / "whole.ckpt", {"conv_in.weight": tensor()}).read_bytes()


@dc.dataclass(frozen=True)
class Broken:
    """A kind of broken file."""

    name: str
    make: Callable[[Path], Path]
    """Writes it into an empty folder and returns what to open."""
    words: tuple[str, ...]
    """What the sentence about it must contain."""


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 4265146304\n" % (b"4d" * 32)
HTML = b"\n<!DOCTYPE html>\n<html><head><title>Sign in to the hub</title></head><body></body></html>"
CLOSED = {"conv_in.weight": entry()}
FULL = bytes(16)

BROKEN: tuple[Broken, ...] = tuple(Broken(name, make, words) for name, make, words in (
    ("git-lfs pointer", lambda f: written(f / "a.safetensors", LFS), ("git-lfs pointer", "4.27 GB", "git lfs pull")),
    ("web page", lambda f: written(f / "a.pt", HTML), ("web page", "Sign in to the hub")),
    ("text stub", lambda f: written(f / "a.ckpt", b"Moved to another place.\n"), ("text", "Moved to another place.")),
    ("text like a header", lambda f: written(f / "a.ckpt", b"version {1}"), ("text", "version {1}")),
    ("empty file", lambda f: written(f / "a.safetensors", b""), ("empty", "0 bytes")),
    ("file of zeros", lambda f: written(f / "a.bin", bytes(9000)), ("zero bytes", "download it again")),
    ("noise", lambda f: written(f / "a.bin", b"\x17\x93\x42" * 99), ("17 93 42", "neither")),
    ("half a zip", lambda f: written(f / "a.ckpt", zipped(f)[:50_000]), ("cut off", "50 kB", "download it again")),
    ("zip with CR LF", lambda f: written(f / "a.ckpt", crlf(zipped(f))), ("CR LF", "binary")),
    ("zip without CR", lambda f: written(f / "a.ckpt", zipped(f).replace(b"\r\n", b"\n").replace(b"\r", b"")),
     ("damaged",)),
    ("safetensors with CR LF", lambda f: written(f / "a.safetensors", crlf(save(TENSORS))), ("CR LF", "binary")),
    ("truncated safetensors", lambda f: written(f / "a.safetensors", save(TENSORS)[:-5000]),
     ("cut off", f"{len(save(TENSORS))} bytes are", f"{len(save(TENSORS)) - 5000} are there", "conv_out.weight")),
    ("truncated header", lambda f: written(f / "a.safetensors", save(TENSORS)[:60]), ("cut off", "header", "60")),
    ("header bomb", lambda f: header(f / "a.safetensors", CLOSED, FULL, 1 << 40), ("header of", "memory")),
    ("header no JSON", lambda f: header(f / "a.safetensors", b'{"conv_in.weight": {"dty'), ("damaged header",)),
    ("header nested", lambda f: header(f / "a.safetensors", b'{"a":' + b"[" * 100_000), ("damaged header",)),
    ("header list", lambda f: header(f / "a.safetensors", b'{}[]'), ("damaged header",)),
    ("header twice", lambda f: header(f / "a.safetensors", b'{"a": 1, "a": 2}'), ("damaged header", "twice")),
    ("header entry", lambda f: header(f / "a.safetensors", {"conv_in.weight": {"dtype": "F32"}}),
     ("conv_in.weight lacks",)),
    ("unknown dtype", lambda f: header(f / "a.safetensors", {"conv_in.weight": entry("F4")}, FULL),
     ("conv_in.weight in the type 'F4'", "BF16")),
    ("overlap", lambda f: header(f / "a.safetensors", CLOSED | {"b": entry(offsets=(8, 24))}, bytes(24)),
     ("b overlaps",)),
    ("gap", lambda f: header(f / "a.safetensors", CLOSED | {"b": entry(offsets=(20, 36))}, bytes(36)), ("gap of 4",)),
    ("out of the file", lambda f: header(f / "a.safetensors", {"a": entry("F32", (1 << 40,), (0, 1 << 42))}, FULL),
     ("cut off", "a and what follows")),
    ("wrong size", lambda f: header(f / "a.safetensors", {"a": entry(shape=(3, 3))}, FULL), ("36 bytes", "16 are set")),
    ("negative shape", lambda f: header(f / "a.safetensors", {"a": entry(shape=(-2, -2))}, FULL), ("a has shape [-2",)),
    ("huge shape", lambda f: header(f / "a.safetensors", {"a": entry(shape=(2**40,) * 40)}, FULL), ("a has shape",)),
    ("bytes behind", lambda f: header(f / "a.safetensors", CLOSED, bytes(99)), ("83 bytes behind",)),
    ("command in a zip", lambda f: torch_zip(f / "a.ckpt", {"a": command(f)}), ("refused", "os.system", "nothing")),
    ("command in a stream", lambda f: torch_legacy(f / "a.pt", {"a": command(f)}), ("refused", "os.system")),
    ("command in a pickle", lambda f: written(f / "a.bin", pickled(command(f))), ("refused", "os.system")),
    ("command in text", lambda f: written(f / "a.pt", pickle.dumps(1, 0)[:0] + b"cos\nsystem\n(S'touch %s'\ntR."
                                          % str(f / MARK).encode()), ("refused", "os.system")),
    ("command by INST", lambda f: written(f / "a.pt", b"(S'touch %s'\nios\nsystem\n." % str(f / MARK).encode()),
     ("refused", "os.system")),
    ("command under a false name", lambda f: torch_zip(f / "a.safetensors", {"a": command(f)}),
     ("refused", "os.system")),
    ("shape beyond the storage", lambda f: torch_zip(f / "a.ckpt", {"a": tensor(shape=(65, 320))}), ("reaches",)),
    ("strides beyond the storage", lambda f: torch_zip(f / "a.ckpt", {"a": tensor(strides=(321, 1))}), ("reaches",)),
    ("offset beyond the storage", lambda f: torch_zip(f / "a.ckpt", {"a": tensor(offset=1)}), ("reaches",)),
    ("negative stride", lambda f: torch_zip(f / "a.ckpt", {"a": tensor(strides=(-320, 1))}), ("natural numbers",)),
    ("repeated without end", lambda f: torch_zip(f / "a.ckpt", {"a": tensor(shape=(1 << 50, 320), strides=(0, 1))}),
     ("claims",)),
    ("storage cut short", lambda f: torch_zip(f / "a.ckpt", {"a": tensor()}, {"0": bytes(99)}), ("99 bytes", "81920")),
    ("storage missing", lambda f: torch_zip(f / "a.ckpt", {"a": tensor(key="7")}), ("archive/data/7 is missing",)),
    ("storage key escapes", lambda f: torch_zip(f / "a.ckpt", {"a": tensor(key="../../x")}), ("is missing",)),
    ("unknown storage type", lambda f: torch_zip(f / "a.ckpt", {"a": tensor(kind="torch QInt8Storage")}),
     ("torch.QInt8Storage",)),
    ("big-endian", lambda f: torch_zip(f / "a.ckpt", {"a": tensor()}, byteorder=b"big"), ("big-endian",)),
    ("TorchScript", lambda f: torch_zip(f / "a.pt", {}, **{"constants.pkl": b"", "code/a.py": b""}), ("TorchScript",)),
    ("stream cut off", lambda f: written(f / "a.bin", torch_legacy(f / "b", {"a": tensor()}).read_bytes()[:-9]),
     ("cut off",)),
    ("stream of other storages", lambda f: torch_legacy(f / "a.bin", {"a": tensor(key="1")}), ("list of storages",)),
    ("stream without storages", lambda f: written(f / "a.bin", pickled({"a": tensor()})), ("does not hold",)),
    ("description cut off", lambda f: written(f / "a.bin", pickled({"a": 1})[:-1]), ("cut off",)),
    ("whole object", lambda f: torch_zip(f / "a.pt", Call(Name("diffusers.models.unet UNet"), ())),
     ("whole object of the class diffusers.models.unet.UNet",)),
    ("no tensors", lambda f: torch_zip(f / "a.pt", {"epoch": 3}), ("no tensors",)),
    ("unknown class", lambda f: torch_zip(f / "a.pt", {"a": Call(Name("mylib Thing"), ())}),
     ("refused", "mylib.Thing")),
    ("compressed zip", repacked, ("compression",)),
    ("other zip", npz, ("NumPy archive",)),
    ("tar", tar, ("tar archive", "torch")),
    ("HDF5", lambda f: written(f / "a.bin", b"\x89HDF\r\n\x1a\n" + bytes(99)), ("HDF5",)),
    ("settings", lambda f: written(f / "config.json", b'{"_class_name": "UNet"}'), ("JSON", "not weights")),
    ("damaged JSON", lambda f: written(f / "a.index.json", b'{"weight_map": {'), ("damaged JSON",)),
    ("shard missing", lambda f: sharded(f, {"conv_in.weight": "1.safetensors", "b": "2.safetensors"}),
     ("2.safetensors", "1 of 2 parts")),
    ("shard escapes", lambda f: sharded(f, {"a": "../secret.safetensors"}), ("refused", "../secret.safetensors")),
    ("shard of the root", lambda f: sharded(f, {"a": "/etc/passwd"}), ("refused", "/etc/passwd")),
    ("shard without tensor", lambda f: sharded(f, {"other": "1.safetensors"}), ("other is in 1.safetensors",)),
    ("folder", lambda f: f, ("is a folder",)),
    ("nothing there", lambda f: written(f / "model.ckpt", b"x").with_name("modle.ckpt"),
     ("There is no", "model.ckpt?")),
    ("nothing like it", lambda f: f / "deep" / "model.ckpt", ("There is no", "has no deep")),
))  # fmt: skip
