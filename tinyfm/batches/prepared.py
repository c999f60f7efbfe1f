"""Prepared folders: data that were read, encoded and written once, and are found again later.

Reading and encoding take longer than training starts should. So their result is kept, below the
cache folder, as NAME-HASH. The hash covers everything that the content depends on: the version of
the source, the tokenizer, sizes, the split. With any change the data are prepared under another
name, and an old folder is never mistaken for the new one.

The writers (shards.py for text, pair_files.py for pictures) give a folder its name only when it is
complete, and list its files with their SHA-256 in manifest.json. The readers compare.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyfm.common import schema


def name_of(path: str, default: str) -> str:
    """A name for a folder, from the last part of the user's path; `default` if nothing is left."""
    return re.sub(r"[^\w-]+", "-", Path(path).name).strip("-") or default


def prepared_folder(cache: str, name: str, depends_on: Sequence[Any]) -> Path:
    """The folder for what `depends_on` (JSON values) determines. It may not exist yet."""
    key = json.dumps(list(depends_on))
    return Path(cache, f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}")


def read_manifest(folder: Path, kind: Any = dict) -> Any:
    """The folder's manifest.json, as a value of that kind (see common/schema.py).

    Raises ValueError that names the file, and the fix, if it is missing or damaged.
    """
    path = folder / "manifest.json"
    try:
        return schema.check(schema.parse_json(path.read_bytes()), kind, path.name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {rebuild_hint(folder)}") from error


def rebuild_hint(folder: Path) -> str:
    """The advice in the errors about a damaged folder."""
    return f"delete the folder {folder} and prepare it again"
