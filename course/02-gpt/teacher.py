"""Lesson 2 for teachers: typical wrong answers, bugs to plant, and questions for an exam."""

from course.lessons import Fault, Wrong

GPT = "tinyfm/gpt.py"

WRONG = {
    "attention_mask": (
        Wrong("distance >= 0", "distance > 0", "a query also sees its own position"),
        Wrong("distance >= 0", "distance <= 0", "no query sees a later key"),
        Wrong("distance < (window", "distance <= (window", "a window of w holds w tokens"),
        Wrong("key[None, None, :] >=", "key[None, None, :] >", "pad is a count: it ends the pad"),
        Wrong(" | (distance == 0)", "", "no query has an empty set of keys"),
        Wrong("[:, None]  # (B", "  # (B", "an axis of 1 stands for the heads"),
    ),
    "Attention.attend": (
        Wrong("q,\n", "q * k.size(-1) ** 0.5,\n", "scores are divided by the root of K"),
        Wrong("attn_mask=mask", "attn_mask=None if mask is None else ~mask", "True means allowed"),
        Wrong("attn_mask=mask", "attn_mask=None", "the mask counts"),
        Wrong("mask is None and q.size(2) > 1", "False", "without a mask attention is causal"),
        Wrong(" and q.size(2) > 1", "", "the latest token sees the whole cache"),
        Wrong("self.dropout if self.training else 0.0", "self.dropout", "no dropout in evaluation"),
        Wrong("scale=self.scale", "scale=None", "a config may set another factor of the scores"),
        Wrong(
            "k,\n    v,",
            "k.repeat(1, q.size(1) // k.size(1), 1, 1),\n"
            "    v.repeat(1, q.size(1) // v.size(1), 1, 1),",
            "neighbouring query heads share a key/value head (repeat_interleave, not repeat)",
        ),
    ),
    "rope_frequencies": (
        Wrong("torch.arange(0, config.K, 2", "torch.arange(0, config.K // 2", "-2i/K, not -i/K"),
        Wrong("/ config.K", "/ (config.K // 2)", "2i is divided by the whole width K"),
        Wrong(
            "1.0 / config.rope_theta**exponent", "config.rope_theta**exponent", "pairs slow down"
        ),
        Wrong("slow_long_waves(frequency, config)", "frequency", "the extension slows long waves"),
    ),
    "rotate": (
        Wrong("b * cos + a * sin", "b * cos - a * sin", "a rotation keeps lengths"),
        Wrong(
            "a * cos - b * sin, b * cos + a * sin",
            "a * cos + b * sin, b * cos - a * sin",
            "the angle turns the first half towards the second",
        ),
        Wrong(
            "a * cos - b * sin, b * cos + a * sin", "a * cos, b * sin", "a rotation mixes a and b"
        ),
        Wrong(
            "a, b = x.chunk(2, dim=-1)",
            "a, b = x[..., ::2], x[..., 1::2]",
            "pairs are (i, i + K/2), not neighbours",
        ),
    ),
    "Attention.project": (
        Wrong("B T (N K) -> B N T K", "B T (K N) -> B N T K", "a head is a run of channels"),
        Wrong("k = rotate(k, *angles)", "pass", "keys have positions too"),
        Wrong("q = self.q_norm(q)", "pass", "queries are normalised"),
        Wrong("k = self.k_norm(k)", "k = self.q_norm(k)", "keys have a norm with its own gains"),
        Wrong("self.v(x)", "self.k(x)", "values have their own layer"),
    ),
    "MLP.forward": (
        Wrong(
            "F.silu(self.gate(x)) * self.up(x)",
            "self.gate(x) * F.silu(self.up(x))",
            "SiLU acts on the gate",
        ),
        Wrong("F.silu(self.gate(x)) * ", "F.silu(self.gate(x)) + ", "a gate multiplies"),
        Wrong("F.silu(", "F.gelu(", "SwiGLU has the SiLU; GEGLU would have the GELU"),
        Wrong(', approximate="tanh"', "", "GPT-2 has the tanh formula of GELU"),
        Wrong("F.gelu(self.up(x)))", 'F.gelu(self.up(x), approximate="tanh"))', "exact is exact"),
        Wrong(".square()", "", "relu2 is the square"),
    ),
    "Block.after_attention": (
        Wrong('"B N T K -> B T (N K)"', '"B N T K -> B T (K N)"', "each head's channels together"),
        Wrong("x = x + self.update(self.attention.out(y))", "x = self.attention.out(y)", "add"),
        Wrong("return x + self.update", "return self.update", "the stream goes on unchanged"),
        Wrong("self.mlp(self.norm2(x))", "self.mlp(x)", "the MLP reads the normalised stream"),
        Wrong("self.mlp(self.norm2(x))", "self.norm2(self.mlp(x))", "the norm comes first"),
        Wrong("self.norm2(x)", "self.norm1(x)", "the second norm has its own gains"),
    ),
    "GPT.loss": (
        Wrong(
            "targets = tokens[:, 1:]", "targets = tokens[:, :-1]", "the target is the next token"
        ),
        Wrong('reduction="sum"', 'reduction="mean"', "the mean is taken once, over what counts"),
        Wrong("~batch", "batch", "False means: does not count"),
        Wrong("weight.clamp(min=1)", "weight", "nothing to predict costs 0, not nan"),
        Wrong("weight.clamp(min=1)", "targets.numel()", "masked targets are not in the mean"),
        Wrong("logits.float()", "logits", "the loss is float32"),
    ),
}

FAULTS = (
    Fault(
        GPT,
        "Attention.attend",
        "mask is None and q.size(2) > 1",
        "False",
        "On any text the training loss and the validation loss fall towards 0, far below what a "
        "model of English can reach. Yet the samples are noise.",
        "Without is_causal each position attends to the tokens behind it, and the next token is "
        "one of them: the model copies its target. When it generates, there is nothing to copy. "
        "Found by changing the last token of a row: logits before it must not change.",
    ),
    Fault(
        GPT,
        "rotate",
        "b * cos + a * sin",
        "b * cos - a * sin",
        "A model trains, a little worse than it should. Put the same eight tokens at the "
        "positions 0 to 7 and, behind others that a window hides, at 20 to 27: the scores q . k "
        "between two of them differ.",
        "With the wrong sign the pair is not rotated but mapped by a matrix that is no rotation: "
        "lengths change with the position, so scores depend on the position and not only on the "
        "distance. Found by comparing the length of a vector before and after.",
    ),
    Fault(
        GPT,
        "Attention.attend",
        "self.dropout if self.training else 0.0",
        "self.dropout",
        "With --model.dropout 0.1 two evaluations of one checkpoint on the same text give two "
        "losses, although model.eval() was called.",
        "Functional dropout does not know of model.eval(): it must be told. nn.Dropout knows by "
        "itself, which is why the two other dropouts of the model are right. Found by calling the "
        "layers one by one, twice each, in evaluation mode.",
    ),
    Fault(
        GPT,
        "GPT.loss",
        "weight.clamp(min=1)",
        "targets.numel()",
        "The same rows cost 2.1 nats per token without a mask, and about half of that when half of "
        "the targets, chosen by chance, are masked.",
        "The sum over the targets that count is divided by the number of all targets. A mask then "
        "makes every model look better. Found by masking all targets but one: the loss must be "
        "-ln p of that one.",
    ),
)

QUESTIONS = [
    (
        "A head has q = (2, 0), keys (ln 3, 0) and (0, 5), values 4 and 8, and K = 2. The scale is "
        "left out for simplicity. What does attention give, with and without the causal mask, if "
        "the query stands at position 0?",
        "Scores 2 ln 3 and 0, so weights 9/10 and 1/10: 4.4. With the mask only position 0 counts: "
        "4.",
    ),
    (
        "Why are the scores divided by sqrt(K)? Assume components of q and k that are independent, "
        "with mean 0 and variance 1.",
        "q . k is a sum of K products of mean 0 and variance 1, so its standard deviation is "
        "sqrt(K). Without the scale a wide head starts with a softmax that is nearly 0 or 1, and "
        "its gradient is nearly 0.",
    ),
    (
        "Show that the score of a query at position m and a key at position n depends on m - n "
        "only, for one rotated pair.",
        "Let R(a) be the rotation by the angle a. (R(mw) q)' (R(nw) k) = q' R(mw)' R(nw) k = "
        "q' R((n - m) w) k, since R(a)' = R(-a) and angles of rotations add up.",
    ),
    (
        "One pass over a row of T + 1 tokens trains T predictions. What would be wrong if one "
        "position could see the next token? What of the training loss and the samples?",
        "The target would be among the inputs. The loss would go towards 0 by copying, on "
        "validation text too; in generation there is no next token to copy, so samples are noise.",
    ),
    (
        "Why does a model of one layer not learn to continue a repeated random passage, while one "
        "of two layers does?",
        "To continue, the head must find the place behind the earlier occurrence of the present "
        "token. In layer 1 a key knows its own token only, not its predecessor. In layer 2 it "
        "does, if a head of layer 1 has copied the previous token into each position; a query can "
        "then look for 'the place whose previous token is mine' (an induction head).",
    ),
    (
        "A model has N = 32 query heads and G = 8 key/value heads of K = 128. By how much is its "
        "cache of keys and values smaller than with G = N? Which query heads read key/value head "
        "2?",
        "By the factor 32 / 8 = 4. Query heads 8 to 11, as head n reads n // 4.",
    ),
    (
        "Two batches have mean losses 2.0 (10 targets) and 3.0 (30 targets). What is the loss of "
        "both together, and why does loss() return its weight?",
        "(2 * 10 + 3 * 30) / 40 = 2.75. The mean of the two means, 2.5, is another number: to "
        "put batches together one needs the number of targets of each.",
    ),
]
