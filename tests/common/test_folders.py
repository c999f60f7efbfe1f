"""Locks that end with their process, and folders that are whole or absent."""

import os
import signal
from pathlib import Path

import processes
import pytest
from conftest import ROOT

from tinyfm.common import folders

# Holds the lock of a folder until it is killed. With a second argument, it makes the folder.
HOLDER = """
import sys, time
from pathlib import Path
from tinyfm.common import folders
folder = Path(sys.argv[1])
if len(sys.argv) > 2:
    with folders.whole_or_absent(folder) as temporary:
        (temporary / "big").write_text("x")
        print("holds", flush=True)
        time.sleep(100)
with folders.hold(folders.lock_inside(folder), folder):
    print("holds", flush=True)
    time.sleep(100)
"""


def hold_elsewhere(tmp_path: Path, *arguments) -> processes.Process:
    holder = processes.start(["-c", HOLDER, *arguments], tmp_path, ROOT, {})
    holder.wait_for("holds", 60)
    assert "holds" in holder.said()[0], holder.said()
    return holder


def kill(holder: processes.Process) -> None:
    os.kill(holder.running.pid, signal.SIGKILL)
    holder.running.join()


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lock = folders.lock_inside(folder)
    holder = hold_elsewhere(tmp_path, folder)
    message = f"run is being written by process {holder.running.pid}: "
    with pytest.raises(ValueError, match=message), folders.hold(lock, folder):
        pass
    kill(holder)
    assert lock.exists()  # what a crash leaves behind locks nothing
    with folders.hold(lock, folder):
        assert lock.read_text(encoding="utf-8") == f"{os.getpid()}\n"
        with pytest.raises(ValueError, match="process"), folders.hold(lock, folder):
            pass
    assert not [*folder.iterdir()]


def test_a_lock_follows_no_link(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("precious", encoding="utf-8")
    folders.lock_inside(tmp_path).symlink_to(mine)
    with pytest.raises(OSError), folders.hold(folders.lock_inside(tmp_path), tmp_path):
        pass
    assert mine.read_text(encoding="utf-8") == "precious"


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def lock(descriptor):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folders, "_lock", lock)
    with (
        pytest.warns(UserWarning, match="cannot be locked"),
        folders.hold(folders.lock_inside(tmp_path), tmp_path),
    ):
        pass


def make(folder: Path, text: str) -> bool:
    """Make a folder with one file; whether this call made it."""
    with folders.whole_or_absent(folder) as temporary:
        if temporary:
            (temporary / "text").write_text(text, encoding="utf-8")
        return temporary is not None


def test_a_folder_is_whole_or_absent(tmp_path):
    folder = tmp_path / "cache" / "made"
    with pytest.raises(KeyboardInterrupt), folders.whole_or_absent(folder) as temporary:
        (temporary / "text").touch()
        raise KeyboardInterrupt
    assert not [*folder.parent.iterdir()]
    assert make(folder, "first") and not make(folder, "second")
    assert (folder / "text").read_text(encoding="utf-8") == "first"
    assert [*folder.parent.iterdir()] == [folder]


def test_what_a_killed_process_leaves_is_removed_and_what_a_live_one_makes_is_not(tmp_path):
    cache = tmp_path / "cache"
    live = hold_elsewhere(tmp_path, cache / "live", "make")
    dead = hold_elsewhere(tmp_path, cache / "dead", "make")
    kill(dead)
    left = cache / f"{folders.TEMPORARY}{dead.running.pid}-dead"
    growing = cache / f"{folders.TEMPORARY}{live.running.pid}-live"
    assert left.is_dir() and growing.is_dir()
    assert make(cache / "other", "")
    assert growing.is_dir() and not left.exists()


def test_a_terminated_process_tidies_up(tmp_path):
    cache = tmp_path / "cache"
    process = hold_elsewhere(tmp_path, cache / "made", "make")
    assert [*cache.iterdir()]
    os.kill(process.running.pid, signal.SIGTERM)
    process.running.join()
    assert process.running.exitcode == 128 + signal.SIGTERM
    assert [*cache.iterdir()] == []
