"""Log-mel spectrograms, the model's input, and what training does to the sound before."""

import math

import numpy as np
import torch
from data import RATE, Recording, one_second
from torch import Tensor

FRAME, HOP = 320, 160  # 40 ms every 20 ms: 49 frames a second
FFT, BANDS = 512, 40
FRAMES = (RATE - FRAME) // HOP + 1
LOWEST = 20.0  # Hz
FLOOR = 1e-4  # power of a band, of a wave in [-1, 1]: what a band of the quietest recordings holds between words

# What training changes, drawn evenly from the middle +- these.
SLOWER = 0.1  # share of the length; the pitch goes along
LATER = RATE // 10  # samples
LOUDER = 6.0  # dB
NOISE = (30.0, 15.0)  # signal to noise ratio, dB


def log_mel(waves: Tensor) -> Tensor:
    """Float waves [n, 8000] in [-1, 1] to spectrograms [n, 49, 40]: log(1 + power / FLOOR) of each mel band.

    Silence gives zeros.
    """
    frames = waves.unfold(1, FRAME, HOP) * torch.hann_window(FRAME, periodic=False)
    power = torch.fft.rfft(frames, FFT).abs().square()
    return torch.log1p(power @ _bands() / FLOOR)


def _mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)  # O'Shaughnessy 1987


def _bands() -> Tensor:
    """Triangles [257, 40] whose corners are evenly spaced in mel from 20 Hz to half the sampling rate."""
    corners = torch.linspace(_mel(LOWEST), _mel(RATE / 2), BANDS + 2)
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    bins = torch.tensor([_mel(k * RATE / FFT) for k in range(FFT // 2 + 1)]).unsqueeze(1)
    return torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0)


# -------------------------------------------------------------------------------------------------- augmentation


def augmented(recording: Recording, generator: torch.Generator) -> Tensor:
    """A second with the recording in it, float [8000]: other speed, place, loudness and background than it had."""
    speed, place, gain, ratio = (2 * torch.rand(4, generator=generator) - 1).tolist()
    length = round(len(recording.samples) * (1 + SLOWER * speed))
    at = np.linspace(0, len(recording.samples) - 1, length)
    spoken = np.interp(at, np.arange(len(recording.samples)), recording.samples)
    loudness = float(np.sqrt(np.square(spoken).mean()))
    noise = torch.randn(RATE, generator=generator) * loudness * 10 ** -((NOISE[0] + NOISE[1] * ratio) / 20)
    clip = torch.from_numpy(one_second(spoken.astype(np.float32), round(LATER * place)))
    return (clip + noise) * 10 ** (LOUDER * gain / 20)
