"""Shared libraries of kernels, as machine code: which operators they register, and what code each of these reaches.

ExecuTorch's libraries are stripped. What is left tells enough: the table that registers the kernels names each
operator's function, the unwind tables bound all functions, and the machine code says which function calls, jumps to, or
takes the address of which.
"""

import struct
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_PROGBITS, _ALLOC = 1, 2
X86, ARM = 62, 183  # e_machine
_PLT_HEAD = {X86: 16, ARM: 32}  # bytes before the first entry

Ints = NDArray[np.int64]


class Section(NamedTuple):
    """A section of an ELF file: its address when loaded, where it lies in the file, its bytes, type and flags."""

    address: int
    offset: int
    size: int
    type: int
    flags: int

    def holds(self, address: int) -> bool:
        return self.address <= address < self.address + self.size


class Library:
    """A shared library of x86-64 or AArch64, as it lies in a file. Raises ValueError where it is of another kind."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        (self.machine,) = struct.unpack_from("<H", self.data, 18) if self.data[:5] == b"\x7fELF\x02" else (0,)
        if self.machine not in _PLT_HEAD:
            raise ValueError(f"{path.name} is no library for x86-64 or AArch64")
        (table,) = struct.unpack_from("<Q", self.data, 40)
        count, names = struct.unpack_from("<HH", self.data, 60)
        heads = [struct.unpack_from("<IIQQQQ", self.data, table + 64 * i) for i in range(count)]
        text = self.data[heads[names][4] :]
        self.sections = {
            text[name : text.index(b"\0", name)].decode(): Section(address, offset, size, kind, flags)
            for name, kind, flags, address, offset, size in heads
        }

    def loaded(self) -> int:
        """Bytes of code and data that a program linked with all of it would hold: no tables for the dynamic linker."""
        return sum(s.size for s in self.sections.values() if s.type == _PROGBITS and s.flags & _ALLOC)

    def kernels(self) -> dict[str, int]:
        """The address of each operator's kernel, out of the table (name, key, function) that registers them."""
        words, names, text = self._words, self.sections[".rodata"], self.sections[".text"]
        found = {}
        for at, name in words.items():
            function = words.get(at + 16, 0)
            if self.sections[".data"].holds(at) and names.holds(name) and text.holds(function):
                start = name - names.address + names.offset
                found[self.data[start : self.data.index(b"\0", start)].decode("ascii", "replace")] = function
        return found

    def reach(self, roots: Iterable[int]) -> int:
        """Bytes of the functions that can be reached from the addresses `roots`, themselves included."""
        starts, sizes = self._functions
        sources, targets = self._references()
        order = np.argsort(sources, kind="stable")
        targets, bounds = targets[order], np.searchsorted(sources[order], np.arange(len(starts) + 1))
        seen: set[int] = set()
        open_ends = set(self._find(np.fromiter(roots, np.int64)).tolist()) - {-1}
        while open_ends:
            function = open_ends.pop()
            seen.add(function)
            open_ends |= set(targets[bounds[function] : bounds[function + 1]].tolist()) - seen
        return int(sizes[sorted(seen)].sum())

    @cached_property
    def _functions(self) -> tuple[Ints, Ints]:
        """Address and size of each function, from .eh_frame_hdr's sorted table and the entries that it points to."""
        head = self.sections[".eh_frame_hdr"]
        (count,) = struct.unpack_from("<I", self.data, head.offset + 8)
        table = np.frombuffer(self.data, "<i4", 2 * count, head.offset + 12).reshape(-1, 2).astype(np.int64)
        # An entry: length, its CIE, start and size of the function, 4 bytes each. .eh_frame lies as far away from
        # its head in the file as in memory.
        entries = table[:, 1] + head.offset
        sizes = np.frombuffer(self.data, np.uint8)[entries[:, None] + np.arange(12, 16)].view("<u4")[:, 0]
        return table[:, 0] + head.address, sizes.astype(np.int64)

    @cached_property
    def _words(self) -> dict[int, int]:
        """What the dynamic linker writes into data: addresses in this library, 0 for those of another, by where."""
        return {at: value for name in (".rela.dyn", ".rela.plt") for at, value in self._relocations(name)}

    def _relocations(self, name: str) -> Iterator[tuple[int, int]]:
        for at, info, value in struct.iter_unpack("<QQq", self._bytes(self.sections[name])):
            if symbol := info >> 32:
                value += struct.unpack_from("<Q", self.data, self.sections[".dynsym"].offset + 24 * symbol + 8)[0]
            yield at, value

    def _references(self) -> tuple[Ints, Ints]:
        """Pairs of functions: who refers to whom."""
        starts, _ = self._functions
        text, plt = self.sections[".text"], self.sections[".plt"]
        at, to, jump = (_x86 if self.machine == X86 else _arm)(self._bytes(text), text.address)
        # An entry of the PLT, of 16 bytes, jumps to what the relocation of the same number says.
        entries = np.array([value for _, value in self._relocations(".rela.plt")], np.int64)
        number = (to - plt.address - _PLT_HEAD[self.machine]) // 16
        through = (number >= 0) & (number < len(entries))
        to[through] = entries[number[through]]
        slots, values = np.array(sorted(self._words.items()), np.int64).T
        place = np.minimum(np.searchsorted(slots, to), len(slots) - 1)
        to = np.where(slots[place] == to, values[place], to)
        source, target = self._find(at), self._find(to)
        # A function is entered at its start, but for jumps into the unlikely part that the compiler moved elsewhere.
        keep = (source >= 0) & (target >= 0) & (jump | (to == starts[target]))
        return source[keep], target[keep]

    def _find(self, addresses: Ints) -> Ints:
        """The functions that addresses lie in, -1 for none."""
        starts, sizes = self._functions
        index = np.searchsorted(starts, addresses, side="right") - 1
        return np.where((index >= 0) & (addresses < starts[index] + sizes[index]), index, -1)

    def _bytes(self, section: Section) -> bytes:
        return self.data[section.offset : section.offset + section.size]


def _x86(code: bytes, address: int) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """Where the code refers to other places, to which, and whether by a conditional jump.

    These are call, jmp, jcc, and what is addressed from rip. Instructions are not decoded: a few such bytes in the
    midst of another instruction, or of two, are taken for a reference as well.
    """
    raw = np.frombuffer(code, np.uint8)
    first, last = raw[:-5], raw[1:-4]
    jump = (first == 0x0F) & (last & 0xF0 == 0x80)
    loads = (last & 0xC7 == 0x05) & ((first == 0x8B) | (first == 0x8D) | (first == 0xFF))  # mov, lea, call and jmp
    at = np.flatnonzero(jump | loads | (last == 0xE8) | (last == 0xE9)) + 2
    offset = raw[at[:, None] + np.arange(4)].view("<i4")[:, 0].astype(np.int64)
    return at + address, at + 4 + offset + address, jump[at - 2]


def _arm(code: bytes, address: int) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """As `_x86`: b and bl, the conditional branches, and adrp with the add or ldr of its register soon after."""
    words = np.frombuffer(code, "<u4").astype(np.int64)
    pc = address + 4 * np.arange(len(words))

    def signed(value: Ints, bits: int) -> Ints:
        return value - ((value >> (bits - 1)) << bits)

    branch = words & 0x7C000000 == 0x14000000
    jump = (words & 0xFF000010 == 0x54000000) | (words & 0x7E000000 == 0x34000000)
    found = [
        (pc[branch], pc[branch] + 4 * signed(words[branch] & 0x3FFFFFF, 26)),
        (pc[jump], pc[jump] + 4 * signed(words[jump] >> 5 & 0x7FFFF, 19)),
    ]
    pages = np.flatnonzero(words & 0x9F000000 == 0x90000000)
    for gap in range(1, 33):  # the compiler puts other instructions between the two
        page = pages[pages + gap < len(words)]
        adrp, then = words[page], words[page + gap]
        load = then & 0xFFC00000 == 0xF9400000
        pair = ((then & 0xFFC00000 == 0x91000000) | load) & (adrp & 31 == then >> 5 & 31)
        base = (pc[page] & ~0xFFF) + (signed((adrp >> 5 & 0x7FFFF) << 2 | adrp >> 29 & 3, 21) << 12)
        found.append((pc[page][pair], (base + (then >> 10 & 0xFFF) * np.where(load, 8, 1))[pair]))
    at, to = np.concatenate([at for at, _ in found]), np.concatenate([to for _, to in found])
    return at, to, np.arange(len(at)) - int(branch.sum()) < int(jump.sum())
