"""Fetch a public file once: mirrors, resumed transfers, a checksum, and a way without a network.

The bytes go to `NAME.part`, which a later call continues (HTTP Range), and get the final name only
when their SHA-256 is the expected one: a file under its own name is whole and right.
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

# Git-ignored; beside this file, so that the folder does not depend on where you stand.
DOWNLOADS = Path(__file__).parent / "cache" / "downloads"
TIMEOUT_SECONDS = 30
BLOCK_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def transfer(url: str, part: Path) -> bool:
    """Append what `part` lacks of `url`; True if it continued an earlier transfer.

    Raises OSError if the connection fails or closes early; what has arrived stays in `part`.
    """
    offset = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "tinyfm"} | ({"Range": f"bytes={offset}-"} if offset else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        # A server that ignores Range sends 200 and everything.
        resumed = offset > 0 and response.status == 206
        length = int(response.headers.get("Content-Length") or 0)
        received = 0
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(total=length, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar,
        ):
            while block := response.read(BLOCK_BYTES):
                received += file.write(block)
                bar.update(len(block))
    if received < length:
        raise ConnectionError(f"closed after {received:,} of {length:,} bytes, run again to resume")
    return resumed


def attempt(url: str, part: Path, sha256: str) -> str | None:
    """Bring `part` to completion from one mirror; None if it succeeded, else why it did not."""
    resumed = True
    while resumed:  # if a continued file turns out wrong, its beginning may be to blame: once more
        try:
            resumed = transfer(url, part)
        except urllib.error.HTTPError as error:
            # 416: nothing is left to send, the part is already as long as the file.
            if error.code != 416 or not part.exists():
                return f"HTTP {error.code} {error.reason}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            return str(getattr(error, "reason", error))
        found = sha256_of(part)
        if found == sha256:
            return None
        part.unlink()
    return f"SHA-256 is {found}, expected {sha256}"


def download(urls: Sequence[str], path: Path, sha256: str) -> Path:
    """Return `path`, fetched from the first of `urls` that delivers the file with this SHA-256.

    Raises ValueError if a file is there but is another one; ConnectionError if no mirror delivers.
    """
    if path.exists():
        if (found := sha256_of(path)) != sha256:
            raise ValueError(f"{path} has SHA-256 {found}, expected {sha256}: delete it")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = []
    for url in urls:
        failure = attempt(url, part, sha256)
        if failure is None:
            os.replace(part, path)
            return path
        failures.append(f"{url}: {failure}")
    raise ConnectionError(
        f"could not download {path.name} ({'; '.join(failures)}). "
        f"Without a network, put the file here by hand: {path}"
    )
