"""What users call things, as identifiers, string literals and comments of C++, Kotlin and Swift. Trusts no name."""

import re
import unicodedata
from collections.abc import Iterable

LONGEST = 60  # characters of an identifier: file names are made from it

# What is no free name for a member in one of the languages: C++ with the lower-case macros of C, Kotlin, Swift.
_KEYWORDS = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t class compl
    concept const consteval constexpr constinit const_cast continue co_await co_return co_yield decltype default delete
    do double dynamic_cast else enum explicit export extern false float for friend goto if inline int long mutable
    namespace new noexcept not not_eq nullptr operator or or_eq private protected public register reinterpret_cast
    requires return short signed sizeof static static_assert static_cast struct switch template this thread_local throw
    true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor xor_eq
    errno stdin stdout stderr assert linux unix i386 major minor
    as fun in interface is null object package super typealias typeof val var when
    any associatedtype await defer deinit extension fallthrough fileprivate func guard import init inout internal let
    nil precedencegroup protocol repeat rethrows self some subscript throws type where
"""
RESERVED = frozenset(_KEYWORDS.split())


def words(name: str) -> list[str]:
    """The runs of ASCII letters and digits of a name; accents are dropped. May be empty."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.findall(r"[A-Za-z0-9]+", plain)


def snake(name: str, otherwise: str) -> str:
    """A name as "lower_case", no word of any of the languages; `otherwise` where nothing of the name is left."""
    made = "_".join(words(name)).lower()[:LONGEST].rstrip("_") or otherwise
    if made[0].isdigit():
        made = f"{otherwise}_{made}"
    return f"{made}_" if made in RESERVED else made


def camel(name: str) -> str:
    """A `snake` name as Kotlin and Swift write it."""
    first, *rest = name.rstrip("_").split("_")
    return first + "".join(word.capitalize() for word in rest) + ("_" if name.endswith("_") else "")


def pascal(name: str, otherwise: str) -> str:
    """A name as "UpperCase"."""
    made = "".join(word[0].upper() + word[1:] for word in words(name))[:LONGEST]
    return made if made and not made[0].isdigit() else f"{otherwise}{made}"


def unique(names: Iterable[str], otherwise: str) -> list[str]:
    """A different `snake` name for each, different as `camel` too."""
    made: list[str] = []
    seen: set[str] = set()
    for name in names:
        first = candidate = snake(name, otherwise)
        count = 2
        while candidate.replace("_", "") in seen:
            candidate, count = f"{first.rstrip('_')}_{count}", count + 1
        seen.add(candidate.replace("_", ""))
        made.append(candidate)
    return made


def cpp_string(text: str) -> str:
    """A C++ string literal of a text in UTF-8."""
    return f'"{"".join(_cpp_byte(byte) for byte in _utf8(text))}"'


def _cpp_byte(byte: int) -> str:
    # octal escapes end after three digits, where hexadecimal ones take what follows; ?? would begin a trigraph
    char = chr(byte)
    return f"\\{char}" if char in '"\\?' else char if 0x20 <= byte < 0x7F else f"\\{byte:03o}"


def kotlin_string(text: str) -> str:
    """A Kotlin string literal."""
    units = _utf8(text).decode().encode("utf-16-be")
    chars = [int.from_bytes(units[i : i + 2], "big") for i in range(0, len(units), 2)]
    return '"' + "".join(_plain(code, '"\\$') or f"\\u{code:04X}" for code in chars) + '"'


def swift_string(text: str) -> str:
    """A Swift string literal."""
    return '"' + "".join(_plain(ord(char), '"\\') or f"\\u{{{ord(char):X}}}" for char in _utf8(text).decode()) + '"'


def comment(text: str) -> str:
    """A text inside of a one-line comment, or of code in Markdown: printable ASCII that ends neither."""
    return "".join(char if " " <= char <= "~" and char not in "\\`|" else "?" for char in text)


def _plain(code: int, escaped: str) -> str:
    if not 0x20 <= code < 0x7F:
        return ""
    return f"\\{chr(code)}" if chr(code) in escaped else chr(code)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # a lone surrogate becomes "?"
