"""A real device, a board or a computer, reached through ssh; figures are measured on it.

The runner and its libraries are copied once and kept on the device under a name that stands for their content, below
~/.cache/edgebuild there. A measurement leaves nothing else behind.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgebuild.devices import remote, runtime, sysfs, timing
from edgebuild.devices.device import Arrays, Device
from edgebuild.devices.guest import Guest, start
from edgebuild.devices.remote import Connection, quoted
from edgebuild.devices.turn import turn
from edgebuild.errors import DeviceError
from edgebuild.spec import CalibrationError, LayerFacts, Measurement, Precision, Target

# What the loader says where it cannot start a program; the last two are the shell's.
_LOADER_SIGNS = ("kernel too old", "error while loading shared libraries", "symbol lookup error", "GLIBC_")
_NOT_STARTED = ("Exec format error", "cannot execute", "Permission denied", "not found")


def check(target: Target) -> None:
    """Reach the device and put the runtime there, and make what predicts its latency ready.

    Raises MissingEnvironment for what is missing here, DeviceError where the device cannot be reached or used.
    """
    with _connected(target):
        pass
    device, base = _predictor(target)
    device.check(base)


@contextmanager
def load(artifact: Path, target: Target, threads: int) -> Iterator[Guest]:
    """Load a `.pte` on the device. Raises MissingEnvironment, and DeviceError where it cannot be loaded."""
    with _connected(target) as (connection, place), _loaded(connection, place, artifact, threads) as guest:
        yield guest


def measure(
    artifact: Path,
    target: Target,
    threads: int,
    inputs: Sequence[Arrays],
    layers: Sequence[tuple[LayerFacts, Precision]],
    enough: timing.Enough = timing.once,
) -> tuple[Measurement, ...]:
    """Latency, throughput and peak memory of the artifact, on the first of `inputs`; `layers` are not needed.

    An inference is what a caller on the device waits for: handing in the inputs and running.
    """
    assert target.ssh is not None
    with turn(target.ssh.host), _connected(target) as (connection, place):
        before = sysfs.read(connection)
        with _loaded(connection, place, artifact, threads) as guest:
            guest.run(inputs[0])

            def time(warm_ups: int, runs: int) -> timing.Nanoseconds:
                return guest.time(inputs[0], warm_ups, runs)

            found, settled = timing.settle(time)
            found = timing.go_on(found, enough, lambda seconds: timing.settle(time, seconds, seconds)[0])
        notes = sysfs.notes(before, sysfs.read(connection), threads)
    count = f"{len(found)} runs with {threads} thread{'s' if threads > 1 else ''}"
    detail = "; ".join([connection.system, count, timing.spread(found, settled), *notes])
    memory = guest.peak_memory(target.name, "measured")
    return (*timing.measurements(target.name, found, detail), memory)


def layer_latency(layer: LayerFacts, precision: Precision, target: Target, threads: int) -> float:
    """Predicted seconds of one layer, by the device of the target that `costs_of` names."""
    device, base = _predictor(target)
    return device.layer_latency(layer, precision, base, threads)


def layer_latencies(
    layers: Sequence[tuple[LayerFacts, Precision]], target: Target, threads: int
) -> NDArray[np.float64]:
    """Predicted seconds of each of many layers, likewise."""
    device, base = _predictor(target)
    return device.layer_latencies(layers, base, threads)


def call_latency(target: Target, threads: int) -> float:
    """Predicted seconds of an inference beside its layers, likewise."""
    device, base = _predictor(target)
    return device.call_latency(base, threads)


def calibration_error(target: Target, threads: int) -> tuple[CalibrationError, ...]:
    """How far off those predictions are on the target that they were made for."""
    device, base = _predictor(target)
    return device.calibration_error(base, threads)


def _predictor(target: Target) -> tuple[Device, Target]:
    from edgebuild.devices import DEVICES  # the registry holds this module too

    assert target.costs_of is not None
    return DEVICES[target.costs_of.device], target.costs_of


@contextmanager
def _connected(target: Target) -> Iterator[tuple[Connection, str]]:
    """A connection, and the folder on the device that the runtime is in."""
    assert target.ssh is not None
    with remote.connect(target.ssh, target.name) as connection:
        if connection.machine not in runtime.LOADERS:
            raise DeviceError(
                f"{target.name} is a machine of kind {connection.machine!r}",
                f"the runner is built for {' and '.join(runtime.LOADERS)}",
            )
        yield connection, _put_runtime(connection)


def _put_runtime(connection: Connection) -> str:
    """Copy the runtime to the device unless it is there: whole or not at all."""
    packed = _packed(runtime.folder(connection.machine))
    place = f"{connection.store}/{packed.name}"
    if connection.run(f"test -f {quoted(place)}/{runtime.COMPLETE} && echo there || true").strip() != "there":
        connection.run(
            f"store={quoted(connection.store)} place={quoted(place)}\n"
            'mkdir -p "$store" && part=$(mktemp -d "$store/.part-XXXXXX") || exit 1\n'
            "trap 'rm -rf \"$part\"' EXIT\n"
            "trap 'exit 1' HUP INT PIPE TERM\n"
            f'tar -xf - -C "$part" && test -f "$part/{runtime.COMPLETE}" || exit 1\n'
            f'test -f "$place/{runtime.COMPLETE}" || mv "$part" "$place"\n',
            packed.data,
            remote.TRANSFER_TIMEOUT,
        )
    return place


_packed = cache(runtime.pack)


@contextmanager
def _loaded(connection: Connection, place: str, artifact: Path, threads: int) -> Iterator[Guest]:
    what = f"{artifact.name} on {connection.name}"
    if artifact.suffix != ".pte":
        raise DeviceError(f"{what}: a {artifact.suffix or 'nameless'} file", "a device over ssh runs .pte files")
    if not artifact.is_file():
        raise DeviceError(f"{what}: there is no file {artifact}")
    model = f"{connection.folder}/model.pte"
    remote.send(connection, artifact, model)
    # In the background, for its number; a shell gives what runs there no input unless told to.
    script = (
        f"place={quoted(place)} dir={quoted(connection.folder)}\n"
        "exec 3<&0\n"
        f'{runtime.command("$place", connection.machine)} "$dir/model.pte" {threads} <&3 &\n'
        'echo $! >"$dir/pid"\n'
        "exec 3<&-\n"
        "wait $!\n"
        "code=$?\n"
        'rm -f "$dir/pid"\n'
        "exit $code\n"
    )
    with ExitStack() as stack:
        try:
            guest = stack.enter_context(start(connection.words(script), what, None, remote.LOST))
        except DeviceError as error:
            raise _explained(error) from None
        yield guest


def _explained(error: DeviceError) -> DeviceError:
    """The same error, with a remedy where the program could not be started at all."""
    if any(sign in error.what for sign in _LOADER_SIGNS):
        return DeviceError(error.what, "the device's kernel or libraries are too old for the runner; update its system")
    if "code 126" in error.what or "code 127" in error.what or any(sign in error.what for sign in _NOT_STARTED):
        return DeviceError(error.what, "the device cannot run programs from its home folder, or is of another kind")
    return error
