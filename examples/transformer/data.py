"""The Free Spoken Digit Dataset: 3,000 recordings of the digits 0 to 9 by six speakers, 8 kHz, 16 bit, mono.

They are read from `$EDGEBUILD_SPOKEN_DIGITS` (a folder of WAV files, or a zip of one), else from `data/` beside this
file, and downloaded to there where they are missing.
"""

import io
import os
import re
import urllib.request
import wave
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgebuild.errors import TaskError

HERE = Path(__file__).parent
ARCHIVE = "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.zip"
VARIABLE = "EDGEBUILD_SPOKEN_DIGITS"
NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[a-z]+)_(?P<index>\d+)\.wav")
RATE = 8_000  # samples a second; a model sees one second
TEST = range(5)  # "Recordings numbered 0-4 (inclusive) are in the test" set, says the data set's README


@dataclass(frozen=True)
class Recording:
    """`samples` are float32 in [-1, 1), at 8 kHz, as long as they were recorded."""

    digit: int
    speaker: str
    index: int
    samples: np.ndarray


Recordings = tuple[Recording, ...]


def load(source: Path | None = None) -> tuple[Recordings, Recordings]:
    """The training and the test recordings, each in the order of digit, speaker and index.

    Raises TaskError where they cannot be had or read.
    """
    source = source or _source()
    recordings = sorted(_read(source), key=lambda r: (r.digit, r.speaker, r.index))
    train = tuple(recording for recording in recordings if recording.index not in TEST)
    test = tuple(recording for recording in recordings if recording.index in TEST)
    for name, split in {"training": train, "test": test}.items():
        if {recording.digit for recording in split} != set(range(10)):
            raise TaskError(
                f"{source} does not hold {name} recordings of all ten digits",
                f"they are named {{digit}}_{{speaker}}_{{index}}.wav; get them from {ARCHIVE}",
            )
    return train, test


def labels(recordings: Recordings) -> Tensor:
    """The digits, int64 [n]."""
    return torch.tensor([recording.digit for recording in recordings])


def one_second(samples: np.ndarray, shift: int = 0) -> np.ndarray:
    """A recording in the middle of a second of silence, `shift` samples later; what does not fit is cut off."""
    clip = np.zeros(RATE, np.float32)
    start = (RATE - len(samples)) // 2 + shift
    kept = samples[max(0, -start) : max(0, RATE - start)]
    clip[max(0, start) : max(0, start) + len(kept)] = kept
    return clip


# --------------------------------------------------------------------------------------------------------- files


def _source() -> Path:
    if named := os.environ.get(VARIABLE):
        if not Path(named).exists():
            raise TaskError(f"{VARIABLE} names {named}, which is not there", f"get the recordings from {ARCHIVE}")
        return Path(named)
    folder = HERE / "data"
    if not folder.is_dir() or not any(folder.rglob("*.wav")):
        archive = folder / "spoken-digits.zip"
        if not archive.is_file():
            _download(archive)
        return archive
    return folder


def _download(archive: Path) -> None:
    part = archive.with_suffix(".part")  # a download that was cut off shall not look like the archive
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(ARCHIVE, timeout=60) as answer, part.open("wb") as file:
            while piece := answer.read(1 << 20):
                file.write(piece)
        part.replace(archive)
    except OSError as error:  # URLError is one
        part.unlink(missing_ok=True)
        raise TaskError(
            f"the spoken digits are not in {archive.parent} and cannot be downloaded from {ARCHIVE}: {error}",
            f"put its recordings/*.wav there, or let {VARIABLE} name the folder or the zip that holds them",
        ) from None


def _read(source: Path) -> Iterator[Recording]:
    for name, content in _files(source):
        if match := NAME.fullmatch(name):
            samples = _samples(content, f"{source}: {name}")
            yield Recording(int(match["digit"]), match["speaker"], int(match["index"]), samples)


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Names without folders, and contents."""
    if source.is_dir():
        for path in source.rglob("*.wav"):
            yield path.name, path.read_bytes()
        return
    try:
        with zipfile.ZipFile(source) as archive:
            for name in archive.namelist():
                if name.endswith(".wav"):
                    yield Path(name).name, archive.read(name)
    except (zipfile.BadZipFile, OSError) as error:
        raise TaskError(f"{source} is neither a folder nor a whole zip: {error}", f"get it from {ARCHIVE}") from None


def _samples(content: bytes, where: str) -> np.ndarray:
    try:
        with wave.open(io.BytesIO(content)) as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise TaskError(f"{where} is no WAV file: {error}") from None
    if form != (1, 2, RATE):
        channels, width, rate = form
        raise TaskError(
            f"{where} has {channels} channel(s) of {8 * width} bit at {rate} Hz", f"mono, 16 bit, {RATE} Hz is needed"
        )
    return np.frombuffer(raw, "<i2").astype(np.float32) / 32768
