"""python -m tinyfm index and search: the right passage, and a clear message for each mistake."""

import json
import shutil
import sys

import pytest
import torch

from tinyfm import __main__ as index_of_commands
from tinyfm.common import files
from tinyfm.recipes import search

TEXTS = {
    "cats.txt": "Cats sleep in the sun. " * 3,
    "dogs.txt": "Dogs dig holes and bury bones in the garden. " * 2,
    "ships.txt": "Ships cross the sea.\n" * 40,
}


def call(*words) -> int | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tinyfm", *map(str, words)])
        return index_of_commands.main()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def with_vectors(texts, tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("indexes") / "both"
    assert search.write_index(str(texts), out, str(tiny_run)) == 4  # the ships are in two pieces
    return out


def test_a_text_is_cut_at_spaces():
    text = "  a b\nc  d e "
    assert search.cut(text, 2) == [(1, "a b"), (2, "c  d"), (2, "e")]
    assert search.cut(text, 5) == [(1, "a b\nc  d e")]
    assert search.cut(" ", 5) == []


def test_what_was_asked_is_found_by_words(texts, tmp_path, capsys):
    out = tmp_path / "index"
    assert call("index", texts, out, "--words", 40) == 0
    assert "in " + str(out) in capsys.readouterr().out
    assert call("search", out, "Who buries bones?", "-n", 1) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"1. {(texts / 'dogs.txt').as_posix()}\n")
    assert "Dogs dig holes" in printed and "Cats" not in printed
    assert call("search", out, "xylophone") == 0
    assert "no passage has a word of it" in capsys.readouterr().out
    names = [passage["name"] for passage in search.open_index(out).passages]
    ships = (texts / "ships.txt").as_posix()
    assert names[2:] == [f"{ships}, from line {line}" for line in (1, 11, 21, 31)]
    assert call("index", texts, out, "--overwrite") == 0
    assert files.read_json(out / "index.json")["passages"] == 4


def test_an_index_stays_until_the_new_one_is_complete(texts, tmp_path, monkeypatch):
    out = tmp_path / "index"
    assert search.write_index(str(texts), out) == 4
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", full)
        assert "No space left" in call("index", texts, out, "--words", 40, "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert search.write_index(str(texts), out, words=40, overwrite=True) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_vectors_find_a_text_by_itself(with_vectors):
    index = search.open_index(with_vectors, "vectors")
    asked = [passage["text"] for passage in index.passages]
    assert [found[0] for found in index.by_vectors(asked, 2)] == [0, 1, 2, 3]
    assert [index.search(text, 1, "vectors") for text in asked] == [[0], [1], [2], [3]]
    assert len(index.search("Ships", 9)) == 2
    assert sorted(index.search("Ships", 9, "both")) == [0, 1, 2, 3]
    torch.testing.assert_close(index.vectors.norm(dim=1), torch.ones(4))


def test_links_may_lead_to_fewer_passages_than_were_asked_for(with_vectors, monkeypatch):
    index = search.open_index(with_vectors, "vectors")
    index.links = object()
    found = (torch.tensor([[0.9, -1.0]]), torch.tensor([[2, -1]]))  # as faiss fills up
    monkeypatch.setattr(search.approximate, "search", lambda links, asked, k: found)
    assert index.search("Ships", 2, "vectors") == [2]
    assert -1 not in index.search("Ships", 9, "both")


def test_an_index_of_another_embedder_is_refused(with_vectors, tiny_run, tmp_path):
    moved = shutil.copytree(tiny_run, tmp_path / "moved")
    assert len(search.open_index(with_vectors, "both", str(moved)).passages) == 4
    record = files.read_json(with_vectors / "index.json")
    other = shutil.copytree(with_vectors, tmp_path / "other")
    changed = record | {"weights": "0" + record["weights"][1:]}
    (other / "index.json").write_text(json.dumps(changed), encoding="utf-8")
    assert call("search", other, "cats") == 0  # by words
    message = call("search", other, "cats", "--by", "both")
    assert "was made by other weights or another tokenizer" in message
    assert f"--run {tiny_run}" in message


def test_mistakes(texts, with_vectors, tiny_run, tmp_path):
    plain = tmp_path / "plain"
    assert search.write_index(str(texts), plain) == 4
    assert "index again with --run RUN" in call("search", plain, "cats", "--by", "both")
    assert "is for --by vectors" in call("search", plain, "cats", "--run", tiny_run)
    assert "add --overwrite" in call("index", texts, plain)
    assert "is no index; choose another folder" in call("index", texts, texts, "--overwrite")
    assert f"python -m tinyfm index PATH {texts}" in call("search", texts, "cats")
    assert "--words is 0" in call("index", texts, tmp_path / "x", "--words", 0)
    assert "-n is 0" in call("search", plain, "cats", "-n", 0)
    assert "the question is empty" in call("search", plain, " ")
    assert "no run directory nowhere" in call("index", texts, tmp_path / "x", "--run", "nowhere")
    assert "nowhere" in call("index", tmp_path / "nowhere", tmp_path / "x")
    own = plain / "index.html"  # a folder of somebody else may have an index.json too
    own.write_text("mine", encoding="utf-8")
    assert "also has index.html" in call("index", texts, plain, "--overwrite")
    assert own.exists()
    (plain / "passages.jsonl").write_text("", encoding="utf-8")
    message = call("search", plain, "cats")
    assert "passages.jsonl is gone or was changed" in message and message.endswith("index again")
    (plain / "index.json").write_text("{", encoding="utf-8")
    message = call("search", plain, "cats")
    assert "plain is damaged" in message and message.endswith("index again")
    (plain / "passages.jsonl").unlink()
    assert "is no index; choose another folder" in call("index", texts, plain, "--overwrite")
    assert not (tmp_path / "x").exists()
