"""The benchmarks' own arithmetic: what is scored, what is equal on both sides, what is written."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from conftest import ROOT, count_parameters

import train
from data.splits import Document, split_of
from tinyfm.batches.text import MODALITIES, TextConfig, TextData, prepare_folder
from tinyfm.calc.size_law import read_table
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.musicgen import MusicGenConfig


@pytest.fixture(scope="module")
def nanogpt():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("nanogpt")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("n", [9, 17, 64, 65, 66, 200])
def test_every_byte_but_the_first_is_scored_once(nanogpt, n):
    """A model that gives id i the probability p_i, so that the order of windows cannot matter."""
    ids = torch.randint(10, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    log_p = torch.linspace(-3, 1, 10).log_softmax(0)
    bpb = nanogpt.bits_per_byte(lambda x: log_p.expand(*x.shape, 10), ids, n - 1, length=8)
    expected = -sum(log_p[i].item() for i in ids[1:]) / math.log(2) / (n - 1)
    assert bpb == pytest.approx(expected, rel=1e-5)


def test_windows_have_the_context_of_their_own_text(nanogpt):
    ids = list(range(20))
    rows = [row for batch in nanogpt.windows(ids, 8, rows=2) for row in zip(*batch.values())]
    assert [tokens.tolist() for tokens, _ in rows] == [ids[:9], ids[8:17], ids[11:20]]
    assert rows[2][1].tolist() == [False] * 5 + [True] * 3


def test_both_networks_of_the_equal_comparison_have_the_same_size(nanogpt):
    """nanoGPT without biases: tied tables, and 12 D^2 + 2 D for a block."""
    V, T, D, L = 257, 64, 128, 4
    for option in (f"--block_size={T}", f"--n_embd={D}", f"--n_layer={L}"):
        assert option in nanogpt.RECIPE
    sizes = count_parameters(GPT(nanogpt.SAME_NETWORK))
    assert sizes == V * D + T * D + L * (12 * D * D + 2 * D) + D


def test_both_sides_read_the_same_nine_tenths(nanogpt, tmp_path):
    text = bytes(range(256)) * 4
    nanogpt.prepare_bytes(tmp_path, text)
    data = nanogpt.RandomWindows(text, seed=0)
    for name, ours in (("train", data.train), ("val", data.val)):
        stored = bytearray((tmp_path / f"{name}.bin").read_bytes())
        theirs = torch.frombuffer(stored, dtype=torch.int16)
        assert torch.equal(theirs.long(), ours)
    assert len(data.val) == 103  # of 1024
    rows = data.batch(3, slice(None))["tokens"]
    assert torch.equal(data.batch(3, slice(4, 6))["tokens"], rows[4:6])
    assert rows.shape == (12, 65)
    assert (rows.diff() % 256 == 1).all()  # each row is a run of the text


def test_a_table_replaces_the_one_between_its_marks(nanogpt, tmp_path):
    page = tmp_path / "README.md"
    text = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nkept\n<!-- end -->\n"
    page.write_text(text, encoding="utf-8")
    nanogpt.record("x", "new\n", page)
    assert page.read_text(encoding="utf-8") == text.replace("old", "new")


def test_the_page_has_the_marks_that_the_scripts_write_to():
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    marks = ("checkouts run", "checkouts models", "nanogpt bytes", "nanogpt shakespeare")
    marks += ("encoder films", "encoder speed", "preference functions", "preference films")
    named = (*MODALITIES, "codec", "musicgen", "actions")
    marks += ("letters", "together", *(f"results {name}" for name in named))
    marks += ("budget sweep", "budget rates", "budget check")
    for mark in marks:
        start = page.index(f"<!-- {mark} -->\n")
        assert "<!-- end -->" in page[start:]


def test_ways_to_draw_letters_take_equal_minutes(tmp_path, monkeypatch):
    """The parts' minutes are no time for the model itself; it is given the parts of its trial."""
    monkeypatch.syspath_prepend(ROOT)
    letters = importlib.import_module("benchmarks.letters")
    given = []
    monkeypatch.setattr(letters, "train", lambda out, *words: given.append(words) or out)
    monkeypatch.setattr(letters, "minutes", lambda run: 2.5 if run.endswith("clip") else 1.5)
    monkeypatch.setattr(letters, "steps_in", lambda minutes, trial: round(100 * minutes))
    letters.train_for(20.0, tmp_path, "text2image", 0, [])
    letters.train_for(20.0, tmp_path, "ddpm", 0, [])
    trial = tmp_path / "text2image-trial-0"
    steps = [words[words.index("--train.steps") + 1] for words in given]
    assert steps == [str(letters.TRIAL_STEPS), "1600", str(letters.TRIAL_STEPS), "2000"]
    assert given[1][-6:-2] == ("--autoencoder", f"{trial}-autoencoder", "--clip", f"{trial}-clip")

    def found(value: float, prompted: bool) -> letters.Found:
        share = letters.Measured(value, (value - 0.1, value + 0.1), 100)
        return letters.Found({letters.KNOWN: share} if prompted else {}, share, share, 20 * value)

    row = letters.row("b", [found(0.5, True), found(0.7, True), found(0.6, True)])
    shares = "50.0, 70.0, 60.0 (50.0 to 70.0)"
    assert row == f"| b | {shares} |  | {shares} | 0, 1, 1 (0 to 1) | 10.0, 14.0, 12.0 |  |"
    assert letters.row("b", [found(0.5, False)]).startswith("| b |  |  | 50.0 (40.0 to 60.0) |")


def test_the_base_of_films_trains_on_no_held_out_sentence(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    preference = importlib.import_module("benchmarks.preference")
    ratings = preference.ratings
    texts = [" ".join(f"{i * k:x}" for k in range(7, 12)) for i in range(200)]
    splits = [split_of(text, ratings.HELD_OUT_SHARE) for text in texts]
    rows = [ratings.Rated(text, (1,), text, split) for text, split in zip(texts, splits)]
    monkeypatch.setattr(ratings, "rows", lambda name: rows)
    given = []
    monkeypatch.setattr(preference, "train", lambda run, *words: given.append(words) or run)
    preference.film_base(tmp_path, "0", Namespace(base_steps=3), [])
    options = dict(pairwise(given[1]))
    path, share = options["--data.path"], float(options["--data.val-fraction"])
    config = TextConfig(path, tokenizer="bytes", val_fraction=share, cache=str(tmp_path / "cache"))
    manifest = json.loads(
        (prepare_folder(config, 257) / "manifest.json").read_text(encoding="utf-8")
    )
    assert manifest["documents"] == Counter(splits)


def test_curves_of_rewards_are_those_of_the_page(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    preference = importlib.import_module("benchmarks.preference")
    rows = ["| way | share | interval | KL | distinct |", "|---|---|---|---|---|"]
    rows += ["| base | 20.0, 30.0, 22.0 | 1 to 2 | 0.00, 0.00, 0.00 | 1, 1, 1 |"]
    rows += ["| best of 2 | 40.0, 41.0, 39.0 | 1 to 2 | 0.19, 0.19, 0.19 | 1, 1, 1 |"]
    rows += ["| GRPO, beta 0.02 | 80.0, 81.0, 90.0 | 1 to 2 | 3.00, 2.00, 2.50 | 1, 1, 1 |"]
    block = "<!-- preference {} -->\n" + "\n".join(rows) + "\n<!-- end -->\n"
    page = block.format("functions") + block.format("films")
    curves = preference.read_curves(page, "films")
    assert curves == {"best of": [(0, 22), (0.19, 40)], "GRPO": [(0, 22), (2.5, 81)]}
    preference.draw(tmp_path / "a.png", page)
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no table of films yet"):
        preference.read_curves(page.replace(rows[0], "").replace("|", "."), "films")


@pytest.fixture
def budget(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.budget")


def test_the_grid_of_the_sweep_is_a_triangle_that_costs_an_hour(budget):
    """At 1.1e11 FLOP/s, which one core reached with the preset gpt."""
    runs = budget.grid()
    tokens = {name: budget.tokens_of(run) for name, run in runs.items()}
    costs = [tokens[name] * budget.flops_per_token(run) for name, run in runs.items()]
    assert costs == sorted(costs, reverse=True) and costs[0] <= budget.MOST * 1.01
    assert sum(costs) / 1.1e11 < 45 * 60
    for name, run in runs.items():
        width, asked = map(int, name.split("-")[1::2])
        assert run.model.d_model == width and tokens[name] == pytest.approx(asked, rel=0.01)
    assert {run.model.d_model for run in runs.values()} == {*budget.WIDTHS}


def test_a_job_of_the_sweep_trains_the_run_it_stands_for(budget, tmp_path):
    run = budget.run_of(128, 400_000)
    job = budget.job_of(run, tmp_path / "a", ["--train.seed", "5"])
    _, _, read = train.read_arguments([*job.words])
    assert read.train.seed == 5
    assert dataclasses.replace(read, out="", train=run.train) == run
    assert read.train.steps == run.train.steps and read.train.batch_size == run.train.batch_size


def test_the_table_of_a_sweep_is_read_back(budget, tmp_path):
    runs = [
        budget.Trained(width, width**2, float(tokens), 1e9, 1 + 20 / width + 50 / tokens**0.5)
        for width in (20, 40, 80)
        for tokens in (1000, 4000, 16000)
    ]
    budget.write_table([(run, 1.5) for run in runs], tmp_path / "a.csv")
    assert read_table(tmp_path / "a.csv") == runs
    rows = budget.sweep_text(runs).splitlines()
    offs = [float(row.split("|")[-2].strip(" %")) for row in rows[2:11]]
    assert max(map(abs, offs)) < 3 and rows[-1].startswith("L = ")


def test_sweep_and_rates_end_in_tables(budget, tmp_path, monkeypatch):
    """Of runs that were not trained, whose best Muon rate is 0.016 at every width."""

    def train_all(jobs, at_once):
        for job in jobs:
            given = dict(pairwise(job.words))
            width = int(given.get("--model.d-model", 256))
            rate = float(given.get("--optim.muon-lr", 0.02))
            steps = int(given["--train.steps"])
            loss = 1 + 20 / width + 3 / steps**0.5 + math.log(rate / 0.016) ** 2
            rows = [{"step": 0, "time": 0.0}, {"step": steps, "val_bpb": loss, "time": 60.0}]
            job.folder.mkdir(parents=True)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (job.folder / "metrics.jsonl").write_text(lines, encoding="utf-8")

    monkeypatch.setattr(budget.sweep, "train_all", train_all)
    data = SimpleNamespace(train=range(3_000_000))
    monkeypatch.setattr(type(budget.PRESET.run), "open_data", lambda run: data)
    monkeypatch.setattr(budget.size_law, "FOLDER", tmp_path)
    options = Namespace(out=str(tmp_path / "runs"), record=True)
    text = budget.do_sweep(options, [])
    assert "; 13 runs, 13 minutes in all\n" in text
    assert [run.unique for run in read_table(tmp_path / "budget.csv")] == [3e6] * 13
    monkeypatch.setattr(budget.timing, "PAGE", tmp_path / "README.md")
    assert "within a factor of 1.00" in budget.do_rates(options, [])
    assert (tmp_path / "budget.png").stat().st_size > 5000


def test_the_least_of_losses_by_rate(budget):
    losses = [2 + math.log(factor / 0.8) ** 2 for factor in budget.FACTORS]
    assert budget.minimum(budget.FACTORS, losses) == pytest.approx(0.8)
    assert budget.minimum(budget.FACTORS, losses[::-1]) != pytest.approx(0.8)
    assert budget.minimum(budget.FACTORS, [5, 4, 3, 2, 1]) == budget.FACTORS[-1]
    text = budget.rates_text({128: losses, 256: losses})
    assert "within a factor of 1.00" in text and text.count("| 0.80 |") == 2


def test_what_a_plan_prints_is_read(budget):
    printed = "  width  128  3.2e+06 tokens  1.612 (1.5 to 1.7 in 90%)\n"
    printed += "  width  192  2.1e+06 tokens  1.600 (1.55 to 1.65 in 90%)  chosen\n"
    assert budget.expected(printed) == ("192", [1.6, 1.55, 1.65])


def test_each_modality_gives_as_much_text_alone_as_together(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    together = importlib.import_module("benchmarks.together")
    documents = {  # 10 bytes each; the second source has less
        name: [
            Document(f"{name}{split:5}{i:04}", split) for split in together.SPLITS for i in range(n)
        ]
        for name, n in (("a", 40), ("b", 20))
    }
    sources = {name: together.read(found) for name, found in documents.items()}
    texts = together.share_out(sources, 1000)
    assert [len(own["train"]) for own in texts.values()] == [20, 20]
    assert len(together.share_out(sources, 155)["a"]["train"]) == 15
    mixed = together.mix(texts)
    assert sorted(mixed["train"]) == sorted(texts["a"]["train"] + texts["b"]["train"])
    assert mixed["train"][:20] != texts["a"]["train"]
    folder = together.prepare(tmp_path / "mixed", mixed)
    data = TextData(Path(folder), 257, 32, 4, seed=0)
    assert data.split("test").bytes.tolist() == [10] * 60
    assert Counter(data.split("train").tokens.tolist())[ord("b")] == 20


def test_rows_of_any_length_are_scored_on_the_same_tokens(monkeypatch):
    """A model that knows the alphabet but not the digits behind it; 64 tokens of each window."""
    monkeypatch.syspath_prepend(ROOT)
    alibi = importlib.import_module("benchmarks.alibi")

    class Reader(GPT):
        def hidden(self, tokens):
            return torch.nn.functional.one_hot((tokens + 1) % 29, 29).float()

    sizes = {"vocab_size": 29, "context_length": 512, "n_layer": 1, "n_head": 1}
    model = Reader(GPTConfig(**sizes, d_model=29, d_head=2))
    model.head.weight.data.copy_(50 * torch.eye(29))
    windows = torch.arange(40 * 513).view(40, 513) % 29
    windows[0, 450] = (windows[0, 450] + 1) % 29  # one of the tokens that are scored, and a prompt
    found = alibi.losses(model, windows.numpy())
    assert [*found] == [128, 192, 256, 384, 512]
    assert all(loss == pytest.approx(2 * 50 / 40 / 64) for loss in found.values())
    table = alibi.table({"alibi": [found] * 3, "rope": [found]})
    assert "| 512 | 0.039 (0.039 to 0.039) |" in table
    assert "rows of 128 tokens; 40 windows" in table


def test_results_are_a_table_of_seeds_with_an_interval(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    results = importlib.import_module("benchmarks.results")
    found = []
    for value in (1.7, 1.5, 1.6):
        scores = {"test_bpb": {"untrained": 3.5, "reached": value}, "distance": {"reached": 2}}
        scores["test_loss"] = {"reached": 3, "Markov": 5.25}
        interval = {"low": value - 0.1, "high": value + 0.1, "of": "9 documents"}
        none = {"low": None, "high": None, "of": "7 batches: too few for an interval"}
        intervals = {"test_bpb": {"reached": interval}, "test_loss": {"reached": none}}
        found.append({"scores": scores, "intervals": intervals})
    runs = ["runs/a", "runs/b", "runs/c"]
    head, _, first, second, third = results.table(runs, found).splitlines()
    assert head == "| measure | untrained | Markov | a | b | c | 95% interval of the median run |"
    assert first == "| test_bpb | 3.5 |  | 1.7 | 1.5 | 1.6 | 1.5 to 1.7 (9 documents) |"
    assert second == "| distance |  |  | 2 | 2 | 2 |  |"
    assert third == "| test_loss |  | 5.25 | 3 | 3 | 3 |  |"


def test_all_patterns_read_the_same_frames(tmp_path, monkeypatch):
    """Each has windows of as many frames, and the last row a quarter of the training steps."""
    monkeypatch.syspath_prepend(ROOT)
    patterns = importlib.import_module("benchmarks.patterns")
    given = []
    monkeypatch.setattr(patterns, "train", lambda run, *words: given.append(words) or run)
    runs = patterns.train_all(Namespace(runs=tmp_path, codec=None, seeds=2, steps=600), [])
    assert given[0] == ("codec",)
    assert len({run for own in runs.values() for run in own}) == 8
    read = []
    for words in given[1:]:
        options = dict(pairwise(words))
        assert Path(options["--codec"]) == (tmp_path / "codec").resolve()
        sizes = int(options["--model.music.context-length"])
        model = MusicGenConfig(pattern=options["--model.music.pattern"], context_length=sizes)
        assert model.frames == patterns.FRAMES and model.n_book == patterns.Q
        read.append((model.pattern, sizes, options["--train.steps"], options["--train.seed"]))
    rows = [("parallel", 125, "600"), ("delay", 128, "600"), ("flat", 500, "600")]
    rows.append(("flat", 500, "150"))
    assert read == [(*row, seed) for seed in "01" for row in rows]


@pytest.mark.long
def test_the_gpu_script_runs_on_a_cpu(monkeypatch, tmp_path):
    """Tiny models: every part gives rows."""
    gpu = importlib.import_module("benchmarks.gpu")

    def run(words, cwd, **capture):
        after = words[1:]
        if after[:2] == ["-m", "torch.distributed.run"]:
            after = ["-c", processes.TORCHRUN, *after[2:]]
        process = processes.start(after, tmp_path, cwd, {})
        return subprocess.CompletedProcess(words, process.wait(100), *process.said())

    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=run))
    settings = gpu.Settings("cpu", tiny=True)
    rows = [row for part in gpu.PARTS.values() for row in part(settings)]
    assert {*gpu.SECONDS} == {*gpu.PARTS}
    assert sum(gpu.SECONDS.values()) <= 600
    errors = [float(value) for what, value, _ in rows if "error" in what or "difference" in what]
    assert len(errors) == 5
    assert max(errors) < 1e-5


def test_a_part_of_the_gpu_script_that_fails_is_a_row(monkeypatch):
    gpu = importlib.import_module("benchmarks.gpu")
    ((what, why, _),) = gpu.run_part("parity", gpu.Settings("nonsense", tiny=True))
    assert what == "FAILED"
    assert "nonsense" in why
    monkeypatch.setitem(gpu.SECONDS, "parity", 0.01)
    found = gpu.run_part("parity", gpu.Settings("cpu", tiny=False))
    assert found == [("FAILED", "not done in 0.01 s", "")]


@pytest.mark.parametrize("passes", [True, False])
def test_the_tests_are_timed_by_room(passes, tmp_path, monkeypatch):
    """A small suite: one room and one file beside it."""
    suite = importlib.import_module("benchmarks.suite")
    (tmp_path / "tests" / "room").mkdir(parents=True)
    slow = f"import time\ndef test_slow():\n    time.sleep(0.2)\n    assert {passes}\n"
    (tmp_path / "tests" / "room" / "test_a.py").write_text(slow, encoding="utf-8")
    quick = "def test_quick(): assert True\ndef test_too(): assert True\n"
    (tmp_path / "tests" / "test_b.py").write_text(quick, encoding="utf-8")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    assert suite.rooms_of([]) == {"lessons": ["tests/test_b.py"], "room": ["tests/room"]}
    with pytest.raises(SystemExit, match=r"no room rom .* choose from room, lessons"):
        suite.rooms_of(["rom"])
    if not passes:
        with pytest.raises(SystemExit, match=r"the tests fail: .* tests/room"):
            suite.run(["tests/room"])
        return
    whole, tests = suite.run(["tests/room", "tests/test_b.py"])
    assert whole > sum(seconds for *_, seconds in tests) > 0.2
    lines = suite.table(100.0, tests, {"room": 10.0, "lessons": 20.0}).splitlines()
    assert lines[0].endswith("; 3 tests in 100 s")
    assert lines[4:6] == ["| lessons | 2 | 0 | 20 |", "| room | 1 | 0 | 10 |"]
    assert lines[9].startswith("| `room/test_a.py::test_slow` | 0.2")
    assert len(lines) == 9 + 3


# ---- encoders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder_benchmark():
    return importlib.import_module("benchmarks.encoder")


def test_windows_have_all_real_tokens_and_no_padding(encoder_benchmark):
    tokens = torch.arange(1, 13).view(3, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    batch = {"tokens": tokens, "targets": -tokens, "mask": mask}
    windows = encoder_benchmark.as_windows(batch, context=4)
    assert windows["tokens"].tolist() == [[1, 2, 3, 5], [6, 9, 10, 11]]  # 12 fills no window
    assert windows["targets"].equal(-windows["tokens"])


def test_the_steps_that_fit_into_a_time(encoder_benchmark, tmp_path):
    rows = [{"step": 0, "val_loss": 9.0, "time": 0.0}]
    rows += [
        {"step": step, "loss": 5.0, "lr": 0.1, "time": 7 + 2.0 * step} for step in (10, 20, 30)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert encoder_benchmark.steps_in(1.0, tmp_path) == 30  # 2 seconds a step


def test_a_cell_has_all_seeds_and_the_interval_of_the_median(encoder_benchmark):
    found = []
    for value in (0.72, 0.70, 0.74):
        interval = {"low": value - 0.02, "high": value + 0.02}
        found.append(
            {
                "scores": {"test accuracy": {"reached": value}},
                "intervals": {"test accuracy": {"reached": interval}},
            }
        )
    assert encoder_benchmark.cell(found) == "72.0, 70.0, 74.0 (70.0 to 74.0)"


def test_each_idea_changes_what_a_step_does(monkeypatch):
    """By the loss of the third step, and by the singular values that Muon's iteration leaves."""
    ideas = importlib.import_module("benchmarks.ideas")
    small = dataclasses.replace(
        ideas.PRESET.model, vocab_size=300, d_model=32, n_head=2, context_length=16
    )
    train = dataclasses.replace(ideas.PRESET.train, batch_size=2, micro_batch_size=1)
    preset = dataclasses.replace(ideas.PRESET, model=small, train=train)
    monkeypatch.setattr(ideas, "PRESET", preset)
    losses = {}
    for name, idea in {"preset": ideas.PLAIN, **ideas.IDEAS}.items():
        torch.manual_seed(0)
        batch = {"tokens": torch.randint(300, (2, 17))}
        with ideas.put_in_place(idea):
            run = ideas.run_of(idea)
            model = run.build_model()
            optimizers = ideas.build_optimizers(model, run.optim)
            for _ in range(3):
                loss, _ = model.loss(batch)
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        losses[name] = float(loss.detach())
    same = {name for name, loss in losses.items() if loss == losses["preset"]}
    # Two change the batches alone, and these are too small for chunks.
    assert same == {"preset", "rows-8", "context-128", "chunks"}
    singular = torch.linalg.svdvals(ideas.polar_express(torch.randn(1, 64, 48)).float())
    assert singular.min() > 0.8 and singular.max() < 1.2


def test_the_tables_of_a_gpt_that_sees(monkeypatch):
    """Of three seeds, with the interval of the middle one; a name is found by its whole pattern."""
    monkeypatch.syspath_prepend(ROOT)
    vision = importlib.import_module("benchmarks.vision")

    def run(values: dict[str, float]) -> dict:
        scores = {name: {"reached": v, "commonest answer": 0.25} for name, v in values.items()}
        intervals = {
            name: {"reached": {"low": v - 0.1, "high": v + 0.1}} for name, v in values.items()
        }
        return {"scores": scores, "intervals": intervals}

    seeing, clip = [], []
    for shift in (0.0, 0.2, 0.1):
        seeing.append({})
        clip.append({})
        for split in vision.TEST:
            seeing[-1] |= {f"{split}: caption": 0.5 + shift, f"{split}: is it bold?": 0.7 + shift}
            start = f"zero-shot, {split}"
            clip[-1] |= {f"{start}, all 6,122 names": 0.3 + shift, f"{start}, mean vectors": 0.0}
            clip[-1] |= {f"{start}, 400 names": 0.4 + shift}
    seeing, clip = list(map(run, seeing)), list(map(run, clip))
    rows = vision.names_table(seeing, clip).splitlines()[2:]
    cells = "50.0, 70.0, 60.0 (50.0 to 70.0) | 30.0, 50.0, 40.0 (30.0 to 50.0) | 40.0, 60.0, 50.0"
    assert [row.partition(" | ")[2] for row in rows] == [f"{cells} (40.0 to 60.0) |"] * 2
    (row,) = vision.questions_table(seeing).splitlines()[2:]
    answer = "70.0, 90.0, 80.0 (70.0 to 90.0) | 25.0"
    assert row == f"| is it bold? | {answer} | {answer} |"
    with pytest.raises(ValueError, match="no measure 'style' among"):
        vision.cell(seeing, "style")
