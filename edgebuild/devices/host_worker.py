"""The process that an artifact runs in; requests on stdin, answers on stdout.

`host_worker.py ARTIFACT THREADS` runs it in this machine's runtime, with `reference` behind it by `devices.reference`.

A frame is MAGIC, the sizes of a JSON header (uint32) and of a body (uint64), then both; the body holds tensors "0",
"1", ... as safetensors. The worker first says `{}` (or `{"error": ...}`), then answers each request in turn:

    load    {}                            loads the artifact
    run     {}                            tensors in, the outputs of one inference out
    many    {}                            samples stacked in a new dimension 0, run one by one; outputs stacked likewise
    verify  {cases, atol}                 runs the test cases of a bundled program, and compares their outputs
    memory  {}                            loads the artifact and runs it; `base` and `peak` resident bytes, `exact`
    time    {method, at_least, at_most, cpu}   nanoseconds of each run, int64, in seconds' bounds; `settled`
    facts   {}                            of a microcontroller's program: bytes planned, operators, flags of delegates
    streams {}                            of the same: the commands and the weights of each delegate

Every answer is `{...}` or `{"error": ...}`. The parent imports this file for the frames, so torch is imported late.
"""

import ctypes
import gc
import json
import os
import runpy
import signal
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterable
from typing import IO, Any

MAGIC = b"EBHW"
_SIZES = struct.Struct("<4sIQ")
_LONGEST_HEADER = 1 << 20

Call = Callable[[tuple[Any, ...]], Any]

WARM_UP = 10  # runs before the first that counts
MEMORY_RUNS = 3  # TorchScript compiles in its second run
MIN_RUNS = 50
SLICE = 100_000_000  # ns between two looks at whether the median has settled
AGREEMENT = 0.02  # relative difference of the medians of the two halves


def write_frame(stream: IO[bytes], header: dict[str, Any], body: bytes = b"") -> None:
    """Send a frame."""
    text = json.dumps(header).encode()
    stream.write(_SIZES.pack(MAGIC, len(text), len(body)) + text)
    stream.write(body)
    stream.flush()


def read_frame(stream: IO[bytes], most: int = sys.maxsize) -> tuple[dict[str, Any], bytes]:
    """Receive a frame with a body of at most `most` bytes.

    Raises EOFError where the stream ends, ValueError where it holds something else.
    """
    magic, header_size, body_size = _SIZES.unpack(_exactly(stream, _SIZES.size))
    if magic != MAGIC or header_size > _LONGEST_HEADER or body_size > most:
        raise ValueError(f"{magic!r} and sizes of {header_size:,} and {body_size:,} bytes start no frame")
    return json.loads(_exactly(stream, header_size)), _exactly(stream, body_size)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


# --------------------------------------------------------------------------------------------------- the worker


def main(artifact: str, threads: int, kind: str = "") -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what libraries print must not end up between the frames
    try:
        model = _model(artifact, threads, kind)
    except Exception as error:
        return write_frame(answers, {"error": _reason(error)})
    gc.collect()
    gc.freeze()  # `time` collects before each series; the libraries' own objects would make that the longest part
    write_frame(answers, {})
    while True:
        try:
            header, body = read_frame(requests)
        except EOFError:
            return
        try:
            answer, outputs = _OPERATIONS[header.pop("op")](model, _unpack(body), **header)
            frame = answer, _pack(outputs)
        except Exception as error:  # whatever the runtime raises is the answer
            frame = {"error": _reason(error)}, b""
        write_frame(answers, *frame)


class _Pte:
    """An ExecuTorch program."""

    def __init__(self, path: str, threads: int):
        # Both libraries resolve their symbols in torch's. `portable_lib` would import the whole exporter as well.
        import torch
        from executorch.extension.pybindings import _C as runtime

        torch.set_num_threads(1)
        runtime._unsafe_reset_threadpool(threads)
        if (found := runtime._threadpool_get_thread_count()) != threads:
            raise RuntimeError(f"asked for {threads} threads, the runtime took {found}")
        self.path, self.runtime = path, runtime
        self.program: Any = None
        self.methods: dict[str, Any] = {}

    def method(self, name: str) -> Call:
        if self.program is None:
            check = self.runtime.Verification.InternalConsistency  # of the file: else a flipped bit may be a crash
            self.program = self.runtime._load_program(self.path, program_verification=check)
        if name not in self.methods:
            self.methods[name] = self.program.load_method(name)
        method = self.methods[name]
        return lambda inputs: method(inputs, False)  # outputs stay in the program's memory until the next run

    def verify(self, cases: int, atol: float) -> None:
        with open(self.path, "rb") as file:
            bundled = self.runtime._load_bundled_program_from_buffer(file.read())
        for case in range(cases):
            bundled.verify_result_with_bundled_expected_output("forward", case, 0.0, atol)


class _TorchScript:
    """A TorchScript module."""

    def __init__(self, path: str, threads: int):
        import torch

        torch.set_grad_enabled(False)
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        if (found := torch.get_num_threads()) != threads:
            raise RuntimeError(f"asked for {threads} threads, PyTorch took {found}")
        self.path = path
        self.module: Any = None

    def method(self, name: str) -> Call:
        import torch

        if self.module is None:
            self.module = torch.jit.load(self.path, map_location="cpu").eval()
        method = getattr(self.module, name)
        return lambda inputs: method(*inputs)


def _model(artifact: str, threads: int, kind: str) -> Any:
    if kind == "reference":
        import tempfile

        # The exporter's libraries ask for temporary folders when they are imported; a confined process can make none.
        tempfile.tempdir = os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.dirname(artifact)
        import torch

        torch.set_num_threads(1)
        # by its path: the package is not on sys.path
        beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "reference.py")
        return runpy.run_path(beside)["Reference"](artifact)
    return _Pte(artifact, threads) if artifact.endswith("pte") else _TorchScript(artifact, threads)


_Model = Any  # _Pte, _TorchScript or Reference
_Answer = tuple[dict[str, Any], list[Any]]


def _load(model: _Model, inputs: tuple[Any, ...]) -> _Answer:
    model.method("forward")
    return {}, []


def _run(model: _Model, inputs: tuple[Any, ...]) -> _Answer:
    return {}, _flat(model.method("forward")(inputs))


def _many(model: _Model, inputs: tuple[Any, ...]) -> _Answer:
    import torch

    call = model.method("forward")
    # Clones, since the next run writes over them.
    outputs = [[tensor.clone() for tensor in _flat(call(sample))] for sample in zip(*inputs, strict=True)]
    return {}, [torch.stack(tensors) for tensors in zip(*outputs, strict=True)]


def _verify(model: _Model, inputs: tuple[Any, ...], cases: int, atol: float) -> _Answer:
    model.verify(cases, atol)
    return {}, []


def _facts(model: _Model, inputs: tuple[Any, ...]) -> _Answer:
    return model.facts(), []


def _streams(model: _Model, inputs: tuple[Any, ...]) -> _Answer:
    return {}, model.streams()


def _memory(model: _Model, inputs: tuple[Any, ...]) -> _Answer:
    base, highest, reset = _at_rest()
    call = model.method("forward")
    for _ in range(MEMORY_RUNS):
        call(inputs)
    peak = _status("VmHWM")
    exact = reset or peak > highest
    return {"base": base, "peak": peak if exact else _status("VmRSS"), "exact": exact}, []


def _time(model: _Model, inputs: tuple[Any, ...], method: str, at_least: float, at_most: float, cpu: bool) -> _Answer:
    import torch

    call, clock = model.method(method), time.process_time_ns if cpu else time.perf_counter_ns
    for _ in range(WARM_UP):
        call(inputs)
    gc.collect()
    gc.disable()
    found: list[int] = []
    started = clock()
    settled = False
    while not settled and clock() - started < at_most * 1e9:
        stop = clock() + min(SLICE, int(at_most * 1e9))
        after = 0
        while after < stop:
            before = clock()
            call(inputs)
            after = clock()
            found.append(after - before)
        settled = after - started >= at_least * 1e9 and len(found) >= MIN_RUNS and agree(found)
    gc.enable()
    return {"settled": settled}, [torch.tensor(found, dtype=torch.int64)]


_OPERATIONS: dict[str, Callable[..., _Answer]] = {
    "load": _load,
    "run": _run,
    "many": _many,
    "verify": _verify,
    "memory": _memory,
    "time": _time,
    "facts": _facts,
    "streams": _streams,
}


def agree(found: list[int]) -> bool:
    """Whether the medians of the two halves of the runs are close."""
    half = len(found) // 2
    first, second = statistics.median(found[:half]), statistics.median(found[half:])
    return abs(first - second) <= AGREEMENT * min(first, second)


# -------------------------------------------------------------------------------------------------------- memory


def _at_rest() -> tuple[int, int, bool]:
    """Resident bytes of the empty runtime, the highest so far, and whether the kernel let that mark be reset.

    The libraries' own pages are brought in first and the heap's free pages given back: else a model would be charged
    for the runtime's code that it is the first to run, or get for nothing what an import left behind.
    """
    gc.collect()
    _touch_libraries()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # proc(5): resets the peak resident set size
        reset = True
    except OSError:
        reset = False
    return _status("VmRSS"), _status("VmHWM"), reset


def _touch_libraries() -> None:
    page, memory = os.sysconf("SC_PAGESIZE"), os.open("/proc/self/mem", os.O_RDONLY)
    try:
        with open("/proc/self/maps") as file:
            maps = [line.split(maxsplit=5) for line in file]
        for span, mode, *_, path in (fields for fields in maps if len(fields) == 6):
            if mode.startswith("r") and ".so" in path:
                start, end = (int(address, 16) for address in span.split("-"))
                for address in range(start, end, page):
                    os.pread(memory, 1, address)
    finally:
        os.close(memory)


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


# ------------------------------------------------------------------------------------------------------- tensors


def _flat(outputs: Any) -> list[Any]:
    import torch

    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, (list, tuple)):
        return [tensor for output in outputs for tensor in _flat(output)]
    return [outputs if isinstance(outputs, torch.Tensor) else torch.as_tensor(outputs)]


def _pack(tensors: Iterable[Any]) -> bytes:
    import torch
    from safetensors.torch import save

    # Clones, since safetensors refuses tensors that share memory.
    packed = {str(i): tensor.clone(memory_format=torch.contiguous_format) for i, tensor in enumerate(tensors)}
    return save(packed) if packed else b""


def _unpack(body: bytes) -> tuple[Any, ...]:
    from safetensors.torch import load

    tensors = load(body) if body else {}
    return tuple(tensors[str(i)] for i in range(len(tensors)))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # TorchScript ends a traceback of its own with the cause; the others begin with it.
    cause = lines[-1] if lines and "Traceback" in str(error) else next(iter(lines), "")
    name = type(error).__name__
    return cause if cause.startswith(f"{name}: ") else f"{name}: {cause}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
