"""Sound files: the samples of a .wav file, in and out, and a picture of the tones in them.

A .wav file (Microsoft and IBM 1991) holds samples, the pressure of the air at moments of equal
distance, here as numbers of 16 bits, and says how many there are a second.
"""

import io
import wave
from pathlib import Path

import numpy as np

from data.report import counted

SCALE = 1 << 15  # a sample is a whole number in [-SCALE, SCALE)
WINDOW = 256  # samples in a column of a picture
STEP = 64  # samples from column to column
QUIETEST = -70.0  # decibels below the loudest tone, drawn black
PIXELS = 2  # width and height of a drawn number


def read(content: bytes, rate: int) -> np.ndarray:
    """The samples of a .wav file, int16 (n,).

    Raises ValueError, without the name of the file, if it is none, or not mono with 16 bits and so
    many samples a second, or has none, or is cut short.
    """
    command = f"ffmpeg -i OLD.wav -ar {rate} -ac 1 -c:a pcm_s16le NEW.wav"
    try:
        with wave.open(io.BytesIO(content), "rb") as file:
            channels, width, own_rate, promised, *_ = file.getparams()
            samples = np.frombuffer(file.readframes(promised), dtype=np.uint8)
    except (wave.Error, EOFError) as error:
        why = str(error) or "it ends too early"
        raise ValueError(
            f"it is no .wav file with plain samples (PCM): {why}; to convert a sound, {command}"
        ) from error
    if (channels, width, own_rate) != (1, 2, rate):
        raise ValueError(
            f"it has {own_rate:,} samples a second of {8 * width} bits in "
            f"{counted(channels, 'channels')}, and is read with {rate:,} of 16 bits in one: "
            f"{command}"
        )
    if not promised:
        raise ValueError("it has no samples")
    if len(samples) < 2 * promised:
        raise ValueError(f"it is cut short: {len(samples) // 2:,} of {promised:,} samples")
    return samples.view("<i2")


def write(samples: np.ndarray, rate: int, path: str | Path) -> None:
    """Write samples, float (n,), as a .wav file of 16 bits; those outside [-1, 1] are clipped."""
    whole = np.clip(np.rint(samples * SCALE), -SCALE, SCALE - 1).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)  # bytes
        file.setframerate(rate)
        file.writeframes(whole.tobytes())


def picture(samples: np.ndarray) -> np.ndarray:
    """A spectrogram of samples (n,), uint8 (rows, columns, 1): time to the right, high tones above,
    white where they are loud."""
    padded = np.pad(samples, (0, WINDOW))
    parts = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::STEP]
    loudness = np.abs(np.fft.rfft(parts * np.hanning(WINDOW), axis=1))
    decibels = 20 * np.log10(np.maximum(loudness / max(loudness.max(), 1e-9), 1e-9))
    grey = 255 * (1 - np.maximum(decibels, QUIETEST) / QUIETEST)
    image = grey.T[::-1].repeat(PIXELS, 0).repeat(PIXELS, 1)
    return image.astype(np.uint8)[:, :, None]
