"""The ids of our tokenizer and those of the library tokenizers, compared on many texts."""

import unicodedata

from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy


def is_known(char: str) -> bool:
    """Whether all versions of Unicode that libraries use have the character in one category."""
    if unicodedata.category(char) in ("Cn", "Cs"):
        return False
    is_mark = unicodedata.category(char) in ("Mn", "Mc", "Me", "Cf")
    return not is_mark or unicodedata.ucd_3_2_0.category(char) != "Cn"


def assert_ids_of_library(
    ours,
    reference,
    drawn: SearchStrategy,
    examples: int,
    texts: list[str],
    finds_names: bool = False,
):
    """The ids are equal, with and without special tokens: of `examples` drawn texts and of `texts`.

    ours: tinyfm's Tokenizer. reference: the library's. Characters that Unicode does not assign are
    left out, because the versions of Unicode of the two differ; so are recent marks. finds_names:
    the library finds the names of special tokens in a text that is to have none.
    """

    def assert_same(text: str) -> None:
        text = "".join(filter(is_known, text))
        reference.encode_special_tokens = False
        assert ours.encode(text, specials=True) == reference.encode(text).ids, text
        if finds_names and any(name in text for name in ours.specials):
            return
        reference.encode_special_tokens = True
        assert ours.encode(text) == reference.encode(text).ids, text

    settings(max_examples=examples, deadline=None)(given(drawn)(assert_same))()
    for text in [*texts, "a" * 300, "".join(map(chr, range(1500)))]:
        assert_same(text)
