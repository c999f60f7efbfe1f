"""Beam search: by hand, against all texts, and against transformers on a GPT."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import random_weights

from tinyfm.beam import Beams, beam_search, complete
from tinyfm.generate import Sampling
from tinyfm.generate import complete as draw
from tinyfm.gpt import GPT, GPTConfig

A, B, END = 0, 1, 2
# p of the next token after each text of a small language. A is the likelier start, but what follows
# B is surer: greedy writes "A A" with p 0.6 x 0.4, and the likeliest text is "B B", 0.4 x 0.9.
NEXT = {
    (): [0.6, 0.4, 0.0],
    (A,): [0.4, 0.25, 0.35],
    (B,): [0.1, 0.9, 0.0],
}


def search(beams: Beams, table=NEXT, rows: int = 1) -> list[list[int]]:
    """Search in a table of p; texts that it does not have end."""
    texts: list[tuple[int, ...]] = [()] * rows

    def logits() -> torch.Tensor:
        rows = [table.get(text, [0.0, 0.0, 1.0]) for text in texts]
        return torch.tensor(rows).clamp(min=1e-30).log()

    def step(parents, tokens):
        texts[:] = [texts[p] + (t,) for p, t in zip(parents.tolist(), tokens.tolist())]
        return logits()

    return beam_search(logits(), step, replace(beams, stop_tokens=(END,)))


def test_the_likeliest_text_by_hand():
    assert search(Beams(1, max_new_tokens=5)) == [[A, A]]
    assert search(Beams(2, max_new_tokens=5), rows=2) == [[B, B], [B, B]]
    # "A" then END has p 0.21 in 2 tokens; "B B" then END 0.36 in 3. By ln p / |y|^a with a = -3
    # short texts win: -1.56 x 8 = -12.5 against -1.02 x 27 = -27.6.
    assert search(Beams(3, length_penalty=-3.0, max_new_tokens=5)) == [[A]]
    # A text that is cut off counts like one that has ended.
    assert search(Beams(2, max_new_tokens=1)) == [[A]]


def test_wide_beams_find_the_best_of_all_texts():
    g = torch.Generator().manual_seed(0)
    texts = [t for n in range(4) for t in itertools.product((A, B), repeat=n)]
    table = {text: torch.rand(3, generator=g).tolist() for text in texts}
    table = {text: [x / sum(p) for x in p] for text, p in table.items()}

    def score(text):
        places = range(min(4, len(text)))
        return sum(math.log(table[text[:i]][text[i]]) for i in places) / len(text) ** 1.5

    whole = [t for t in texts if len(t) == 3]  # with END behind, 4 tokens
    candidates = [(*t, END) for t in texts] + [(*t, x) for t in whole for x in (A, B)]
    best = max(candidates, key=score)
    found = search(Beams(32, length_penalty=1.5, max_new_tokens=4), table)
    assert found == [[token for token in best if token != END]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A GPT-2 of transformers, and ours with the same weights."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(
        vocab_size=29, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    theirs = random_weights(lambda: transformers.GPT2LMHeadModel(config), 0.3)
    theirs.save_pretrained(folder)
    return theirs.double(), GPT.from_pretrained(folder, torch.float64)


def up_to(row: list[int], stops: tuple[int, ...]) -> list[int]:
    return [*itertools.takewhile(lambda token: token not in stops, row)]


def test_texts_of_a_gpt_are_those_of_transformers(pair):
    theirs, ours = pair
    prompts = [[3], [7, 1, 4, 1, 5], [2, 7, 1], [11, 12]]
    rows = torch.tensor([[0] * (5 - len(row)) + row for row in prompts])
    real = torch.tensor([[0] * (5 - len(row)) + [1] * len(row) for row in prompts])
    lengths = set()
    for width, penalty, stops in ((4, 1.0, (0,)), (3, 0.0, (0, *range(13, 29))), (2, 2.0, (0, 5))):
        written = theirs.generate(
            rows, attention_mask=real, num_beams=width, length_penalty=penalty, max_new_tokens=12,
            do_sample=False, eos_token_id=list(stops),
        )[:, 5:].tolist()  # fmt: skip
        expected = [up_to(row, stops) for row in written]
        found = complete(ours, prompts, Beams(width, penalty, 12, stops))
        assert found == expected
        lengths |= set(map(len, found))
    assert 12 in lengths and min(lengths) < 12
    greedy = draw(ours, prompts, Sampling(12, temperature=0, stop_tokens=(0,)))
    assert complete(ours, prompts, Beams(1, max_new_tokens=12, stop_tokens=(0,))) == greedy


def test_the_context_ends_a_text_and_never_is_never(pair):
    _, ours = pair
    prompt = [5] * 20
    (found,) = complete(ours, [prompt], Beams(2), never=[0, *range(9, 29)])
    assert len(found) == 4 and all(0 < token < 9 for token in found)
    with pytest.raises(ValueError, match=r"24 tokens, and the context 24.*shorten it"):
        complete(ours, [[5] * 24], Beams(2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"length_penalty": math.nan}, "length_penalty is nan"),
        ({"length_penalty": 1e9}, "length_penalty is 1000000000.0; use -20 to 20"),
    ],
)
def test_settings_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        Beams(**fields)


def test_damaged_weights_are_named():
    model = GPT(GPTConfig(9, 8, n_layer=1, n_head=1, d_model=8))
    model.head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        complete(model, [[1]], Beams(2))
