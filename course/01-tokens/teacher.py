"""Typical wrong answers, bugs to plant, and questions of lesson 1."""

from course.lessons import Fault, Wrong

WRONG = {
    "merge": (
        Wrong("i += 2", "i += 1", "a merged pair uses up both of its tokens"),
        Wrong("== pair", "== pair[::-1]", "the order within a pair matters"),
        Wrong("while i < len(ids):", "while i < len(ids) - 1:", "the last token is kept"),
    ),
    "decode": (
        Wrong(
            "token_bytes[a] + token_bytes[b]",
            "token_bytes[b] + token_bytes[a]",
            "the left token of a pair comes first",
        ),
        Wrong(
            'b"".join(token_bytes[i] for i in ids).decode("utf-8", errors="replace")',
            '"".join(token_bytes[i].decode("utf-8", errors="replace") for i in ids)',
            "a character may be spread over several tokens",
        ),
        Wrong('errors="replace"', 'errors="strict"', "any row of ids has a text"),
        Wrong(
            "token_bytes.append(token_bytes[a] + token_bytes[b])",
            "token_bytes.append(bytes([a, b]) if max(a, b) < 256 else b'')",
            "a token may be made of merged tokens",
        ),
    ),
    "learn_merges_slowly": (
        Wrong("+= occurrences", "+= 1", "a pair counts as often as its chunk occurs"),
        Wrong("max(counts, key=counts.get)", "max(counts)", "the most frequent pair is merged"),
        Wrong(
            "max(counts, key=counts.get)",
            "max(counts, key=lambda pair: (counts[pair], pair))",
            "of equally frequent pairs the first in the text wins",
        ),
        Wrong(
            "rows = [merge(row, best, new) for row in rows]",
            "[merge(row, best, new) for row in rows]",
            "later merges build on earlier ones",
        ),
    ),
    "apply_merges_slowly": (
        Wrong("_, i = min(ranked)", "_, i = ranked[0]", "the lowest rank goes first, not the left"),
        Wrong("_, i = min(ranked)", "_, i = max(ranked)", "what was learned first goes first"),
        Wrong("ids = list(ids)", "ids = ids", "the list that was given is not changed"),
        Wrong("[i : i + 2]", "[i : i + 1]", "two tokens are replaced by one"),
    ),
    "LinkedTokens.merge": (
        Wrong("        continue", "        pass", "outdated places are skipped"),
        Wrong("    left[after] = i", "    left[i] = after", "the link to the left is set"),
        Wrong("    self.remove(j, after)", "    pass", "the pair behind is no longer counted"),
        Wrong(
            "    self.add(before, i)",
            "    self.add(i, before)",
            "the left token of a pair is first",
        ),
        Wrong(
            "    added.add((ids[before], new))", "    pass", "the pair in front is a candidate too"
        ),
    ),
    "learn_merges": (
        Wrong("if heap[0] != key:", "if False:", "an outdated count must not decide"),
        Wrong(
            "heapq.heapreplace(heap, key)",
            "heapq.heappop(heap)",
            "a pair whose count fell stays a candidate",
        ),
        Wrong("== 0", "== 1", "a pair that occurs once can be merged"),
        Wrong("added & tokens.counts.keys()", "()", "pairs with the new token become candidates"),
    ),
    "apply_merges": (
        Wrong(
            "if rule is None or rule[0] != rank:",
            "if rule is None:",
            "a place whose pair has changed waits for its new rank",
        ),
        Wrong("    left[after] = i", "    left[i] = after", "the link to the left is set"),
        Wrong(
            "((before, (ids[before], ids[i])), (i, (ids[i], ids[after])))",
            "((i, (ids[i], ids[after])),)",
            "the new token may merge with its left neighbour",
        ),
        Wrong("ids = [*ids, WALL]", "ids.append(WALL)", "the list that was given is not changed"),
    ),
}

FAULTS = (
    Fault(
        "tinyfm/tokenizer.py",
        "Tokenizer.encode",
        "replace_surrogates(text), specials)",
        "replace_surrogates(text), True)",
        "A chat server appends each message of a user to the conversation. After a message that "
        "quotes the characters <|endoftext|>, the model forgets the conversation so far.",
        "The argument specials is ignored: the name of a special token in plain text is encoded as "
        "that token, so a text from outside can end a document.",
    ),
    Fault(
        "tinyfm/tokenizer.py",
        "ChunkCache.__missing__",
        "self[chunk] = ids",
        "self[chunk.strip()] = ids",
        "A tokenizer of kind bpe is lossless when it is new. In a long program some texts come "
        'back with spaces that were not there: "the" becomes " the". A test that makes a new '
        "tokenizer for each text finds nothing.",
        "The cache stores the ids of a chunk under the chunk without its spaces, so that a word "
        "without a space finds the ids of the same word with one. Results that depend on the "
        "order of calls point to a state, here the cache.",
    ),
    Fault(
        "tinyfm/bpe.py",
        "train",
        '{word.encode("utf-8"): count for',
        '{word.encode("utf-8"): 1 for',
        "A vocabulary of 1,024 ids that is learned from the documentation of Python shortens new "
        "pages much less than it did, although each merge is correct for the chunks it is given.",
        "Every different word counts once, however often it occurs, so that the merges suit the "
        "word list and not the text.",
    ),
    Fault(
        "tinyfm/tokenizer.py",
        "choose_alphabet",
        "covered >= 0.9995 * total",
        "covered >= 0.75 * total",
        "A tokenizer of kind sentencepiece with 4,096 pieces loses no text, but cuts frequent "
        "words at letters such as k, which are a token for themselves wherever they stand.",
        "The alphabet covers only three quarters of the characters. All others are spelled in "
        "bytes, and no piece can hold them.",
    ),
)

QUESTIONS = [
    (
        "The chunks are {aab: 3, ab: 2}. Which two merges does BPE learn, and what becomes of aab?",
        "Counts: aa 3, ab 5. First ab -> 256 = ab; then aab is a 256, and the pair (a, 256) occurs "
        "3 times: 257 = aab. So aab is the one token 257.",
    ),
    (
        "Model P has 2.0 nats per token and 4.0 bytes per token, model Q 1.2 nats and 2.0 bytes. "
        "Which one predicts the text better?",
        "Bits per byte: P 2.0 / (4.0 ln 2) = 0.72, Q 1.2 / (2.0 ln 2) = 0.87. P, although its loss "
        "per token is higher.",
    ),
    (
        "Why may encoding not simply take the longest token that fits, from left to right?",
        "The merges were learned in an order, and the model saw texts that were cut in that order. "
        "Longest match gives other ids for some words; decode still gives the text, but the model "
        "has never seen these rows.",
    ),
    (
        "All merges together replace at most how many pairs in a text of N bytes? What follows for "
        "the cost of the linked list?",
        "N - 1, as each replacement makes the text one token shorter. The list costs O(1) per "
        "replacement, so O(N) in all, and the heap adds a factor of log N.",
    ),
    (
        "Why may a key in the heap of learn_merges be outdated, and why does it do no harm?",
        "A merge lowers the counts of other pairs without touching the heap. Counts only fall and "
        "first places only move right, so an old key is too good: it reaches the top too early, is "
        "compared with the current key and replaced.",
    ),
    (
        "A sentence has 40 characters in English and in Greek. Why does the Greek one take several "
        "times as many tokens, and who pays for it?",
        "Greek letters take two bytes each, and a vocabulary learned from English has merges for "
        "few of them, so nearly every byte is a token. Users pay in price, time and in how much of "
        "a context a text fills.",
    ),
]
