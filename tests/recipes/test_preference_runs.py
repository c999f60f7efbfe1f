"""The tasks reward, dpo and grpo: train, resume, adapt, measure, sample; and what users mistype."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import call

import sample
import train
from data.report import Report
from data.suites import Question
from tinyfm.adapt import __main__ as adapt
from tinyfm.adapt.constitution import Principle
from tinyfm.adapt.preference import Answer
from tinyfm.adapt.rewards import Judge
from tinyfm.batches.preference import PairConfig, read_pairs
from tinyfm.common import files
from tinyfm.evaluate import __main__ as evaluate
from tinyfm.evaluate import overlap
from tinyfm.hub import __main__ as hub
from tinyfm.recipes import constitution, history, policies, run_dir, suites
from tinyfm.recipes.gpt import GPTDPORun, GPTGRPORun
from tinyfm.training import checkpoint
from tinyfm.training.trainer import TrainConfig

BASE = """gpt --data.path text.txt --data.tokenizer bytes --data.cache cache --model.vocab-size 257
--model.n-layer 1 --model.n-head 2 --model.d-model 32 --model.context-length 32
--train.batch-size 8 --train.micro-batch-size 0 --train.steps 30 --train.eval-every 0"""
TASK = """--init-from base --train.batch-size 8 --train.micro-batch-size 4 --train.eval-every 10
--train.log-every 1 --train.dtype float32 --data.val-fraction 0.25"""
STEPS = {"reward": 20, "dpo": 20, "grpo": 20, "lora": 10}
MORE = {
    "reward": ("--task", "reward", "--data.path", "pairs.jsonl"),
    "dpo": ("--task", "dpo", "--data.path", "pairs.jsonl", "--data.cache", "cache"),
    "grpo": (
        *("--task", "grpo", "--data.path", "prompts.jsonl", "--data.reward", "positive"),
        *("--data.judge", "reward", "--grpo.max-new-tokens", "6", "--grpo.beta", "0.01"),
    ),
}
MORE["lora"] = (*MORE["grpo"], "--adapt", "lora")
WORDS = ("cat", "dog", "sun", "sea", "tree", "road")


def write(name: str, rows: list[dict]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, no_forecast) -> Path:
    """A folder with a base, pairs of which those with "oo" are better, and a run of each task."""
    place = tmp_path_factory.mktemp("preference")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        lines = [f"the {word} is {how}" for word in WORDS for how in ("good", "a bad one")]
        Path("text.txt").write_text("\n\n".join(lines * 8), encoding="utf-8")
        prompts = [f"the {word}{mark}" for word in WORDS for mark in ("", "?", "!", ",")]
        write("prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
        better = {"chosen": " is good", "rejected": " is a bad one"}
        write("pairs.jsonl", [{"prompt": prompt, **better} for prompt in prompts])
        assert call(train, *BASE.split(), "--out", "base") == 0
        for name, words in MORE.items():
            steps = ("--train.steps", STEPS[name])
            assert call(train, "gpt", *TASK.split(), *steps, *words, "--out", name) == 0
    return place


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture
def fails(capsys):
    def run(module, *words) -> str:
        capsys.readouterr()
        assert call(module, *words) == 1
        return capsys.readouterr().err

    return run


def rows_of(run: str | Path) -> list[dict]:
    lines = Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def first_and_last(run: str) -> tuple[dict, dict]:
    scores = [row for row in rows_of(run) if "val_loss" in row]
    return scores[0], scores[-1]


# ---- learning ------------------------------------------------------------------------------------


def test_pairs_are_learned():
    for name in ("reward", "dpo"):
        first, last = first_and_last(name)
        assert last["val_loss"] < first["val_loss"] - 0.1
        assert first["val_margin"] == pytest.approx(0, abs=1e-4)
        assert last["val_accuracy"] == 1 and last["val_margin"] > 0.3
    first, last = first_and_last("dpo")
    assert first["val_kl"] == pytest.approx(0, abs=1e-5)
    assert last["val_kl"] > 0 and 0 < last["val_distinct_2"] <= 1


def test_grpo_raises_the_reward_and_measures_the_kl():
    first, last = first_and_last("grpo")
    assert first["val_kl"] == pytest.approx(0, abs=1e-5)
    assert last["val_kl"] > 0.01
    assert last["val_reward"] > first["val_reward"]
    assert {"val_positive", "val_distinct_2"} < last.keys()
    losses = [row["loss"] for row in rows_of("grpo") if "loss" in row]  # minus the reward
    assert sum(losses[-3:]) < sum(losses[:3])


def test_a_lora_learns_from_rewards_too():
    first, last = first_and_last("lora")
    assert first["val_kl"] == pytest.approx(0, abs=1e-5)
    assert last["val_kl"] > 1e-3
    tensors = files.load_tensors(Path("lora", "step-000010"))
    assert all(".lora." in name for name in tensors)


def test_a_policy_of_pairs_answers_prompts_that_leave_room_for_it():
    opened = run_dir.open_run("dpo")
    data = opened.run.open_data()
    long = data.splits["val"][0]._replace(chosen=[256] * 31, start=29)
    data.splits["val"].append(long)
    answers = opened.run.answers(opened.model, data, "val")
    assert len(answers) == len(data.splits["val"]) - 1
    assert max(len(answer.tokens) for answer in answers) <= 16  # half of the context
    data.splits["val"] = [long]  # then what there is: three tokens
    answers = opened.run.answers(opened.model, data, "val", most=8)
    assert {len(answer.tokens) for answer in answers} <= {1, 2, 3} and len(answers) == 8


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_run_that_stopped_goes_the_same_way(name, tmp_path):
    out = tmp_path / name
    shutil.copytree(name, out)
    shutil.rmtree(out / "step-000020")
    (out / "latest").write_text("step-000010\n", encoding="utf-8")
    assert call(train, "--resume", "--out", out) == 0
    scores = ("loss", "val_loss", "val_kl", "val_margin", "val_reward")
    whole, again = ([{k: row.get(k) for k in scores} for row in rows_of(o)] for o in (name, out))
    assert again[-len(whole) :] == whole
    resumed = files.load_tensors(out / "step-000020")
    for key, weight in files.load_tensors(Path(name, "step-000020")).items():
        assert weight.equal(resumed[key])


# ---- the commands --------------------------------------------------------------------------------


def test_sample_continues_texts_and_gives_rewards(capsys):
    for name in ("dpo", "grpo", "lora"):
        words = (name, "--prompt", "the cat", "--max-new-tokens", "5")
        assert call(sample, *words) == 0
        assert call(sample, *words, "--quantize", "int4-gptq") == 0  # it computes the run's loss
        assert capsys.readouterr().out.startswith("the cat")
    rewards = []
    for text in ("the cat is good", "the cat is a bad one"):
        assert call(sample, "reward", "--prompt", text) == 0
        rewards.append(float(capsys.readouterr().out))
    assert rewards[0] > rewards[1]
    assert call(sample, "reward", "--prompt", "x" * 99) == 0
    assert "has 101 tokens: the model reads the first 32" in capsys.readouterr().err


def test_evaluate_measures_reward_and_kl_before_and_after(capsys):
    assert call(evaluate, "grpo", "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    own = scores["scores"]
    assert own["test_kl"]["before"] == pytest.approx(0, abs=1e-5)
    assert own["test_kl"]["reached"] > 0
    assert own["val_reward"]["reached"] > own["val_reward"]["before"]
    assert scores["intervals"]["val_positive"]["reached"]["of"] == "3 answers"
    assert call(evaluate, "dpo", "--json") == 0
    own = json.loads(capsys.readouterr().out)["scores"]
    assert own["val_accuracy"]["reached"] == 1 and own["val_kl"]["reached"] > 0
    assert call(evaluate, "reward", "--json") == 0
    assert json.loads(capsys.readouterr().out)["scores"]["test_accuracy"]["reached"] == 1


def test_a_policy_is_a_gpt_for_the_hub(fails, tmp_path, capsys):
    hub.main(["grpo", str(tmp_path / "exported")])
    assert 'pipeline("text-generation"' in capsys.readouterr().out
    hub.main(["dpo", "--gguf", str(tmp_path / "dpo.gguf")])
    assert (tmp_path / "dpo.gguf").read_bytes()[:4] == b"GGUF"
    assert "family reward" in fails(hub, "reward", "--gguf", tmp_path / "a.gguf")


def test_principles_make_pairs_and_answers(fails, tmp_path, capsys):
    write("rules.jsonl", [
        {"principle": "It says good.", "judge": "contains good", "keeps": ["good", "bad"]},
        {"principle": "It is liked.", "judge": "reward"},
    ])  # fmt: skip
    out = tmp_path / "pairs.jsonl"
    words = ("constitution", "base", "--data", "prompts.jsonl", "--max-new-tokens", "16")
    words += ("--drafts", "6", "--out", out)
    call(adapt, *words, "--principles", "rules.jsonl")
    printed = capsys.readouterr().out
    assert "judge: contains good; 1 of 2 examples right" in printed
    assert "of 3 test pairs it orders 100% (44% to 100%) as people do" in printed
    assert f"next: python train.py gpt --task dpo --init-from base --data.path {out}" in printed
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    answers = (tmp_path / "pairs-answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert f"{len(rows)} pairs in" in printed and f"{len(answers)} answers that" in printed
    judge = run_dir.open_run("reward")
    score = Judge(judge.model, judge.tokenizer, whole=False)

    def kept(prompt: str, text: str) -> int:
        (reward,) = score([Answer([], [], prompt, text, True)])
        return ("good" in text) + (reward > 0)

    assert rows and answers
    for row in rows:
        better, worse = (kept(row["prompt"], row[name]) for name in ("chosen", "rejected"))
        assert better > worse
    assert all("good" in json.loads(line)["text"] for line in answers)
    # What train.py makes of the pairs: none is skipped.
    assert len(list(read_pairs(PairConfig(str(out)), Report()))) == len(rows)

    # The same again, and mistakes.
    first = out.read_bytes()
    assert f"{out} exists" in fails(adapt, *words, "--principles", "rules.jsonl")
    call(adapt, *words, "--principles", "rules.jsonl", "--overwrite")
    assert out.read_bytes() == first
    words = (*words[:-1], tmp_path / "other.jsonl")
    assert "--principles data/principles.jsonl" in fails(adapt, *words)
    rules = ("--principles", "rules.jsonl")
    assert "--drafts is 1; use 2" in fails(adapt, *words, *rules, "--drafts", "1")
    assert "leaves no room" in fails(adapt, *words, *rules, "--max-new-tokens", "32")
    assert "no folder" in fails(adapt, *words, *rules, "--out", "nowhere/a.jsonl")
    assert "ends in .jsonl" in fails(adapt, *words, *rules, "--out", "a.txt")
    assert "family reward: give one that continues" in fails(
        adapt, words[0], "reward", *words[2:], *rules
    )
    write("rules.jsonl", [{"principle": "It is short.", "judge": "words 99"}])
    assert "one breaks fewer principles: use more --drafts" in fails(adapt, *words, *rules)
    write("rules.jsonl", [{"principle": "It is liked.", "judge": "dpo"}])
    assert "the judge dpo is a run of family dpo: give a reward" in fails(adapt, *words, *rules)
    assert "usage: python -m tinyfm.adapt compare RUN" in fails(adapt, "constitutions")


def test_what_came_before_a_run_counts_only_if_it_is_as_it_was():
    """A reward model's test pairs, and the run that a run started from."""
    judge = run_dir.open_run("reward")
    assert constitution.agreement_with_people(judge, "reward").startswith("of 3 test pairs")
    pairs = Path("pairs.jsonl")
    content = pairs.read_bytes()
    pairs.write_bytes(content.replace(b"sun", b"son"))
    try:
        said = constitution.agreement_with_people(judge, "reward")
    finally:
        pairs.write_bytes(content)
    assert "not measured" in said and "reward was trained on other data than pairs.jsonl" in said
    dpo = run_dir.open_run("dpo")
    assert [one.run.family for one in history.open_bases(dpo)] == ["dpo", "gpt"]
    moved = replace(dpo, run=replace(dpo.run, base_hash="0"))
    with pytest.raises(ValueError, match="base: its weights now have the hash"):
        history.open_bases(moved)


def test_empty_and_unfinished_drafts_are_left_out():
    """An empty one would keep the principle first, and so leave the prompt without a pair."""
    judges = constitution.Judges([Principle("It is short.", "words 2")], whole=False)
    texts = ("", "a b c", "a", "cut")
    rounds = [[Answer([], [], "p ", text, ended=text != "cut")] for text in texts]
    (drafts,) = constitution.judge_drafts(rounds, judges)
    pair = {"prompt": "p ", "chosen": "a", "rejected": "a b c"}
    assert constitution.choose(drafts) == (pair, {"text": "p a"})


def test_rounds_of_drafts_differ_and_share_none_with_another_seed():
    opened = run_dir.open_run("base")
    prompts = constitution.open_prompts("prompts.jsonl", opened, 16).prompts("train")
    rounds = []
    for seed in (0, 1):
        rounds += constitution.draw_rounds(opened, prompts, 2, seed, 16, code=False)
    assert len({tuple(answer.text for answer in answers) for answers in rounds}) == 4


def test_suites_know_what_a_policy_has_read_and_cost(capsys, monkeypatch):
    """Its own pairs or prompts, and the text of its base."""
    question = Question(" ".join("abcdefghijklmno"), ("yes", "no"), 0)
    for name in ("dpo", "grpo"):
        assert suites.count_known(name, {"piqa": [question]}) == {"piqa": (0, 1)}
    pairs, _ = history.open_training_data("dpo").values()
    texts = list(overlap.read_texts(pairs, "train"))
    assert len(texts) == 2 * len(pairs.splits["train"])
    better, worse, *_ = texts
    assert better.startswith("the ") and better.endswith(" is good")
    assert worse == better.replace("good", "a bad one")
    prompts, _ = history.open_training_data("grpo").values()
    assert all(text.startswith("the ") for text in overlap.read_texts(prompts, "train"))
    found = suites.resources(run_dir.open_run("dpo"))
    assert found["training data"] == f"{20 * 8} pairs, {30 * 8 * 32:,} tokens"
    assert capsys.readouterr().err == ""
    # Without a record of its unit, or in rows of unknown length: what its base read is not all.
    for unit in ("", "tokens"):
        monkeypatch.setattr(suites.card, "read_speeds", lambda own, unit=unit: (unit, {}))
        assert suites.resources(run_dir.open_run("dpo"))["training data"] == "not known"


def test_policies_are_compared_on_the_same_prompts(fails, tmp_path, capsys):
    write("rules.jsonl", [
        {"principle": "It says good.", "judge": "contains good"},
        {"principle": "It is short.", "judge": "words 99"},
    ])  # fmt: skip
    rules = ("--data", "prompts.jsonl", "--max-new-tokens", "16", "--principles", "rules.jsonl")
    assert call(adapt, "policies", "dpo", "lora", *rules) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "answers to 1 prompt of test, of prompts.jsonl" in lines
    columns = "keeps all finished breaks 1 breaks 2 KL distinct bits"
    assert " ".join(lines[-4].split()) == columns
    base, dpo, lora = (line.split() for line in lines[-3:])
    assert (base[1], dpo[1], lora[2]) == ("base", "(dpo,", "lora")
    opened = run_dir.open_run("base")
    bits = opened.run.losses(opened.model, opened.run.open_data())["test_bpb"]
    assert base[-1] == f"{bits:.3f}" != dpo[-1]
    assert float(base[-3]) == 0 < float(dpo[-3])

    # The judge of a run is no judge of what it learned.
    judges = constitution.Judges([Principle("It is liked.", f"{Path('reward').resolve()}")], True)
    policies.warn_of_own_judges({name: run_dir.open_run(name) for name in ("dpo", "lora")}, judges)
    warned = capsys.readouterr().err
    assert "warning: lora was trained with the judge reward" in warned and "dpo" not in warned

    moved = tmp_path / "moved"
    shutil.copytree("dpo", moved)
    config = moved / "step-000020" / "config.json"
    record = files.read_json(config)
    files.write_json(config, record | {"base_hash": "0" + record["base_hash"][1:]})
    files.write_json(config.parent / checkpoint.MANIFEST, checkpoint.make_manifest(config.parent))
    assert "compare runs of one base" in fails(adapt, "policies", "dpo", moved, *rules)
    assert "base is a run of family gpt: give" in fails(adapt, "policies", "base", *rules)
    assert "which runs?" in fails(adapt, "policies", *rules)


# ---- what users mistype --------------------------------------------------------------------------


def test_wrong_input_is_refused_in_one_sentence(fails, tmp_path):
    out = ("--out", tmp_path / "out")
    start = ("gpt", *TASK.split(), *out)
    assert "add --init-from RUN" in fails(train, "gpt", "--task", "dpo", *out)
    parses = ("--task", "grpo", "--data.path", "prompts.jsonl", "--grpo.max-new-tokens")
    message = fails(train, *start, *parses, "32")
    assert "--grpo.max-new-tokens 32" in message and "context of 32" in message
    message = fails(train, *start, *parses, "8")
    assert "the reward is constant" in message and "--grpo.group" in message
    message = fails(train, *start, *MORE["grpo"], "--data.judge", "dpo")
    assert "--data.judge dpo is a run of family dpo" in message and "--task reward" in message
    message = fails(train, *start, *MORE["dpo"], "--data.tokenizer", "cache")
    assert "the tokenizer comes from base" in message
    message = fails(train, *start, *MORE["dpo"], "--init-from", "reward")
    assert "a run of family reward, not gpt" in message
    message = fails(train, *start, *MORE["dpo"], "--model.n-layer", "2")  # as the preset has
    assert "--model.n-layer 2: sizes come from base, which has 1" in message
    message = fails(train, *start, *MORE["dpo"], "--data.tokenizer", "")
    assert "the tokenizer comes from base" in message
    assert "give the text to judge" in fails(sample, "reward")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="use lora or full"):
        GPTDPORun(adapt="prompt")
    with pytest.raises(ValueError, match="leave both out"):
        GPTGRPORun(train=TrainConfig(parallel="fsdp"))


def test_evaluation_needs_the_reference(fails, folder):
    base = Path("base").rename("elsewhere")
    try:
        assert "base" in fails(evaluate, "dpo")
    finally:
        base.rename("base")
    assert run_dir.open_run("dpo").run.task == "dpo"
