"""Typical wrong answers, bugs to plant, and questions of lesson 4."""

from course.lessons import Fault, Wrong

WRONG = {
    "keep_min_p": (
        Wrong(
            "share * p.amax(-1, keepdim=True)",
            "share",
            "the share is one of the likeliest token's probability",
        ),
        Wrong("p.amax(-1, keepdim=True)", "p.amax()", "each row has its own likeliest token"),
        Wrong("p < share", "p > share", "the unlikely tokens are excluded, not the likely ones"),
        Wrong("-math.inf", "0.0", "a logit of 0 is no probability of 0"),
    ),
    "penalise_repeats": (
        Wrong(
            "torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)",
            "scores[seen] / penalty",
            "dividing a negative logit makes the token likelier",
        ),
        Wrong(
            "torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)",
            "scores[seen] - penalty",
            "the penalty is a factor",
        ),
        Wrong("logits = logits.clone()", "logits = logits", "the logits given are not changed"),
        Wrong("set(row)", "set(sum(rows, []))", "a row is penalised for its own text alone"),
    ),
    "keep_nucleus": (
        Wrong("- p >= top_p", ">= top_p", "the token that crosses top_p is kept"),
        Wrong(
            "excluded.scatter(1, index, excluded)",
            "excluded",
            "the mask belongs to the order of the tokens, not to that of the probabilities",
        ),
        Wrong("ordered.softmax(-1)", "ordered.exp()", "logits need not be normalised"),
        Wrong("descending=True", "descending=False", "the likeliest tokens come first"),
    ),
    "choose": (
        Wrong(
            "logits / max(sampling.temperature, 1e-30)",
            "logits * max(sampling.temperature, 1e-30)",
            "a low temperature makes the distribution sharper",
        ),
        Wrong("generator=g)", "generator=generators[0])", "a row uses only its own generator"),
        Wrong("logits.float() - ", "logits - ", "sums of small probabilities need float32"),
        Wrong(
            "logits = logits / max(sampling.temperature, 1e-30)\n"
            "logits = filter_logits(logits, sampling.top_k, sampling.top_p, sampling.min_p)",
            "logits = filter_logits(logits, sampling.top_k, sampling.top_p, sampling.min_p)\n"
            "logits = logits / max(sampling.temperature, 1e-30)",
            "the filters see the probabilities at this temperature",
        ),
        Wrong(
            "logits.softmax(-1).cumsum(-1)",
            "logits.softmax(0).cumsum(-1)",
            "probabilities sum to 1 over the vocabulary, not over the rows",
        ),
    ),
    "visible_from": (
        Wrong("math.ceil", "math.floor", "what is visible fits into the context"),
        Wrong("max(1, context_length // 2)", "context_length // 2", "a step is at least one token"),
        Wrong(
            "max(0, math.ceil((n - context_length) / step)) * step",
            "max(0, n - context_length)",
            "the start moves in steps of half a context",
        ),
    ),
    "KVCache.update": (
        Wrong(
            "slot = self.length % self.slots",
            "slot = min(self.length, self.slots - 1)",
            "the oldest key is replaced, not the newest",
        ),
        Wrong(
            "min(self.length + 1, self.slots)",
            "min(self.length, self.slots)",
            "a token attends to itself too",
        ),
        Wrong(
            "past_k[:, :, kept % self.slots]",
            "past_k[:, :, : len(kept)]",
            "position p is stored in slot p mod S",
        ),
        Wrong("past_v[:, :, slot] = v", "past_v[:, :, slot] = k", "values are not keys"),
        Wrong("    return k, v", "    return past_k, past_v", "a prompt attends to all of itself"),
    ),
    "KVCache.key_positions": (
        Wrong(
            "self.length - (self.length - slot) % self.slots",
            "slot",
            "a slot's number is not its position once the window moves",
        ),
        Wrong(
            "min(self.length + 1, self.slots)",
            "min(self.length, self.slots)",
            "the new token's own key counts",
        ),
        Wrong(
            "(self.length - slot) % self.slots",
            "(slot - self.length) % self.slots",
            "older keys have smaller positions",
        ),
    ),
}

FAULTS = (
    Fault(
        "tinyfm/gpt.py",
        "GPT.hidden",
        "(cache.length, cache.pad)",
        "(0, cache.pad)",
        "A trained model writes sense when generate.complete is called with use_cache=False, and "
        "repeats itself within a few words with the cache. The first new token is always right.",
        "With a cache, every new token is given position 0 instead of the number of tokens before "
        "it, so its rotary angles and its mask are wrong.",
    ),
    Fault(
        "tinyfm/gpt.py",
        "GPT.hidden",
        "(positions - pad[:, None]).clamp(min=0)",
        "positions.expand(len(pad), -1)",
        "A model with learned positions (GPT-2) answers a short prompt differently when a longer "
        "prompt stands in the same batch. A model with rotary positions does not.",
        "Positions count the padding in front of a short prompt. Rotary positions act only through "
        "distances, which a common shift leaves alone; learned ones do not.",
    ),
    Fault(
        "tinyfm/generate.py",
        "row_generator",
        "seed * 1_000_003 + index",
        "seed * 1_000_003",
        "python sample.py RUN --prompt The -n 4 prints one text four times, at any temperature.",
        "All rows have a generator with the same seed, so that equal prompts get equal draws.",
    ),
    Fault(
        "tinyfm/generate.py",
        "TextStream.feed",
        "self.decoder.decode(data, final)",
        'data.decode("utf-8", errors="replace")',
        "The streamed text shows replacement characters in place of letters with accents and of "
        "emoji. The same ids, decoded at once, give the right text.",
        "The bytes of each token are decoded alone, but a character may be spread over two tokens.",
    ),
    Fault(
        "tinyfm/generate.py",
        "stream",
        "model.eval()",
        "model.train()",
        "A model that was trained with dropout 0.1 gives another greedy text each time it is "
        "called, and all are a little worse than its loss promises.",
        "The model generates in training mode, so that dropout sets activations to zero by chance.",
    ),
)

QUESTIONS = [
    (
        "Tokens have the probabilities 0.6, 0.3 and 0.1. What are they at temperature 0.5, and "
        "which tokens does top_p = 0.8 keep then?",
        "Squares: 0.36, 0.09, 0.01, sum 0.46: 0.783, 0.196, 0.022. The second token is kept, as "
        "0.783 < 0.8; the third is not, as 0.978 >= 0.8.",
    ),
    (
        "Why do the keys and values of earlier tokens not change when a token is added?",
        "Attention is causal: the state of position t in every layer depends on positions up to t "
        "only. In a model that attends in both directions a cache would be wrong.",
    ),
    (
        "How large is the cache of a model with 32 layers, 8 key/value heads of width 128, in "
        "bfloat16, for 8,192 tokens? What do 32 key/value heads cost?",
        "2 x 32 x 8 x 128 x 2 bytes = 128 KiB a token, 1 GiB for the text. With 32 heads 4 GiB.",
    ),
    (
        "Why does each row have its own random generator?",
        "Its text then depends on its prompt and seed alone, not on how many other rows stand in "
        "the batch. Results can be repeated one by one.",
    ),
    (
        "Greedy decoding gives the likeliest next token at each step. Is the text the likeliest?",
        "No. A likely first token may lead to unlikely continuations. And the likeliest text is "
        "often not what one wants: it repeats itself.",
    ),
    (
        "What does a repetition penalty do to a text about a person whose name must recur?",
        "It lowers the name's logits each time, so that the model avoids it or misspells it. The "
        "penalty knows tokens, not meaning.",
    ),
]
