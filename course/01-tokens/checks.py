"""Checks of lesson 1. A dot stands for a merged pair in the comments: b.an is b and an."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from course.lessons import checks
from tinyfm import bpe, tokenizer

# The example of the lesson: "banana" and " bandana", each once. Rank 0 makes 256 = an, rank 1
# makes 257 = b.an and rank 2 makes 258 = an.a.
A, B, N = b"abn"
BANANA = {b"banana": 1, b" bandana": 1}
MERGES = [(A, N), (B, 256), (256, A)]


def shown(ids: list[int]) -> str:
    """Ids as a student reads them: bytes as letters, tokens as numbers."""
    return " ".join(chr(i) if 32 < i < 127 else str(i) for i in ids)


def same(got, expected, what: str) -> None:
    assert got == expected, f"{what}: expected {expected}, got {got}"


def random_chunks(seed: int) -> dict[bytes, int]:
    """Chunks of the letters a, b and c, with counts from 1 to 4; few and short for a small seed."""
    r = random.Random(seed)
    chunks = {}
    for _ in range(r.randint(1, min(8, 1 + seed // 10))):
        chunks["".join(r.choices("abc", k=r.randint(1, 4 + seed // 5))).encode()] = r.randint(1, 4)
    return chunks


def words_of(text: str) -> dict[bytes, int]:
    return {word.encode(): count for word, count in Counter(bpe.CHUNK.findall(text)).items()}


PROSE = """A tokenizer cuts a text into tokens. The tokens of a text are numbers, and the model sees
nothing else of the text. A token that is frequent should be long, so that texts become short; a
token that is rare should not exist, so that the table of tokens stays small. """


# ---- merge --------------------------------------------------------------------------------------


@checks("merge")
def test_every_occurrence_becomes_the_new_token():
    got = bpe.merge(list(b"banana"), (A, N), 256)
    same(got, [B, 256, 256, A], "banana with an -> 256")


@checks("merge")
def test_occurrences_do_not_overlap_and_the_left_one_wins():
    same(bpe.merge([7, 7, 7], (7, 7), 256), [256, 7], "7 7 7 with 7 7 -> 256")
    same(bpe.merge([7, 7, 7, 7], (7, 7), 256), [256, 256], "7 7 7 7 with 7 7 -> 256")


@checks("merge")
def test_the_order_within_the_pair_matters():
    same(bpe.merge([1, 2, 1, 1, 2], (2, 1), 256), [1, 256, 1, 2], "1 2 1 1 2 with 2 1 -> 256")


@checks("merge")
def test_a_last_token_without_a_partner_is_kept():
    same(bpe.merge([1, 2, 1], (1, 2), 256), [256, 1], "1 2 1 with 1 2 -> 256")
    same(bpe.merge([], (1, 2), 256), [], "an empty list")


@checks("merge")
def test_the_list_that_was_given_is_not_changed_by_merge():
    ids = [1, 2, 3]
    bpe.merge(ids, (1, 2), 256)
    same(ids, [1, 2, 3], "the list after the call")


# ---- decode -------------------------------------------------------------------------------------


@checks("decode")
def test_bytes_are_their_own_tokens():
    same(bpe.decode(b"cat", []), "cat", "three bytes without merges")


@checks("decode")
def test_a_token_is_the_bytes_of_its_pair_in_order():
    same(bpe.decode([256], MERGES), "an", "token 256")
    same(bpe.decode([257], MERGES), "ban", "token 257, which is b and 256")
    same(bpe.decode([257, 258], MERGES), "banana", "tokens 257 and 258")


@checks("decode")
def test_a_character_may_be_spread_over_tokens():
    # U+00E9 is the two bytes C3 A9 in UTF-8; each alone is no character.
    same(bpe.decode([0xC3, 0xA9], []), "\u00e9", "the bytes C3 A9")


@checks("decode")
def test_bytes_that_are_no_character_become_the_replacement_character():
    same(bpe.decode([0x61, 0xC3], []), "a\ufffd", "a, and the first byte of two")


@checks("decode")
def test_decoding_undoes_encoding():
    merges = bpe.learn_merges(words_of(PROSE), 60)
    for text in (PROSE, "", "na\u00efve \u4e2d\u6587 \U0001f642"):
        same(bpe.decode(bpe.encode(text, merges), merges), text, "decode(encode(text))")


# ---- learning -----------------------------------------------------------------------------------


def check_lesson_example(learn):
    merges = learn(BANANA, 3)
    same(merges, MERGES, "three merges of banana and bandana")


def check_counts_of_chunks(learn):
    # x y occurs once in each of two chunks, p q in one chunk that occurs five times.
    same(learn({b"xy1": 1, b"xy2": 1, b"pq": 5}, 1), [(ord("p"), ord("q"))], "the first merge")


def check_ties(learn):
    same(learn({b"cd": 1, b"ab": 1}, 2), [(99, 100), (97, 98)], "two pairs that occur once each")
    same(learn({b"abzb": 1, b"zb": 1, b"ab": 1}, 1), [(97, 98)], "ab and zb, twice each")


def check_end(learn):
    same(learn({b"abc": 1, b"d": 9}, 50), [(97, 98), (256, 99)], "merges until abc is one token")
    same(learn({}, 5), [], "a text without chunks")


@checks("learn_merges_slowly")
def test_the_example_of_the_lesson():
    check_lesson_example(bpe.learn_merges_slowly)


@checks("learn_merges_slowly")
def test_a_pair_counts_as_often_as_its_chunk_occurs():
    check_counts_of_chunks(bpe.learn_merges_slowly)


@checks("learn_merges_slowly")
def test_of_equally_frequent_pairs_the_first_in_the_text_wins():
    check_ties(bpe.learn_merges_slowly)


@checks("learn_merges_slowly")
def test_learning_ends_when_every_chunk_is_one_token():
    check_end(bpe.learn_merges_slowly)


@checks("learn_merges_slowly")
def test_overlapping_pairs_are_counted_at_each_place():
    # In a a a a the pair occurs at three places, one more often than x y in its chunk.
    same(bpe.learn_merges_slowly({b"xy": 2, b"aaaa": 1}, 1), [(97, 97)], "a a a a beside x y twice")


@checks("learn_merges_slowly")
def test_the_merges_of_a_text_are_those_of_the_fast_version():
    chunks = words_of(PROSE)
    expected = bpe.learn_merges(chunks, 40)
    same(bpe.learn_merges_slowly(chunks, 40), expected, "40 merges of a paragraph")


@checks("learn_merges")
def test_the_fast_version_learns_the_example_of_the_lesson():
    check_lesson_example(bpe.learn_merges)


@checks("learn_merges")
def test_the_fast_version_counts_a_pair_as_often_as_its_chunk_occurs():
    check_counts_of_chunks(bpe.learn_merges)


@checks("learn_merges")
def test_the_fast_version_breaks_ties_by_the_first_place():
    check_ties(bpe.learn_merges)


@checks("learn_merges")
def test_the_fast_version_ends_when_every_chunk_is_one_token():
    check_end(bpe.learn_merges)


@checks("learn_merges")
def test_no_more_merges_than_wanted():
    same(len(bpe.learn_merges(words_of(PROSE), 7)), 7, "number of merges")
    same(bpe.learn_merges(words_of(PROSE), 0), [], "no merges wanted")


@checks("learn_merges")
def test_a_pair_whose_count_fell_gives_way_to_a_better_one():
    # bc occurs five times and de three times, until ab (six times) takes four b away from bc.
    chunks = {b"abc": 4, b"ab": 2, b"bc": 1, b"de": 3}
    expected = [(97, 98), (256, 99), (100, 101), (98, 99)]
    same(bpe.learn_merges(chunks, 4), expected, "merges of abc 4, ab 2, bc 1, de 3 times")


@checks("learn_merges")
def test_the_fast_version_equals_the_definition():
    for seed in range(150):
        chunks = random_chunks(seed)
        expected = bpe.learn_merges_slowly(chunks, 25)
        got = bpe.learn_merges(chunks, 25)
        same(got, expected, f"merges of {chunks}")


# ---- the linked list ----------------------------------------------------------------------------


def follow(tokens: bpe.LinkedTokens, links: list[int], place: int) -> list[int]:
    """The tokens that the links lead through, walls included; links may be wrong and go round."""
    walk = []
    while 0 <= place < len(tokens.ids) and len(walk) <= len(tokens.ids):
        walk.append(tokens.ids[place])
        place = links[place]
    return walk


@checks("LinkedTokens.merge")
def test_the_links_lead_past_a_merged_token():
    tokens = bpe.LinkedTokens({b"banana": 1})
    tokens.merge((A, N), 256)
    expected = [bpe.WALL, B, 256, 256, A, bpe.WALL]
    same(follow(tokens, tokens.right, 0), expected, "banana after an -> 256")


@checks("LinkedTokens.merge")
def test_links_to_the_left_are_kept_too():
    tokens = bpe.LinkedTokens({b"banana": 1})
    tokens.merge((A, N), 256)
    got = follow(tokens, tokens.left, len(tokens.ids) - 1)
    same(got, [bpe.WALL, A, 256, 256, B, bpe.WALL], "banana after an -> 256, from right to left")


@checks("LinkedTokens.merge")
def test_counts_follow_every_merge():
    for seed in range(60):
        chunks = random_chunks(seed)
        tokens = bpe.LinkedTokens(chunks)
        rows = {chunk: list(chunk) for chunk in chunks}
        merged = set()
        for rank, pair in enumerate(bpe.learn_merges_slowly(chunks, 6)):
            tokens.merge(pair, 256 + rank)
            merged.add(pair)
            rows = {chunk: bpe.merge(row, pair, 256 + rank) for chunk, row in rows.items()}
            expected = Counter()
            for chunk, row in rows.items():
                for neighbours in pairwise(row):
                    expected[neighbours] += chunks[chunk]
            for key in {*expected, *tokens.counts} - merged:  # a merged pair is not looked at again
                got = tokens.counts.get(key, 0)
                what = f"after the merge of {shown(pair)} in {chunks}, the count of {shown(key)}"
                assert got == expected[key], f"{what}: expected {expected[key]}, got {got}"


@checks("LinkedTokens.merge")
def test_in_a_run_of_equal_tokens_occurrences_do_not_overlap():
    tokens = bpe.LinkedTokens({b"aaaaa": 1})
    tokens.merge((A, A), 256)
    expected = [bpe.WALL, 256, 256, A, bpe.WALL]
    same(follow(tokens, tokens.right, 0), expected, "a a a a a after aa -> 256")


@checks("LinkedTokens.merge")
def test_the_new_pairs_are_returned():
    tokens = bpe.LinkedTokens({b"xaby": 2, b"ab": 1})
    got = {pair for pair in tokens.merge((A, B), 256) if bpe.WALL not in pair}
    same(got, {(120, 256), (256, 121)}, "new pairs of x a b y after ab -> 256")


@checks("LinkedTokens.merge")
def test_learning_with_the_linked_list_equals_the_definition():
    for seed in range(100):
        chunks = random_chunks(seed)
        expected = bpe.learn_merges_slowly(chunks, 25)
        same(bpe.learn_merges(chunks, 25), expected, f"merges of {chunks}")


# ---- applying merges ----------------------------------------------------------------------------


def check_new_words(apply):
    rules = bpe.make_rules(MERGES)
    for word, expected in ((b"bananas", [257, 258, 115]), (b"canal", [99, 258, 108])):
        got = apply(list(word), rules)
        same(shown(got), shown(expected), f"ids of {word.decode()}")


def check_rank_before_place(apply):
    # y z was learned before x y, so x y z becomes x and y.z, although x y stands further left.
    rules = bpe.make_rules([(8, 9), (7, 8)])
    same(apply([7, 8, 9], rules), [7, 256], "7 8 9 with 8.9 -> 256 learned before 7.8 -> 257")


def check_leftmost(apply):
    rules = bpe.make_rules([(7, 7)])
    same(apply([7, 7, 7], rules), [256, 7], "7 7 7 with 7.7 -> 256")


def check_edges(apply):
    rules = bpe.make_rules(MERGES)
    same(apply([], rules), [], "no ids")
    same(apply([A], rules), [A], "one id")
    same(apply([1, 2, 3], rules), [1, 2, 3], "ids without a rule")


def check_named_tokens(apply):
    same(
        apply([1, 2, 3], {(1, 2): (0, 900), (900, 3): (1, 50)}), [50], "rules that name 900 and 50"
    )


def check_input_is_kept(apply):
    ids = list(b"banana")
    apply(ids, bpe.make_rules(MERGES))
    same(ids, list(b"banana"), "the list that was given, after the call")


@checks("apply_merges_slowly")
def test_a_new_word_is_encoded_with_the_learned_merges():
    check_new_words(bpe.apply_merges_slowly)


@checks("apply_merges_slowly")
def test_the_lowest_rank_goes_first_wherever_it_stands():
    check_rank_before_place(bpe.apply_merges_slowly)


@checks("apply_merges_slowly")
def test_of_equal_ranks_the_leftmost_goes_first():
    check_leftmost(bpe.apply_merges_slowly)


@checks("apply_merges_slowly")
def test_nothing_to_merge_changes_nothing():
    check_edges(bpe.apply_merges_slowly)


@checks("apply_merges_slowly")
def test_the_rule_names_the_new_token():
    check_named_tokens(bpe.apply_merges_slowly)


@checks("apply_merges_slowly")
def test_the_list_that_was_given_is_not_changed():
    check_input_is_kept(bpe.apply_merges_slowly)


@checks("apply_merges")
def test_fast_encoding_of_a_new_word():
    check_new_words(bpe.apply_merges)


@checks("apply_merges")
def test_fast_encoding_takes_the_lowest_rank_first():
    check_rank_before_place(bpe.apply_merges)


@checks("apply_merges")
def test_fast_encoding_takes_the_leftmost_of_equal_ranks():
    check_leftmost(bpe.apply_merges)


@checks("apply_merges")
def test_fast_encoding_of_nothing_to_merge():
    check_edges(bpe.apply_merges)


@checks("apply_merges")
def test_fast_encoding_uses_the_token_that_the_rule_names():
    check_named_tokens(bpe.apply_merges)


@checks("apply_merges")
def test_fast_encoding_does_not_change_the_list_that_was_given():
    check_input_is_kept(bpe.apply_merges)


@checks("apply_merges")
def test_fast_encoding_equals_the_definition():
    """Also for rules in any order: a published vocabulary may rank a merge before its parts."""
    for seed in range(300):
        r = random.Random(seed)
        size = 3 + seed // 10  # short ones first, as they are easier to read
        pairs = list({(r.randint(0, 6), r.randint(0, 6)): 0 for _ in range(r.randint(0, size))})
        rules = {pair: (rank, r.randint(0, 6)) for rank, pair in enumerate(pairs)}
        ids = [r.randint(0, 5) for _ in range(r.randint(0, size))]
        expected = bpe.apply_merges_slowly(ids, rules)
        same(bpe.apply_merges(ids, rules), expected, f"ids of {ids} with the rules {rules}")


@checks("apply_merges")
def test_a_long_chunk_costs_few_steps():
    """The number of rules that are looked up grows like n log n, not like n squared."""

    class Counting(dict):
        looked_up = 0

        def __contains__(self, pair):
            self.looked_up += 1
            return super().__contains__(pair)

        def __getitem__(self, pair):
            self.looked_up += 1
            return super().__getitem__(pair)

        def get(self, pair, default=None):
            self.looked_up += 1
            return super().get(pair, default)

    # a a becomes 256, 256 256 becomes 257 ...: 2,048 ids take 11 rounds of merges.
    rules = Counting(bpe.make_rules([(A, A), *((i, i) for i in range(256, 266))]))
    got = bpe.apply_merges([A] * 2048, rules)
    same(got, [266], "2,048 a, merged in pairs")
    most = 40 * 2048
    message = f"{rules.looked_up:,} rules were looked up for 2,048 ids; expected at most {most:,}"
    assert rules.looked_up <= most, message


# ---- oracles ------------------------------------------------------------------------------------

LOW = "low" + " low" * 4 + " lower" * 2 + " newest" * 6 + " widest" * 3
WORDS = "lower newest widest lowest newer wide low new"
# ids of WORDS by the library tokenizers 0.23.3: byte-level BPE with the 14 merges learned from LOW
ORACLE = [259, 101, 114, 264, 268, 260, 257, 263, 101, 114, 267, 101, 260, 263]


@checks("apply_merges_slowly")
def test_ids_are_those_of_the_library_tokenizers():
    rules = bpe.make_rules(bpe.learn_merges(words_of(LOW), 14))
    got = []
    for word in bpe.CHUNK.findall(WORDS):
        got += bpe.apply_merges_slowly(list(word.encode()), rules)
    same(got, ORACLE, f"ids of {WORDS!r}")


# ---- around the exercises -----------------------------------------------------------------------


def test_a_text_from_outside_cannot_end_a_document():
    tokens = tokenizer.train("bytes", [], 257)
    forged = f"hello{tokenizer.EOT}"
    assert tokens.eot not in tokens.encode(forged), "the end of a text is encoded from plain text"


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_the_ids_of_a_text_do_not_depend_on_what_was_encoded_before(kind):
    tokens = tokenizer.train(kind, [PROSE], 300)
    texts = [" the", "the", "the text", " text", "text"]
    first = [tokenizer.train(kind, [PROSE], 300).encode(text) for text in texts]
    for text, expected in zip(texts, first):
        same(tokens.encode(text), expected, f"ids of {text!r} after other texts")


def test_a_frequent_word_is_learned_before_rare_ones():
    text = " cat" * 100 + " " + " ".join(f"d{a}g{b}" for a in "abcdefgh" for b in "abcdefgh")
    merges = bpe.train([text], 256 + 3 + 1)
    tokens = [bpe.decode([256 + i], merges) for i in range(3)]
    same(tokens[-1], " cat", "the third token learned")


def test_the_alphabet_has_all_but_the_rarest_characters():
    missing = set(PROSE) - {"\n"} - set(tokenizer.choose_alphabet([PROSE], 600))
    assert not missing, f"the alphabet of a paragraph lacks {sorted(missing)}"
