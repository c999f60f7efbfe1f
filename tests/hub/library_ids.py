"""The ids of our tokenizer and those of the library tokenizers, compared on many texts."""

import unicodedata

from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy


def assert_ids_of_library(ours, reference, drawn: SearchStrategy, examples: int, texts: list[str]):
    """The ids are equal, with and without special tokens: of `examples` drawn texts and of `texts`.

    ours: tinyfm's Tokenizer. reference: the library's. Characters that Unicode does not assign are
    left out, because the versions of Unicode of the two differ.
    """

    def assert_same(text: str) -> None:
        reference.encode_special_tokens = False
        assert ours.encode(text, specials=True) == reference.encode(text).ids, text
        reference.encode_special_tokens = True
        assert ours.encode(text) == reference.encode(text).ids, text

    settings(max_examples=examples, deadline=None)(given(drawn)(assert_same))()
    for text in [*texts, "a" * 300, "".join(map(chr, range(1500)))]:
        assert_same("".join(c for c in text if unicodedata.category(c) != "Cn"))
