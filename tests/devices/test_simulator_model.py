"""The simulator's model of cores and memory, without qemu, against what follows from the target's figures."""

import itertools
import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgebuild import catalog
from edgebuild.devices import simulator, toolchain
from edgebuild.spec import Core, Target

SOURCES = toolchain.NATIVE / "simulator"
LINE = 64
FAR = 1 << 30  # an address away from the others
MIB = 1 << 20


def _machines() -> dict[str, Target]:
    """A target for each cluster, so that each core that is shipped comes in."""
    found = {}
    for name in catalog.names("targets"):
        target = catalog.load_target(name)
        for cluster in target.cluster if target.device == "arm" else ():
            found[f"{name}-{cluster.name}"] = replace(target, cluster=(cluster,))
    return found


MACHINES = _machines()
CORES = {target.cluster[0].model.name: target for target in MACHINES.values()}
every_machine = pytest.mark.parametrize("target", MACHINES.values(), ids=MACHINES)
every_core = pytest.mark.parametrize("target", CORES.values(), ids=CORES)


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("cc is not installed; get it with `apt-get install -y gcc`")
    program = tmp_path_factory.mktemp("bench") / "bench"
    parts = [SOURCES / f"{name}.c" for name in ("core", "decode", "description", "footprint")]
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    flags = ("-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *sanitizers)
    source = Path(__file__).with_name("simulator_bench.c")
    subprocess.run([compiler, *flags, f"-I{SOURCES}", source, *parts, "-o", program], check=True)
    return program


@pytest.fixture
def drive(bench, tmp_path):
    """Runs a script of simulator_bench.c on a machine, and returns what it printed."""

    def run(target: Target, *script: str, threads: int = 1) -> list[Any]:
        described = tmp_path / "machine"
        described.write_text(simulator.description(target, threads))
        done = subprocess.run([bench, described], input="\n".join(script) + "\n", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


# ---------------------------------------------------------------------------------------------------- instructions


def fmla(to: int, one: int = 30, other: int = 31) -> str:
    return f"{0x4E20CC00 | other << 16 | one << 5 | to:x}"  # FMLA V.4S, V.4S, V.4S


def add(to: int, source: int) -> str:
    return f"{0x91000400 | source << 5 | to:x}"  # ADD X, X, #1


def load(to: int, base: int = 20) -> str:
    return f"{0xF9400000 | base << 5 | to:x}"  # LDR X, [X]


def load_q(to: int, base: int = 20) -> str:
    return f"{0x3DC00000 | base << 5 | to:x}"  # LDR Q, [X]


def store_q(source: int, base: int = 20) -> str:
    return f"{0x3D800000 | base << 5 | source:x}"  # STR Q, [X]


def load_four(to: int, base: int = 20) -> str:
    return f"{0x4C402800 | base << 5 | to:x}"  # LD1 { V.4S - V.4S }, [X]


def load_two(to: int, base: int = 20) -> str:
    return f"{0x4C40A800 | base << 5 | to:x}"  # LD1 { V.4S, V.4S }, [X]


def store_four(source: int, base: int = 20) -> str:
    return f"{0x4C002800 | base << 5 | source:x}"  # ST1 { V.4S - V.4S }, [X]


ADD_AND_SET_FLAGS = "b1000400"  # ADDS X0, X0, #1
BRANCH_IF_EQUAL = "54000040"


def loop(times: int, *body: str) -> str:
    return "\n".join([f"run {times}", *body, "end"])


def least_cycles(core: Core, *classes: str) -> float:
    """For one of each: no set of ports can do what only it can do in less, and the front end has its width."""
    slots = [slot for name in classes for slot in core.slots(name)]
    busiest = 0.0
    for count in range(1, len(core.ports) + 1):
        for ports in itertools.combinations(core.ports, count):
            work = sum(cycles for wanted, cycles in slots if set(wanted) <= set(ports))
            busiest = max(busiest, work / count)
    in_order = core.pipeline.order == "in-order"
    taken_in = sum(1 if in_order else core.of(name).micro_ops for name in classes)
    return max(busiest, taken_in / core.pipeline.width)


def per_turn(drive, target: Target, *body: str, times: int = 2000) -> float:
    """Cycles for each turn of a loop, with the caches warm."""
    warm, whole = drive(target, loop(100, *body), "report", loop(times, *body), "report")
    return (whole["cycles"] - warm["cycles"]) / times


# ---------------------------------------------------------------------------------------------------------- cores


@every_core
def test_dependent_multiply_accumulates_wait_for_the_accumulator(drive, target):
    fma = target.cluster[0].model.of("fma_q")
    assert per_turn(drive, target, fmla(0)) == pytest.approx(fma.accumulate or fma.latency, rel=0.01)


@every_core
def test_multiply_accumulates_wait_for_factors_as_long_as_any_result_takes(drive, target):
    fma = target.cluster[0].model.of("fma_q")
    assert per_turn(drive, target, fmla(0, one=0)) == pytest.approx(fma.latency, rel=0.01)


@every_core
def test_independent_multiply_accumulates_run_at_the_throughput_of_the_ports(drive, target):
    wanted = 16 * least_cycles(target.cluster[0].model, "fma_q")
    assert per_turn(drive, target, *map(fmla, range(16))) == pytest.approx(wanted, rel=0.01)


@every_core
def test_a_chain_of_additions(drive, target):
    wanted = target.cluster[0].model.of("alu").latency
    assert per_turn(drive, target, add(0, 0)) == pytest.approx(wanted, rel=0.01)


@every_core
def test_different_instructions_issue_together(drive, target):
    model = target.cluster[0].model
    wanted = 8 * least_cycles(model, "fma_q", "alu")
    body = [line for i in range(8) for line in (fmla(i), add(i, i))]
    assert per_turn(drive, target, *body) == pytest.approx(wanted, rel=0.02)


@every_core
@pytest.mark.parametrize(
    ("word", "size", "classes"),
    [
        (load, 8, ["load"]),
        (load_q, 16, ["load_q"]),
        (load_two, 32, ["load_multiple"]),
        (load_four, 64, ["load_multiple"] * 2),
        (store_four, 64, ["store_q"] * 4),
    ],
)
def test_accesses_to_l1_run_at_the_throughput_of_the_ports(drive, target, word, size, classes):
    wanted = 4 * least_cycles(target.cluster[0].model, *classes)
    if word in (load_two, load_four, store_four) and target.cluster[0].model.pipeline.order == "in-order":
        wanted = max(wanted, 4.0)  # nothing issues along with it
    body = [f"{word(4 * i)} {FAR} {size} 0" for i in range(4)]
    assert per_turn(drive, target, *body) == pytest.approx(wanted, rel=0.02)


@every_core
def test_a_load_that_waits_for_a_load(drive, target):
    wanted = target.cluster[0].model.of("load").latency
    assert per_turn(drive, target, f"{load(0, 0)} {FAR} 8 0") == pytest.approx(wanted, rel=0.01)


@every_core
def test_a_branch_guessed_wrong_costs_what_the_target_says(drive, target):
    # Each branch waits for a chain that the next turn goes on with, so that nothing can be done ahead of it.
    length, turns = 20, 5020
    chain = [ADD_AND_SET_FLAGS] * length
    pattern = "".join(random.Random(0).choices("tn", k=251))
    taken, not_taken, missed = (
        drive(target, loop(turns, *chain, f"branch {BRANCH_IF_EQUAL} 4096 {which}"), "report")[0]
        for which in ("t", "n", pattern)
    )
    share = pattern.count("t") / len(pattern)
    assert taken["mispredictions"] < 20 and not_taken["mispredictions"] == 0
    assert length * turns <= not_taken["cycles"] <= taken["cycles"] <= (length + 2) * turns
    wrong = missed["mispredictions"]
    assert wrong > 300
    cost = (missed["cycles"] - share * taken["cycles"] - (1 - share) * not_taken["cycles"]) / wrong
    assert cost == pytest.approx(target.cluster[0].model.pipeline.mispredict, abs=2)
    # Being guessed wrong is put down to latency, as is the chain.
    assert missed["bounds"]["latency"] >= 0.8 * missed["cycles"]


@every_core
def test_bounds_sum_to_cycles(drive, target):
    chance = random.Random(0)
    script = []
    for _ in range(300):
        kind = chance.choice([load, load_q, store_q, load_four])
        size = {load: 8, load_q: 16, store_q: 16, load_four: 64}[kind]
        body = [
            f"{kind(chance.randrange(16))} {FAR + chance.randrange(4 * MIB)} {size} {chance.choice([0, 16, 64, -64])}",
            fmla(chance.randrange(8), chance.randrange(16)),
            add(chance.randrange(8), chance.randrange(8)),
            f"branch {BRANCH_IF_EQUAL} {chance.randrange(4096)} {chance.choice(['t', 'n', 'tnntt'])}",
        ]
        script += [f"core {chance.randrange(2)}", loop(chance.randrange(1, 20), *chance.sample(body, 4))]
    script += ["core 1", "wait 1000000", "report", "core 0", "report"]
    reports = drive(target, *script, threads=2)
    for report in reports:
        assert sum(report["bounds"].values()) == report["cycles"] > 0
        assert report["bounds"]["memory"] > 0
    assert reports == drive(target, *script, threads=2)  # random replacement too: the same from run to run


# --------------------------------------------------------------------------------------------------------- memory


def chase(drive, target: Target, lines: int, steps: int, warm: bool) -> float:
    word = load(0, 0)
    before, after = drive(
        target,
        *([f"chase {word} {FAR} {lines} {lines}"] if warm else []),
        *("report", f"chase {word} {FAR} {lines} {steps}", "report"),
    )
    return (after["cycles"] - before["cycles"]) / steps


def lines_within(size: float) -> int:
    """A power of two that takes up to half of a cache, which is found there whatever is replaced."""
    return 1 << (int(size / 2) // LINE).bit_length() - 1


@every_machine
def test_a_chain_of_loads_takes_the_latency_of_the_level_that_holds_them(drive, target):
    cluster, clock = target.cluster[0], target.cluster[0].clock.rate
    in_l1 = cluster.model.of("load").latency
    below = in_l1 + cluster.l2.latency
    lines = lines_within(cluster.l2.size)
    # Some lines are still in L1 when their turn comes again.
    assert chase(drive, target, lines, lines, True) == pytest.approx(below, rel=0.06)
    if target.l3 is not None:
        lines = lines_within(target.l3.size)
        assert chase(drive, target, lines, 20_000, True) == pytest.approx(below + target.l3.latency, rel=0.06)
    wanted = in_l1 + target.memory.latency * clock
    assert chase(drive, target, 1 << 20, 2000, False) == pytest.approx(wanted, rel=0.02)


def stream(start: int, size: int) -> str:
    return loop(size // LINE, *(f"{load_q(i)} {start + 16 * i} 16 {LINE}" for i in range(4)))


@every_machine
def test_one_core_reads_at_the_bandwidth_of_one(drive, target):
    cluster = target.cluster[0]
    clock = cluster.clock.rate
    (report,) = drive(target, stream(FAR, 2 * MIB), "report")
    wanted = min(target.memory.one_core, LINE * clock / cluster.l2.interval)
    assert report["bytes"] == pytest.approx(2 * MIB, rel=0.01)
    assert 2 * MIB / report["cycles"] * clock == pytest.approx(wanted, rel=0.03)


@every_machine
def test_all_cores_read_at_the_bandwidth_of_all(drive, target):
    cluster = target.cluster[0]
    clock = cluster.clock.under(cluster.count, cluster.count)
    each, piece = MIB // 2, 8192
    script = [
        f"core {core}\n" + stream(FAR * (core + 1) + at, piece)
        for at in range(0, each, piece)
        for core in range(cluster.count)
    ]
    script += [f"core {core}\nreport" for core in range(cluster.count)]
    cycles = max(report["cycles"] for report in drive(target, *script, threads=cluster.count))
    every = LINE * clock / (cluster.l2.interval / cluster.count)
    if cluster.l2.shared:
        every = min(every, LINE * clock / (cluster.l2.interval_all or cluster.l2.interval))
    wanted = min(target.memory.all_cores, target.memory.one_core * cluster.count, every)
    assert each * cluster.count / cycles * clock == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("interval", [3.7, 42.0, 250.0, 300.0, 600.0])
@pytest.mark.parametrize(
    ("step", "modulus"), [(0, 1), (1, 1 << 40), (7919, 20_000), (19_999, 20_000)], ids=["still", "on", "to-fro", "back"]
)
def test_a_channel_never_serves_faster_than_its_rate(drive, interval, step, modulus):
    count = 4000
    (last,) = drive(CORES["cortex-a53"], f"channel {interval} {count} 0 {step} {modulus}")
    assert last >= (count - 1) * interval - 256  # a window
    if modulus < 1 << 40:
        # Nor much slower: what nobody could ask for before the last request came is the only loss.
        assert last <= count * interval + 20_000 + 256


def test_what_another_core_writes_is_lost_to_those_that_have_it(drive):
    for target in CORES.values():
        number = FAR // LINE
        read, write = f"{load(1)} {FAR} 8 0", f"{store_q(1)} {FAR} 16 0"
        found = drive(
            target,
            *("core 1", loop(1, read), f"holds 1 {number}", f"holds 2 {number}"),
            *("core 0", loop(1, write), f"holds 1 {number}"),
            *("core 1", f"holds 1 {number}", f"holds 2 {number}", loop(1, read), "report"),
            threads=2,
        )
        assert found[:3] == [1, 1, 2]
        assert found[3:5] == [0, int(target.cluster[0].l2.shared)]
        assert found[5]["l1"] == 2


def test_what_was_lost_makes_room_before_what_is_in_use(drive):
    target = CORES["cortex-a72"]
    l1 = target.cluster[0].l1d
    assert l1.replacement != "random" and l1.ways == 2
    apart = int(l1.size) // l1.ways  # two addresses so far apart share a set
    lines = [FAR, FAR + apart, FAR + 2 * apart]
    found = drive(
        target,
        *("core 1", *(loop(1, f"{load(1)} {line} 8 0") for line in lines[:2])),
        *("core 0", loop(1, f"{store_q(1)} {lines[1]} 16 0")),
        *("core 1", loop(1, f"{load(1)} {lines[2]} 8 0"), *(f"holds 1 {line // LINE}" for line in lines)),
        threads=2,
    )
    assert found == [1, 0, 1]


def test_a_stream_downward_ends_at_the_first_line(drive):
    target = CORES["cortex-a72"]
    (report,) = drive(target, loop(64, f"{load_q(1)} {63 * LINE} 16 {-LINE}"), "report")
    assert report["bytes"] == 64 * LINE


# ------------------------------------------------------------------------------------------------------ footprints

BLOCK = (1 << 16) // LINE  # lines of a block of memory


def test_pieces_that_are_left_out_touch_what_the_two_before_them_let_expect(drive):
    # Line 1000 is read by all pieces; four lines are read from 2000, 2004, ... on, and two written from 9000, 8998, ...
    script = []
    for which in range(2):
        script += [f"piece {which} 1000 1 0", f"piece {which} {2000 + 4 * which} 4 0"]
        script += [f"piece {which} {2000 + 4 * which} 4 0", f"piece {which} {9000 - 2 * which} 2 1"]
    script.append("continue 3 100000")
    # Blocks of memory are numbered as they are touched, and `holds` wants numbers.
    lines = {1000: 1, **dict.fromkeys(range(2008, 2020), 1), **dict.fromkeys(range(8992, 8998), 2)}
    numbers: dict[int, int] = {}
    pieces = ((range(2008 + 4 * i, 2012 + 4 * i), range(8996 - 2 * i, 8998 - 2 * i)) for i in range(3))
    order = [line for piece in pieces for lines_of_run in piece for line in lines_of_run]
    for line in [*order, 1000]:
        numbers.setdefault(line // BLOCK, len(numbers))
    asked = [*lines, 2020]
    numbers.setdefault(2020 // BLOCK, len(numbers))
    script += [f"holds 2 {numbers[line // BLOCK] * BLOCK + line % BLOCK}" for line in asked]
    alike, *found = drive(CORES["cortex-a72"], *script)
    assert alike == 1
    assert dict(zip(asked, found, strict=True)) == {**lines, 2020: 0}


def test_pieces_that_differ_are_not_continued(drive):
    script = ["piece 0 1000 4 0", "piece 1 1000 4 0", "piece 1 3000 4 0", "continue 3 1000", "holds 2 0"]
    assert drive(CORES["cortex-a72"], *script) == [0, 0]


# ---------------------------------------------------------------------------------------------------- descriptions


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        ("class fma_q ", None, "no class fma_q"),
        ("l2 ", None, "a figure is missing or out of range"),
        ("class alu ", "class alu 1 0 1 16777216:1", "not understood: class alu 1 0 1 16777216:1"),
        ("class alu ", "class alu 1 0 1 1:1 1:1", "class alu wants a port twice"),
        ("misses ", "misses 0 4", "a figure is missing or out of range"),
        ("cores ", "cores 17 0", "a figure is missing or out of range"),
        ("pipeline ", "pipelines 1", "not understood: pipelines 1"),
    ],
)
def test_a_description_that_is_not_whole_is_refused(bench, tmp_path, was, becomes, message):
    lines = simulator.description(CORES["cortex-a53"], 1).splitlines()
    (line,) = (line for line in lines if line.startswith(was))
    path = tmp_path / "machine"
    path.write_text("".join(f"{text}\n" for text in (becomes if text == line else text for text in lines) if text))
    done = subprocess.run([bench, path], input="", capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{path}: {message}")


# -------------------------------------------------------------------------------------------------------- compilers


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_plugin_compiles_without_warnings(tmp_path, compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    assert "-Werror" in toolchain.PLUGIN_FLAGS
    sources = sorted(SOURCES.glob("*.c"))
    done = subprocess.run(
        [compiler, *toolchain.PLUGIN_FLAGS, *sources, "-o", tmp_path / "plugin.so"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
