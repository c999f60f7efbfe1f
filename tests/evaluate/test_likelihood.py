"""Likelihood: equal to the obvious sums, however texts are batched and cut; choices, few-shot."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyfm import adapt
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.evaluate import likelihood
from tinyfm.evaluate.__main__ import read_choices
from tinyfm.generate import Sampling, complete
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.tokenizer import ByteTokenizer, train

VARIANTS = {
    "ours": {},
    "gpt2": {
        "position": "learned",
        "norm": "layernorm",
        "mlp": "gelu",
        "bias": True,
        "tied": True,
        "qk_norm": False,
    },
    "mistral": {"qk_norm": False, "n_kv_head": 1, "window": 5},
}
T = 16
TOKENIZER = ByteTokenizer()


def loud(**options) -> GPT:
    """A model in float64 with large weights, so that every input changes its output."""
    sizes = {"vocab_size": 257, "context_length": T, "n_layer": 2, "n_head": 2, "d_model": 16}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**sizes, **options})).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (p.size(1) ** -0.5 if p.ndim == 2 else 1))
    return model


@torch.no_grad()
def obvious(model: GPT, context: list[int], ids: list[int]) -> tuple[float, bool]:
    """(ln p, greedy), token by token, each after as much context as the model can read."""
    total = 0.0
    greedy = True
    for i, token in enumerate(ids):
        seen = (context + ids[:i])[-model.config.context_length :]
        log_p = model.eval()(torch.tensor([seen]))[0, -1].log_softmax(-1)
        total += log_p[token].item()
        greedy = greedy and log_p.argmax().item() == token
    return total, greedy


def random_ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 257, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# ---- windows ------------------------------------------------------------------------------------


LENGTH_AND_STRIDE = st.integers(1, 16).flatmap(
    lambda length: st.tuples(st.just(length), st.integers(1, length))
)


@given(st.integers(1, 40), st.integers(1, 60), LENGTH_AND_STRIDE)
def test_windows_score_each_id_once_with_as_much_context_as_stated(before, n, sizes):
    length, stride = sizes
    whole = list(range(before + n))
    done = before
    for window in likelihood.windows(whole[:before], whole[before:], length, stride):
        assert len(window.inputs) <= length
        assert window.targets[0] == done
        assert window.inputs[-1] + 1 == window.targets[-1]
        assert window.inputs == tuple(range(window.inputs[0], window.targets[-1]))
        assert window.targets[0] - window.inputs[0] >= min(done, length - stride + 1)
        first = max(stride, length + 1 - before) if done == before else stride
        assert len(window.targets) == min(first, before + n - done)
        done += len(window.targets)
    assert done == before + n


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_scores_are_the_obvious_sums(options):
    """With stride 1 every token has all the context that fits, as if it were scored alone."""
    model = loud(**options)
    sizes = [(1, 1), (3, 5), (1, 16), (2, 15), (9, 9), (40, 3), (16, 1), (1, 30)]
    pairs = [(random_ids(a, i), random_ids(b, i + 50)) for i, (a, b) in enumerate(sizes)]
    expected = [obvious(model, *pair) for pair in pairs]
    for rows in (1, 3, 32):
        found = likelihood.score_ids(model, pairs, stride=1, rows=rows)
        # The head's logits are scored in float32.
        assert [total for total, _ in found] == pytest.approx([e[0] for e in expected], rel=1e-5)
        assert [greedy for _, greedy in found] == [e[1] for e in expected]


def test_the_score_of_a_text_that_fits_does_not_depend_on_the_stride():
    model = loud()
    pairs = [(random_ids(4), random_ids(13, 1))]
    expected = obvious(model, *pairs[0])[0]
    for stride in (0, 1, 7, T):
        assert likelihood.score_ids(model, pairs, stride)[0][0] == pytest.approx(expected, rel=1e-5)


def test_a_text_is_greedy_if_temperature_0_generates_it():
    model = loud()
    prompt = random_ids(5)
    (written,) = complete(model, [prompt], Sampling(max_new_tokens=6, temperature=0))
    other = [*written[:-1], (written[-1] + 1) % 257]
    (_, yes), (_, no) = likelihood.score_ids(model, [(prompt, written), (prompt, other)])
    assert yes and not no
    long = random_ids(T + 8)
    (best,) = complete(model, [long[-T:]], Sampling(max_new_tokens=1, temperature=0))
    pairs = [(long[:1], long[1:] + best), (long, best)]  # the first is wrong in early windows
    assert [greedy for _, greedy in likelihood.score_ids(model, pairs, stride=1)] == [False, True]


def test_equal_inputs_go_through_the_model_once():
    """For instance labels of one token after the same prompt: they share a row."""
    model = loud()
    seen = []
    model.register_forward_pre_hook(lambda *_: pytest.fail("hidden and head are called separately"))
    model.token_embedding.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    likelihood.score_ids(model, [(random_ids(5), [i]) for i in range(20)])
    assert seen == [1]


def test_a_soft_prompt_stands_before_every_window():
    model = loud()
    adapt.apply(model, "prompt", adapt.AdapterConfig(prompt_tokens=3))
    with torch.no_grad():
        model.token_embedding.prompt.normal_()
    context, ids = random_ids(6), random_ids(5, 1)
    total, _ = likelihood.score_ids(model, [(context, ids)])[0]
    assert total == pytest.approx(obvious(model, prompt_ids(model) + context, ids)[0], rel=1e-5)
    long = likelihood.score_ids(model, [(context, random_ids(40, 2))])[0][0]
    assert math.isfinite(long)


# ---- texts --------------------------------------------------------------------------------------


def test_bits_per_byte_and_perplexity_by_hand(tmp_path):
    """A model to which all 257 ids are equally likely."""
    model = loud()
    torch.nn.init.zeros_(model.head.weight)
    text = "naïve text, longer than the context"
    score = likelihood.score_text(model, TOKENIZER, text)
    assert (score.tokens, score.bytes) == (36, 36)
    assert score.perplexity == pytest.approx(257)
    assert score.bits_per_byte == pytest.approx(math.log2(257))
    assert score.by("token") == score.by("byte") == pytest.approx(-math.log(257))
    assert score.by("total") == score.log_likelihood
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert likelihood.score_files(model, TOKENIZER, str(tmp_path)) == [score, score]


def test_a_text_is_scored_after_the_end_of_another():
    model = loud()
    expected = obvious(model, [TOKENIZER.eot], TOKENIZER.encode("a text"))
    score = likelihood.score_text(model, TOKENIZER, "a text")
    assert score.log_likelihood == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe", "bytes"])
def test_the_space_between_belongs_to_the_continuation(kind):
    tokenizer = train(
        kind, ["in the beginning the word was the end "] * 20, 275 if kind != "bytes" else 257
    )
    context, ids = likelihood.encode_pair(tokenizer, "in the ", "word")
    assert (tokenizer.decode(context), tokenizer.decode(ids)) == ("in the", " word")
    assert context + ids == tokenizer.encode("in the word")
    assert likelihood.encode_pair(tokenizer, "", "word") == (
        [tokenizer.eot],
        tokenizer.encode("word"),
    )
    assert likelihood.encode_pair(tokenizer, " ", "word")[0] == [tokenizer.eot]


# ---- choices ------------------------------------------------------------------------------------


def test_questions_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "q.jsonl"
    question = {"context": "one\u2028two", "choices": ["a", "b"], "answer": 1}
    line = json.dumps(question, ensure_ascii=False)
    path.write_text(f"\ufeff{line}\r\n\n{line}", encoding="utf-8")
    assert read_choices(str(path)) == [question, question]
    for bad, problem in (
        ("{", r"not JSON \(q.jsonl:2\)"),
        (line.replace("1}", "true}"), r"q.jsonl:2 is no question"),
        (line.replace('["a", "b"]', '"ab"'), r"q.jsonl:2 is no question"),
    ):
        path.write_text(f"{line}\n{bad}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=problem):
            read_choices(str(path))


def test_choices_by_each_rule():
    model = loud()
    questions = [("one ", ["a", "bb", "ccc"]), ("another question", [" yes", " no, not at all"])]
    questions.append(("long " * 20, ["é" * 6, "z"]))
    for rule in ("total", "token", "byte"):
        chosen = likelihood.choose(model, TOKENIZER, questions, rule)
        for (context, choices), choice in zip(questions, chosen):
            scores = likelihood.score(model, TOKENIZER, [(context, c) for c in choices])
            values = [s.log_likelihood for s in scores]
            if rule == "token":
                values = [s.log_likelihood / s.tokens for s in scores]
            elif rule == "byte":
                values = [s.log_likelihood / len(c.encode()) for s, c in zip(scores, choices)]
            assert choice.scores == tuple(scores)
            assert choice.best == values.index(max(values))


def test_longer_choices_win_per_token_where_they_lose_in_total():
    model = loud()
    best = complete(model, [TOKENIZER.encode("q")], Sampling(max_new_tokens=4, temperature=0))[0]
    rare = min(range(97, 123), key=lambda i: likelihood.score_ids(model, [([113], [i])])[0][0])
    pair = [([113], best), ([113], [rare])]
    (long, _), (short, _) = likelihood.score_ids(model, pair)
    assert long / len(best) > short


# ---- few-shot -----------------------------------------------------------------------------------

EXAMPLES = [("good film", "plus"), ("bad film", "minus"), ("fine", "plus")]
LABELS = ["plus", "minus"]


def test_a_prompt_holds_the_examples_that_fit():
    whole, kept = likelihood.few_shot_prompt(TOKENIZER, EXAMPLES, "a query", 1000)
    assert kept == EXAMPLES
    assert whole == (
        "Text: good film\nLabel: plus\n\nText: bad film\nLabel: minus\n\n"
        "Text: fine\nLabel: plus\n\nText: a query\nLabel:"
    )
    less, kept = likelihood.few_shot_prompt(TOKENIZER, EXAMPLES, "a query", len(whole) - 1)
    assert kept == EXAMPLES[1:] and whole.endswith(less)
    long = [*EXAMPLES, ("too long " * 20, "plus")]  # it is left out, and the others are not
    assert likelihood.few_shot_prompt(TOKENIZER, long, "a query", len(whole)) == (whole, EXAMPLES)
    alone = likelihood.few_shot_prompt(TOKENIZER, EXAMPLES, "a query", 3)
    assert alone == ("Text: a query\nLabel:", [])


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 30), st.integers(0, 9))
def test_examples_are_drawn_with_all_labels_alike(sizes, shots, seed):
    pool = [(f"{label} {i}", label) for label, size in zip("abcde", sizes) for i in range(size)]
    drawn = likelihood.draw_examples(pool, shots, np.random.default_rng(seed))
    assert len(drawn) == len(set(drawn)) == min(shots, len(pool))
    assert set(drawn) <= set(pool)
    counts = {label: sum(own == label for _, own in drawn) for label in "abcde"[: len(sizes)]}
    for (label, count), size in zip(counts.items(), sizes):
        assert count == size or count >= max(counts.values()) - 1, label


def test_examples_differ_by_seed_and_all_are_drawn():
    pool = [(str(i), "common" if i < 90 else "rare") for i in range(100)]
    draws = [likelihood.draw_examples(pool, 3, np.random.default_rng(seed)) for seed in range(500)]
    assert {example for drawn in draws for example in drawn} == set(pool)
    assert len({tuple(drawn) for drawn in draws}) > 450
    common = sum(label == "common" for drawn in draws for _, label in drawn)
    assert 0.45 < common / 1500 < 0.55  # which label has two of three examples is random
    last = sum(drawn[-1][1] == "common" for drawn in draws)
    assert 0.4 < last / 500 < 0.6


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_endings_after_a_cache_have_the_scores_of_whole_texts(options):
    model = loud(**options)
    endings = [random_ids(n, n) for n in (1, 2, 4)] + [random_ids(4, 9)]
    contexts = [random_ids(n, n + 20) for n in (1, 5, 13, 8, 2)]
    pairs = [(context, ending) for context in contexts for ending in endings]
    expected = [total for total, _ in likelihood.score_ids(model, pairs)]
    for rows in (1, 2, 9):
        found = likelihood.score_endings(model, contexts, endings, rows)
        assert found.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    cut = likelihood.score_endings(model, [random_ids(40)], endings)
    assert torch.equal(cut, likelihood.score_endings(model, [random_ids(40)[-(T - 3) :]], endings))


def test_endings_after_a_soft_prompt():
    model = loud()
    adapt.apply(model, "prompt", adapt.AdapterConfig(prompt_tokens=3))
    with torch.no_grad():
        model.token_embedding.prompt.normal_()
    pairs = [(random_ids(6), random_ids(3, 1)), (random_ids(6), random_ids(1, 2))]
    found = likelihood.score_endings(model, [random_ids(6)], [ending for _, ending in pairs])
    expected = [total for total, _ in likelihood.score_ids(model, pairs)]
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5)


def obvious_guess(model, examples, query, calibrate):
    """Probabilities of LABELS after these examples, from the scores of whole texts."""

    def log_p(text):
        prompt, _ = likelihood.few_shot_prompt(TOKENIZER, examples, text, 1000)
        scores = likelihood.score(model, TOKENIZER, [(prompt, f" {label}") for label in LABELS])
        return torch.tensor([score.log_likelihood for score in scores]).double().log_softmax(-1)

    values = log_p(query).exp()
    if calibrate:
        values = values / sum(log_p(text).exp() for text in likelihood.NO_CONTENT)
    return (values / values.sum()).tolist()


@pytest.mark.parametrize("calibrate", [False, True])
def test_each_query_is_classified_after_its_own_examples(calibrate):
    model = loud(context_length=128)
    pool = [(f"{word} {i}", label) for i in range(5) for word, label in EXAMPLES[:2]]
    queries = ["one", "x" * 40, "one"]
    guesses = likelihood.classify(
        model, TOKENIZER, pool, queries, LABELS, shots=3, seed=7, calibrate=calibrate
    )
    for i, (query, guess) in enumerate(zip(queries, guesses)):
        drawn = likelihood.draw_examples(pool, 3, np.random.default_rng((7, i)))
        own = drawn[3 - guess.shots :]
        expected = obvious_guess(model, own, query, calibrate)
        assert list(guess.probabilities.values()) == pytest.approx(expected, rel=1e-4)
        assert guess.label == max(guess.probabilities, key=guess.probabilities.get)
    assert [guess.shots for guess in guesses] == [3, 2, 3]
    assert guesses[0].probabilities != guesses[2].probabilities  # other examples


def test_calibration_takes_out_the_preference_of_a_model_that_does_not_read():
    model = loud(context_length=128)
    for block in model.blocks:  # without attention a token depends on the one before it alone
        torch.nn.init.zeros_(block.attention.out.weight)
    ask = (model, TOKENIZER, EXAMPLES, ["one", "a long one"], LABELS)
    plain, fair = (likelihood.classify(*ask, shots=3, calibrate=c) for c in (False, True))
    assert abs(plain[0].probabilities["plus"] - 0.5) > 0.01
    assert [g.probabilities["plus"] for g in fair] == pytest.approx([0.5, 0.5])


def test_labels_by_each_rule():
    model = loud(context_length=64)
    labels = ["a", "three words here"]
    values = {}
    for rule in ("total", "token", "byte"):
        (guess,) = likelihood.classify(model, TOKENIZER, [], ["one"], labels, rule=rule)
        values[rule] = list(guess.probabilities.values())
        scores = likelihood.score(
            model, TOKENIZER, [("Text: one\nLabel:", f" {l}") for l in labels]
        )
        expected = torch.tensor([score.by(rule) for score in scores]).double().softmax(-1)
        assert values[rule] == pytest.approx(expected.tolist(), rel=1e-5)
    assert values["total"] != values["byte"]


def test_calibration_works_with_labels_that_are_almost_impossible():
    model = loud(context_length=64)
    with torch.no_grad():
        model.head.weight.mul_(1000)
    ask = {"queries": ["one"], "labels": ["plus", "a very long label"], "calibrate": True}
    (guess,) = likelihood.classify(model, TOKENIZER, [], **ask)
    assert sum(guess.probabilities.values()) == pytest.approx(1)


# ---- bad input ----------------------------------------------------------------------------------


def test_bad_input_is_refused():
    model = loud()
    with pytest.raises(ValueError, match="stride is 17; it must be 0 to 16"):
        likelihood.score_ids(model, [([1], [2])], stride=T + 1)
    with pytest.raises(ValueError, match="start a new text with the end-of-text token"):
        likelihood.score_ids(model, [([], [2])])
    with pytest.raises(ValueError, match="a continuation is empty"):
        likelihood.score(model, TOKENIZER, [("context", "")])
    with pytest.raises(ValueError, match="give at least two different ones"):
        likelihood.classify(model, TOKENIZER, [], ["query"], ["plus", "plus"])
    with pytest.raises(ValueError, match="has the label 'maybe', none of"):
        likelihood.classify(model, TOKENIZER, [("x", "maybe")], ["query"], ["plus", "minus"])
    with pytest.raises(ValueError, match="2 shots from 0 examples"):
        likelihood.classify(model, TOKENIZER, [], ["query"], LABELS, shots=2)
    with pytest.raises(ValueError, match="has 17 tokens, the model's context only 16"):
        likelihood.score_endings(model, [[1]], [[1], random_ids(T + 1)])
    with pytest.raises(ValueError, match="is empty"):
        likelihood.score_endings(model, [[]], [[1]])
    with pytest.raises(ValueError, match="no file matches"):
        likelihood.score_files(model, TOKENIZER, "nowhere.txt")
