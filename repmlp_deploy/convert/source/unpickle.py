"""Read the structure of a PyTorch pickle without importing or running anything that it names.

This file runs as a script in a child process with limits on time and memory. It needs the standard library alone:

    python -I unpickle.py FILE SECONDS BYTES

The limits follow FILE: seconds of CPU time, and bytes of memory. It prints one JSON object: the tree of dictionaries,
lists and plain values in the file, and for every tensor the place of its numbers in the file. A class that is neither a
tensor nor a plain container becomes an inert placeholder: its state is kept, its code is never looked up. A pickled
module therefore gives its tensors by their places in it.

A pickle can be small and still describe something endless: nested repetitions double at every level. The values are
therefore counted before the tree is written, each shared one once, and refused beyond `_MOST_NODES`.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
from functools import partial
from typing import Any, BinaryIO

__all__ = ["Refused", "main", "read_structure"]

_MOST_NODES = 500_000
_MOST_DEPTH = 100
_LONGEST_TEXT = 4096
_LARGEST_PICKLE_BYTES = 64 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LONGEST_NUMBER_BITS = 63
_MOST_NAMES = 20
_ORDINARY = ("builtins", "__builtin__", "_codecs", "collections", "copyreg", "copy_reg", "numpy", "torch")
"""Packages whose classes every checkpoint may hold: no reader needs to be told."""

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
_ITEM_BYTES = {"complex128": 16, "complex64": 8, "float64": 8, "int64": 8, "float32": 4, "int32": 4}
_ITEM_BYTES |= {"float16": 2, "bfloat16": 2, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
_PLAIN = {"set": set, "frozenset": frozenset, "list": list, "dict": dict, "tuple": tuple, "bytearray": bytearray}


class Refused(Exception):  # noqa: N818 - reads as what it says
    """The file is damaged, or describes more than a checkpoint holds."""


class Placeholder:
    """Stand for an object of a class that is not loaded; remember its state.

    Attributes:
        name: of the class, `package.module.Class`.
        items: what was set by key.
        values: what was appended.
        state: what its `__setstate__` would have got.
    """

    name = ""

    def __new__(cls, *args: Any, **_keywords: Any) -> Any:
        if args and cls.name == "torch._dynamo.eval_frame.OptimizedModule":  # of torch.compile: the network inside
            return args[0]
        made = super().__new__(cls)
        made.items, made.values, made.state = {}, [], None
        return made

    def __init__(self, *_args: Any, **_keywords: Any) -> None:
        self.items: dict[Any, Any]
        self.values: list[Any]
        self.state: Any

    def __call__(self, *_args: Any, **_keywords: Any) -> Placeholder:
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.values.append(value)

    def extend(self, values: Any) -> None:
        self.values.extend(values)

    add = append


class _Dictionary(dict[Any, Any]):
    """An ordered dictionary; the attributes that state dicts carry are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class TensorPlace:
    """Where the numbers of a tensor are: a storage by its key, the way through it, and whether their sign is turned."""

    def __init__(  # noqa: PLR0913 - torch's own arguments
        self, storage: Any, offset: Any, shape: Any, stride: Any, dtype: str = "", marks: Any = None
    ) -> None:
        if not isinstance(storage, tuple):
            raise Refused("a tensor without a storage")
        kind, self.key, self.elements = storage
        self.dtype = dtype or kind
        self.stored_dtype = kind
        self.offset, self.shape, self.stride = offset, shape, stride
        self.negative = isinstance(marks, dict) and marks.get("neg") is True

    def __setstate__(self, state: Any) -> None:
        pass


class OddTensor:
    """A tensor that cannot be weights: sparse, quantized or without numbers."""

    def __init__(self, kind: str, *_arguments: Any) -> None:
        self.kind = kind

    def __setstate__(self, state: Any) -> None:
        pass


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any = None, _hooks: Any = None, marks: Any = None
) -> TensorPlace:
    return TensorPlace(storage, offset, shape, stride, marks=marks)


def _tensor_v3(  # noqa: PLR0913 - torch's own arguments
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, marks: Any = None
) -> TensorPlace:
    return TensorPlace(storage, offset, shape, stride, dtype.name.removeprefix("torch."), marks)


def _parameter(data: Any, *_rest: Any) -> Any:
    return data


def _of_subclass(rebuild: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    return rebuild(*arguments)


def _size(*parts: Any) -> Any:
    return tuple(parts[0]) if parts else ()


_KNOWN: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_subclass,
    ("torch._utils", "_rebuild_sparse_tensor"): partial(OddTensor, "sparse"),
    ("torch._utils", "_rebuild_qtensor"): partial(OddTensor, "quantized"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): partial(OddTensor, "without numbers"),
    ("torch", "Size"): _size,
    ("collections", "OrderedDict"): _Dictionary,
}


class Reader(pickle.Unpickler):
    """An unpickler that looks no class up.

    Attributes:
        replaced: (module, name) of every class that is not loaded, and its placeholder.
        kinds: key of every storage to the type of its numbers.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self.replaced: dict[tuple[str, str], type[Placeholder]] = {}
        self.kinds: dict[str, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for `module.name` here: a container, a tensor's place or a placeholder."""
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if module in {"builtins", "__builtin__"} and name in _PLAIN:
            return _PLAIN[name]
        if module in {"torch", "torch.storage", "torch.cuda"} and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) not in self.replaced:
            self.replaced[module, name] = type("Placeholder", (Placeholder,), {"name": f"{module}.{name}"})
        return self.replaced[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Return (type, key, elements) of a storage, or a class that was saved with its source text."""
        if isinstance(pid, tuple) and pid[:1] == ("module",) and len(pid) > 1:
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":  # noqa: PLR2004 - torch's own tuple
            raise Refused("it refers to data outside the file")
        _, kind, key, _location, elements, *view = pid
        kind = kind if isinstance(kind, str) else "unknown"  # of quantized numbers, which are no weights
        if view and view[0] is not None:
            raise Refused("a storage is a view of another one: save the file again with a newer PyTorch")
        self.kinds[str(key)] = kind
        return kind, str(key), int(elements)


def read_structure(path: str) -> dict[str, Any]:
    """Return the tree, the storages' places and the names of the replaced classes of a checkpoint.

    Raises:
        Refused: it is none, is damaged, or describes more than a checkpoint holds.
    """
    with open(path, "rb") as file:  # noqa: PTH123 - imports what it needs and no more
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        return _read_archive(path) if zipped else _read_legacy(file)


def _read_archive(path: str) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused("the archive does not hold the one data.pkl that torch.save writes")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in names:
            raise Refused("it is a TorchScript program: save the state dict of the trained network instead")
        order = f"{root}byteorder"
        if order in names and archive.getinfo(order).file_size <= len("little") and archive.read(order) != b"little":
            raise Refused("its numbers are big-endian: save it again on a little-endian machine")
        if archive.getinfo(pickles[0]).file_size > _LARGEST_PICKLE_BYTES:
            raise Refused(f"its pickle is larger than {_LARGEST_PICKLE_BYTES >> 20} MB")
        reader = Reader(io.BytesIO(archive.read(pickles[0])))
        tree = reader.load()
    return _described(tree, reader) | {"root": f"{root}data/"}


def _read_legacy(file: BinaryIO) -> dict[str, Any]:
    """Read the format of PyTorch before 1.6: pickles one after the other, then the storages."""
    if Reader(file).load() != _LEGACY_MAGIC or Reader(file).load() != _LEGACY_PROTOCOL:
        raise Refused("it does not begin as the files of torch.save do")
    about = Reader(file).load()
    if isinstance(about, dict) and about.get("little_endian") is False:
        raise Refused("its numbers are big-endian: save it again on a little-endian machine")
    reader = Reader(file)
    tree = reader.load()
    keys = Reader(file).load()
    position, end = file.tell(), file.seek(0, io.SEEK_END)
    places: dict[str, list[int]] = {}
    for key in keys:
        file.seek(position)
        (elements,) = struct.unpack("<q", file.read(8))
        size = elements * _ITEM_BYTES[reader.kinds.get(str(key), "uint8")]
        position += 8 + size
        if elements < 0 or position > end:
            raise Refused("it ends before its last tensor")
        places[str(key)] = [position - size, size]
    return _described(tree, reader) | {"places": places}


def _described(tree: Any, reader: Reader) -> dict[str, Any]:
    named = {".".join(name)[:_LONGEST_TEXT] for name in reader.replaced if name[0].partition(".")[0] not in _ORDINARY}
    _check_size(tree)
    return {"tree": _Description().of(tree), "replaced": sorted(named)[:_MOST_NAMES]}


def _check_size(tree: Any) -> None:
    """Count the values of the tree and the levels of them, without visiting a shared one twice.

    Raises:
        Refused: there are more than a checkpoint has.
    """
    known: dict[int, tuple[int, int]] = {}  # a value's id to how many values and levels are in it

    def measure(value: Any, depth: int) -> tuple[int, int]:
        if id(value) not in known:
            children = _children(value) if depth <= _MOST_DEPTH else []
            inside = [measure(child, depth + 1) for child in children[: _MOST_NODES + 1]]
            known[id(value)] = 1 + sum(n for n, _ in inside), 1 + max((levels for _, levels in inside), default=0)
        if known[id(value)][0] > _MOST_NODES:
            raise Refused(f"it describes more than {_MOST_NODES} values")
        if depth + known[id(value)][1] > _MOST_DEPTH + 1:
            raise Refused(f"it is nested deeper than {_MOST_DEPTH} levels")
        return known[id(value)]

    measure(tree, 0)


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    return [*value.items.values(), *value.values, value.state] if isinstance(value, Placeholder) else []


class _Description:
    """Turn the tree into what JSON can hold."""

    def of(self, value: Any) -> Any:
        """Return a value as JSON holds it."""
        if value is None or isinstance(value, bool | int | float | str):
            return self._scalar(value)
        if isinstance(value, dict):
            return {"dict": self._items(value)}
        if isinstance(value, list | tuple | set | frozenset):
            return {"list": [self.of(item) for item in value]}
        if isinstance(value, Placeholder):
            return self._placeholder(value)
        if isinstance(value, TensorPlace):
            return {"tensor": self._tensor(value)}
        return {"odd": value.kind} if isinstance(value, OddTensor) else {"other": type(value).__name__}

    @staticmethod
    def _scalar(value: int | float | str | None) -> Any:  # noqa: PYI041 - mypy tells int from float here
        if isinstance(value, str):
            return value[:_LONGEST_TEXT]
        if isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER_BITS:
            return {"other": "a very large integer"}
        return value

    def _placeholder(self, value: Placeholder) -> dict[str, Any]:
        return {
            "class": value.name[:_LONGEST_TEXT],
            "dict": self._items(value.items),
            "list": [self.of(item) for item in value.values],
            "state": self.of(value.state),
        }

    def _items(self, items: dict[Any, Any]) -> list[list[Any]]:
        return [[self._key(key), self.of(value)] for key, value in items.items()]

    @staticmethod
    def _key(key: Any) -> Any:
        if isinstance(key, str):
            return key[:_LONGEST_TEXT]
        fits = isinstance(key, int) and key.bit_length() <= _LONGEST_NUMBER_BITS
        return key if fits else f"<{type(key).__name__}>"

    @staticmethod
    def _tensor(place: TensorPlace) -> dict[str, Any]:
        shape, stride = tuple(place.shape), tuple(place.stride)
        numbers = (place.offset, place.elements, *shape, *stride)
        if not all(isinstance(n, int) and 0 <= n < 2**_LONGEST_NUMBER_BITS for n in numbers):
            raise Refused("a tensor has a size that is not a number of elements")
        return {
            "dtype": place.dtype,
            "stored": place.stored_dtype,
            "storage": place.key,
            "elements": place.elements,
            "offset": place.offset,
            "shape": shape,
            "stride": stride,
            "negative": place.negative,
        }


def _limit(seconds: int, memory_bytes: int) -> None:
    """Let the system end this process when it needs more."""
    try:
        import resource  # noqa: PLC0415 - absent on Windows
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(arguments: list[str]) -> int:
    """Print the structure of a file as JSON, or an object with the key `refused`."""
    path, seconds, memory_bytes = arguments
    _limit(int(seconds), int(memory_bytes))
    try:
        result = read_structure(path)
    except Refused as refused:
        result = {"refused": str(refused)}
    except MemoryError:
        result = {"refused": "reading it takes more memory than a checkpoint needs"}
    except Exception as error:  # noqa: BLE001 - a damaged pickle makes the reader raise anything
        result = {"refused": f"its pickle cannot be read ({type(error).__name__})"}
    json.dump(result, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
