"""CLIP's tokenizer: the ids of CLIPTokenizer of transformers, for any text and each file layout."""

import json
import pickle
import random
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, CLIPTokenizer

from tinyfm import tokenizer as T
from tinyfm.hub import text_steps
from tinyfm.hub import tokenizers as formats
from tinyfm.hub.tokenizers import CLIP_CONTEXT_LENGTH, CLIP_WORDS, START, clip_spec
from tinyfm.tokenizer import ClipTokenizer, encode_captions

LEARNED = (
    "the cat cats catch photo of naïve ангел 中文 中 日本 🙂 's 't 're 've 'm 'll 'd 've !! ... é "
    "it straße i\u0307 σσ <| |> endoftext startoftext -- ,, ½"
)
HARD = [
    "",
    " ",
    "\n\t \u00a0\u3000",
    "A photo of 12 CATS, the cat's",
    "It's he'll they'Ve I'M 'sam ''s don’t 'tis",
    "naïve nai\u0308ve NAÏVE Straße STRASSE",
    "ΟΔΟΣ ΣΑΣ Σ ς",  # one capital sigma, two small ones
    "İstanbul I\u0307 ǅ ﬁ ½ Ⅷ",
    "e\u0301 \u1e9b\u0323 \u212b \u0344",
    "中文字, 日本語 한국어 \u1112\u1161\u11ab العربية हिन्दी",
    "🤷🏽‍♂️ 🙂🙂 🇫🇷 a🙂b",
    "x=12345.678e-9; <a href='b'>&amp;</a> ...!!",
    "\0\x1c\x85\u180e\u200b\ufeff\ufffd\ud800",
    "</w> a</w>b <w/>",
    "<|startoftext|>a<|endoftext|>!! <|endoftext|><|endoftext|>s'<|ENDOFTEXT|>",
    "cat" * 300,
]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from("caT'sS 12\n!<|>/wéÉ\u0301Σσ中🙂\u00a0"), max_size=40),
    st.lists(st.sampled_from([*LEARNED.split(), START, T.EOT, " ", "7"]), max_size=9).map("".join),
)
# The libraries know different versions of Unicode, so compare only assigned characters.
ASSIGNED = TEXTS.map(lambda t: "".join(c for c in t if unicodedata.category(c) != "Cn"))


def make_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges.

    The tokens stand in CLIP's order: bytes, bytes that end a word, merges, specials. The merges
    are some random ones, then those that spell the words of LEARNED from the left. So a text
    often has several pairs to merge, and the rank decides.
    """
    r = random.Random(0)
    order = [*sorted(text_steps.VISIBLE), *text_steps.HIDDEN]
    base = [text_steps.CHAR_OF[b] for b in order]
    tokens = [*base, *(char + "</w>" for char in base)]
    merges = {}  # a dict without values keeps the order and drops repetitions
    letters = [text_steps.CHAR_OF[b] for b in b"acehost"]
    for _ in range(60):
        merges[r.choice(letters), r.choice(letters) + r.choice(["", "</w>"])] = None
    for word in LEARNED.split():
        chars = [text_steps.CHAR_OF[b] for b in word.encode()]
        chars[-1] += "</w>"
        for i in range(1, len(chars)):
            merges["".join(chars[:i]), chars[i]] = None
    tokens += [a + b for a, b in merges]
    tokens = [*dict.fromkeys(tokens), START, T.EOT]
    return {token: i for i, token in enumerate(tokens)}, [*merges]


VOCAB, MERGES = make_vocabulary()
MERGES_TXT = "\n".join(["#version: 0.2", *map(" ".join, MERGES), ""])


def as_openai(name: str) -> dict:
    """A special token, described as in the older published files."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"content": name} | flags


def write_published(folder) -> None:
    """The files of openai/clip-vit-base-patch32 and Stable Diffusion 1, without tokenizer.json."""
    names = {"bos_token": START, "eos_token": T.EOT, "unk_token": T.EOT}
    marked = {key: as_openai(name) for key, name in names.items()}
    config = {key: token | {"__type": "AddedToken"} for key, token in marked.items()}
    config |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace"}
    config |= {"model_max_length": 77, "pad_token": T.EOT, "tokenizer_class": "CLIPTokenizer"}
    contents = {
        "vocab.json": VOCAB,
        "special_tokens_map.json": marked | {"pad_token": T.EOT},
        "tokenizer_config.json": config,
    }
    for name, content in contents.items():
        text = json.dumps(content, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "merges.txt").write_text(MERGES_TXT, encoding="utf-8")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    write_published(folder)
    return folder


@pytest.fixture(scope="module")
def reference(published):
    return CLIPTokenizer.from_pretrained(published)


@pytest.fixture(scope="module")
def ours(published):
    return T.load(published)


def reference_ids(reference, text: str, specials: bool = False) -> list[int]:
    text = T.replace_surrogates(text)  # the library cannot take lone surrogates
    return reference.encode(text, add_special_tokens=False, split_special_tokens=not specials)


# ---- ids and text --------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(text=ASSIGNED)
def test_ids_and_text_are_those_of_transformers(ours, reference, text):
    ids = ours.encode(text)
    assert ids == reference_ids(reference, text)
    assert ours.decode(ids) == reference.decode(ids)
    # Hypothesis also draws strings from the source code, so START in capitals: see the test below.
    text = re.sub(re.escape(START), START, text, flags=re.IGNORECASE)
    ids = ours.encode(text, specials=True)
    assert ids == reference_ids(reference, text, specials=True)
    assert ours.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("text", HARD)
def test_hard_texts(ours, reference, text):
    ids = ours.encode(text)
    assert ids == reference_ids(reference, text)
    assert ours.decode(ids) == reference.decode(ids)
    assert ours.encode_batch([text, text]) == [ids, ids]


def test_every_assigned_character(ours, reference):
    chars = map(chr, range(0x110000))
    text = " ".join(c for c in chars if unicodedata.category(c) not in ("Cn", "Co", "Cs"))
    for start in range(0, len(text), 20_000):
        part = text[start : start + 20_000]
        assert ours.encode(part) == reference_ids(reference, part)


def test_the_example_of_the_docstring(ours):
    ids = ours.encode("The CAT's")
    assert ids == [VOCAB["the</w>"], VOCAB["cat</w>"], VOCAB["'s</w>"]]
    assert [ours.token_bytes(i) for i in ids] == [b"the ", b"cat ", b"'s "]
    assert ours.decode(ids) == "the cat 's"
    assert VOCAB["cat</w>"] not in ours.encode("catch")
    assert len({token for token in VOCAB if len(token.removesuffix("</w>")) == 1}) == 512


def test_special_tokens_are_text_by_default(ours, reference):
    assert (ours.bot, ours.eot) == (reference.bos_token_id, reference.eos_token_id)
    assert ours.specials == {START: ours.bot, T.EOT: ours.eot}
    assert ours.vocab_size == len(reference) == ours.eot + 1
    forged = f"{START}one{T.EOT}"
    assert not {ours.bot, ours.eot} & {*ours.encode(forged)}
    assert ours.encode(forged, specials=True) == [ours.bot, *ours.encode("one"), ours.eot]
    for name in ours.specials:  # ours have one spelling; the reference also reads START in capitals
        assert ours.encode(name.upper(), specials=True) == ours.encode(name.upper())
    assert reference_ids(reference, START.upper(), specials=True) == [ours.bot]
    with pytest.raises(ValueError, match="not in the vocabulary"):
        ours.decode([ours.vocab_size])


# ---- rows of captions ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 7, 77])
def test_rows_of_captions_are_those_of_transformers(ours, reference, length):
    texts = ["", "a photo of the cat", "the cat " * 50]
    options = {"truncation": True, "max_length": length}
    rows, cut = encode_captions(ours, texts, length)
    expected = [reference(text, **options).input_ids for text in texts]
    longest = max(len(row) for row in expected)
    assert rows.tolist() == [row + [ours.eot] * (longest - len(row)) for row in expected]
    lengths = [len(reference(text).input_ids) for text in texts]
    assert cut == sum(n > length for n in lengths)


def test_rows_of_a_tokenizer_without_start_token(ours):
    plain = T.ByteTokenizer()
    assert plain.bot is None
    assert encode_captions(plain, ["abc"], 10)[0].tolist() == [[97, 98, 99, 256]]
    assert encode_captions(plain, ["abc"], 3)[0].tolist() == [[97, 98, 256]]
    for tokenizer, least in ((plain, 2), (ours, 3)):
        assert encode_captions(tokenizer, ["abc"], least)[0].shape == (1, least)
        with pytest.raises(ValueError, match=f"context_length {least - 1} .*>= {least}"):
            encode_captions(tokenizer, ["abc"], least - 1)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["save", "save_pretrained"])
def test_reloaded_is_the_same(ours, save, tmp_path):
    getattr(ours, save)(tmp_path)
    for again in (T.load(tmp_path), pickle.loads(pickle.dumps(ours))):
        assert type(again) is ClipTokenizer
        assert again.fingerprint() == ours.fingerprint()
        assert (again.bot, again.eot, again.specials) == (ours.bot, ours.eot, ours.specials)
        assert again.encode_batch(HARD) == ours.encode_batch(HARD)


def test_the_fingerprint_is_as_recorded(ours):
    """Prepared captions record the fingerprint of their tokenizer, so it must not change."""
    recorded = "726ebffcbd6d1ffed66d40d1dc32cb08e59f4dc4b916e8e900a9b64c50b512a4"
    assert ours.fingerprint() == recorded


def test_transformers_reads_what_we_save_in_either_layout(ours, reference, tmp_path):
    ours.save_pretrained(tmp_path / "both")
    config = json.loads((tmp_path / "both" / "tokenizer_config.json").read_text(encoding="utf-8"))
    specials = [config[f"{name}_token"] for name in ("bos", "eos", "unk", "pad")]
    assert specials == [START, T.EOT, T.EOT, T.EOT]  # as CLIPTokenizer has them by default
    ours.save_pretrained(tmp_path / "older")
    (tmp_path / "older" / "tokenizer.json").unlink()
    (tmp_path / "newer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "newer" / name).write_bytes((tmp_path / "both" / name).read_bytes())
    for name in ("both", "older", "newer"):
        for kind in (CLIPTokenizer, AutoTokenizer):
            again = kind.from_pretrained(tmp_path / name)
            assert type(again) is CLIPTokenizer
            assert again.model_max_length == CLIP_CONTEXT_LENGTH == 77
            assert again.pad_token_id == again.eos_token_id == ours.eot
            for text in HARD:
                text = T.replace_surrogates(text)
                assert again(text).input_ids == reference(text).input_ids
        assert T.load(tmp_path / name).encode_batch(HARD) == ours.encode_batch(HARD)


def test_the_tokenizers_library_reads_what_we_save(ours, reference, tmp_path):
    ours.save_pretrained(tmp_path)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in map(T.replace_surrogates, HARD):
        row = library.encode(text).ids
        assert row == reference(text).input_ids
        words = library.decode(row, skip_special_tokens=False).replace("</w>", " ").strip()
        assert words == ours.decode(row)


def test_a_tokenizer_json_of_transformers_loads(ours, reference, tmp_path):
    """As it writes it now; and as openai/clip-* have it, without specials in the pattern."""
    reference.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    for older in (False, True):
        if older:
            spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = CLIP_WORDS
            spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
            path.write_text(json.dumps(spec), encoding="utf-8")
        loaded = T.load(tmp_path)
        again = CLIPTokenizer.from_pretrained(tmp_path)
        assert type(loaded) is ClipTokenizer
        assert loaded.encode_batch(HARD) == [reference_ids(again, text) for text in HARD]
        assert loaded.encode_batch(HARD) == ours.encode_batch(HARD)
        loaded.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "merges.txt").read_text(encoding="utf-8") == MERGES_TXT
        saved = (tmp_path / "again" / "tokenizer.json").read_text(encoding="utf-8")
        assert json.loads(saved) == spec == loaded._spec()


def test_added_tokens_are_specials(reference, tmp_path):
    """Textual inversion adds such tokens. In Stable Diffusion 2, "!" pads, and stays a word."""
    names = {"additional_special_tokens": ["<cat-toy>"], "pad_token": "!"}
    CLIPTokenizer(VOCAB, MERGES, **names).save_pretrained(tmp_path)
    loaded = T.load(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.specials["<cat-toy>"] == again.convert_tokens_to_ids("<cat-toy>") == len(VOCAB)
    for specials in (False, True):
        text = "a photo of<cat-toy>cats"
        assert loaded.encode(text, specials) == reference_ids(again, text, specials)
        assert loaded.encode("cats!!", specials) == reference_ids(reference, "cats!!")


def test_other_tokenizers_with_ends_of_words_are_refused(tmp_path):
    spec = clip_spec(VOCAB, MERGES_TXT)
    model = spec["model"]
    steps = spec["pre_tokenizer"]
    split = steps["pretokenizers"]
    other = split[0] | {"pattern": {"Regex": "[a-z]+"}}
    few = {token: i for token, i in VOCAB.items() if token != "!</w>"}
    cases = [
        ("lacks b'!</w>'", spec | {"model": model | {"vocab": few, "merges": []}}),
        ("splits differently", spec | {"normalizer": {"type": "NFC"}}),
        (
            "splits differently",
            spec | {"pre_tokenizer": steps | {"pretokenizers": [other, split[1]]}},
        ),
        ("splits differently", spec | {"pre_tokenizer": steps | {"pretokenizers": split[1:]}}),
        ("a step without a type", spec | {"pre_tokenizer": {"pretokenizers": split}}),
        ("WordPiece", spec | {"model": model | {"type": "WordPiece"}}),
    ]
    others = {token: i for token, i in VOCAB.items() if token != START}
    cases.append((f"lack {re.escape(START)}; add it", clip_spec(others, MERGES_TXT)))
    others = {token: i for token, i in VOCAB.items() if token != T.EOT}
    cases.append((f"lack {re.escape(T.EOT)}; add it", clip_spec(others, MERGES_TXT)))
    for message, case in cases:
        (tmp_path / "tokenizer.json").write_text(json.dumps(case), encoding="utf-8")
        with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: .*{message}"):
            T.load(tmp_path)


def test_ends_of_words_without_a_split_are_the_librarys(tmp_path):
    """Without a pre-tokenizer a text is one word, for the library and here."""
    spec = clip_spec(VOCAB, MERGES_TXT) | {"pre_tokenizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = T.load(tmp_path)
    for text in ("low lower newest", "HELLO  you", "é x\n y", ""):
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_an_end_of_word_token_alone_does_not_make_it_clips(tmp_path):
    """A byte-level BPE stays one if it has the token "</w>"."""
    added = [{"id": 256, "content": T.EOT}, {"id": 257, "content": "</w>"}]
    marked = T.BPETokenizer(formats.learned_spec([]) | {"added_tokens": added})
    marked.save(tmp_path)
    again = T.load(tmp_path)
    assert type(again) is T.BPETokenizer
    assert again.encode("</w>", specials=True) == [257]
    vocab = json.dumps(again._spec()["model"]["vocab"] | {"</w>": 257}).encode()
    gpt2 = T.from_files({"vocab.json": vocab, "merges.txt": b""})
    assert type(gpt2) is T.BPETokenizer and gpt2.encode("a") == [97]
    with pytest.raises(ValueError, match="looked for"):
        T.from_files({"vocab.json": json.dumps(VOCAB).encode()})
