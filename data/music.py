"""Notes in one voice or several: as a MIDI file, as sound, and as a piano roll.

The voices of tunes.py and chorales.py end here. A file of a piece is three files:

    .mid    a track a voice, for any program that plays music
    .wav    each note a sum of sines that fades; the voices are added
    .png    a piano roll: high notes above, time to the right, each C in grey

Lengths are fractions of a whole note, so that triplets add up.
"""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import waves

STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}  # semitones
TICKS = 480  # of a quarter note, in a MIDI file
QUARTER_SECONDS = 0.5  # 120 quarter notes a minute
RATE = 22_050  # samples a second
OVERTONES = (1.0, 0.5, 0.3, 0.15, 0.1)  # amplitude of the base note and of each overtone
LONGEST_SECONDS = 120  # of sound
DRAWN = 8  # pieces in a file


class Note(NamedTuple):
    """A note or a rest."""

    pitch: int | None  # MIDI number, 60 is the C in the middle of a piano; None for a rest
    length: Fraction  # 1 is a whole note
    tied: bool = False  # to the next note


PAUSE = Note(None, Fraction(1, 2))  # between two pieces


def variable(number: int) -> bytes:
    """A number as MIDI writes it: 7 bits a byte, the highest first; a set top bit: more follow."""
    found = [number & 127]
    while number := number >> 7:
        found.append(number & 127 | 128)
    return bytes(reversed(found))


def track_of(notes: Sequence[Note]) -> bytes:
    """The events of a voice, as a track of a MIDI file."""
    tempo = round(QUARTER_SECONDS * 1e6)  # microseconds of a quarter note
    track = b"\0\xff\x51\x03" + tempo.to_bytes(3, "big")
    time = Fraction(0)  # in ticks
    written = 0  # ticks of the events so far
    for note in notes:
        end = time + note.length * 4 * TICKS
        if note.pitch is not None and 0 <= note.pitch < 128:
            for moment, event in ((time, 0x90), (end, 0x80)):  # note on, note off
                track += variable(round(moment) - written) + bytes([event, note.pitch, 80])
                written = round(moment)
        time = end
    track += variable(round(time) - written) + b"\xff\x2f\0"  # end of the track
    return struct.pack(">4sI", b"MTrk", len(track)) + track


def midi(voices: Sequence[Sequence[Note]]) -> bytes:
    """A Standard MIDI File (MIDI Manufacturers Association 1996): a track a voice."""
    kind = int(len(voices) > 1)  # 0: one track; 1: tracks that sound together
    head = struct.pack(">4sIHHH", b"MThd", 6, kind, len(voices), TICKS)
    return head + b"".join(map(track_of, voices))


def sound(notes: Sequence[Note]) -> np.ndarray:
    """The notes as samples in [-1, 1]: sums of sines that fade, at RATE."""
    parts = []
    total = 0.0
    for note in notes:
        seconds = float(note.length) * 4 * QUARTER_SECONDS
        total += seconds
        if total > LONGEST_SECONDS:
            break
        t = np.arange(round(seconds * RATE)) / RATE
        tone = np.zeros(len(t))
        if note.pitch is not None:
            hertz = 440 * 2 ** ((note.pitch - 69) / 12)
            for i, amplitude in enumerate(OVERTONES, 1):
                if i * hertz < RATE / 2:  # higher ones cannot be written at this rate
                    tone += amplitude * np.sin(2 * np.pi * i * hertz * t)
            # It starts within 10 ms, fades, and ends within 10 ms, so that it does not click.
            tone *= np.exp(-2 * t) * np.clip(np.minimum(t, seconds - t) / 0.01, 0, 1)
        parts.append(tone)
    return 0.8 * np.concatenate([np.zeros(0), *parts]) / sum(OVERTONES)


def roll(voices: Sequence[Sequence[Note]], per_quarter: int = 8) -> np.ndarray:
    """A piano roll, uint8 (rows, columns, 1): high notes above, time to the right, C in grey."""
    pitches = [note.pitch for notes in voices for note in notes if note.pitch is not None]
    low, high = min(pitches), max(pitches)
    columns = round(sum(note.length for note in voices[0]) * 4 * per_quarter)
    image = np.full((high - low + 1, columns, 1), 255, dtype=np.uint8)
    image[[high - p for p in range(low, high + 1) if p % 12 == 0]] = 220
    for notes in voices:
        time = Fraction(0)
        for note in notes:
            start = round(time * 4 * per_quarter)
            time += note.length
            end = round(time * 4 * per_quarter)
            if note.pitch is not None:
                image[high - note.pitch, start : max(start + 1, end - 1)] = 0
    return image.repeat(6, 0).repeat(2, 1)


def write(voices: Sequence[Sequence[Note]], path: Path) -> None:
    """Write voices of equal length as .mid, .wav and, as a piano roll, .png."""
    from data import pictures  # loads Pillow, which texts do not need

    path.with_suffix(".mid").write_bytes(midi(voices))
    sounds = list(map(sound, voices))
    shortest = min(map(len, sounds))  # they differ by roundings
    waves.write(np.mean([own[:shortest] for own in sounds], axis=0), RATE, path.with_suffix(".wav"))
    pictures.save(roll(voices), path.with_suffix(".png"))
