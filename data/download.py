"""Download a public file once, from one of several mirrors; continue a transfer that broke off.

The bytes are written to `NAME.part`. A later call continues that file (by an HTTP Range request).
The file gets its final name only when its SHA-256 is the expected one. So a file with its final
name is complete and correct.
"""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

# In the same folder as this file, whatever the current directory is. Git ignores data/cache.
DOWNLOADS = Path(__file__).parent / "cache" / "downloads"
TIMEOUT_SECONDS = 30
BLOCK_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal. The file is read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def transfer(url: str, part: Path) -> bool:
    """Append to `part` the rest of the file at `url`; True if it continued an earlier transfer.

    Raises OSError if the connection fails or closes early. The bytes received stay in `part`.
    """
    offset = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "tinyfm"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        # A server that ignores Range answers 200 and sends the whole file.
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
    """Complete `part` from one mirror; None if that succeeds, otherwise the reason."""
    resumed = True
    # A continued file with a wrong checksum may have had a wrong start. So try it again from the
    # first byte, and give up when a transfer from the first byte was wrong.
    while resumed:
        try:
            resumed = transfer(url, part)
        except urllib.error.HTTPError as error:
            # 416 (range not satisfiable): `part` is already as long as the file.
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
    """Return `path`, downloaded from the first of `urls` that sends a file with this SHA-256.

    Raises ValueError if `path` is another file, ConnectionError if every mirror fails.
    """
    if path.exists():
        found = sha256_of(path)
        if found != sha256:
            raise ValueError(
                f"{path} has SHA-256 {found}, expected {sha256}: delete it, and run again"
            )
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
