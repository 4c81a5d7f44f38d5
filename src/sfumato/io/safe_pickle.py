"""Reading pickles without running them: an unpickler that can build tensors and plain containers, nothing else.

A pickle is a program for a small stack machine. Its instructions are harmless but for those that look a name up
(GLOBAL, STACK_GLOBAL, INST) and those that call what was found or hand it state (REDUCE, NEWOBJ, OBJ, BUILD). Here a
name never leads to an importable object. It is either a `Maker` of this module, or it becomes an `Inert` mark, or the
file is refused; and only makers and marks can be called. BUILD
sets no attributes: a mark keeps the state as data, everything else loses it.
"""

from __future__ import annotations

import dataclasses as dc
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np

from sfumato.io.lazy import LazyTensor, MappedFile, room

MOST_AXES = 32
MOST_REPEATED = 1 << 26
"""Bytes up to which a tensor may be larger than its storage, by strides of 0 (as torch's `expand` makes them)."""

DTYPES: dict[str, np.dtype] = {name: np.dtype(dtype) for name, dtype in {
    "float16": np.float16, "half": np.float16, "float32": np.float32, "float": np.float32, "float64": np.float64,
    "double": np.float64, "bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2, "uint8": np.uint8, "int8": np.int8, "int16": np.int16, "short": np.int16,
    "int32": np.int32, "int": np.int32, "int64": np.int64, "long": np.int64, "uint16": np.uint16,
    "uint32": np.uint32, "uint64": np.uint64, "bool": np.bool_, "complex64": np.complex64,
}.items()}  # fmt: skip
"""torch's types by their names in `torch`."""

STORAGES: dict[str, str] = {
    "HalfStorage": "float16", "FloatStorage": "float32", "DoubleStorage": "float64", "BFloat16Storage": "bfloat16",
    "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16", "IntStorage": "int32",
    "LongStorage": "int64", "BoolStorage": "bool", "ComplexFloatStorage": "complex64", "UntypedStorage": "uint8",
}  # fmt: skip

INERT_PACKAGES = frozenset(
    ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "omegaconf",
     "argparse", "pathlib", "typing", "collections", "datetime", "enum", "torch", "numpy", "ldm", "sgm", "cldm",
     "taming", "diffusers", "transformers", "accelerate", "deepspeed")
)  # fmt: skip
"""Packages whose classes (names with a capital) occur in checkpoints beside the weights."""

INERT_NAMES = frozenset(
    f"{module}.{name}" for module, names in {
        "builtins": "set frozenset int float str bool list tuple dict bytes bytearray complex slice range object type",
        "_codecs": "encode",
        "copyreg": "_reconstructor",
        "numpy": "dtype ndarray float16 float32 float64 int8 int16 int32 int64 uint8 uint32 uint64 bool_",
        "numpy.core.multiarray": "scalar _reconstruct",
        "numpy._core.multiarray": "scalar _reconstruct",
        "numpy.random._pickle": "__randomstate_ctor __generator_ctor __bit_generator_ctor",
        "torch": "device",
        "torch.serialization": "_get_layout",
        "collections": "deque",
        "datetime": "datetime timedelta",
    }.items() for name in names.split()
)  # fmt: skip
"""What else occurs beside the weights in real checkpoints."""


class Inert:
    """The mark that stands for a class, a function, or an object made with one. It has a name and does nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = None

    @property
    def members(self) -> dict:
        """Parameters, buffers and modules inside, if the object was a torch module (such as a ParameterDict)."""
        tables = self.state if isinstance(self.state, dict) else {}
        groups = (tables.get(name) for name in ("_parameters", "_buffers", "_modules"))
        return {key: value for group in groups if isinstance(group, dict) for key, value in group.items()}

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...


@dc.dataclass(frozen=True)
class Maker:
    """A function that a pickle may call."""

    make: Callable[..., Any]


@dc.dataclass
class Storage:
    """A stretch of numbers in a file. Where it begins may become known only after the pickle is read."""

    dtype: np.dtype
    count: int
    offset: int = -1


@dc.dataclass(frozen=True)
class TensorView:
    """Some numbers of a storage as an array; `offset` and `strides` in numbers, as in torch.

    Made from what a file claims: that they are natural numbers, and fit, is checked here.
    """

    storage: Storage
    dtype: np.dtype
    offset: Any
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]

    def __post_init__(self) -> None:
        """Raises ValueError unless all of it lies inside the storage."""
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or len(self.shape) > MOST_AXES:
            raise ValueError(f"a tensor has {len(self.shape)} axes and {len(self.strides)} strides")
        if any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
            raise ValueError("a tensor's shape, strides or offset are not natural numbers")
        held, claimed = self.storage.count * self.storage.dtype.itemsize, room(self.shape, self.dtype)
        if claimed > max(held, MOST_REPEATED):
            raise ValueError(f"a tensor of shape {list(self.shape)} claims {claimed} bytes of a storage of {held}")
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and (last + 1) * self.dtype.itemsize > held:
            raise ValueError(f"a tensor of shape {list(self.shape)} reaches number {last} of a storage of {held} bytes")

    def lazy(self, file: MappedFile) -> LazyTensor:
        size = self.dtype.itemsize
        start = self.storage.offset + self.offset * size
        return file.tensor(self.shape, self.dtype, start, tuple(stride * size for stride in self.strides))


# The functions below carry the arguments of those that they stand for; what does not matter here is dropped.
def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorView:
    return _tensor_v3(storage, offset, shape, strides, False, None, getattr(storage, "dtype", None))


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any):
    if not isinstance(storage, Storage) or not isinstance(dtype, np.dtype):
        raise ValueError("a tensor has no storage or a type that sfumato does not know")
    return TensorView(storage, dtype, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _subclass(function: Any, _kind: Any, args: Any, *_: Any) -> Any:
    return call(function, args)


def _dict(items: Iterable[tuple[Any, Any]] = (), *_: Any) -> dict:
    return {key: value for key, value in items if _is_key(key)}


def _default_dict(*_: Any) -> dict:
    return {}


MAKERS: dict[str, Any] = {
    "collections.OrderedDict": Maker(_dict),
    "collections.defaultdict": Maker(_default_dict),
    "torch._utils._rebuild_tensor": Maker(_tensor),
    "torch._utils._rebuild_tensor_v2": Maker(_tensor),
    "torch._utils._rebuild_tensor_v3": Maker(_tensor_v3),
    "torch._utils._rebuild_parameter": Maker(_parameter),
    "torch._utils._rebuild_parameter_with_state": Maker(_parameter),
    "torch._tensor._rebuild_from_type_v2": Maker(_subclass),
    **{f"{module}.{name}": DTYPES[dtype] for module in ("torch", "torch.storage", "torch.cuda")
       for name, dtype in STORAGES.items()},
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
}  # fmt: skip
"""What a pickle may name, and what it then gets; of storage classes and torch's types their numpy type."""


def call(function: Any, args: Any) -> Any:
    """What the pickle gets for calling something that it has found."""
    if isinstance(function, Inert):
        return Inert(function.name)
    if not isinstance(function, Maker) or not isinstance(args, tuple):
        raise ValueError("it calls something that is no function")
    return function.make(*args)


def find(module: str, name: str) -> Any:
    """What stands for a name in a pickle. Raises Refused if it is not known to be harmless."""
    full = f"{module}.{name}"
    if full in MAKERS:
        return MAKERS[full]
    is_class = name.lstrip("_")[:1].isupper() and "." not in name
    if full in INERT_NAMES or (module.split(".")[0] in INERT_PACKAGES and is_class):
        return Inert(full)
    raise Refused(full)


class Refused(Exception):
    """The pickle names something that is neither a tensor, nor a container, nor known to be harmless."""


def _is_key(key: Any) -> bool:
    """Whether hashing it is quick and safe (deeply nested tuples are neither)."""
    return key is None or isinstance(key, str | int | float | bytes | Inert)


class Reader:
    """Bytes of a mapped file from `here` to `stop`, as an unpickler reads them."""

    LONGEST_LINE = 1 << 16

    def __init__(self, file: MappedFile, here: int, stop: int) -> None:
        self.file, self.here, self.stop = file, here, stop

    def read(self, count: int) -> bytes:
        start = self.here
        self.here = min(start + count, self.stop)
        return self.file.bytes[start : self.here]

    def readline(self) -> bytes:
        end = self.file.bytes.find(b"\n", self.here, min(self.here + self.LONGEST_LINE, self.stop))
        if end < 0:
            raise ValueError("a line in it does not end")
        return self.read(end + 1 - self.here)


PythonUnpickler: Any = pickle._Unpickler

HARMLESS_CODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT),
    *(pickle.STRING, pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE),
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE8, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.EMPTY_DICT, pickle.LIST, pickle.TUPLE, pickle.TUPLE1),
    *(pickle.TUPLE2, pickle.TUPLE3, pickle.APPEND, pickle.APPENDS),
    *(pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
    # These come to `find_class`, `persistent_load` and `_instantiate` below.
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID, pickle.INST, pickle.OBJ),
)
"""The instructions that are carried out as Python does it."""


class SafeUnpickler(PythonUnpickler):
    """Python's own unpickler in Python, without the instructions that no tensor file needs.

    The one in C reserves memory for any number that the file names, and looks up extensions before names.
    """

    def __init__(self, reader: Reader, persistent_load: Callable[[Any], Any]) -> None:
        super().__init__(reader, encoding="utf-8", errors="replace")
        self._persistent_load = persistent_load

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent_load(pid)

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        return find(module, name)

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(call(klass, tuple(args)))

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = call(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_reduce()

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        if _is_key(key):
            self.stack[-1][key] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            if _is_key(key):
                self.stack[-1][key] = value

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_dict(zip(items[::2], items[1::2], strict=True)))

    dispatch = {code[0]: PythonUnpickler.dispatch[code[0]] for code in HARMLESS_CODES} | {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
    }
