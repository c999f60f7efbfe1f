"""Runs that start from a trained run, by the command line: trained, sampled, compared."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SIZES, call
from PIL import Image

import sample
import train
from tinyfm import adapt
from tinyfm.adapt import __main__ as compare
from tinyfm.batches import text as data
from tinyfm.clip import CLIPConfig
from tinyfm.common import files
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.evaluate import likelihood, overlap
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.hub import __main__ as hub
from tinyfm.recipes import pictures, registry, run_dir

pytestmark = pytest.mark.usefixtures("no_forecast")
STEPS = ["--train.steps", "4", "--train.eval-every", "2", "--train.batch-size", "4"]
REVIEWS = "text,label,tone\n" + "".join(
    f"{word} {i},{label},{tone}\n"
    for i in range(6)
    for word, label, tone in (("fine", "good", "calm"), ("awful", "bad", "loud"))
)


def same_sizes(options: list[str]) -> list[str]:
    """The options of a tiny run without those of model and tokenizer, which come from the base."""
    words = " ".join(options)
    return re.sub(r"--(model\.\S+|data\.tokenizer) \S+ ?", "", words).split()


@pytest.fixture(scope="module")
def base(tiny_run):
    return run_dir.open_run(str(tiny_run))


@pytest.fixture(scope="module")
def lora(tiny_run, options, tmp_path_factory):
    """A run that adapts the tiny one."""
    out = tmp_path_factory.mktemp("adapted") / "lora"
    begun = ["--init-from", tiny_run, "--adapt", "lora", "--adapter.rank", "2", "--out", out]
    assert call(train, *same_sizes(options), *begun) == 0
    return out


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "reviews.csv"
    path.write_text(REVIEWS, encoding="utf-8")
    return path


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- starting from a run ------------------------------------------------------------------------


def test_a_run_starts_from_the_weights_of_its_base(tiny_run, base, options, tmp_path, capsys):
    out = tmp_path / "more"
    assert call(train, *same_sizes(options), "--init-from", tiny_run, "--out", out) == 0
    first = lines_of(out / "metrics.jsonl")[0]
    assert first["val_bpb"] == pytest.approx(base.meta["val_bpb"], rel=1e-4)
    assert "before" in capsys.readouterr().out
    whole = run_dir.open_run(str(out))  # it holds all weights: its base is not needed
    assert whole.run.base_hash == adapt.base_hash(base.model)
    assert whole.model.state_dict().keys() == base.model.state_dict().keys()


def test_the_tokenizer_of_a_run_can_be_used_by_others(tiny_run, base):
    found = [data.fixed_tokenizer(str(path)) for path in (tiny_run, base.folder)]
    assert {own.fingerprint() for own in found} == {base.tokenizer.fingerprint()}


def test_an_adapter_is_small_and_opens_on_its_base(lora, base, tiny_run):
    opened = run_dir.open_run(str(lora))
    tensors = files.load_tensors(opened.folder)
    assert all(".lora." in name for name in tensors)
    assert sum(t.numel() for t in tensors.values()) < 0.2 * adapt.trained(opened.model)[1]
    x = torch.arange(20)[None]
    reached = opened.model(x)
    assert not torch.equal(reached, base.model(x))
    own = run_dir.open_run(str(tiny_run))
    run_dir.add_adapters(own, [str(lora)])
    assert torch.equal(own.model(x), reached)


@pytest.mark.parametrize("method", ["bias", "head", "prompt"])
def test_every_method_trains_and_generates(method, tiny_run, options, tmp_path, capsys):
    out = tmp_path / method
    begun = ["--init-from", tiny_run, "--adapt", method, "--adapter.prompt-tokens", "4"]
    assert call(train, *same_sizes(options), *begun, "--out", out) == 0
    assert call(sample, out, "--prompt", "The", "--max-new-tokens", "3", "--temperature", "0") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("The")


def test_an_adapter_resumes_bit_for_bit(lora, tiny_run, options, tmp_path):
    out = tmp_path / "stopped"
    begun = [*same_sizes(options), "--init-from", tiny_run, "--out", out]
    begun += ["--adapt", "lora", "--adapter.rank", "2"]
    shutil.copytree(lora, out)
    shutil.rmtree(out / "step-000004")
    (out / "latest").write_text("step-000002\n", encoding="utf-8")
    assert call(train, *begun, "--resume") == 0
    one, two = (files.load_tensors(run / "step-000004") for run in (lora, out))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_student_learns_from_a_teacher(tiny_run, options, tmp_path):
    out = tmp_path / "student"
    own = " ".join(options).replace("--data.tokenizer bytes", "").split()  # it takes the teacher's
    taught = [*own, "--teacher", tiny_run, "--model.d-model", "16", "--distil.share", "1"]
    assert call(train, *taught, "--out", out) == 0
    rows = lines_of(out / "metrics.jsonl")
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]


# ---- tasks --------------------------------------------------------------------------------------


def test_texts_are_classified(tiny_run, reviews, tmp_path, capsys):
    out = tmp_path / "reviews"
    task = ["gpt", "--task", "classify", "--init-from", tiny_run, "--data.path", reviews]
    columns = ["--data.label-columns", "label", "tone", "--data.val-fraction", "0.3"]
    assert call(train, *task, *columns, *STEPS, "--optim.lr", "0.1", "--out", out) == 0
    assert lines_of(out / "metrics.jsonl")[-1]["accuracy label"] > 0.5
    capsys.readouterr()
    assert call(sample, out, "--prompt", "fine 9") == 0
    said = capsys.readouterr().out
    assert "label:" in said and "tone:" in said
    shares = [float(line.split()[0]) for line in said.splitlines() if line[0].isdigit()]
    assert sum(shares) == pytest.approx(2, abs=1e-3)  # one for each question
    assert call(evaluate, out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    trained = lines_of(out / "metrics.jsonl")[-1]  # training reads validation alone
    for name in ("accuracy label", "macro_f1 tone"):
        found = printed["scores"][f"validation {name}"]["reached"]
        assert found == pytest.approx(trained[name], rel=1e-4)
        assert f"test {name}" in printed["scores"]
    assert printed["intervals"]["test accuracy tone"]["reached"]["n"] == 2
    assert "test_loss" in printed["scores"]


def test_pictures_are_classified(tmp_path, capsys):
    for name, level in (("dark", 0), ("light", 255)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            picture = Image.fromarray(np.full((8, 8), abs(level - 4 * i), np.uint8))
            picture.save(tmp_path / "pictures" / name / f"{i}.png")
    out, cache = tmp_path / "lights", ["--data.cache", tmp_path / "cache"]
    model = CLIPConfig(8, 1, 4, "conv", 1, 8, 2, 300, 8, 1, 8, 2, 8)
    sizes = [
        f"--model.{name.replace('_', '-')}={value}"
        for name, value in vars(model).items()
        if value != getattr(CLIPConfig(), name)
    ]
    task = ["clip", "--task", "classify", "--data.path", tmp_path / "pictures", *sizes]
    learning = ["--optim.lr", "0.02", "--data.val-fraction", "0.3", "--train.batch-size", "4"]
    learning += ["--train.steps", "30", "--train.eval-every", "15"]
    assert call(train, *task, *cache, *learning, "--out", out) == 0
    assert lines_of(out / "metrics.jsonl")[-1]["accuracy"] == 1
    capsys.readouterr()
    assert call(sample, out, "--image", tmp_path / "pictures" / "dark" / "0.png") == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("dark")
    assert "no confusion" in refusal(capsys, evaluate, out, "--picture", tmp_path / "x.png")
    with pytest.MonkeyPatch.context() as patch:  # a model that confuses everything
        patch.setattr(pictures, "predictions", lambda *_: {"label": (np.eye(2), np.array([1, 0]))})
        assert call(evaluate, out, "--picture", tmp_path / "x.png") == 0
    assert Image.open(tmp_path / "x.png").info["Software"] == "tinyfm"
    mine = tmp_path / "mine.png"
    mine.write_text("precious", encoding="utf-8")
    assert "tinyfm did not draw it" in refusal(capsys, evaluate, out, "--picture", mine)
    assert mine.read_text(encoding="utf-8") == "precious"


def test_a_base_learns_to_chat(tiny_run, tmp_path, capsys, monkeypatch):
    chats = tmp_path / "chats.jsonl"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    asked = [{**talk[0], "content": f"a{i}"} for i in range(8)]
    lines = [json.dumps({"messages": [question, talk[1]]}) for question in asked]
    chats.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "chat"
    task = ["gpt", "--task", "chat", "--init-from", tiny_run, "--data.path", chats, *STEPS]
    assert call(train, *task, "--out", out) == 0
    assert re.search(r"[\d,]+ of [\d,]+ tokens are trained on", capsys.readouterr().out)
    answer = ["--max-new-tokens", "4", "--temperature", "0"]
    assert call(sample, out, "--prompt", "a1", *answer) == 0
    typed = ["a2"]

    def read_line(prompt: str) -> str:
        if not typed:
            raise EOFError
        return typed.pop()

    monkeypatch.setattr("builtins.input", read_line)
    assert call(sample, out, "--chat", *answer) == 0
    assert "assistant: " in capsys.readouterr().out


# ---- without training, and compared -------------------------------------------------------------


def test_a_gpt_answers_without_training(tiny_run, reviews, text, tmp_path, capsys):
    questions = tmp_path / "questions.jsonl"
    question = {"context": "The", "choices": [" statement", "\x00\x01\x02"], "answer": 0}
    questions.write_text(json.dumps(question), encoding="utf-8")
    asked = ["--text", text, "--choices", questions, "--task", reviews, "--shots", "1", "--json"]
    assert call(evaluate, tiny_run, *asked) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    values = {name.split(": ")[1]: row["reached"] for name, row in scores.items()}
    assert 0 < values["bits per byte"] < 9 and values["perplexity"] > 1
    assert values["right, likelihood by byte"] == 1 and values["by chance"] == 0.5
    shots = ["--shots", "2", "--examples", reviews, "--prompt", "fine"]
    assert call(sample, tiny_run, *shots) == 0
    printed = capsys.readouterr()
    assert {line.split()[-1] for line in printed.out.splitlines()} == {"good", "bad"}
    assert "of 2 examples fit into the context" in printed.err


def test_few_shot_examples_are_of_all_classes_and_drawn_by_the_seed(tiny_run, reviews, monkeypatch):
    """The training examples are sorted by class: the first four are of one class."""
    prompts = []

    def noted(tokenizer, examples, query, room):
        prompts.append((query, tuple(examples)))
        return make_prompt(tokenizer, examples, query, room)

    make_prompt = likelihood.few_shot_prompt
    monkeypatch.setattr(likelihood, "few_shot_prompt", noted)
    seen = []
    for seed in ("0", "1"):
        prompts.clear()
        options = ["--task", reviews, "--shots", "4", "--seed", seed]
        assert call(evaluate, tiny_run, *options) == 0
        queries = [(query, drawn) for query, drawn in prompts if query not in likelihood.NO_CONTENT]
        for _, drawn in queries:
            assert sorted(label for _, label in drawn) == ["bad", "bad", "good", "good"]
        seen.append(queries)
    assert [query for query, _ in seen[0]] == [query for query, _ in seen[1]]
    assert seen[0] != seen[1]
    prompts.clear()
    asked = ["--shots", "4", "--examples", reviews, "--prompt", "fine"]
    assert call(sample, tiny_run, *asked, "--seed", "1") == 0
    assert sorted(label for _, label in prompts[0][1]) == ["bad", "bad", "good", "good"]


def test_methods_are_compared_and_results_are_kept(tiny_run, reviews, tmp_path, capsys):
    out = tmp_path / "compared"
    ways = ["--methods", "head", "bias", "lora 1", "from scratch", "--labels", "4", "0"]
    ways += ["--steps", "2", "2"]
    data = ["--data.path", str(reviews), "--data.val-fraction", "0.4", "--batch-size", "2"]
    arguments = ["compare", str(tiny_run), *ways, *data, "--seeds", "1", "--out", str(out)]
    assert compare.main(arguments) == 0
    rows = lines_of(out / "results.jsonl")
    methods = ["zero-shot", "few-shot", "head", "head, gains", "lora 1", "from scratch"]
    assert [row["method"] for row in rows] == methods + methods[2:]
    assert {row["n"] for row in rows} == {3}  # all are scored on the three test texts
    for row in rows:
        assert row["low"] <= row["accuracy"] <= row["high"]
    assert rows[1]["shots"] <= 4 and 0 <= rows[1]["without"] <= 1
    n = {row["method"]: row["trained"] for row in rows}
    assert 0 == n["zero-shot"] < n["head"] < n["lora 1"] < n["from scratch"]
    assert n["head"] < n["head, gains"]
    assert (out / "compare.png").stat().st_size > 10_000
    table = capsys.readouterr().out.splitlines()[-19:]
    assert any("on test, 3 texts" in line for line in table)
    assert f"on average {rows[1]['shots']:.1f} of 4 examples fitted" in table[-3]
    assert re.match(r"base: 0.0% of the words of test are in 13-word runs", table[-2])
    assert compare.main(arguments) == 0  # nothing is measured again
    assert capsys.readouterr().out.splitlines() == table
    assert len(lines_of(out / "results.jsonl")) == len(rows)


def test_damaged_results_are_measured_again(tmp_path, capsys):
    row = {"what": ["head", 4], "method": "head", "labels": 4, "accuracy": 0.5, "low": None}
    row |= {"high": 0.6, "n": 9, "examples": "9 texts", "trained": 1, "peak_bytes": 2}
    row |= {"stored_bytes": 3, "seconds": 1.5}
    bad = [
        row | {name: value} for name in row for value in ({}, True, "x" if name != "method" else 1)
    ]
    bad = [one for one in bad if one != row | {"examples": "x"}]
    lines = [row, *bad, [row], {"what": []}]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"what": ["he', encoding="utf-8")
    assert compare.read_results(path) == [row]
    assert f"{len(lines)} lines of {path} cannot be read" in capsys.readouterr().err
    assert path.read_bytes().endswith(b'["he\n')  # the next row gets a line to itself
    assert compare.read_results(tmp_path / "none") == []


def test_what_the_base_has_read_of_test_is_said(tiny_run, monkeypatch):
    opened = run_dir.open_run(str(tiny_run))
    words = opened.run.open_data().split("train").tokens[1:400]
    ids = words.tolist()
    task = SimpleNamespace(tokenizer=opened.tokenizer)

    def texts(source, split):
        if source is task:
            return [opened.tokenizer.decode(ids)] if split == "test" else []
        return [opened.tokenizer.decode(ids[:200])]

    monkeypatch.setattr(overlap, "read_texts", texts)
    share = float(re.search(r"base: (\d+\.\d)%", compare.read_by_base(opened, task))[1])
    assert 25 < share < 75
    monkeypatch.setattr(run_dir, "is_data_of", lambda opened, base: False)
    assert "changed" in compare.read_by_base(opened, task)


def test_a_row_has_the_interval_of_its_median_seed():
    about = {"method": "head", "labels": 100, "n": 400, "examples": "400 texts", "trained": 1}
    about |= {"peak_bytes": 0, "stored_bytes": 0, "seconds": 1.0}
    rows = []
    for accuracy in (0.55, 0.5, 0.6):
        rows.append(
            {**about, "accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05}
        )
    line = compare.accuracy_table(rows, (100,)).splitlines()[-1]
    assert line.split("  ")[-1].strip() == "55.0 (50.0 to 60.0), seeds 50.0 to 60.0"
    alone = [{**rows[0], "low": None, "high": None}]
    assert compare.accuracy_table(alone, (100,)).splitlines()[-1].split() == ["head", "55.0"]


def test_what_the_method_bias_trains_is_named():
    config = {"vocab_size": 8, "context_length": 4, "n_layer": 1, "n_head": 1, "d_model": 8}
    for options, name in (({}, "gains"), ({"norm": "layernorm", "bias": True}, "biases and gains")):
        model = GPT(GPTConfig(**config, **options))
        adapt.apply(model, "bias")
        trained = {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad}
        assert ("bias" in trained) == ("biases" in name)
        assert adapt.kinds_of_bias(model) == name
    assert adapt.kinds_of_bias(torch.nn.Linear(2, 2)) == "biases"


def test_an_adapted_run_exports(lora, tmp_path):
    hub.main([str(lora), str(tmp_path / "whole")])
    hub.main([str(lora), str(tmp_path / "adapter"), "--adapter"])
    assert (tmp_path / "whole" / "model.safetensors").exists()
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


# ---- refused ------------------------------------------------------------------------------------


def refusal(capsys, module, *arguments) -> str:
    capsys.readouterr()
    assert call(module, *arguments) in (1, 2)
    return re.sub(r"[\s│╭╮╰╯─]+", " ", capsys.readouterr().err)


def test_options_that_do_not_fit_the_base_are_refused(tiny_run, lora, options, tmp_path, capsys):
    own, out = same_sizes(options), ["--out", tmp_path / "x"]
    for wrong, reason in (
        (["--adapt", "lora"], "add --init-from RUN"),
        (["--init-from", tiny_run, "--model.d-model", "64"], "has 32"),
        (["--init-from", tiny_run, "--data.tokenizer", "bpe"], "remove this option"),
        (["--init-from", tmp_path], "no complete checkpoint"),
        (["--init-from", tiny_run, "--adapt", "lora", "--adapter.rank", "99"], "rank 99"),
        (["--init-from", tiny_run, "--adapt", "lora", "--adapter.targets", "zz"], "match no layer"),
    ):
        assert reason in refusal(capsys, train, *own, *wrong, *out)
    assert "family gpt, not clip" in refusal(capsys, train, "clip", "--init-from", tiny_run, *out)
    assert "it has chat, classify" in refusal(capsys, train, "gpt", "--task", "sing", *out)
    assert "start from a run, --init-from" in refusal(capsys, train, "gpt", "--task", "chat", *out)
    other = ["--data.tokenizer", "bpe", "--model.vocab-size", "260"]
    assert "teacher" in refusal(capsys, train, *options, *other, "--teacher", tiny_run, *out)
    assert not (tmp_path / "x").exists()


def test_an_adapter_of_another_base_is_refused(lora, tiny_run, tmp_path, capsys):
    assert "no adapter" in refusal(capsys, sample, tiny_run, "--adapter", tiny_run)
    other = [*SIZES.split(), "--data.path", __file__, "--data.cache", tmp_path]
    other += ["--out", tmp_path / "other", "--train.seed", "5"]
    assert call(train, *other) == 0
    assert "hash" in refusal(capsys, sample, tmp_path / "other", "--adapter", lora)
    record = files.read_json(lora / "step-000004" / "config.json")
    assert record["base_hash"] and record["adapt"] == "lora"


def test_bad_labels_and_questions_are_refused(tiny_run, tmp_path, capsys):
    table, questions = tmp_path / "one.csv", tmp_path / "q.jsonl"
    table.write_text("text,label\na,x\nb,x\nc,x\n", encoding="utf-8")
    questions.write_text('{"context": "a", "choices": ["b"], "answer": 0}', encoding="utf-8")
    task = ["gpt", "--task", "classify", "--init-from", tiny_run, "--out", tmp_path / "x"]
    assert "need two" in refusal(capsys, train, *task, "--data.path", table)
    columns = ["--data.path", table, "--data.label-columns", "topic"]
    assert "no column 'topic'" in refusal(capsys, train, *task, *columns)
    assert "is no question" in refusal(capsys, evaluate, tiny_run, "--choices", questions)
    assert "--examples" in refusal(capsys, sample, tiny_run, "--shots", "2", "--prompt", "a")
    assert not (tmp_path / "x").exists()


def test_presets_of_tasks_keep_the_model():
    for name, families in (("gpt", {"classify", "chat"}), ("clip", {"classify"})):
        for task in families:
            run = registry.get_preset(name, task, "lora").run
            assert run.model == registry.find_preset(name).run.model and run.task == task
            assert run.optim.optimizer == "adamw"
    assert registry.get_preset("gpt") is registry.find_preset("gpt")


def test_a_run_that_starts_from_another_has_half_the_learning_rate():
    usual = registry.find_preset("gpt").run.optim
    optim = registry.get_preset("gpt", init_from="runs/gpt").run.optim
    assert (optim.lr, optim.muon_lr) == (usual.lr / 2, usual.muon_lr / 2)
    assert registry.get_preset("gpt", adapt="lora", init_from="runs/gpt").run.optim.lr == 0.005


def test_an_absurd_number_of_seeds_is_refused():
    message = compare.main(["compare", "nowhere", "--seeds", str(10**12)])
    assert "--seeds 1000000000000: use 1 to 1000" in message
