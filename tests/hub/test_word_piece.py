"""WordPiece: trained by hand and beside the library, and BERT's vocab.txt; RoBERTa's tokens."""

import json
from pydoc_data.topics import topics

import pytest
from test_tokenizer_families import BERT_SPECIALS, NASTY, WORDS
from tokenizers import BertWordPieceTokenizer
from transformers import AutoTokenizer

from tinyfm import tokenizer as T

TEXTS = [*topics.values()][:30]


def test_training_by_hand():
    """Pairs of h ##u ##g 10, p ##u ##g 5, p ##u ##n 12, h ##u ##n 4.

    p ##u occurs 17 times, then h ##u 14, pu ##n 12, hu ##g 10, pu ##g 5. The rest is no merge.
    """
    text = " ".join(["hug"] * 10 + ["pug"] * 5 + ["pun"] * 12 + ["hun"] * 4)
    words = T.train_word_piece([text], 5 + 10, lowercase=True)
    symbols = ["h", "##u", "##g", "p", "##n"]
    learned = ["pu", "hu", "pun", "hug", "pug"]
    assert [*T.model_of(words._spec())["vocab"]] == [*BERT_SPECIALS, *symbols, *learned]
    pieces = [words.decode([i]) for i in words.encode("pun hun PÜG hunug hat")]
    assert pieces == ["pun", "hu", "n", "pug", "hu", "n", "u", "g", "[UNK]"]
    with pytest.raises(ValueError, match="use at most 16"):
        T.train_word_piece([text], 17, lowercase=True)


@pytest.mark.parametrize("kind", ["wordpiece", "wordpiece-cased"])
def test_training_learns_most_tokens_of_the_library(kind, tmp_path):
    """The two break ties and choose rare characters in another way."""
    ours = T.train(kind, TEXTS, 500)
    assert ours.vocab_size == 500
    names = [ours.cls, ours.eot, ours.pad, ours.mask]
    assert names == [BERT_SPECIALS.index(f"[{name}]") for name in ("CLS", "SEP", "PAD", "MASK")]
    theirs = BertWordPieceTokenizer(lowercase=kind == "wordpiece")
    theirs.train_from_iterator(T.sample_documents(TEXTS, 2_000_000), 500, show_progress=False)
    ids = T.model_of(ours._spec())["vocab"]
    assert len(ids.keys() & theirs.get_vocab().keys()) > 0.95 * 500
    # The ids of a text are the library's.
    ours.save_pretrained(tmp_path)
    again = T.load(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for text in (WORDS, TEXTS[3], "The [MASK] of\tnaïve 中文"):
        expected = reference(text)["input_ids"]
        assert [ours.cls, *ours.encode(text, specials=True), ours.eot] == expected
        assert again.encode(text, specials=True) == expected[1:-1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True},
        {"strip_accents": False, "tokenize_chinese_chars": False},
    ],
)
def test_a_vocab_txt(settings, tmp_path):
    """As BERT was first published: a token a line, and how to clean the text."""
    tokens = T.model_of(T.train("wordpiece-cased", [*TEXTS[:9], WORDS], 600)._spec())["vocab"]
    lines = [*tokens][5:300] + BERT_SPECIALS + [*tokens][300:]  # not in front
    (tmp_path / "vocab.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    config = {"tokenizer_class": "BertTokenizer"} | settings
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ours = T.load(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.do_lower_case == settings.get("do_lower_case", True)
    names = [theirs.cls_token_id, theirs.sep_token_id, theirs.pad_token_id, theirs.mask_token_id]
    assert [ours.cls, ours.eot, ours.pad, ours.mask] == names
    for text in (WORDS, NASTY, *TEXTS[:3], "a [MASK] b [UNK]", "[mask]", "a" * 101, ""):
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, specials=True) == expected, text[:80]
    ours.save_pretrained(tmp_path / "again", texts=16)
    exported = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert exported("a [MASK] b")["input_ids"] == theirs("a [MASK] b")["input_ids"]


@pytest.mark.parametrize(
    ("lines", "config", "message"),
    [
        (["a", "[SEP]"], {}, r"lacks the unk_token '\[UNK\]'"),
        (["a", "[UNK]"], {}, "none of the special tokens .* ends a text"),
        (BERT_SPECIALS, {"tokenizer_class": "BertJapaneseTokenizer"}, "add its tokenizer.json"),
    ],
)
def test_a_vocab_txt_that_cannot_be_followed(lines, config, message, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        T.load(tmp_path)


def test_tokens_of_roberta(tmp_path):
    """vocab.json and merges.txt of byte-level BPE, with the special tokens at the ends."""
    spec = T.train("bpe", TEXTS[:9], 400)._spec()
    tokens = [token for token in spec["model"]["vocab"] if token != T.EOT]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *tokens, "<mask>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    mask = {"content": "<mask>", "lstrip": True, "special": True}
    config = {"tokenizer_class": "RobertaTokenizer"}
    config["mask_token"] = mask | {"__type": "AddedToken"}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config["added_tokens_decoder"] = {str(vocab["<mask>"]): mask}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ours = T.load(tmp_path)
    assert (ours.cls, ours.pad, ours.eot, ours.mask) == (0, 1, 2, vocab["<mask>"])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The <mask> statement", "The  <mask>,", WORDS):
        expected = theirs(text)["input_ids"]
        assert [0, *ours.encode(text, specials=True), 2] == expected
    ours.save_pretrained(tmp_path / "again", texts=16)
    exported = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (
        exported("The <mask> statement")["input_ids"] == theirs("The <mask> statement")["input_ids"]
    )
