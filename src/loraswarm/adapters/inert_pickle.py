"""What a pickle by torch.save says, found without running anything it asks for.

A machine of the few instructions that state dicts of tensors are written with; results are plain
data of this module. Knows neither files nor torch. Called by adapters/state_dict_pickle.
Source    CPython's Lib/pickletools.py, which documents each instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from loraswarm.adapters.printable import quoted
from loraswarm.errors import AdapterError

# A tensor takes about 40.
MAX_INSTRUCTIONS = 250_000
PROTOCOL = 2
STORAGE_DTYPES = {
    "BFloat16Storage": "BF16",
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "ShortStorage": "I16",
}
_ORDERED_DICT = ("collections", "OrderedDict")
_REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = ("torch._utils", "_rebuild_parameter")
_GLOBALS = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER} | {
    ("torch", name) for name in STORAGE_DTYPES
}


class Global(NamedTuple):
    """The name of a Python object; never looked up."""

    module: str
    name: str


class Storage(NamedTuple):
    """Elements in a member of the file, `data/<key>`."""

    dtype: str
    key: str
    num_elements: int


class PickledTensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Malformed(Exception):
    """What is wrong; `read_state_dict_pickle` adds where."""


def read_state_dict_pickle(data: bytes, label: str) -> dict[str, PickledTensor]:
    """The tensors by name.

    Raises    AdapterError for anything but a dict of names to tensors: calls of other functions,
              other instructions, nested dicts, pickles that are cut short or too large.
    Cost      at most MAX_INSTRUCTIONS steps; memory in proportion.
    """
    machine = _Machine(data)
    try:
        result = machine.run()
    except _Malformed as error:
        reason = str(error)
    except (IndexError, KeyError, ValueError, struct.error):
        reason = "is malformed or cut short"
    else:
        return _tensors(result, label)
    raise AdapterError(f"{label} {reason} (byte {machine.position} of its pickle)")


def _tensors(result: Any, label: str) -> dict[str, PickledTensor]:
    if type(result) is not dict:
        raise AdapterError(f"{label} holds no dict of tensors by name; save a state dict")
    for name, value in result.items():
        if type(value) is not PickledTensor:
            kind = "a nested dict" if type(value) is dict else f"a {type(value).__name__}"
            raise AdapterError(
                f"{label}: {quoted(name)} is {kind}, not a tensor; save a flat state dict"
            )
    return result


class _Machine:
    """A stack, the marks in it, and the memo. `position` is the next byte."""

    def __init__(self, data: bytes) -> None:
        self.position = 0
        self._data = data
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Everything up to STOP, which must be the last byte."""
        for _ in range(MAX_INSTRUCTIONS):
            code = self._take(1)
            if code == b".":
                if self.position != len(self._data) or len(self._stack) != 1 or self._marked:
                    raise _Malformed("does not end where its pickle ends")
                return self._stack[0]
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise _Malformed(
                    f"has the pickle instruction {code!r}, which no state dict of tensors needs"
                )
            instruction(self)
        raise _Malformed(f"has more than {MAX_INSTRUCTIONS} pickle instructions")

    def _take(self, num_bytes: int) -> bytes:
        part = self._data[self.position : self.position + num_bytes]
        if len(part) != num_bytes:
            raise _Malformed("is cut short")
        self.position += num_bytes
        return part

    def _number(self, layout: str) -> int:
        (number,) = struct.unpack(layout, self._take(struct.calcsize(layout)))
        return int(number)

    def _line(self) -> str:
        end = self._data.index(b"\n", self.position, self.position + 256)
        line = self._take(end - self.position)
        self.position += 1
        return line.decode("utf-8")

    def protocol(self) -> None:
        if self._number("<B") != PROTOCOL:
            raise _Malformed(f"is not of pickle protocol {PROTOCOL}, torch.save's own")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def push_text(self) -> None:
        self.push(self._take(self._number("<I")).decode("utf-8"))

    def push_number(self, layout: str) -> None:
        self.push(self._number(layout))

    def push_long(self) -> None:
        num_bytes = self._number("<B")
        if num_bytes > 8:
            raise _Malformed("has a number of more than 64 bits")
        self.push(int.from_bytes(self._take(num_bytes), "little", signed=True))

    def push_global(self) -> None:
        found = Global(self._line(), self._line())
        if found not in _GLOBALS:
            raise _Malformed(
                f"asks for {'.'.join(found)[:100]!r}, which no state dict of tensors needs; only"
                " plain tensors in one dict are read"
            )
        self.push(found)

    def mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._marked.pop()
        return items

    def make_tuple(self, size: int | None = None) -> None:
        if size is None:
            items = self._since_mark()
        else:
            items = [self._stack.pop() for _ in range(size)][::-1]
        self.push(tuple(items))

    def put(self, layout: str) -> None:
        self._memo[self._number(layout)] = self._stack[-1]

    def get(self, layout: str) -> None:
        self.push(self._memo[self._number(layout)])

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set(key, value)

    def set_items(self) -> None:
        items = self._since_mark()
        if len(items) % 2:
            raise _Malformed("has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        target = self._stack[-1]
        if type(target) is not dict or type(key) is not str:
            raise _Malformed("has a dict whose keys are not names")
        if key in target:
            raise _Malformed(f"names {quoted(key)} twice")
        target[key] = value

    def load_storage(self) -> None:
        """The 5 things that torch.save says about a storage; where it once was is not needed."""
        match self._stack.pop():
            case ("storage", Global("torch", kind), str(key), str(), int(num_elements)):
                self.push(Storage(STORAGE_DTYPES[kind], key, num_elements))
            case _:
                raise _Malformed("refers to something that is not a storage of torch.save")

    def reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not Global or type(arguments) is not tuple:
            raise _Malformed("calls something that is not a function")
        self.push(_call(function, arguments))

    def build(self) -> None:
        """Attributes of a state dict (`_metadata`, versions of its modules) mean nothing here."""
        state = self._stack.pop()
        if type(state) is not dict or type(self._stack[-1]) is not dict:
            raise _Malformed("sets the attributes of something that is not a dict")


def _call(function: Global, arguments: tuple[Any, ...]) -> Any:
    if function == _ORDERED_DICT and not arguments:
        return {}
    if function == _REBUILD_PARAMETER:
        match arguments:
            case (PickledTensor() as tensor, bool(), {**hooks}) if not hooks:
                return tensor
    if function == _REBUILD_TENSOR:
        match arguments:
            case (
                Storage() as storage,
                int(offset),
                tuple(shape),
                tuple(strides),
                bool(),
                {**hooks},
            ) if not hooks and all(type(number) is int for number in (*shape, *strides)):
                return PickledTensor(storage, offset, shape, strides)
    raise _Malformed(f"calls {function.module}.{function.name} as torch.save does not")


_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"c": _Machine.push_global,
    b"X": _Machine.push_text,
    b"J": lambda machine: machine.push_number("<i"),
    b"K": lambda machine: machine.push_number("<B"),
    b"M": lambda machine: machine.push_number("<H"),
    b"\x8a": _Machine.push_long,
    b"N": lambda machine: machine.push(None),
    b"\x88": lambda machine: machine.push(True),
    b"\x89": lambda machine: machine.push(False),
    b"}": lambda machine: machine.push({}),
    b")": lambda machine: machine.push(()),
    b"(": _Machine.mark,
    b"t": _Machine.make_tuple,
    b"\x85": lambda machine: machine.make_tuple(1),
    b"\x86": lambda machine: machine.make_tuple(2),
    b"\x87": lambda machine: machine.make_tuple(3),
    b"q": lambda machine: machine.put("<B"),
    b"r": lambda machine: machine.put("<I"),
    b"h": lambda machine: machine.get("<B"),
    b"j": lambda machine: machine.get("<I"),
    b"s": _Machine.set_item,
    b"u": _Machine.set_items,
    b"Q": _Machine.load_storage,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}
