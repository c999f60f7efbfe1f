"""Tokenizers: lossless for any text, ids equal to the reference libraries, near-linear time."""

import hashlib
import json
import multiprocessing
import pickle
import random
import re
import time
import unicodedata
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from library_ids import assert_ids_of_library
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tinyfm import bpe
from tinyfm import tokenizer as T

KINDS = ("sentencepiece", "sentencepiece-unigram", "bpe", "bytes")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
HARD = [
    "",
    " ",
    "\n",
    "  a  \n\n\tb \r\n ",
    "\0",
    "▁ ▁a▁▁",
    "\u2585",
    "<0x41><unk><s>",
    "\ufeff\ufffd",
    "naïve Ångström ½ ﬁ",
    "🤷🏽‍♂️ 中文字 العربية",
    "e\u0301",
    "'S 'll I'VE",
    "x = 12345.678e-9",
    "\x1c\x85\u180e\u200b\u3000",
    " " * 3000 + "x" + " " * 1001,
    "ab " * 700,
]


def make_text(n_lines: int = 1500) -> str:
    """Lines that resemble prose and code, with frequent and rare words; always the same."""
    r = random.Random(7)
    letters = "etaoinshrdlucmfw"
    words = ["".join(r.choices(letters, k=r.randint(1, 9))) for _ in range(900)]
    weights = [1 / (k + 1) for k in range(len(words))]
    lines = []
    for _ in range(n_lines):
        line = r.choices(words, weights, k=r.randint(3, 12))
        line[0] = line[0].title()
        end = r.choice([".", ", ", "!", f" {r.randint(0, 9999)}", "'s naïve;", ":\n    "])
        lines.append(" ".join(line) + end)
    return "\n".join(lines)


TEXT = make_text()
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(st.sampled_from("ab eE'\n\t .,0129▁é中🙂s<|>"), max_size=60),
    st.lists(st.sampled_from(TEXT.split(" ")[:500]), max_size=12).map(" ".join),
)
# The libraries know different versions of Unicode, so compare only assigned characters.
ASSIGNED = TEXTS.map(lambda t: "".join(c for c in t if unicodedata.category(c) not in ("Cn", "Cs")))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return T.train(request.param, [TEXT], 257 if request.param == "bytes" else 600)


@pytest.fixture(scope="module")
def reloaded(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return T.load(folder)


# ---- every kind ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_round_trip_of_any_text(tokenizer, reloaded, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode("utf-8")
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode("utf-8")
    assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eot for i in ids)
    assert reloaded.encode(text) == ids
    assert reloaded.decode(ids) == text


@pytest.mark.parametrize("text", HARD)
def test_round_trip_of_hard_texts(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_shorten_the_text_they_learned_from(tokenizer):
    ids = tokenizer.encode(TEXT)
    if isinstance(tokenizer, T.ByteTokenizer):
        assert len(ids) == len(TEXT.encode())
    else:
        assert len(ids) < 0.6 * len(TEXT.encode())


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(HARD) == [tokenizer.encode(text) for text in HARD]
    assert tokenizer.encode_batch([]) == []


def test_special_tokens_are_text_by_default(tokenizer):
    forged = f"one{T.EOT}two{T.EOT}{T.EOT}"
    assert tokenizer.eot not in tokenizer.encode(forged)
    assert tokenizer.decode(tokenizer.encode(forged)) == forged
    ids = tokenizer.encode(forged, specials=True)
    one = tokenizer.encode("one")
    two = tokenizer.encode("two")
    assert ids == [*one, tokenizer.eot, *two, tokenizer.eot, tokenizer.eot]
    assert tokenizer.decode(ids) == forged
    assert tokenizer.specials[T.EOT] == tokenizer.eot
    assert tokenizer.encode("plain", specials=True) == tokenizer.encode("plain")


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")) == "🙂"


def test_partial_characters_decode_to_replacement_characters(tokenizer):
    ids = tokenizer.encode("\u4dff")  # not in the training text, so three bytes
    assert len(ids) == 3
    assert [tokenizer.decode(ids[:n]) for n in (1, 2, 3)] == ["\ufffd", "\ufffd", "\u4dff"]


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, bad):
    with pytest.raises(ValueError, match=f"{bad} is not in the vocabulary"):
        tokenizer.decode([bad])


def test_reloaded_is_the_same(tokenizer, reloaded):
    for name in ("vocab_size", "specials", "eot"):
        assert getattr(reloaded, name) == getattr(tokenizer, name)
    assert reloaded.fingerprint() == tokenizer.fingerprint()
    assert type(reloaded) is type(tokenizer)


def test_a_worker_process_gets_the_same_tokenizer(tokenizer):
    """data/prepare.py sends it pickled; its cache of words is not part of the pickle."""
    size = len(pickle.dumps(tokenizer))
    expected = tokenizer.encode_batch(HARD)
    pickled = pickle.dumps(tokenizer)
    assert len(pickled) == size
    copy = pickle.loads(pickled)
    assert type(copy) is type(tokenizer)
    assert copy.fingerprint() == tokenizer.fingerprint()
    assert copy.specials == tokenizer.specials
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(tokenizer.encode_batch, HARD).result() == expected


def test_training_is_deterministic_and_fingerprints_differ():
    fingerprints = []
    for kind in KINDS:
        size = 257 if kind == "bytes" else 400
        first = T.train(kind, [TEXT[:20000]], size).fingerprint()
        assert T.train(kind, [TEXT[:20000]], size).fingerprint() == first
        fingerprints.append(first)
    fingerprints.append(T.train("bpe", [TEXT[:20000]], 401).fingerprint())
    assert len(set(fingerprints)) == len(fingerprints)
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in fingerprints)


def test_fingerprints_are_as_recorded(tmp_path):
    """Prepared data and runs record the fingerprint of their tokenizer, so it must not change.

    That of SentencePiece is the hash of its model, whose bytes depend on the library's version.
    """
    recorded_bpe = "f1d9c7c9085a0997925d70ccf17783d3753f73def1367910210b68397b2a056e"
    recorded_bytes = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert T.train("bpe", [TEXT[:20000]], 400).fingerprint() == recorded_bpe
    assert T.train("bytes", [], 257).fingerprint() == recorded_bytes
    pieces = T.train("sentencepiece", [TEXT[:20000]], 400)
    pieces.save(tmp_path)
    model = (tmp_path / "tokenizer.model").read_bytes()
    assert pieces.fingerprint() == hashlib.sha256(model).hexdigest()


def test_exported_tokenizer_json_gives_the_same_ids(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert auto.eos_token_id == auto.bos_token_id == tokenizer.eot
    assert len(auto) == tokenizer.vocab_size
    reference = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    loaded = T.load(tmp_path)

    @settings(max_examples=150, deadline=None)
    @given(text=ASSIGNED)
    def assert_same_ids(text):
        ids = tokenizer.encode(text, specials=True)
        assert loaded.encode(text, specials=True) == ids
        text = text.replace(T.SPACE, "")  # the one character that the export cannot keep
        ids = tokenizer.encode(text, specials=True)
        assert reference.encode(text, add_special_tokens=False).ids == ids
        assert reference.decode(ids, skip_special_tokens=False) == text

    assert_same_ids()
    for text in [*HARD, TEXT, f"a{T.EOT}b"]:
        text = text.replace(T.SPACE, "")
        text = text.replace(" " * 999, " ")  # for a unigram, splits of long runs are ties
        ids = tokenizer.encode(text, specials=True)
        assert auto.encode(text, add_special_tokens=False) == ids
        assert auto.decode(ids) == text


# ---- BPE -----------------------------------------------------------------------------------------

LEARN = (bpe.learn_merges_slowly, bpe.learn_merges)


@pytest.mark.parametrize("learn", LEARN)
def test_worked_example_of_wikipedia(learn):
    """The string of the article "Byte-pair encoding" becomes XdXac there and here.

    Of two pairs that are equally frequent, the article merges ab; we merge the first in the text.
    """
    x, y, z = 256, 257, 258
    merges = learn({b"aaabdaaabac": 1}, 3)
    assert merges == [(97, 97), (x, 97), (y, 98)]
    assert bpe.encode("aaabdaaabac", merges) == [z, ord("d"), z, ord("a"), ord("c")]
    assert bpe.decode([z], merges) == "aaab"
    assert bpe.train(["aaabdaaabac"], 256 + 3 + 1) == merges
    tokenizer = T.train("bpe", ["aaabdaaabac"], 256 + 3 + 1)
    assert tokenizer.encode("aaabdaaabac") == [z, ord("d"), z, ord("a"), ord("c")]
    assert tokenizer.token_bytes(z) == b"aaab"


def count_chunks(text: str) -> dict[bytes, int]:
    counts = {}
    for chunk in regex.findall(bpe.GPT2_PATTERN, text):
        counts[chunk.encode()] = counts.get(chunk.encode(), 0) + 1
    return counts


CHUNKS = st.dictionaries(
    st.text("abc", min_size=1, max_size=14).map(str.encode), st.integers(1, 4), max_size=8
)


@settings(max_examples=300, deadline=None)
@given(chunks=CHUNKS, n_merges=st.integers(0, 30))
def test_fast_training_learns_the_merges_of_the_definition(chunks, n_merges):
    merges = bpe.learn_merges(chunks, n_merges)
    assert merges == bpe.learn_merges_slowly(chunks, n_merges)
    assert len(merges) <= n_merges


def test_fast_training_equals_the_definition_on_prose():
    chunks = count_chunks(TEXT[:20000])
    merges = bpe.learn_merges(chunks, 150)
    assert merges == bpe.learn_merges_slowly(chunks, 150)
    assert len(merges) == 150


@settings(max_examples=200, deadline=None)
@given(chunks=CHUNKS, n_merges=st.integers(0, 30), text=st.text("abcd", max_size=40))
def test_fast_encoding_equals_the_definition(chunks, n_merges, text):
    """Applying rules by rank, fast or slowly, equals replaying the merges in the order learned."""
    merges = bpe.learn_merges(chunks, n_merges)
    rules = bpe.make_rules(merges)
    ids = list(text.encode())
    replayed = ids
    for rank, pair in enumerate(merges):
        replayed = bpe.merge(replayed, pair, 256 + rank)
    assert bpe.apply_merges(ids, rules) == bpe.apply_merges_slowly(ids, rules) == replayed


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, 5), max_size=40),
    pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), unique=True, max_size=20),
    new=st.lists(st.integers(0, 9), min_size=20, max_size=20),
)
def test_fast_encoding_with_rules_in_any_order(ids, pairs, new):
    """A published vocabulary may rank a merge before those that make its tokens."""
    rules = {pair: (rank, token) for rank, (pair, token) in enumerate(zip(pairs, new))}
    assert bpe.apply_merges(ids, rules) == bpe.apply_merges_slowly(ids, rules)


def test_the_tokenizer_gives_the_ids_of_bpe_py():
    merges = bpe.train([TEXT], 600)
    assert len(merges) == 600 - 257
    tokenizer = T.train("bpe", [TEXT], 600)
    for text in [*HARD, TEXT]:
        ids = bpe.encode(text, merges)
        assert ids == tokenizer.encode(text)
        assert bpe.decode(ids, merges) == text
    assert bpe.decode([0xE4], merges) == "\ufffd"  # the first of three bytes


def reference_tokenizer(style: str) -> Tokenizer:
    """A tokenizer of the `tokenizers` library, configured as that of GPT-2, Llama 3 or Qwen."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    if style == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = Regex(LLAMA3 if style == "llama3" else QWEN)
        split = pre_tokenizers.Split(pattern, behavior="isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    if style == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[T.EOT, "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.mark.parametrize("style", ["gpt2", "llama3", "qwen"])
def test_published_styles_give_the_ids_of_the_library(style, tmp_path):
    reference = reference_tokenizer(style)
    reference.save(str(tmp_path / "tokenizer.json"))
    ours = T.load(tmp_path)
    assert ours.vocab_size == reference.get_vocab_size()
    assert ours.specials == {T.EOT: 0, "<|im_end|>": 1}

    special = f"a{T.EOT} <|im_end|>{T.EOT}"
    assert_ids_of_library(ours, reference, ASSIGNED, 300, [*HARD, TEXT, special])
    ours.save(tmp_path / "again")
    assert T.load(tmp_path / "again").fingerprint() == ours.fingerprint()
    again = Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    assert again.encode(TEXT).ids == ours.encode(TEXT)


def test_merges_as_strings_and_ignored_merges(tmp_path):
    """Older files write a merge as "a b". With ignore_merges, a chunk that is a token stays one."""
    spec = json.loads(reference_tokenizer("gpt2").to_str())
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    word = "zq zq"
    for ignore in (False, True):
        spec["model"]["ignore_merges"] = ignore
        spec["model"]["vocab"]["zq"] = 700  # a token that no merge makes
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        ids = T.load(tmp_path).encode(word)
        assert ids == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(word).ids
        assert (700 in ids) == ignore


def test_vocab_json_and_merges_txt_of_gpt2(tmp_path):
    reference = reference_tokenizer("gpt2")
    reference.model.save(str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
    ours = T.load(tmp_path)
    assert ours.eot == 0
    for text in [*HARD, TEXT]:
        assert ours.encode(text) == reference.encode(text).ids
    with (tmp_path / "merges.txt").open("a", encoding="utf-8") as file:
        file.write("a b</w>\n")  # as in the files of CLIP
    with pytest.raises(ValueError, match="not byte-level BPE"):
        T.load(tmp_path)


def test_several_split_patterns_apply_in_turn():
    spec = json.loads(reference_tokenizer("llama3").to_str())
    digit = spec["pre_tokenizer"]["pretokenizers"][0] | {"pattern": {"Regex": r"\d"}}
    spec["pre_tokenizer"]["pretokenizers"].insert(0, digit)
    reference = Tokenizer.from_str(json.dumps(spec))
    ours = T.BPETokenizer(spec)
    text = "in 1999 the t1t2 34,5" + TEXT
    assert ours.encode(text) == reference.encode(text).ids


def with_model(spec: dict, **fields) -> dict:
    """A tokenizer.json with changed fields of its model."""
    return spec | {"model": spec["model"] | fields}


def test_other_kinds_of_tokenizer_json_are_refused(tmp_path):
    spec = json.loads(reference_tokenizer("gpt2").to_str())
    vocab = spec["model"]["vocab"]
    merged = "".join(spec["model"]["merges"][-1])
    without = {token: i for token, i in vocab.items() if token != merged}
    without_end = {token: i for token, i in vocab.items() if token != T.EOT}
    end = spec["added_tokens"][0]
    other = {"content": "<|im_end|>", "id": 1}
    cases = [
        ("WordLevel; .*BPE, WordPiece, Unigram", with_model(spec, type="WordLevel")),
        ("ends of words", with_model(spec, end_of_word_suffix="</w>")),
        ("normalizer Nmt .*NFC", spec | {"normalizer": {"type": "Nmt"}}),
        ("pre-tokenizer UnicodeScripts", spec | {"pre_tokenizer": {"type": "UnicodeScripts"}}),
        ("lacks a token", with_model(spec, vocab=without)),
        ("'Q' is 1.5", with_model(spec, vocab=vocab | {"Q": 1.5})),
        ("'Q' is True", with_model(spec, vocab=vocab | {"Q": True})),
        ("'Q' is -1", with_model(spec, vocab=vocab | {"Q": -1})),
        (f"'Q' is {10**12}", with_model(spec, vocab=vocab | {"Q": 10**12})),
        ("share the id 9", with_model(spec, vocab=vocab | {"Q": 9, "Z": 9})),
        ("not two tokens", with_model(spec, merges=["a b c"])),
        ("merges is dict", with_model(spec, merges={"a": "b"})),
        ("no model", {"model": [], "added_tokens": []}),
        ("id 5000 in added_tokens and 0", spec | {"added_tokens": [end | {"id": 5000}]}),
        ("unk_token", with_model(spec, unk_token="<unk>")),
        ("flag", spec | {"added_tokens": [end | {"lstrip": "yes"}]}),
        ("ends a text", with_model(spec, vocab=without_end) | {"added_tokens": [other]}),
    ]
    for message, case in cases:
        (tmp_path / "tokenizer.json").write_text(json.dumps(case), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            T.load(tmp_path)


# ---- time: the work is counted where it can be; elsewhere a generous bound on the clock ----------


class CountingDict(dict):
    """A dict that counts its look-ups."""

    looked_up = 0

    def get(self, *args):
        self.looked_up += 1
        return super().get(*args)

    def __contains__(self, key):
        self.looked_up += 1
        return super().__contains__(key)


@pytest.mark.parametrize("kind", ["one letter", "random letters"])
def test_the_work_of_encoding_is_linear_in_the_length(kind):
    r = random.Random(0)
    tokenizer = T.train("bpe", ["a" * 2000 + TEXT[:20000]], 300)
    rules = tokenizer._vocabulary.model.rules
    work = {}
    for n in (2000, 16000):
        ids = [97] * n if kind == "one letter" else r.choices(range(97, 123), k=n)
        counting = CountingDict(rules)
        bpe.apply_merges(ids, counting)
        work[n] = counting.looked_up / n
    assert work[16000] < 1.2 * work[2000]


@pytest.mark.parametrize("kind", KINDS)
def test_a_megabyte_without_spaces_takes_seconds(kind):
    """Quadratic time would be hours here, so a generous bound on the clock is enough."""
    r = random.Random(0)
    start = time.perf_counter()
    tokenizer = T.train(kind, [TEXT[:20000]], 257 if kind == "bytes" else 400)
    for text in ("^" * 300_000, " " * 300_000, "".join(r.choices("abcdefgh", k=300_000))):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("letters", ["a", "abcdefghij"])
def test_training_on_one_huge_chunk_takes_seconds(letters):
    text = "".join(random.Random(0).choices(letters, k=200_000))
    start = time.perf_counter()
    tokenizer = T.train("bpe", [text], 270)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - start < 10


# ---- SentencePiece -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:2])
def test_sentencepiece_learns_from_lines_its_trainer_would_skip(kind):
    lines = [line + "\t\0▁\u2585" for line in TEXT.split("\n")]
    tokenizer = T.train(kind, lines, 500)
    assert len(tokenizer.encode(TEXT)) < 0.6 * len(TEXT)


def test_sentencepiece_leaves_rare_characters_to_the_bytes():
    many = "".join(chr(0x4E00 + k) for k in range(2000))
    tokenizer = T.train("sentencepiece", [TEXT, many], 400)
    assert tokenizer.decode(tokenizer.encode(many)) == many


def test_sections_do_not_change_the_ids():
    """For speed we cut a text where no piece continues. The whole text gives the same ids."""
    tokenizer = T.train("sentencepiece", [TEXT], 600)
    for text in (TEXT, "  ".join(TEXT[:9000].split(" ")), " " * 2500 + "x  y" + " " * 1000):
        assert tokenizer.encode(text) == tokenizer._library.encode(text)


def test_sentencepiece_models_that_change_the_text_are_refused(tmp_path):
    import io

    import sentencepiece

    lossless = {
        "add_dummy_prefix": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    }
    lossy = [
        {"normalization_rule_name": "nfkc"},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False},
    ]
    for change in [{}, *lossy]:
        writer = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.split("\n")),
            model_writer=writer,
            vocab_size=600,
            model_type="bpe",
            minloglevel=2,
            **(lossless | change),
        )
        (tmp_path / "tokenizer.model").write_bytes(writer.getvalue())
        if change:
            with pytest.raises(ValueError, match="would change the text"):
                T.load(tmp_path)
        else:
            assert T.load(tmp_path).specials == {"<s>": 1, "</s>": 2}


# ---- training: sample and errors -----------------------------------------------------------------


def test_a_sample_of_documents_is_even_and_bounded():
    documents = [f"{k:05d} " * 1000 for k in range(400)]
    assert T.sample_documents(documents, 10**7) == documents
    some = T.sample_documents(iter(documents), 300_000)
    assert 100_000 < sum(map(len, some)) <= 300_000
    picked = [int(re.search(r"\d{5}", text)[0]) for text in some]
    gaps = [b - a for a, b in pairwise(picked)]
    assert picked[0] == 0
    assert picked[-1] >= 390
    assert max(gaps) - min(gaps) <= 1
    assert T.sample_documents(["", "x", ""], 100) == ["x"]
    assert T.sample_documents(["\ud800"], 100) == ["?"]
    assert T.sample_documents(["xyz"], 1) == ["x"]


def test_a_sample_of_one_large_document_reaches_its_end():
    document = "".join(f"{k:07d}\n" for k in range(100_000))
    (text,) = T.sample_documents([document], 100_000)
    assert len(text) <= 100_000
    assert int(re.findall(r"\d{7}", text)[-1]) > 90_000


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_vocabulary_that_is_too_large_is_refused(kind):
    """The message names the largest size, with which training succeeds."""
    text = "the cat sat on the mat " * 5
    with pytest.raises(ValueError, match=r"5000 .*use at most") as error:
        T.train(kind, [text], 5000)
    most = int(re.findall(r"\d+", str(error.value))[-1])
    assert T.train(kind, [text], most).vocab_size == most


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_that_is_too_small_for_the_bytes_is_refused(kind):
    with pytest.raises(ValueError, match="vocab_size 200"):
        T.train(kind, [TEXT], 200)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_following_the_errors_leads_to_the_smallest_vocabulary(kind):
    size = 1
    tried = []
    while size not in tried:
        tried.append(size)
        try:
            tokenizer = T.train(kind, [TEXT], size)
        except ValueError as error:
            size = int(re.search(r"at least (\d+)", str(error))[1])
    assert tokenizer.vocab_size == size < 300
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_characters_of_an_alphabet_are_tokens(tmp_path):
    """As the library reads them too. What is not in the alphabet is refused, not lost."""
    alphabet = "".join(map(chr, range(0x100, 0x200)))
    tokenizer = T.CharacterTokenizer(alphabet)
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)
    tokenizer.save(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "both")
    library = Tokenizer.from_file(str(tmp_path / "both" / "tokenizer.json"))
    text = alphabet[200:] + alphabet[:3] * 2
    ids = [*range(200, 256), 0, 1, 2, 0, 1, 2]
    copied = pickle.loads(pickle.dumps(tokenizer))
    for own in (tokenizer, T.load(tmp_path / "ours"), T.load(tmp_path / "both"), copied):
        assert own.encode(text) == ids and own.decode(ids) == text
        assert own.decode_bytes(ids) == text.encode()
    assert library.encode(text).ids == ids and library.decode(ids) == text
    assert T.load(tmp_path / "ours").fingerprint() == tokenizer.fingerprint()
    with pytest.raises(ValueError, match="'h' has no token: the alphabet has 256 characters"):
        tokenizer.encode("hello")
    with pytest.raises(ValueError, match="twice"):
        T.CharacterTokenizer("aba")


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match=r"'wordlevel'; .*sentencepiece"):
        T.train("wordlevel", [TEXT], 500)
    with pytest.raises(ValueError, match="single string"):
        T.train("bpe", TEXT, 500)
    with pytest.raises(ValueError, match="documents are empty"):
        T.train("bpe", ["", ""], 500)
    with pytest.raises(ValueError, match="exactly 257"):
        T.train("bytes", [TEXT], 500)


def test_folders_without_a_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.model, tokenizer.json, vocab.json"):
        T.load(tmp_path)
    with pytest.raises(ValueError, match="missing"):
        T.load(tmp_path / "missing")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        T.load(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        T.load(tmp_path)
