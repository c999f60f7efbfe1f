"""--task embed: train, resume, adapt, measure, sample, index and search; and what users mistype."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_it_resumes, call, rows_of
from PIL import Image

import sample
import train
from tinyfm import __main__ as commands
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.common import files
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.recipes import approximate, run_dir, search
from tinyfm.recipes.base import OpenRun
from tinyfm.recipes.clip import CLIPRun
from tinyfm.recipes.embed import mean_over_articles
from tinyfm.retrieval import nearest
from tinyfm.serve.families import Served
from tinyfm.serve.vectors import embed_text
from tinyfm.tokenizer import ByteTokenizer

BASE = """encoder --data.path text.txt --data.tokenizer bytes --data.cache cache
--model.vocab-size 258 --model.n-layer 1 --model.n-head 2 --model.d-model 32
--model.context-length 48 --train.batch-size 8 --train.micro-batch-size 0 --train.steps 2
--train.eval-every 0"""
TASK = """encoder --task embed --init-from base --data.path pairs.jsonl --data.cache cache
--data.val-fraction 0.3 --embed.widths 8 16 --train.batch-size 16 --train.steps 20
--train.eval-every 10 --train.log-every 1 --train.dtype float32"""
SOUNDS = ("ka", "lo", "mi", "tu", "re", "so", "ba", "ne")


def tinyfm(*words) -> int | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tinyfm", *map(str, words)])
        return commands.main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, no_forecast) -> Path:
    """A folder with pairs, a text, a base, and an embedder trained from it."""
    place = tmp_path_factory.mktemp("embed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        names = [a + b for a in SOUNDS for b in SOUNDS]
        rows = [{"question": f"who is {n}?", "passage": f"{n} of {n}, a king"} for n in names]
        Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        Path("text.txt").write_text("\n\n".join(r["passage"] for r in rows), encoding="utf-8")
        assert call(train, *BASE.split(), "--out", "base") == 0
        assert call(train, *TASK.split(), "--out", "embedder") == 0
    return place


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture
def fails(capsys):
    def run(module, *words) -> str:
        capsys.readouterr()
        assert call(module, *words) in (1, 2)
        return " ".join(capsys.readouterr().err.replace("│", " ").split())

    return run


def test_it_learns_and_a_run_that_stopped_goes_the_same_way(tmp_path):
    scores = [row for row in rows_of("embedder") if "val_loss" in row]
    assert scores[-1]["val_loss"] < scores[0]["val_loss"] - 0.1
    assert scores[-1]["val_mrr"] > scores[0]["val_mrr"]
    assert_it_resumes("embedder", tmp_path / "embedder", 20)


def test_it_is_measured_beside_bm25_and_finds_what_is_asked(capsys):
    assert call(evaluate, "embedder", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["test_mrr"]["BM25"] == 1  # it knows the names as words
    assert 0 < scores["test_mrr"]["reached"] <= 1
    assert scores["test_mrr with BM25"]["reached"] > scores["test_mrr"]["reached"]
    data = run_dir.open_run("embedder").run.open_data()
    row = data.splits["test"][0]
    assert call(sample, "embedder", "--prompt", data.texts[row.passage], "-n", "2") == 0
    assert capsys.readouterr().out.startswith(f"1.000  {data.texts[row.passage]}\n")
    opened = run_dir.open_run("embedder")
    served = Served("embedder", Path("embedder"), opened)
    assert served.abilities == {"embed"}
    vector, _ = embed_text(served, row.question)
    expected = search.embed(opened, [row.question])[0].tolist()
    assert vector == pytest.approx(expected, abs=1e-6)


def test_the_interval_is_over_articles():
    """A second question on each article, as hard as the first, says nothing more."""
    values = np.random.default_rng(0).random(12)
    once = mean_over_articles(values, range(12))
    twice = mean_over_articles(np.repeat(values, 2), np.repeat(range(12), 2))
    assert (once, once.low, once.high) == pytest.approx((twice, twice.low, twice.high))
    assert once.about == twice.about == "12 articles"


def test_an_index_has_its_vectors_and_is_searched_by_both(tmp_path, capsys):
    out = tmp_path / "index"
    options = ("--run", "embedder", "--width", 8, "--words", 5, "--approximate")
    assert tinyfm("index", "text.txt", out, *options) == 0
    said = capsys.readouterr()
    assert "finds 100.0% of the 10 nearest" in said.err
    index = search.open_index(out)
    assert index.by == "both" and index.vectors.shape[1] == 8
    texts = [passage["text"] for passage in index.passages]
    torch.testing.assert_close(index.vectors, search.embed(index.opened, texts, 8))
    linked = search.open_index(out, "vectors", links=True)
    asked = index.read(texts[:9])
    exact = nearest(asked, index.vectors, 5)[0]
    torch.testing.assert_close(approximate.search(linked.links, asked, 5)[0], exact)
    found = linked.by_vectors(texts[:1], 5)[0]
    torch.testing.assert_close(index.vectors[found] @ asked[0], exact[0])
    assert tinyfm("search", out, "who is lomi?", "-n", 1) == 0
    assert "lomi of lomi" in capsys.readouterr().out
    file = out / "vectors.faiss"
    file.write_bytes(file.read_bytes()[:-1])
    assert "vectors.faiss is gone or was changed; index again" in tinyfm(
        "search", out, "x", "--approximate"
    )
    tensors = files.load_tensors(out, "vectors")
    files.save_tensors(out, "vectors", {**tensors, "passages": -tensors["passages"]})
    assert "vectors.safetensors is gone or was changed; index again" in tinyfm("search", out, "x")


def test_a_clip_searches_pictures(tmp_path, monkeypatch, capsys):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        image = np.full((8, 8), 120 * i, dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no")
    sizes = {"image_layer": 1, "image_width": 16, "image_head": 2, "text_layer": 1}
    config = CLIPConfig(
        8, patch_size=4, vocab_size=257, text_width=16, text_head=2, embed_dim=8, **sizes
    )
    run = CLIPRun(model=config)
    opened = OpenRun(run, CLIP(config).eval(), ByteTokenizer(), tmp_path, {}, "model")
    monkeypatch.setattr(search.run_dir, "open_base", lambda path: opened)
    out = tmp_path / "index"
    assert tinyfm("index", tmp_path / "pictures", out, "--run", "clip") == 0
    assert tinyfm("search", out, "a knight", "-n", 3) == 0
    printed = capsys.readouterr().out
    assert all(f"{i}.png" in printed for i in range(3)) and "broken" not in printed
    other = ("index", "text.txt", tmp_path / "x", "--run", "clip")
    assert "cannot be cut" in tinyfm(*other, "--width", 4)


def test_mistakes(fails, tmp_path, monkeypatch):
    out = ("--out", tmp_path / "out")
    start = (*TASK.split(), *out)
    assert "add --init-from RUN" in fails(train, "encoder", "--task", "embed", *out)
    assert "use 2 or more" in fails(train, *start, "--train.batch-size", 1)
    assert "widths has 64" in fails(train, *start, "--embed.widths", 64)
    assert "--embed.length is -1" in fails(train, *start, "--embed.length", -1)
    assert "--adapt head" in fails(train, *start, "--adapt", "head")
    assert "no run directory nowhere" in fails(train, *start, "--init-from", "nowhere")
    assert "of family encoder-embed, not encoder" in fails(train, *start, "--init-from", "embedder")
    assert '--prompt "a question"' in fails(sample, "embedder")
    index = ("index", "text.txt", tmp_path / "index")
    assert "widths 8, 16, 32" in tinyfm(*index, "--run", "embedder", "--width", 5)
    assert "cannot be cut" in tinyfm(*index, "--run", "base", "--width", 8)
    assert "--width is -1" in tinyfm(*index, "--run", "embedder", "--width", -1)
    assert "add --run RUN" in tinyfm(*index, "--width", 8)
    assert "add --run RUN" in tinyfm(*index, "--approximate")
    assert tinyfm(*index, "--run", "embedder") == 0
    search_it = ("search", tmp_path / "index", "x")
    assert "index again with --approximate" in tinyfm(*search_it, "--approximate")
    assert "made by other weights" in tinyfm(*search_it, "--run", "base")
    assert "is for --by vectors" in tinyfm(*search_it, "--by", "words", "--approximate")
    monkeypatch.setitem(sys.modules, "faiss", None)
    message = tinyfm("index", "text.txt", tmp_path / "y", "--run", "embedder", "--approximate")
    assert "pip install faiss-cpu" in message
    with pytest.raises(ValueError, match="pip install faiss-cpu"):
        approximate.load_faiss()
