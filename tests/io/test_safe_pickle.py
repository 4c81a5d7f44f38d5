"""The unpickler builds tensors and containers, and nothing that a pickle can say makes it do more."""

import os
import pickle
import pickletools
import random
import re
import subprocess
import time
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.errors import FileError
from sfumato.io import safe_pickle
from sfumato.io.lazy import MappedFile
from sfumato.io.safe_pickle import Inert, Reader, Refused, SafeUnpickler
from sfumato.io.tensors import open_tensors

from broken_files import MARK, NUMBERS, Call, Name, Stored, code, pickled, tensor, torch_legacy, torch_zip

DANGEROUS = (
    "os system", "posix system", "nt system", "builtins eval", "builtins exec", "builtins getattr", "builtins open",
    "__builtin__ eval", "builtins __import__", "builtins compile", "builtins setattr", "builtins print",
    "subprocess Popen", "subprocess call", "shutil rmtree", "importlib import_module", "runpy run_path", "pty spawn",
    "socket socket", "ctypes CDLL", "webbrowser open", "pickle loads", "_pickle loads", "operator attrgetter",
    "operator methodcaller", "functools partial", "types FunctionType", "types CodeType", "code InteractiveInterpreter",
    "torch load", "torch.hub load", "torch.storage _load_from_bytes", "torch.serialization load",
    "torch.utils.cpp_extension load_inline", "torch.jit load", "torch._utils import_dill",
    "numpy load", "numpy.testing._private.utils runstring", "numpy.f2py.capi_maps load", "numpy.core._methods eval",
    "collections namedtuple", "collections OrderedDict.fromkeys", "collections OrderedDict.__class__",
    "sfumato.io.safe_pickle call", "sfumato.io.safe_pickle Maker", "copyreg add_extension", "bdb Bdb", "pdb Pdb",
    "pytorch_lightning.utilities.cloud_io load", "diffusers.utils.import_utils os", "pathlib os.system",
    "transformers.utils.import_utils importlib", "__main__ Thing", "asyncio.unix_events Process",
)  # fmt: skip
HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint", "omegaconf.dictconfig DictConfig",
    "omegaconf.base ContainerMetadata", "typing Any", "argparse Namespace", "numpy.core.multiarray scalar",
    "numpy dtype", "_codecs encode", "builtins set", "__builtin__ dict", "torch.optim.adamw AdamW", "torch Size",
    "torch device", "pathlib PosixPath", "numpy.core.multiarray _reconstruct", "collections Counter",
)  # fmt: skip


def unpickle(data: bytes, tmp_path: Path) -> Any:
    path = tmp_path / "pickle"
    path.write_bytes(data)
    file = MappedFile(path)
    return SafeUnpickler(Reader(file, 0, len(file)), lambda pid: pid).load()


@pytest.mark.parametrize("name", DANGEROUS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_dangerous_names_are_refused_by_name(name: str, protocol: int, tmp_path: Path) -> None:
    module, attribute = name.split(" ")
    found = code(Name(name)) if protocol == 2 else code(module) + code(attribute) + b"\x93"
    data = pickled({"state_dict": {"a": 1}, "x": found + code((f"touch {tmp_path / MARK}",)) + b"R"})
    module = module.replace("__builtin__", "builtins")
    with pytest.raises(Refused, match=f"^{re.escape(f'{module}.{attribute}')}$"):
        unpickle(data, tmp_path)
    with pytest.raises(FileError, match=f"refused and nothing in it was run: it would call {module}.{attribute}"):
        open_tensors(torch_zip(tmp_path / "a.ckpt", {"x": found}))
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_names_become_marks(name: str, tmp_path: Path) -> None:
    assert isinstance(unpickle(pickled(Name(name)), tmp_path), Inert)
    made = unpickle(pickled(code(Call(Name(name), (1, "a", []))) + code({"x": 1}) + b"b"), tmp_path)
    assert isinstance(made, Inert)
    assert made.__dict__.keys() == {"name", "state"}, "state is data beside the mark, never attributes of it"


def test_nothing_that_a_name_leads_to_can_be_imported() -> None:
    """Every object a pickle can get hold of by name is one of ours, or a numpy type, which cannot be called."""
    for value in safe_pickle.MAKERS.values():
        assert isinstance(value, safe_pickle.Maker | np.dtype)
        if isinstance(value, safe_pickle.Maker):
            assert isinstance(value.make, types.FunctionType)
            assert value.make.__module__ == safe_pickle.__name__


def test_lightning_checkpoint(tmp_path: Path) -> None:
    """What old Stable Diffusion checkpoints hold beside their weights."""
    callback = Name("pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint")
    scalar = Call(Name("numpy.core.multiarray scalar"), (
        code(Call(Name("numpy dtype"), ("f8", False, True))) + code((3, "<", None, None, None, -1, -1, 0)) + b"b",
        Call(Name("_codecs encode"), ("\x00" * 8, "latin1"))))  # fmt: skip
    state = Call(Name("collections OrderedDict"), ())
    state_dict = code(state) + code({"_metadata": {"version": 1}}) + b"b(" + code("a.weight") + code(tensor()) + b"u"
    path = torch_zip(tmp_path / "sd.ckpt", {
        "epoch": 12, "global_step": 470_000, "pytorch-lightning_version": "1.4.2", "state_dict": state_dict,
        "callbacks": b"}" + b"(" + code(callback) + code({"monitor": None, "best_model_score": tensor()}) + b"u",
        "optimizer_states": [{"state": {0: {"step": scalar, "exp_avg": tensor()}}}],
        "hyper_parameters": Call(Name("omegaconf.dictconfig DictConfig"), ()),
    })  # fmt: skip
    file = open_tensors(path)
    assert list(file.tensors) == ["a.weight"]
    assert np.array_equal(file.tensors["a.weight"].read(), NUMBERS)
    assert file.metadata["global_step"] == "470000"
    assert file.metadata["pytorch-lightning_version"] == "1.4.2"


def test_parameter_dicts_and_whole_modules_give_up_their_tensors(tmp_path: Path) -> None:
    """The first textual inversion files hold a torch.nn.ParameterDict."""
    kind = Name("torch.nn.modules.container ParameterDict")
    parameter = Call(Name("torch._utils _rebuild_parameter"), (tensor(), True, {}))
    inner = code(Call(kind, ())) + code({"training": True, "_parameters": {"*": parameter}, "_modules": {}}) + b"b"
    path = torch_zip(tmp_path / "embeddings.pt", {"string_to_token": {"*": 265}, "string_to_param": inner})
    assert list(open_tensors(path).tensors) == ["string_to_param.*"]


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
def test_tensors_of_every_rebuilding(write: Any, tmp_path: Path) -> None:
    storage = Stored(("storage", Name("torch.storage UntypedStorage"), "1", "cpu", 80))
    legacy = write is torch_legacy
    rebuilt = {
        "v2": tensor(),
        "transposed": tensor(shape=(320, 64), strides=(1, 320)),
        "sliced": tensor(shape=(3, 5), strides=(640, 2), offset=7),
        "expanded": tensor(shape=(4, 64, 320), strides=(0, 320, 1)),
        "scalar": tensor(shape=(), strides=(), offset=5),
        "empty": tensor(shape=(0, 7), strides=(7, 1), offset=20480),
        "parameter": Call(Name("torch._utils _rebuild_parameter"), (tensor(), True, {})),
        "subclass": Call(Name("torch._tensor _rebuild_from_type_v2"), (
            Name("torch._utils _rebuild_tensor_v2"), Name("torch.nn.parameter Parameter"), tensor().args, {})),
        "old": Call(Name("torch._utils _rebuild_tensor"), tensor().args[:4]),
    }  # fmt: skip
    data = {"0": NUMBERS.tobytes()}
    if not legacy:
        rebuilt["v3"] = Call(Name("torch._utils _rebuild_tensor_v3"), (
            storage, 2, (9, 2), (2, 1), False, {}, Name("torch uint32"), {}))  # fmt: skip
        data["1"] = bytes(range(80))
    found = open_tensors(write(tmp_path / "file", rebuilt, data)).tensors
    flat = NUMBERS.reshape(-1)
    strides = np.lib.stride_tricks.as_strided
    expected = {
        "v2": NUMBERS, "transposed": NUMBERS.T, "sliced": strides(flat[7:], (3, 5), (2560, 8)),
        "expanded": np.broadcast_to(NUMBERS, (4, 64, 320)), "scalar": flat[5], "empty": np.empty((0, 7), np.float32),
        "parameter": NUMBERS, "subclass": NUMBERS, "old": NUMBERS,
        "v3": np.frombuffer(bytes(range(80)), np.uint32)[2:].reshape(9, 2),
    }  # fmt: skip
    for key, lazy in found.items():
        array = lazy.read()
        assert (array.shape, array.dtype) == (lazy.shape, lazy.dtype)
        assert np.array_equal(array, expected[key]), key
        assert not array.flags.writeable or not array.size
        lazy.release()
        assert np.array_equal(lazy.read(), expected[key])


def test_views_of_old_storages(tmp_path: Path) -> None:
    """Before torch 0.4 several storages could be parts of one."""
    value = {"whole": tensor(view=(None,)),
             "part": tensor(view=(("0.0", 320, 640),), shape=(2, 320), strides=(320, 1))}  # fmt: skip
    found = open_tensors(torch_legacy(tmp_path / "old.pth", value)).tensors
    assert np.array_equal(found["part"].read(), NUMBERS[1:3])
    beyond = {"whole": tensor(), "part": tensor(view=(("0.0", 20480 - 639, 640),), shape=(640,), strides=(1,))}
    with pytest.raises(FileError, match="a part of a storage reaches beyond it"):
        open_tensors(torch_legacy(tmp_path / "bad.pth", beyond))


@pytest.mark.parametrize(("name", "value"), {
    "build on a maker": code(Name("torch._utils _rebuild_tensor_v2")) + b"N" + code({"__defaults__": (1,)}) + b"\x86b",
    "build on a type": code(Name("torch float32")) + code({"itemsize": 1}) + b"b",
    "build on a table": b"}" + code({"update": 1}) + b"b",
    "new object of a table": code(Name("collections OrderedDict")) + b")\x81",
    "new object of a mark": code(Name("torch Tensor")) + b")\x81",
    "new object with keywords": code(Name("torch Tensor")) + b")}\x92",
    "obj": b"(" + code(Name("torch Tensor")) + b"o",
}.items())  # fmt: skip
def test_state_and_construction_are_without_effect(name: str, value: bytes, tmp_path: Path) -> None:
    before = {key: repr(maker) for key, maker in safe_pickle.MAKERS.items()}
    defaults = safe_pickle._tensor.__defaults__
    unpickle(pickled(value), tmp_path)
    assert safe_pickle._tensor.__defaults__ == defaults
    assert {key: repr(maker) for key, maker in safe_pickle.MAKERS.items()} == before


@pytest.mark.parametrize("value", [
    code("abc") + b")R",  # calls a string
    code(Name("torch float32")) + b")R",  # calls a type
    code({"a": 1}) + b")\x81",  # makes an instance of a table
    code(Name("collections OrderedDict")) + b"K\x01R",  # calls without a tuple
    code(Name("torch float32")) + code("x") + b"a",  # appends to a type
    code(Name("torch float32")) + code("x") + code("y") + b"s",  # sets an item of a type
    code(Name("collections OrderedDict")) + code("x") + code("y") + b"s",  # sets an item of a maker
    code((1, 2)) + code("x") + b"a",
    b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00",  # extension registry
    b"\x8f", b"\x96" + (1 << 45).to_bytes(8, "little"), b"\x97", b"Pabc\n",  # sets, byte arrays, buffers, old ids
    b"\x95" + (1 << 62).to_bytes(8, "little"),  # a frame longer than memory
    b"\x8e" + (1 << 45).to_bytes(8, "little") + b"x",  # bytes longer than memory
    b"h\x07",  # a memo that was never set
    b"0" * 9, b"e", b"u", b"\xff", b"(" * 99 + b"e",
    b"I" + b"9" * 70_000,  # a line without end
    b"\x8b\xff\xff\xff\xff",  # a long of negative length
])  # fmt: skip
def test_nonsense_is_damage(value: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(pickled(value))
    with pytest.raises(FileError, match=r"damaged|cut off|no tensors"):
        open_tensors(path)


def test_memo_of_any_number_takes_no_memory(tmp_path: Path) -> None:
    assert unpickle(pickled(b"Nr\xff\xff\xff\x7f"), tmp_path) is None


def test_deep_and_endless_structures(tmp_path: Path) -> None:
    """Tables inside tables: 2^60 paths through shared ones, one that holds itself, one 100,000 deep."""
    shared = b"}q\x00" + b"".join(b"}(" + code("a") + b"h" + bytes([i]) + code("b") + b"h" + bytes([i]) + b"uq"
                                   + bytes([i + 1]) for i in range(60))  # fmt: skip
    endless = b"}q\x00(" + code("a") + b"h\x00" + b"u"
    deep = b"]" * 100_000 + b"a" * 99_999
    tuples = b"}" + b")" + b"\x85" * 200_000 + b"Ns"  # a key whose hash would overflow the machine's stack
    started = time.perf_counter()
    for value in (shared, endless, deep, tuples):
        path = tmp_path / "a.bin"
        path.write_bytes(pickled(value))
        with pytest.raises(FileError, match=r"deep|no tensors"):
            open_tensors(path)
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize(("claims", "words"), [
    ({"shape": (True, 2)}, "natural numbers"), ({"shape": ("64", 2)}, "natural numbers"),
    ({"offset": 1 << 70}, "natural numbers"), ({"shape": (1 << 62, 1 << 62), "strides": (0, 0)}, "claims"),
    ({"shape": 5}, "makes no sense"), ({"shape": (1,) * 99, "strides": (1,) * 99}, "99 axes"),
    ({"strides": (1,)}, "1 strides"), ({"numbers": -4}, "length"), ({"numbers": 1 << 60}, "length"),
    ({"numbers": 1 << 50, "shape": (1 << 50,), "strides": (1,)}, "81920 bytes of"),
    ({"kind": "collections OrderedDict"}, "no known type"), ({"kind": "torch Foo"}, "torch.Foo"),
])  # fmt: skip
def test_claims_about_tensors_are_checked(claims: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=words):
        open_tensors(torch_zip(tmp_path / "a.ckpt", {"a": tensor(**claims)}))


def test_a_storage_is_no_other_thing(tmp_path: Path) -> None:
    for pid in ("0", ("module", 1), ("storage",), ("other", Name("torch FloatStorage"), "0", "cpu", 4), 7):
        with pytest.raises(FileError, match="no storage"):
            open_tensors(torch_zip(tmp_path / "a.ckpt", {"a": Stored(pid)}))
    for storage in (Name("torch FloatStorage"), "0", Name("torch Tensor")):
        value = Call(Name("torch._utils _rebuild_tensor_v2"), (storage, 0, (1,), (1,), False, {}))
        with pytest.raises(FileError, match="no storage"):
            open_tensors(torch_zip(tmp_path / "a.ckpt", {"a": value}))


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"two tensors that are called a\.b"):
        open_tensors(torch_zip(tmp_path / "a.ckpt", {"a.b": tensor(), "a": {"b": tensor()}}))


class Trap:
    """Leaves a mark if an unpickler ever makes one."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ['TRAP']}",)


@pytest.mark.slow
def test_mutations_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random changes of a malicious and of a harmless file end in tensors or in a FileError."""
    monkeypatch.setenv("TRAP", str(tmp_path / MARK))
    chance = random.Random(0)
    weights = {"a": tensor(), "b": tensor(offset=3, shape=(9,), strides=(2,))}
    good = torch_zip(tmp_path / "good", {"state_dict": weights})
    legacy = torch_legacy(tmp_path / "legacy", {"a": tensor()}, {"0": NUMBERS.tobytes()})
    bad = tmp_path / "bad"
    bad.write_bytes(pickle.dumps(OrderedDict(x=Trap(), y=[Trap()]), 2))
    for module, function in ((os, "system"), (os, "popen"), (os, "execv"), (subprocess, "Popen")):
        monkeypatch.setattr(module, function, lambda *_: pytest.fail("a pickle was run"))
    opcodes = [op.code.encode("latin1") for op in pickletools.opcodes]
    for original in (good, legacy, bad):
        data = original.read_bytes()
        head = data[:700]
        for _ in range(400):
            changed = bytearray(head)
            for _ in range(chance.randrange(1, 6)):
                at = chance.randrange(len(changed))
                changed[at : at + chance.randrange(2)] = chance.choice([*opcodes, bytes([chance.randrange(256)])])
            path = tmp_path / "mutant"
            path.write_bytes(bytes(changed) + data[700:])
            try:
                for lazy in open_tensors(path).tensors.values():
                    lazy.read().tobytes()
            except FileError:
                continue
    assert not (tmp_path / MARK).exists()
