"""Small archives, packages of Debian's kind, and one of sounds: hums in place of a voice."""

import dataclasses
import hashlib
import io
import tarfile
import wave

import numpy as np
import pytest

from data import sounds, wheels


def tar_of(members: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar archive with these files; mode "w:gz" and "w:xz" compress it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name, own in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(own)
            archive.addfile(entry, io.BytesIO(own))
    return content.getvalue()


def make_deb(members: dict[str, bytes]) -> bytes:
    """A .deb with these files: an archive of the kind ar, whose third member holds them."""
    deb = b"!<arch>\n"
    parts = {b"debian-binary": b"2.0\n", b"odd": b"x", b"data.tar.xz": tar_of(members, "w:xz")}
    for name, own in parts.items():
        deb += name.ljust(48) + str(len(own)).encode().ljust(10) + b"`\n"
        deb += own + b"\n" * (len(own) % 2)
    return deb


def publish_deb(patch: pytest.MonkeyPatch, source, members: dict[str, bytes]) -> None:
    """Put a .deb with these files where the source's own would lie."""
    content = make_deb(members)
    source.PACKAGE.path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    patch.setattr(source, "PACKAGE", dataclasses.replace(source.PACKAGE, sha256=digest))


def wave_file(samples: np.ndarray, rate: int = 8000, channels: int = 1, width: int = 2) -> bytes:
    """A .wav file of samples in [-1, 1]."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((channels, width, rate, 0, "NONE", ""))
        out.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()


def hum(n: int, hertz: float = 150, noise: float = 0.01) -> np.ndarray:
    """n samples of a tone with overtones, which swells and fades, and a little noise."""
    t = np.arange(n) / sounds.RATE
    tone = sum(np.sin(2 * np.pi * hertz * k * t) / k for k in (1, 2, 3))
    swell = 0.2 + 0.1 * np.sin(2 * np.pi * 3 * t)
    return tone * swell + noise * np.random.default_rng(n).normal(size=n)


def sound_members(count: int, n: int = 2400) -> dict[str, bytes]:
    """`count` hums of different height and length, and one file of silence."""
    place = "./usr/share/asterisk/sounds/en/{}.wav"
    names = [f"hum {chr(97 + i)}" for i in range(count)]
    members = {
        place.format(name): wave_file(hum(n + 37 * i, 100 + 10 * i)) for i, name in enumerate(names)
    }
    return members | {place.format("silence/1"): wave_file(np.zeros(n))}


def install_sounds(patch: pytest.MonkeyPatch, folder, count: int = 24) -> None:
    """Let the source of sounds read such a package, from this folder."""
    patch.setattr(wheels, "FOLDER", folder)
    folder.mkdir(exist_ok=True)
    publish_deb(patch, sounds, sound_members(count))
