"""What a pickle of torch.save says, read without unpickling it: an interpreter whose every result is inert.

It knows the operations and the names that `torch.load(weights_only=True)` knows (torch/_weights_only_unpickler.py, torch
2.15) and calls nothing: a name stays a name, a tensor becomes a description of where its numbers lie.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploykit.intake.refused import Refused

# Bytes of one element, by torch's name of the type.
SIZES: Mapping[str, int] = {
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 1),
    "complex128": 16,
}
_STORAGES = {
    **{"FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8"},
    **{"BoolStorage": "bool", "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128"},
}
_UNTYPED = "torch.storage.UntypedStorage"
_PARAMETER, _TENSOR, _ORDERED = "torch.nn.parameter.Parameter", "torch.Tensor", "collections.OrderedDict"
# Names that torch allows and that make nothing a network could take: they may stand in a checkpoint and are not looked into.
_INERT = frozenset(
    {
        *("torch.device", "torch.serialization._get_layout", "builtins.bytearray", "builtins.set", "builtins.complex"),
        *("_codecs.encode", "torch.per_tensor_affine", "torch.per_tensor_symmetric", "torch.per_channel_affine"),
        *("torch.per_channel_symmetric", "torch.per_channel_affine_float_qparams", "torch._utils._rebuild_qtensor"),
        *("torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_meta_tensor_no_storage"),
        *("torch._utils._rebuild_wrapper_subclass", "torch._utils._rebuild_device_tensor_from_numpy"),
        "torch._utils._rebuild_device_tensor_from_cpu_tensor",
        *(f"torch.{kind}Storage" for kind in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")),
        *(f"torch.{name}" for name in ("complex32", "quint8", "qint8", "qint32", "quint4x2", "quint2x4")),
    }
)
_PYTHON_2 = {"__builtin__": "builtins"}
_LONGEST_NAME = 256
_STOP = ord(".")
_MOST_DIMENSIONS = 32


@dataclass(frozen=True)
class Name:
    """A global of Python, as text."""

    text: str


@dataclass(frozen=True)
class Other:
    """A value that is no number, text, container or plain tensor: only what it is called is known."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Numbers in the file: `key` says where, `count` elements of `dtype`, of which this is `length` from `offset` on."""

    dtype: str
    key: str
    count: int
    offset: int
    length: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage, in elements of its own type."""

    storage: Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Names(dict[Any, Any]):
    """An OrderedDict, with the attributes that were put on it: torch keeps module versions in `_metadata`."""

    def __init__(self, content: Any = ()) -> None:
        super().__init__()
        for key, value in content.items() if isinstance(content, dict) else content:
            self[_key(key)] = value
        self.attributes: dict[str, Any] = {}


def read(content: bytes | memoryview, start: int = 0, storages: dict[str, Storage] | None = None) -> tuple[Any, int]:
    """The value of the pickle that begins at `start`, and where it ends; `storages` gets all that it names, by key.

    Raises Refused for a name that torch does not allow, and for what is damaged or not a pickle of torch.save.
    """
    machine = _Machine(content, start, {} if storages is None else storages)
    try:
        return machine.run(), machine.position
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError, struct.error, RecursionError) as error:
        raise Refused("it is damaged, or a pickle that torch.save did not write") from error


@dataclass
class _Machine:
    """The stack machine of PEP 307, for the operations of protocol 2 that torch.save uses."""

    content: bytes | memoryview
    position: int
    storages: dict[str, Storage]
    stack: list[Any] = field(default_factory=list)
    marked: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self) -> Any:
        while True:
            code = self.content[self.position]
            self.position += 1
            if code == _STOP:
                return self.stack.pop()
            _OPERATIONS[code](self)

    def take(self, count: int) -> bytes:
        piece = bytes(self.content[self.position : self.position + count])
        if len(piece) != count:
            raise ValueError("the pickle ends in the middle")
        self.position += count
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = bytes(self.content[self.position : self.position + _LONGEST_NAME]).index(b"\n")
        return self.take(end + 1)[:-1].decode()

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items


def _mark(machine: _Machine) -> None:
    machine.marked.append(machine.stack)
    machine.stack = []


def _tuple_to_mark(machine: _Machine) -> None:
    items = machine.to_mark()  # first, because it changes which stack the machine has
    machine.stack.append(tuple(items))


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def make(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise IndexError("the stack is too short")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return make


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(make(machine))


def _remember(form: str) -> Callable[[_Machine], None]:
    def put(machine: _Machine) -> None:
        machine.memo[machine.number(form)] = machine.stack[-1]

    return put


def _append(machine: _Machine) -> None:
    item = machine.stack.pop()
    _list(machine.stack[-1]).append(item)


def _extend(machine: _Machine) -> None:
    items = machine.to_mark()
    _list(machine.stack[-1]).extend(items)


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    _mapping(machine.stack[-1])[_key(key)] = value


def _set_items(machine: _Machine) -> None:
    items = machine.to_mark()
    target = _mapping(machine.stack[-1])
    for index in range(0, len(items), 2):
        target[_key(items[index])] = items[index + 1]


def _key(value: Any) -> Any:
    """A key that is a number or text. Any other is of no use here, and hashing what is nested deeply ends a process."""
    return value if isinstance(value, (str, int, float, type(None))) else Other(type(value).__name__)


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError("only a list is appended to")
    return value


def _mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError("only a dict takes items")
    return value


def _short_text(machine: _Machine) -> str:
    return machine.take(machine.number("B")).decode()


def _text(machine: _Machine) -> str:
    return machine.take(machine.number("<I")).decode("utf-8", "surrogatepass")


def _long(machine: _Machine) -> int:
    return int.from_bytes(machine.take(machine.number("B")), "little", signed=True)


def _global(machine: _Machine) -> Name:
    module, name = machine.line(), machine.line()
    text = f"{_PYTHON_2.get(module, module)}.{name}"
    if text not in _CALLS and text not in _INERT and _type_of(text) is None and _storage_of(text) is None:
        raise Refused(
            "it holds Python objects besides weights, and unpickling those can run any code",
            told="refused to load {}: it wants " + text.removeprefix("builtins."),
            fix="save the weights alone, where you trust the file: torch.save(model.state_dict(), FILE)",
        )
    return Name(text)


def _type_of(text: str) -> str | None:
    """torch.float32 and the like, as torch calls it."""
    name = text.removeprefix("torch.")
    return name if text.startswith("torch.") and name in SIZES else None


def _storage_of(text: str) -> str | None:
    """The type of a storage's elements; bytes for one without a type."""
    if text == _UNTYPED:
        return "uint8"
    module, _, name = text.rpartition(".")
    return _STORAGES.get(name) if module in ("torch", "torch.cuda") else None


def _persistent(machine: _Machine) -> None:
    """A storage: ("storage", type, key, location, elements), and from before torch 1.6 the part of it that is meant."""
    kind, storage_type, key, _, count, *view = machine.stack.pop()
    dtype = _storage_of(_named(storage_type))
    if kind == "storage" and storage_type.text in _INERT:
        machine.stack.append(Other(storage_type.text))
        return
    if kind != "storage" or dtype is None or len(view) > 1:
        raise ValueError("only storages lie outside a pickle")
    offset, length = (view[0][1], view[0][2]) if view and view[0] is not None else (0, count)
    if min(_whole(count), _whole(offset), _whole(length)) < 0 or offset + length > count:
        raise ValueError("a storage has a part that it has not")
    storage = Storage(dtype, str(key), count, offset, length)
    machine.storages[storage.key] = storage
    machine.stack.append(storage)


def _new(machine: _Machine) -> None:
    arguments, name = machine.stack.pop(), _named(machine.stack.pop())
    machine.stack.append(_call(name, arguments))


def _reduce(machine: _Machine) -> None:
    arguments, name = machine.stack.pop(), _named(machine.stack.pop())
    machine.stack.append(_call(name, arguments))


def _call(name: str, arguments: Any) -> Any:
    """What stands for the result of a call; nothing is called but functions of this module."""
    if type(arguments) is not tuple:
        raise TypeError("arguments are a tuple")
    made = _CALLS.get(name)
    return Other(name) if made is None else made(*arguments)


def _build(machine: _Machine) -> None:
    state, value = machine.stack.pop(), machine.stack[-1]
    if isinstance(value, Names):
        value.attributes.update(_mapping(state))
    elif not isinstance(value, (Other, Tensor)):
        raise TypeError("only an object has a state")


def _named(value: Any) -> str:
    if not isinstance(value, Name):
        raise TypeError("only a name is called")
    return value.text


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError("not a whole number")
    return value


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor | Other:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2: (storage, offset, size, stride, gradient, hooks, bits)."""
    return _tensor(storage, storage.dtype, offset, size, stride, rest[2:])


def _rebuild_typed(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor | Other:
    """torch._utils._rebuild_tensor_v3, for types that have no storage type of their own."""
    dtype = _type_of(_named(rest[2]))
    return (
        Other("torch.Tensor of " + _named(rest[2])) if dtype is None else _tensor(storage, dtype, offset, size, stride, rest[3:])
    )


def _tensor(storage: Any, dtype: str, offset: Any, size: Any, stride: Any, bits: Sequence[Any]) -> Tensor | Other:
    """A tensor that lies within its storage; `bits` says whether it is to be conjugated or negated when it is read."""
    if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
        raise ValueError("not a tensor")
    numbers = [_whole(number) for number in (offset, *size, *stride)]
    if min(numbers) < 0:
        raise ValueError("a tensor has a negative size")
    if any(bits):
        return Other("torch.Tensor that is stored conjugated or negated")
    held = storage.length * SIZES[storage.dtype] // SIZES[dtype]
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= held:
        raise Refused(
            f"a tensor of {'x'.join(map(str, size)) or 'one number'} reaches beyond its storage of {held} elements",
            told="{} is damaged",
        )
    return Tensor(storage, dtype, offset, tuple(size), tuple(stride))


def _rebuild_of_type(call: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor that had attributes, or is of a class of its own."""
    made = _call(_named(call), arguments)
    return made if _named(kind) in (_TENSOR, _PARAMETER) else Other(_named(kind))


def _first(value: Any, *_: Any) -> Any:
    return value


_CALLS: Mapping[str, Callable[..., Any]] = {
    _ORDERED: Names,
    "collections.Counter": Names,
    "torch.Size": lambda sizes: tuple(sizes),
    _TENSOR: lambda *_: Other(_TENSOR),
    _PARAMETER: _first,
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _rebuild_of_type,
}


def _skip_protocol(machine: _Machine) -> None:
    # torch.load warns for another protocol than 2 and goes on; operations that came later are refused where they stand.
    machine.take(1)


_OPERATIONS: Mapping[int, Callable[[_Machine], None]] = {
    ord("\x80"): _skip_protocol,
    ord("c"): _push(_global),
    ord("\x81"): _new,
    ord("R"): _reduce,
    ord("b"): _build,
    ord("Q"): _persistent,
    ord("("): _mark,
    ord("t"): _tuple_to_mark,
    **{code: _tuple_of(count) for count, code in enumerate(b"\x85\x86\x87", start=1)},
    ord(")"): _push(lambda _: ()),
    ord("]"): _push(lambda _: []),
    ord("}"): _push(lambda _: {}),
    ord("\x8f"): _push(lambda _: Other("builtins.set")),
    ord("a"): _append,
    ord("e"): _extend,
    ord("s"): _set_item,
    ord("u"): _set_items,
    ord("N"): _push(lambda _: None),
    ord("\x88"): _push(lambda _: True),
    ord("\x89"): _push(lambda _: False),
    ord("J"): _push(lambda machine: machine.number("<i")),
    ord("K"): _push(lambda machine: machine.number("B")),
    ord("M"): _push(lambda machine: machine.number("<H")),
    ord("G"): _push(lambda machine: machine.number(">d")),
    ord("\x8a"): _push(_long),
    ord("X"): _push(_text),
    ord("U"): _push(_short_text),
    ord("h"): _push(lambda machine: machine.memo[machine.number("B")]),
    ord("j"): _push(lambda machine: machine.memo[machine.number("<I")]),
    ord("q"): _remember("B"),
    ord("r"): _remember("<I"),
}
