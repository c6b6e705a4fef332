"""examples/keywords: sound to coefficients, where recordings come from and, where they are there, the real thing."""

import http.server
import importlib
import os
import re
import shutil
import socket
import sys
import threading
import wave
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from edgebuild import load, pipeline
from edgebuild.errors import TaskError
from edgebuild.pipeline import Request

FOLDER = Path(__file__).parent.parent.parent / "examples" / "keywords"
RATE = 8_000


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The example's modules, imported as its scripts do; forgotten afterwards, as other examples use the same names."""
    names = ("data", "features", "model", "task")
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture
def data(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delenv("EDGEBUILD_SPOKEN_DIGITS", raising=False)
    return modules["data"]


def tone(hertz: float, seconds: float = 1.0, loudness: float = 0.3) -> np.ndarray:
    return (loudness * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each digit twice for the test set and twice for training, as tones of its own."""
    folder = tmp_path_factory.mktemp("spoken") / "recordings"
    folder.mkdir()
    for digit in range(10):
        for index in (0, 4, 5, 12):
            write(folder / f"{digit}_ann_{index}.wav", tone(300 + 100 * digit, 0.3 + 0.01 * index))
    return folder


@pytest.fixture(scope="module")
def archive(recordings: Path) -> Path:
    """A zip like GitHub's: a folder at the top, and other files beside the recordings."""
    path = recordings.parent / "spoken.zip"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("free-spoken-digit-dataset-1.0.10/README.md", "text")
        for file in recordings.iterdir():
            made.write(file, f"free-spoken-digit-dataset-1.0.10/recordings/{file.name}")
    return path


# ------------------------------------------------------------------------------------------------------- features


def test_a_recording_lies_in_the_middle_of_a_second_or_is_cut(data: ModuleType) -> None:
    short, long = np.ones(2_000, np.float32), np.arange(10_000, dtype=np.float32)
    assert np.flatnonzero(data.one_second(short)).tolist() == list(range(3_000, 5_000))
    assert np.flatnonzero(data.one_second(short, 500)).tolist() == list(range(3_500, 5_500))
    assert np.flatnonzero(data.one_second(short, -4_000)).tolist() == list(range(1_000))
    assert data.one_second(long).tolist() == long[1_000:9_000].tolist()
    assert data.one_second(long, 500).tolist() == long[500:8_500].tolist()


def test_a_second_is_49_frames_of_10_coefficients_and_silence_is_zero(modules: dict[str, ModuleType]) -> None:
    features = modules["features"]
    waves = torch.from_numpy(np.stack([tone(500), np.zeros(RATE, np.float32)]))
    found = features.mfcc(waves)
    assert found.shape == (2, 1, 49, 10) and found.dtype == torch.float32
    assert found[0].abs().max() > 1 and not found[1].any()
    # the orthonormal transform keeps the sum: coefficient 0 is the mean over the bands times sqrt(bands)
    mean = features.log_mel(waves)[0].mean(1) * 40**0.5
    torch.testing.assert_close(found[0, 0, :, 0], mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hertz", [250.0, 700.0, 1_500.0, 3_000.0])
def test_a_tone_lands_in_its_mel_band(modules: dict[str, ModuleType], hertz: float) -> None:
    def mel(frequency: float) -> float:
        return 2595 * np.log10(1 + frequency / 700)

    step = (mel(4_000) - mel(20)) / 41  # 40 bands between 20 Hz and half the rate, each as wide as two steps
    expected = (mel(hertz) - mel(20)) / step - 1
    loudest = modules["features"].log_mel(torch.from_numpy(tone(hertz)).unsqueeze(0))[0].argmax(1)
    assert (loudest - expected).abs().max() <= 1


def test_a_tone_later_is_later_in_the_frames(modules: dict[str, ModuleType]) -> None:
    data, features = modules["data"], modules["features"]
    hop = 160
    clips = [data.one_second(tone(600, 0.3), shift) for shift in (0, 5 * hop)]
    first, later = features.mfcc(torch.from_numpy(np.stack(clips)))[:, 0]
    torch.testing.assert_close(first[:-5], later[5:], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- data


def test_the_authors_split_is_kept_and_a_zip_and_a_folder_are_the_same(
    data: ModuleType, recordings: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = data.load(recordings)
    assert [r.index for r in train] == [5, 12] * 10 and [r.index for r in test] == [0, 4] * 10
    assert data.labels(test).tolist() == [digit for digit in range(10) for _ in range(2)]
    np.testing.assert_allclose(test[0].samples, tone(300, 0.3), atol=1e-4)
    monkeypatch.setenv("EDGEBUILD_SPOKEN_DIGITS", str(archive))
    for folder, zipped in zip((train, test), data.load(), strict=True):
        for one, other in zip(folder, zipped, strict=True):
            assert (one.digit, one.speaker, one.index) == (other.digit, other.speaker, other.index)
            np.testing.assert_array_equal(one.samples, other.samples)


def test_every_call_gives_the_same_batches_and_a_seed_others(modules: dict[str, ModuleType], recordings: Path) -> None:
    task = modules["task"]
    train, _ = modules["data"].load(recordings)
    first, again, other = (list(task.batches(train, epochs=2, seed=seed)) for seed in (1, 1, 2))
    assert [x.shape for x, _ in first] == [(20, 1, 49, 10)] * 2
    assert all(a[0].equal(b[0]) and a[1].equal(b[1]) for a, b in zip(first, again, strict=True))
    assert not first[0][0].equal(other[0][0]) and not first[0][0].equal(first[1][0])


def test_what_is_missing_or_cannot_be_read_is_named(
    data: ModuleType, recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEBUILD_SPOKEN_DIGITS", str(tmp_path / "nowhere"))
    with pytest.raises(TaskError, match=r"EDGEBUILD_SPOKEN_DIGITS names .*nowhere, which is not there \(get .*https:"):
        data.load()
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(TaskError, match=r"cut.zip is neither a folder nor a whole zip"):
        data.load(tmp_path / "cut.zip")
    some = tmp_path / "some"
    shutil.copytree(recordings, some)
    (some / "7_ann_12.wav").write_bytes(b"RIFF")
    with pytest.raises(TaskError, match=r"7_ann_12.wav is no WAV file"):
        data.load(some)
    write(some / "7_ann_12.wav", tone(300), rate=16_000)
    with pytest.raises(
        TaskError, match=r"7_ann_12.wav has 1 channel\(s\) of 16 bit at 16000 Hz \(mono, 16 bit, 8000 Hz"
    ):
        data.load(some)
    for index in (0, 4):
        (some / f"3_ann_{index}.wav").unlink()
    (some / "7_ann_12.wav").unlink()
    with pytest.raises(TaskError, match=r"some does not hold test recordings of all ten digits"):
        data.load(some)


def test_missing_data_is_downloaded_once_or_the_way_out_is_told(
    data: ModuleType, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "HERE", tmp_path)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr(data, "ARCHIVE", f"http://127.0.0.1:{unused.getsockname()[1]}/{archive.name}")
        way_out = r"cannot be downloaded from http:.*refused.*let EDGEBUILD_SPOKEN_DIGITS name the folder or the zip"
        with pytest.raises(TaskError, match=way_out):
            data.load()
    assert not list((tmp_path / "data").iterdir())
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(archive.parent))
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(data, "ARCHIVE", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        train, _ = data.load()
        server.shutdown()
    assert len(train) == 20
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["spoken-digits.zip"]
    again, _ = data.load()  # the server is gone
    assert len(again) == 20


# --------------------------------------------------------------------------------------------------- the real thing


@pytest.fixture(scope="module")
def spoken() -> None:
    if not os.environ.get("EDGEBUILD_SPOKEN_DIGITS") and not (FOLDER / "data").is_dir():
        pytest.skip("the recordings are not here; EDGEBUILD_SPOKEN_DIGITS names them")


def test_the_weights_know_the_words(spoken: None) -> None:
    loaded = load.load(str(FOLDER))
    assert len(loaded.samples) == 128
    task = loaded.task
    assert task.evaluate is not None
    with torch.inference_mode():
        assert task.evaluate(task.model) >= 0.97


def test_int8_meets_the_size_and_the_drop_of_the_profile(spoken: None, tmp_path: Path) -> None:
    text = (FOLDER / "profiles" / "phone.toml").read_text()
    profile = tmp_path / "phone.toml"
    profile.write_text(
        re.sub(r"target = .*\nalso_on = .*|latency = .*|peak_memory = .*", "", text).replace(
            "artifact =", 'target = "host"\nartifact ='
        )
    )
    report = pipeline.build(Request(str(FOLDER), str(profile), tmp_path / "out"), lambda message, seconds: None)
    assert report.outcome == "met" and report.size <= 64_000
    assert report.rounds[0].plan.techniques == ("quantize",)
