"""The simulator's decoder against a disassembler's text: what each mnemonic reads, writes and is sorted into."""

import functools
import random
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from edgebuild.devices import toolchain
from edgebuild.spec import INSTRUCTION_CLASSES

SIMULATOR = Path(toolchain.__file__).parent / "native" / "simulator"
OBJDUMP = "aarch64-linux-gnu-objdump"
ASSEMBLER = "aarch64-linux-gnu-as"
FLAGS = 64
SP = 31
LINK = 30


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What follows a mnemonic in these tables: "+" adds to its first operand, "~" keeps a part of it; "*" is a 128-bit
# operation also where its first operand has 64 bits, unless that is a scalar.
VECTOR_CLASSES = {
    "valu": """
        add sub neg abs addp addhn* addhn2*~ raddhn* raddhn2*~ subhn* subhn2*~ rsubhn* rsubhn2*~
        saddl saddl2 saddw saddw2 ssubl ssubl2 ssubw ssubw2 uaddl uaddl2 uaddw uaddw2 usubl usubl2 usubw usubw2
        saddlp uaddlp sabd uabd sabdl sabdl2 uabdl uabdl2 sqabs sqneg suqadd~ usqadd~
        shadd uhadd srhadd urhadd shsub uhsub sqadd uqadd sqsub uqsub
        smax smin umax umin smaxp sminp umaxp uminp cmeq cmge cmgt cmhi cmhs cmle cmlt cmtst
        and orr orn eor bic bsl~ bit~ bif~ not cnt clz cls rbit fabs fneg fcsel
        aese~ aesd~ aesmc aesimc sha1c~ sha1p~ sha1m~ sha1h sha1su0~ sha1su1~
        sha256h~ sha256h2~ sha256su0~ sha256su1~ sha512h~ sha512h2~ sha512su0~ sha512su1~ rax1 eor3 bcax xar
        sm3partw1~ sm3partw2~ sm3ss1 sm3tt1a~ sm3tt1b~ sm3tt2a~ sm3tt2b~ sm4e~ sm4ekey
    """,
    "vshift": """
        shl sshl ushl sshr ushr srshl urshl srshr urshr sqshl uqshl sqrshl uqrshl sqshlu sli~ sri~
        sshll sshll2 ushll ushll2 shll shll2 shrn* shrn2*~ rshrn* rshrn2*~
        sqshrn* sqshrn2*~ uqshrn* uqshrn2*~ sqrshrn* sqrshrn2*~ uqrshrn* uqrshrn2*~
        sqshrun* sqshrun2*~ sqrshrun* sqrshrun2*~ sqxtn* sqxtn2*~ uqxtn* uqxtn2*~ sqxtun* sqxtun2*~
    """,
    "permute": "zip1 zip2 uzp1 uzp2 trn1 trn2 ext dup ins~ rev16 rev32 rev64 xtn* xtn2*~",
    "fadd": """
        fadd fsub faddp fabd fmax fmin fmaxnm fminnm fmaxp fminp fmaxnmp fminnmp
        fcmp fcmpe fccmp fccmpe fcmeq fcmge fcmgt fcmle fcmlt facge facgt fcadd
    """,
    "fmul": "fmul fnmul fmulx frecps frsqrts",
    "fma": "fmla+ fmls+ fmlal+ fmlal2+ fmlsl+ fmlsl2+ fcmla+ bfmlalb+ bfmlalt+ fmadd fmsub fnmadd fnmsub",
    "fcvt": """
        fcvt bfcvt fcvtl* fcvtl2* fcvtn* fcvtn2*~ fcvtxn* fcvtxn2*~ bfcvtn* bfcvtn2*~ scvtf ucvtf
        fcvtas fcvtau fcvtms fcvtmu fcvtns fcvtnu fcvtps fcvtpu fcvtzs fcvtzu fjcvtzs
        frinta frinti frintm frintn frintp frintx frintz frint32x frint32z frint64x frint64z
        frecpe frecpx frsqrte urecpe ursqrte
    """,
}
UNSIZED_VECTOR_CLASSES = {
    "fdiv": "fdiv fsqrt",
    "imac": """
        smlal+ smlal2+ smlsl+ smlsl2+ umlal+ umlal2+ umlsl+ umlsl2+ sqdmlal+ sqdmlal2+ sqdmlsl+ sqdmlsl2+
        smull smull2 umull umull2 sqdmull sqdmull2 pmull pmull2
    """,
    "dot": "sdot+ udot+ usdot+ sudot+ bfdot+",
    "matmul": "smmla+ ummla+ usmmla+ bfmmla+",
    "vaccumulate": """
        sadalp+ uadalp+ saba+ uaba+ sabal+ sabal2+ uabal+ uabal2+ ssra+ usra+ srsra+ ursra+
        addv saddlv uaddlv smaxv sminv umaxv uminv
    """,
    "table": "tbl tbx~",
    "vmov": "movi mvni",
    "vector_to_general": "umov smov",
}
# "imac" up to 64 bits, "imac_q" with 128.
IMAC = "mla+ mls+ mul pmul sqdmulh sqrdmulh sqrdmlah+ sqrdmlsh+"
ACROSS_FLOATS = "fmaxv fminv fmaxnmv fminnmv"  # their width is that of what they sum up

GENERAL_CLASSES = {
    "alu": """
        add adds sub subs adc adcs sbc sbcs and ands bic bics eor eon orr orn adr adrp movz movn movk~
        csel csinc csinv csneg ccmp ccmn clz cls rbit rev rev16 rev32 ctz cnt abs smax smin umax umin
        rmif setf8 setf16 cfinv axflag xaflag addg subg irg gmi subp subps pacga
        pacia~ pacib~ pacda~ pacdb~ autia~ autib~ autda~ autdb~
        paciza~ pacizb~ pacdza~ pacdzb~ autiza~ autizb~ autdza~ autdzb~ xpaci~ xpacd~
    """,
    "alu_shift": """
        sbfm ubfm bfm~ extr lslv lsrv asrv rorv
        crc32b crc32h crc32w crc32x crc32cb crc32ch crc32cw crc32cx
    """,
    "mul": "madd msub smaddl smsubl umaddl umsubl smulh umulh",
    "div": "sdiv udiv",
    "nop": """
        hint dmb dsb isb sb clrex msr mrs sys sysl svc hvc smc brk hlt udf dcps1 dcps2 dcps3 wfet wfit
        smstart smstop tcancel tcommit
    """,
}
# Nothing that these write is a register of theirs.
NO_DESTINATION = _words("fcmp fcmpe fccmp fccmpe ccmp ccmn rmif setf8 setf16 msr sys wfet wfit")
WRITES_FLAGS = _words(
    """
    adds subs adcs sbcs ands bics ccmp ccmn fcmp fcmpe fccmp fccmpe rmif setf8 setf16 cfinv axflag xaflag subps fjcvtzs
    """
)
READS_FLAGS = _words(
    "adc adcs sbc sbcs csel csinc csinv csneg ccmp ccmn fcsel fccmp fccmpe rmif setf8 setf16 cfinv axflag xaflag"
)
MACS_FOR_EACH_LANE = {
    **dict.fromkeys(_words("sdot udot usdot sudot"), 4),
    **dict.fromkeys(["bfdot"], 2),
    **dict.fromkeys(_words("smmla ummla usmmla"), 8),
    **dict.fromkeys(["bfmmla"], 4),
    **dict.fromkeys(
        _words("""
        fmla fmls fmlal fmlal2 fmlsl fmlsl2 fcmla bfmlalb bfmlalt fmadd fmsub fnmadd fnmsub
        mla mls sqrdmlah sqrdmlsh smlal smlal2 smlsl smlsl2 umlal umlal2 umlsl umlsl2
        sqdmlal sqdmlal2 sqdmlsl sqdmlsl2 smull smull2 umull umull2 sqdmull sqdmull2
        """),
        1,
    ),
}
# Extensions that no supported core has: transactional memory, tags in memory, 64-byte accesses. Beside them: CPY, SET.
UNSUPPORTED = _words("tstart ttest stg st2g stzg stz2g ldg ldgm stgm stzgm stgp ld64b st64b st64bv st64bv0")

ORDERS = ("", "a", "l", "al")
SIZES = ("", "b", "h")
ATOMIC_UPDATES = {
    operation + order + size
    for operation in _words("ldadd ldclr ldeor ldset ldsmax ldsmin ldumax ldumin swp")
    for order in ORDERS
    for size in SIZES
}
COMPARE_AND_SWAPS = {"cas" + order + size for order in ORDERS for size in SIZES}
COMPARE_AND_SWAP_PAIRS = {"casp" + order for order in ORDERS}
ORDERED_LOADS = {name + size for name in _words("ldar ldlar ldapr ldapur ldxr ldaxr") for size in SIZES} | _words(
    "ldapursb ldapursh ldapursw ldxp ldaxp"
)
ORDERED_STORES = {name + size for name in ("stlr", "stllr", "stlur") for size in SIZES}
EXCLUSIVE_STORES = {name + size for name in ("stxr", "stlxr") for size in SIZES} | {"stxp", "stlxp"}
LOADS = _words(
    """
    ldr ldrb ldrh ldrsb ldrsh ldrsw ldur ldurb ldurh ldursb ldursh ldursw ldtr ldtrb ldtrh ldtrsb ldtrsh ldtrsw
    ldraa ldrab
    """
)
STORES = _words("str strb strh stur sturb sturh sttr sttrb sttrh")
LOAD_PAIRS = {"ldp", "ldnp", "ldpsw"}
STORE_PAIRS = {"stp", "stnp"}
STRUCTURES = {f"{name}{count}" for name in ("ld", "st") for count in (1, 2, 3, 4)}
REPLICATES = {f"ld{count}r" for count in (1, 2, 3, 4)}
MEMORY = frozenset().union(
    *(ATOMIC_UPDATES, COMPARE_AND_SWAPS, COMPARE_AND_SWAP_PAIRS, ORDERED_LOADS, ORDERED_STORES, EXCLUSIVE_STORES),
    *(LOADS, STORES, LOAD_PAIRS, STORE_PAIRS, STRUCTURES, REPLICATES),
)


class Decoded(NamedTuple):
    """The sources and destinations as sets: in which order they come matters for the base register only."""

    name: str
    sources: frozenset[int]
    destinations: frozenset[int]
    base: int | None = None  # which must be the first source and, written back, the first destination
    accumulator: int | None = None
    registers: int = 1
    macs: int = 0
    flags: str = ""


class Rule(NamedTuple):
    name: str
    accumulates: bool
    keeps: bool
    full_width: bool


def _rules(*tables: dict[str, str]) -> dict[str, Rule]:
    return {
        entry.rstrip("+~*"): Rule(name, "+" in entry, "~" in entry, "*" in entry)
        for table in tables
        for name, entries in table.items()
        for entry in entries.split()
    }


VECTOR_RULES = _rules(VECTOR_CLASSES, UNSIZED_VECTOR_CLASSES, {"imac_by_width": IMAC, "fadd_across": ACROSS_FLOATS})
GENERAL_RULES = _rules(GENERAL_CLASSES)


# Operands


def _split(text: str) -> list[str]:
    """At the commas outside of brackets and braces."""
    text = text.partition("//")[0].strip()
    parts, depth, begin = [], 0, 0
    for place, character in enumerate(text):
        if character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and not depth:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return [*parts, text[begin:].strip()] if text else []


@functools.cache
def _register(operand: str) -> int | None:
    """Its number; None for the zero register and for what is no register."""
    if operand in ("sp", "wsp"):
        return SP
    letter, digits = operand[:1], operand[1:].partition(".")[0]
    if not digits.isdigit() or int(digits) > 31:
        return None
    if letter in "wx":
        return int(digits)
    return 32 + int(digits) if letter in "bhsdqv" else None


def _is_vector(operand: str) -> bool:
    number = _register(operand)
    return number is not None and number >= 32


def _is_general(operand: str) -> bool:
    number = _register(operand)
    return operand in ("xzr", "wzr") or (number is not None and number < 32)


@functools.cache
def _list(operand: str) -> tuple[tuple[int, ...], str]:
    """The registers of "{v0.4s-v3.4s}[1]" and their arrangement."""
    inside = operand[1 : operand.index("}")]
    arrangement = inside.rpartition(".")[2]
    if "-" in inside:
        first, last = (_register(end) for end in inside.split("-"))
        assert first is not None and last is not None
        return tuple(32 + (first - 32 + i) % 32 for i in range((last - first) % 32 + 1)), arrangement
    numbers = [_register(part.strip()) for part in inside.split(",")]
    return tuple(number for number in numbers if number is not None), arrangement


def _arrangement(operand: str) -> tuple[int, int]:
    """Bits and lanes: (64, 1) for a scalar, whatever its width, or an element."""
    shape = operand.partition(".")[2]
    if not shape or "[" in shape or not shape[0].isdigit():
        return 64, 1
    lanes = int(shape[:-1])
    return lanes * {"b": 8, "h": 16, "s": 32, "d": 64, "q": 128}[shape[-1]], lanes


def _numbers(operands: Iterable[str]) -> frozenset[int]:
    return frozenset(number for number in map(_register, operands) if number is not None)


# What is expected of an instruction


def _branch(mnemonic: str, operands: list[str]) -> Decoded | None:
    sources: frozenset[int] = frozenset()
    destinations: frozenset[int] = frozenset()
    if mnemonic.startswith(("b.", "bc.")):
        return Decoded("branch", frozenset({FLAGS}), destinations, flags="BC")
    if mnemonic in ("cbz", "cbnz", "tbz", "tbnz"):
        return Decoded("branch", _numbers(operands[:1]), destinations, flags="BC")
    if mnemonic in ("bl", "blr", "blraa", "blraaz", "blrab", "blrabz"):
        destinations = frozenset({LINK})
    if mnemonic == "ret":
        sources = _numbers(operands) if operands else frozenset({LINK})
    elif mnemonic in ("retaa", "retab"):
        sources = frozenset({LINK, SP})
    elif mnemonic in ("eretaa", "eretab"):
        sources = frozenset({SP})
    elif mnemonic in _words("br blr braa brab blraa blrab braaz brabz blraaz blrabz"):
        sources = _numbers(operands)
    elif mnemonic not in ("b", "bl", "eret", "drps"):
        return None
    return Decoded("branch", sources, destinations, flags="B")


def _memory_class(mnemonic: str, operand: str, loads: bool) -> str:
    if not _is_vector(operand):
        return "load" if loads else "store"
    return ("load" if loads else "store") + ("_q" if operand[0] == "q" else "_d")


def _structure(mnemonic: str, listed: str) -> tuple[str, int]:
    numbers, arrangement = _list(listed)
    loads, count = mnemonic.startswith("ld"), len(numbers)
    if mnemonic in REPLICATES:
        return "load_replicate", count
    if not arrangement[0].isdigit():
        return ("load_lane" if loads else "store_lane"), count
    quad = _arrangement("v0." + arrangement)[0] == 128
    units = count if quad else -(-count // 2)
    if count == 1:
        return ("load" if loads else "store") + ("_q" if quad else "_d"), units
    if loads:
        return "load_multiple", units
    return ("store_pair_q" if quad and count == 2 else "store_q"), units


def _memory(mnemonic: str, operands: list[str]) -> Decoded | None:
    place = next((i for i, operand in enumerate(operands) if operand.startswith("[")), None)
    before, base, address, back = operands[:place], None, frozenset[int](), False
    if place is not None:
        inside = [part.strip() for part in operands[place].strip("[]!").split(",")]
        base = _register(inside[0])
        address = _numbers([*inside, *operands[place + 1 :]])
        back = operands[place].endswith("!") or place + 1 < len(operands)
    elif mnemonic in ("ldr", "ldrsw", "prfm"):
        before = operands[:1]  # the other one is a place in the program
    registers, numbers = 1, _numbers(before)

    if mnemonic in ("prfm", "prfum"):
        return Decoded("prefetch", address, frozenset(), base)
    if mnemonic in ATOMIC_UPDATES:
        name, reads, writes, flags = "atomic", _numbers(before[:1]), _numbers(before[1:]), "LS"
    elif mnemonic in COMPARE_AND_SWAPS:
        name, reads, writes, flags = "atomic", numbers, _numbers(before[:1]), "LS"
    elif mnemonic in COMPARE_AND_SWAP_PAIRS:
        name, reads, writes, flags = "atomic", numbers, _numbers(before[:2]), "LS"
    elif mnemonic in ORDERED_LOADS:
        name, reads, writes, flags = "atomic", frozenset(), numbers, "L"
    elif mnemonic in ORDERED_STORES:
        name, reads, writes, flags = "atomic", numbers, frozenset(), "S"
    elif mnemonic in EXCLUSIVE_STORES:
        name, reads, writes, flags = "atomic", _numbers(before[1:]), _numbers(before[:1]), "S"
    elif mnemonic in LOADS:
        name, reads, writes, flags = _memory_class(mnemonic, before[0], True), frozenset(), numbers, "L"
    elif mnemonic in STORES:
        name, reads, writes, flags = _memory_class(mnemonic, before[0], False), numbers, frozenset(), "S"
    elif mnemonic in LOAD_PAIRS:
        kind = before[0][0]
        name = {"q": "load_pair_q", "d": "load_pair_d", "s": "load_pair_d"}.get(kind, "load_pair")
        reads, writes, flags, registers = frozenset(), numbers, "L", 2 if kind == "q" else 1
    elif mnemonic in STORE_PAIRS:
        kind = before[0][0]
        name = {"q": "store_pair_q", "d": "store_q", "s": "store_d"}.get(kind, "store")
        reads, writes, flags, registers = numbers, frozenset(), "S", 2 if kind == "q" else 1
    elif mnemonic in STRUCTURES or mnemonic in REPLICATES:
        listed = frozenset(_list(before[0])[0])
        name, registers = _structure(mnemonic, before[0])
        loads = mnemonic.startswith("ld")
        reads = listed if not loads or name == "load_lane" else frozenset()
        writes, flags = listed if loads else frozenset(), "L" if loads else "S"
    else:
        return None
    if back:
        assert base is not None
        writes, flags = writes | {base}, flags + "W"
    return Decoded(name, address | reads, writes, base, registers=registers, flags=flags)


def _vector_class(rule: Rule, mnemonic: str, operands: list[str]) -> str:
    first = operands[0]
    bits = _arrangement(first)[0]
    if rule.name == "imac_by_width":
        return "imac_q" if bits == 128 else "imac"
    if rule.name == "fadd_across":
        return "fadd_q" if _arrangement(operands[1])[0] == 128 else "fadd_d"
    if mnemonic in _words("addp faddp fmaxp fminp fmaxnmp fminnmp") and "." not in first:
        return "vaccumulate" if mnemonic == "addp" else "fadd_d"
    if mnemonic in ("dup", "ins") and _is_general(operands[1]):
        return "general_to_vector"
    if mnemonic == "ins":
        return "permute_q"
    if mnemonic.startswith(("sha1", "sha256", "sha512")):
        return "valu_q"
    if rule.name in VECTOR_CLASSES:
        return rule.name + ("_q" if bits == 128 or (rule.full_width and "." in first) else "_d")
    return rule.name


def _fmov(operands: list[str]) -> Decoded:
    to, source = operands
    reads = _numbers([source, to] if "[" in to else [source])
    if _is_general(to):
        return Decoded("vector_to_general", reads, _numbers([to]))
    return Decoded("general_to_vector" if _is_general(source) else "vmov", reads, _numbers([to]))


def _vector(mnemonic: str, operands: list[str]) -> Decoded | None:
    if mnemonic == "fmov":
        return _fmov(operands)
    rule = VECTOR_RULES.get(mnemonic)
    if rule is None:
        return None
    first = operands[0]
    writes = frozenset() if mnemonic in NO_DESTINATION else _numbers([first])
    reads = _numbers(operands if mnemonic in NO_DESTINATION else operands[1:])
    for operand in operands:
        if operand.startswith("{"):
            reads |= frozenset(_list(operand)[0])
    accumulator = None
    # ORR and BIC with an immediate change their only register.
    if rule.accumulates or rule.keeps or (mnemonic in ("orr", "bic") and not _is_vector(operands[1])):
        reads |= _numbers([first])
    if rule.accumulates:
        accumulator = _register(first)
    elif mnemonic in ("fmadd", "fmsub", "fnmadd", "fnmsub"):
        accumulator = _register(operands[3])
    if mnemonic in READS_FLAGS:
        reads |= {FLAGS}
    if mnemonic in WRITES_FLAGS:
        writes |= {FLAGS}
    macs = MACS_FOR_EACH_LANE.get(mnemonic, 0) * _arrangement(first)[1]
    return Decoded(_vector_class(rule, mnemonic, operands), reads, writes, None, accumulator, 1, macs)


def _shifts(operands: list[str]) -> bool:
    """Whether the last register is shifted or extended. An extension of all of its bits is none."""
    if not _is_general(operands[-2]):  # but an immediate
        return False
    kind, _, amount = operands[-1].partition(" ")
    if kind not in _words("lsl lsr asr ror uxtb uxth uxtw uxtx sxtb sxth sxtw sxtx"):
        return False
    if amount and amount != "#0":
        return True
    wide = operands[0] == "sp" or operands[0][0] == "x"
    whole = _words("uxtx sxtx") if wide else _words("uxtw sxtw uxtx sxtx")
    return kind[1:3] == "xt" and kind not in whole


def _general(mnemonic: str, operands: list[str]) -> Decoded | None:
    rule = GENERAL_RULES.get(mnemonic)
    if rule is None:
        return None
    name = rule.name
    if name == "alu" and len(operands) >= 3 and _shifts(operands):
        name = "alu_shift"
    if mnemonic in NO_DESTINATION:
        writes, reads = frozenset(), _numbers(operands)
    elif mnemonic in ("adr", "adrp"):
        writes, reads = _numbers(operands[:1]), frozenset()
    else:
        writes, reads = _numbers(operands[:1]), _numbers(operands[1:])
    if rule.keeps:
        reads |= _numbers(operands[:1])
    accumulator = _register(operands[3]) if mnemonic in _words("madd msub smaddl smsubl umaddl umsubl") else None
    if mnemonic in READS_FLAGS or (mnemonic == "mrs" and operands[1] == "nzcv"):
        reads |= {FLAGS}
    if mnemonic in WRITES_FLAGS or (mnemonic == "msr" and operands[0] == "nzcv"):
        writes |= {FLAGS}
    return Decoded(name, reads, writes, None, accumulator)


def _is_scalable(word: int) -> bool:
    """SVE and SME: two rows of the top-level table, shared with UDF only."""
    return word >> 25 & 15 in (0, 2)


def _expected(word: int, mnemonic: str, text: str) -> Decoded | None:
    """None: the tables do not have it."""
    memory_copy = mnemonic.startswith(("cpy", "setg", "setp", "setm", "sete"))
    if _is_scalable(word) or mnemonic in UNSUPPORTED or memory_copy:
        return Decoded("nop", frozenset(), frozenset())
    operands = _split(text)
    if mnemonic[0] in "bcdert":
        branch = _branch(mnemonic, operands)
        if branch is not None:
            return branch
    memory = _memory(mnemonic, operands)
    if memory is not None:
        return memory
    if any(_is_vector(operand) for operand in operands) and mnemonic not in ("adr", "adrp"):
        return _vector(mnemonic, operands)
    return _general(mnemonic, operands)


# The two sides


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    if not shutil.which("cc"):
        pytest.skip("cc is not installed")
    program = tmp_path_factory.mktemp("decoder") / "dump"
    options = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover"]
    sources = [SIMULATOR / "decode.c", Path(__file__).parent / "decoder_dump.c"]
    subprocess.run(["cc", *options, *sanitizers, f"-I{SIMULATOR}", *sources, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def binutils():
    for program in (OBJDUMP, ASSEMBLER):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed; get it with `{toolchain.INSTALL}`")


class Line(NamedTuple):
    name: str
    sources: list[int]
    destinations: list[int]
    accumulator: int
    registers: int
    macs: int
    flags: str


def _decode(decoder: Path, words: list[int]) -> Iterator[Line]:
    text = "\n".join(f"{word:x}" for word in words)
    ran = subprocess.run([decoder], input=text, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == len(words)
    for line in lines:
        name, sources, destinations, accumulator, registers, macs, flags = line.split("\t")
        yield Line(
            name,
            [int(number) for number in sources.split(",")] if sources else [],
            [int(number) for number in destinations.split(",")] if destinations else [],
            int(accumulator),
            int(registers),
            int(macs),
            flags,
        )


def _seen(line: Line, expected: Decoded) -> Decoded:
    base = expected.base
    if base is not None and (line.sources[:1] != [base] or ("W" in line.flags and line.destinations[:1] != [base])):
        base = -1
    accumulator = line.sources[line.accumulator - 1] if line.accumulator else None
    return Decoded(
        line.name,
        frozenset(line.sources),
        frozenset(line.destinations),
        base,
        accumulator,
        line.registers,
        line.macs,
        line.flags,
    )


def _disassemble(arguments: list[str | Path]) -> Iterator[tuple[int, str, str]]:
    """Word, mnemonic, operands, as the encoding has them and not by an alias."""
    command = [OBJDUMP, "-M", "no-aliases", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            parts = line.split("\t", 3)
            if len(parts) >= 3 and len(parts[1].strip()) == 8:
                yield int(parts[1], 16), parts[2].strip(), parts[3] if len(parts) == 4 else ""
    assert process.returncode == 0


def _disassemble_words(words: Iterable[int], folder: Path) -> Iterator[tuple[int, str, str]]:
    binary = folder / "words"
    binary.write_bytes(b"".join(struct.pack("<I", word) for word in words))
    return _disassemble(["-D", "-z", "-b", "binary", "-m", "aarch64", binary])


def _is_allocated(word: int, mnemonic: str, text: str) -> bool:
    """Or of SVE and SME, if too new for the disassembler. System registers with op0 = 0 have a text, but are none."""
    return _is_scalable(word) or (mnemonic != ".inst" and "s0_" not in text)


def _check(decoder: Path, instructions: dict[int, tuple[str, str]]) -> int:
    """Every word as its text says; how many were compared."""
    words = [word for word, (mnemonic, text) in instructions.items() if _is_allocated(word, mnemonic, text)]
    wrong: dict[str, list[str]] = {}
    for word, line in zip(words, _decode(decoder, words), strict=True):
        mnemonic, text = instructions[word]
        expected = _expected(word, mnemonic, text)
        if expected is None:
            wrong.setdefault(mnemonic, []).append(f"{word:08x} {mnemonic} {text.strip()}: not in the tables")
            continue
        seen = _seen(line, expected)
        if seen != expected:
            differing = [
                f"{field} is {had!r} and should be {should!r}"
                for field, had, should in zip(Decoded._fields, seen, expected, strict=True)
                if had != should
            ]
            wrong.setdefault(mnemonic, []).append(f"{word:08x} {mnemonic} {text.strip()}: " + ", ".join(differing))
    report = [f"{len(cases)} x {cases[0]}" for _, cases in sorted(wrong.items())]
    assert not report, "\n".join(report)
    return len(words)


def test_every_instruction_of_the_library(decoder, binutils):
    libraries = sorted((toolchain.sdk() / "lib").glob("lib*.so"))
    assert libraries
    instructions: dict[int, tuple[str, str]] = {}
    for library in libraries:
        for word, mnemonic, text in _disassemble(["-d", library]):
            if word not in instructions:
                instructions[word] = mnemonic, text
    assert _check(decoder, instructions) > 300_000


# Value and mask of groups that random words seldom hit.
RARE_GROUPS = {
    "data processing, one source": (0x5AC00000, 0x7FE00000),
    "pointer authentication": (0xDAC10000, 0xFFFFC000),
    "XPACI, XPACD": (0xDAC143E0, 0xFFFFFBE0),
    "data processing, two source": (0x1AC00000, 0x5FE00000),
    "SUBP": (0x9AC00000, 0xDFE0FC00),
    "IRG, GMI": (0x9AC01000, 0xFFE0F800),
    "add/subtract with carry, flags": (0x1A000000, 0x1FE00000),
    "SETF8, SETF16": (0x3A00080D, 0xFFFFBC1F),
    "min/max immediate": (0x11C00000, 0x7FC00000),
    "system": (0xD5000000, 0xFFC00000),
    "CFINV, XAFLAG, AXFLAG": (0xD500401F, 0xFFFFF01F),
    "SMSTART, SMSTOP": (0xD503401F, 0xFFFFF01F),
    "NZCV": (0xD51B4200, 0xFFDFFFE0),
    "hints and barriers": (0xD503201F, 0xFFFFE01F),
    "WFET, WFIT": (0xD5031000, 0xFFFFFFC0),
    "exceptions": (0xD4000000, 0xFF00001C),
    "unconditional branch (register)": (0xD61F0000, 0xFE1FF000),
    "exclusive and ordered": (0x08000000, 0x3F000000),
    "compare and swap": (0x08A07C00, 0x3FA07C00),
    "compare and swap pair": (0x08207C00, 0xBFA07C00),
    "LDAR": (0x08DFFC00, 0x3FFFFC00),
    "LDAPR": (0x38BFC000, 0x3FFFFC00),
    "LDAPR/STLR (unscaled)": (0x19000000, 0x3F200C00),
    "atomic memory operations": (0x38200000, 0x3F200C00),
    "load register (PAC)": (0xF8200400, 0xFF200400),
    "SIMD structures": (0x0C000000, 0xBF000000),
    "SIMD structure, single": (0x0D000000, 0xBF000000),
    "SIMD two-register": (0x0E200800, 0x9F3E0C00),
    "SIMD two-register, FP16": (0x0E780800, 0x9F7E0C00),
    "SIMD across lanes": (0x0E300800, 0x9F3E0C00),
    "SIMD copy": (0x0E000400, 0x9FE08400),
    "SIMD modified immediate": (0x0F000400, 0x9FF80400),
    "SIMD shift by immediate": (0x0F000400, 0x9F800400),
    "SIMD three same": (0x0E200400, 0x9F200400),
    "SIMD three different": (0x0E200000, 0x9F200C00),
    "SIMD three same, FP16": (0x0E400400, 0x9F60C400),
    "SIMD three same extra": (0x0E008400, 0x9F208400),
    "SIMD extract and permute": (0x0E000000, 0x9F208400),
    "SIMD by element": (0x0F000000, 0x9F000400),
    "scalar two-register": (0x5E200800, 0xDF3E0C00),
    "scalar two-register, FP16": (0x5E780800, 0xDF7E0C00),
    "scalar pairwise": (0x5E300800, 0xDF3E0C00),
    "scalar copy": (0x5E000400, 0xFFE0FC00),
    "scalar three same, FP16": (0x5E400400, 0xDF60C400),
    "scalar three same extra": (0x5E008400, 0xDF208400),
    "AES": (0x4E280800, 0xFFFF0C00),
    "SHA, two-register": (0x5E280800, 0xFFFF0C00),
    "SHA, three-register": (0x5E000000, 0xFFE08C00),
    "SHA512, SM3, SM4": (0xCE000000, 0xFF000000),
    "SHA512SU0, SM4E": (0xCEC08000, 0xFFFFF000),
    "FP and fixed point": (0x1E000000, 0x7F200000),
    "FP and integer": (0x1E200000, 0x7F20FC00),
    "FP one source": (0x1E204000, 0xFF207C00),
    "FP compare": (0x1E202000, 0xFF20FC07),
    "FP immediate": (0x1E201000, 0xFF201FE0),
}


def test_words_at_random(decoder, binutils, tmp_path):
    draw = random.Random(0)
    words = [draw.getrandbits(32) for _ in range(150_000)]
    for value, mask in RARE_GROUPS.values():
        words.extend(value | draw.getrandbits(32) & ~mask for _ in range(4000))
    instructions = {word: (mnemonic, text) for word, mnemonic, text in _disassemble_words(words, tmp_path)}
    _check(decoder, instructions)
    met = {mnemonic for mnemonic, _ in instructions.values()}
    untried = (set(VECTOR_RULES) | set(GENERAL_RULES) | MEMORY) - met
    assert not untried, " ".join(sorted(untried))


def test_any_word_stays_within_the_interface(decoder):
    draw = random.Random(1)
    words = [0, 0xFFFFFFFF, *(draw.getrandbits(32) for _ in range(400_000))]
    assert sum(1 for _ in _decode(decoder, words)) == len(words)


def test_the_classes_are_those_of_a_core_s_description(decoder):
    names = subprocess.run([decoder, "classes"], check=True, capture_output=True, text=True).stdout.split()
    assert names == list(INSTRUCTION_CLASSES)


# Class, sources, destinations, accumulator, registers, macs, flags; what the library has little of, or nothing.
WRITTEN = {
    "add x0, sp, x1": Line("alu", [31, 1], [0], 0, 1, 0, ""),
    "add w0, w1, w2, uxtb": Line("alu_shift", [1, 2], [0], 0, 1, 0, ""),
    "sub sp, sp, #64": Line("alu", [31], [31], 0, 1, 0, ""),
    "cmp x3, x4, lsl #2": Line("alu_shift", [3, 4], [64], 0, 1, 0, ""),
    "adcs x0, x1, x2": Line("alu", [1, 2, 64], [0, 64], 0, 1, 0, ""),
    "ccmp x1, #3, #0, ne": Line("alu", [1, 64], [64], 0, 1, 0, ""),
    "mrs x5, nzcv": Line("nop", [64], [5], 0, 1, 0, ""),
    "msr nzcv, x5": Line("nop", [5], [64], 0, 1, 0, ""),
    "madd x0, x1, x2, x3": Line("mul", [1, 2, 3], [0], 3, 1, 0, ""),
    "mul x0, x1, x2": Line("mul", [1, 2], [0], 0, 1, 0, ""),
    "crc32cx w0, w1, x2": Line("alu_shift", [1, 2], [0], 0, 1, 0, ""),
    "pacia x0, sp": Line("alu", [0, 31], [0], 0, 1, 0, ""),
    "paciasp": Line("nop", [], [], 0, 1, 0, ""),
    "braa x1, sp": Line("branch", [1, 31], [], 0, 1, 0, "B"),
    "blrab x1, x2": Line("branch", [1, 2], [30], 0, 1, 0, "B"),
    "retaa": Line("branch", [30, 31], [], 0, 1, 0, "B"),
    "tbnz x3, #40, .": Line("branch", [3], [], 0, 1, 0, "BC"),
    "b.ne .": Line("branch", [64], [], 0, 1, 0, "BC"),
    "ldr x0, [sp], #16": Line("load", [31], [31, 0], 0, 1, 0, "LW"),
    "str q3, [x1, x2, lsl #4]": Line("store_q", [1, 2, 35], [], 0, 1, 0, "S"),
    "ldraa x0, [x1, #8]!": Line("load", [1], [1, 0], 0, 1, 0, "LW"),
    "ldp q0, q1, [x2], #32": Line("load_pair_q", [2], [2, 32, 33], 0, 2, 0, "LW"),
    "stp d0, d1, [x2]": Line("store_q", [2, 32, 33], [], 0, 1, 0, "S"),
    "stp s0, s1, [x2]": Line("store_d", [2, 32, 33], [], 0, 1, 0, "S"),
    "prfm pldl1keep, [x0, x1]": Line("prefetch", [0, 1], [], 0, 1, 0, ""),
    "ld1 {v30.4s, v31.4s, v0.4s}, [x0], x3": Line("load_multiple", [0, 3], [0, 62, 63, 32], 0, 3, 0, "LW"),
    "ld4 {v0.8b-v3.8b}, [x0]": Line("load_multiple", [0], [32, 33, 34, 35], 0, 2, 0, "L"),
    "ld4 {v0.h-v3.h}[5], [x0], x1": Line("load_lane", [0, 1, 32, 33, 34, 35], [0, 32, 33, 34, 35], 0, 4, 0, "LW"),
    "ld2r {v4.2d, v5.2d}, [x0]": Line("load_replicate", [0], [36, 37], 0, 2, 0, "L"),
    "st1 {v0.16b, v1.16b}, [x0], #32": Line("store_pair_q", [0, 32, 33], [0], 0, 2, 0, "SW"),
    "st1 {v0.8b-v2.8b}, [x0]": Line("store_q", [0, 32, 33, 34], [], 0, 2, 0, "S"),
    "st3 {v7.s-v9.s}[1], [x0]": Line("store_lane", [0, 39, 40, 41], [], 0, 3, 0, "S"),
    "ldapr x0, [x1]": Line("atomic", [1], [0], 0, 1, 0, "L"),
    "ldapur w0, [x1, #4]": Line("atomic", [1], [0], 0, 1, 0, "L"),
    "stlur w0, [x1, #4]": Line("atomic", [1, 0], [], 0, 1, 0, "S"),
    "ldaxp x0, x1, [x2]": Line("atomic", [2], [0, 1], 0, 1, 0, "L"),
    "stlxp w0, x1, x2, [x3]": Line("atomic", [3, 1, 2], [0], 0, 1, 0, "S"),
    "casal x0, x1, [x2]": Line("atomic", [2, 0, 1], [0], 0, 1, 0, "LS"),
    "casp x0, x1, x2, x3, [x4]": Line("atomic", [4, 0, 1, 2, 3], [0, 1], 0, 1, 0, "LS"),
    "ldadd x0, x1, [x2]": Line("atomic", [2, 0], [1], 0, 1, 0, "LS"),
    "stadd x0, [x2]": Line("atomic", [2, 0], [], 0, 1, 0, "LS"),
    "fmadd s0, s1, s2, s3": Line("fma_d", [33, 34, 35], [32], 3, 1, 1, ""),
    "fmla v0.4s, v1.4s, v31.s[3]": Line("fma_q", [33, 63, 32], [32], 3, 1, 4, ""),
    "fmla v0.8h, v1.8h, v15.h[7]": Line("fma_q", [33, 47, 32], [32], 3, 1, 8, ""),
    "fmls v0.2d, v1.2d, v2.2d": Line("fma_q", [33, 34, 32], [32], 3, 1, 2, ""),
    "fmlal v0.4s, v1.4h, v2.4h": Line("fma_q", [33, 34, 32], [32], 3, 1, 4, ""),
    "fmlsl2 v0.2s, v1.2h, v15.h[7]": Line("fma_d", [33, 47, 32], [32], 3, 1, 2, ""),
    "fcmla v0.4s, v1.4s, v2.4s, #90": Line("fma_q", [33, 34, 32], [32], 3, 1, 4, ""),
    "fcmla v0.4h, v1.4h, v31.h[1], #180": Line("fma_d", [33, 63, 32], [32], 3, 1, 4, ""),
    "fcadd v0.8h, v1.8h, v2.8h, #270": Line("fadd_q", [33, 34], [32], 0, 1, 0, ""),
    "fdiv v0.8h, v1.8h, v2.8h": Line("fdiv", [33, 34], [32], 0, 1, 0, ""),
    "fcmp s0, #0.0": Line("fadd_d", [32], [64], 0, 1, 0, ""),
    "fmaxnmv s0, v1.4s": Line("fadd_q", [33], [32], 0, 1, 0, ""),
    "faddp d0, v1.2d": Line("fadd_d", [33], [32], 0, 1, 0, ""),
    "fcvtn2 v0.4s, v1.2d": Line("fcvt_q", [33, 32], [32], 0, 1, 0, ""),
    "fmov x0, v1.d[1]": Line("vector_to_general", [33], [0], 0, 1, 0, ""),
    "fmov v1.d[1], x0": Line("general_to_vector", [0, 33], [33], 0, 1, 0, ""),
    "smlal v0.8h, v1.8b, v2.8b": Line("imac", [33, 34, 32], [32], 3, 1, 8, ""),
    "smull2 v0.4s, v1.8h, v15.h[2]": Line("imac", [33, 47], [32], 0, 1, 4, ""),
    "sadalp v0.4s, v1.8h": Line("vaccumulate", [33, 32], [32], 2, 1, 0, ""),
    "mla v0.4s, v1.4s, v2.4s": Line("imac_q", [33, 34, 32], [32], 3, 1, 4, ""),
    "sqrdmlah v0.8h, v1.8h, v2.8h": Line("imac_q", [33, 34, 32], [32], 3, 1, 8, ""),
    "sqrdmlsh s0, s1, v2.s[0]": Line("imac", [33, 34, 32], [32], 3, 1, 1, ""),
    "pmull v0.1q, v1.1d, v2.1d": Line("imac", [33, 34], [32], 0, 1, 0, ""),
    "sdot v0.4s, v1.16b, v31.4b[2]": Line("dot", [33, 63, 32], [32], 3, 1, 16, ""),
    "udot v0.2s, v1.8b, v2.8b": Line("dot", [33, 34, 32], [32], 3, 1, 8, ""),
    "sudot v0.4s, v1.16b, v2.4b[0]": Line("dot", [33, 34, 32], [32], 3, 1, 16, ""),
    "bfdot v0.4s, v1.8h, v31.2h[1]": Line("dot", [33, 63, 32], [32], 3, 1, 8, ""),
    "bfmlalb v0.4s, v1.8h, v15.h[7]": Line("fma_q", [33, 47, 32], [32], 3, 1, 4, ""),
    "usmmla v0.4s, v1.16b, v2.16b": Line("matmul", [33, 34, 32], [32], 3, 1, 32, ""),
    "bfmmla v0.4s, v1.8h, v2.8h": Line("matmul", [33, 34, 32], [32], 3, 1, 16, ""),
    "bfcvt h0, s1": Line("fcvt_d", [33], [32], 0, 1, 0, ""),
    "orr v0.4s, #1": Line("valu_q", [32], [32], 0, 1, 0, ""),
    "bit v0.8b, v1.8b, v2.8b": Line("valu_d", [33, 34, 32], [32], 0, 1, 0, ""),
    "addhn2 v0.8h, v1.4s, v2.4s": Line("valu_q", [33, 34, 32], [32], 0, 1, 0, ""),
    "xtn2 v0.8h, v1.4s": Line("permute_q", [33, 32], [32], 0, 1, 0, ""),
    "sqxtn b0, h1": Line("vshift_d", [33], [32], 0, 1, 0, ""),
    "sqrshrun2 v0.16b, v1.8h, #4": Line("vshift_q", [33, 32], [32], 0, 1, 0, ""),
    "sri v0.2d, v1.2d, #3": Line("vshift_q", [33, 32], [32], 0, 1, 0, ""),
    "usra d0, d1, #3": Line("vaccumulate", [33, 32], [32], 2, 1, 0, ""),
    "tbx v0.8b, {v31.16b, v0.16b}, v2.8b": Line("table", [63, 32, 34, 32], [32], 0, 1, 0, ""),
    "mov v0.s[1], v2.s[3]": Line("permute_q", [34, 32], [32], 0, 1, 0, ""),
    "mov v0.s[1], w2": Line("general_to_vector", [2, 32], [32], 0, 1, 0, ""),
    "aese v0.16b, v1.16b": Line("valu_q", [33, 32], [32], 0, 1, 0, ""),
    "aesmc v0.16b, v1.16b": Line("valu_q", [33], [32], 0, 1, 0, ""),
    "sha256h q0, q1, v2.4s": Line("valu_q", [33, 34, 32], [32], 0, 1, 0, ""),
    "eor3 v0.16b, v1.16b, v2.16b, v3.16b": Line("valu_q", [33, 34, 35], [32], 0, 1, 0, ""),
}


def test_instructions_written_by_hand(decoder, binutils, tmp_path):
    assembled = tmp_path / "written.o"
    extensions = "armv8.6-a+crypto+sha3+fp16+fp16fml"
    text = "\n".join(WRITTEN) + "\n"
    subprocess.run([ASSEMBLER, f"-march={extensions}", "-", "-o", assembled], input=text, text=True, check=True)
    words = [word for word, _, _ in _disassemble(["-d", assembled])]
    assert dict(zip(WRITTEN, _decode(decoder, words), strict=True)) == WRITTEN
