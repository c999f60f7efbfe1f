"""For teachers: wrong answers that the checks of lesson 13 must find, bugs to plant, questions."""

from course.lessons import Fault, Wrong

WRONG = {
    "query_mask": (
        Wrong(" < ", " <= ", "a query must not see its own token"),
        Wrong(" < ", " > ", "a query sees what comes before it in the order, not after it"),
        Wrong("order.gather(1, places)", "places", "the order decides, not the place in the text"),
    ),
    "hide": (
        Wrong("ids.copy()", "ids", "the ids that were given must not change"),
        Wrong("allowed & ", "", "only the allowed places may be hidden"),
        Wrong("MASKED + RANDOM", "RANDOM", "a tenth of the hidden tokens reads another token"),
        Wrong("targets[chosen] = ids[chosen]", "targets[chosen] = inputs[chosen] + 1", "targets"),
        Wrong("max(1, round", "(round", "at least one token is hidden"),
        Wrong("drawn[replaced]", "drawn[0]", "each other token is drawn for itself"),
    ),
    "hide_spans": (
        Wrong("stop - size - kept[number]", "stop - size", "what is kept stands in the source"),
        Wrong(
            "sentinels[shape.spans : shape.spans + 1]",
            "sentinels[:0]",
            "a last sentinel closes the target",
        ),
        Wrong("[*target, [end]]", "target", "the target ends with END"),
        Wrong("ids[stop - size : stop]", "ids[start:stop]", "the target has what is hidden alone"),
    ),
    "Block.forward": (
        Wrong("self.norm1, attend", "self.norm2, attend", "each update has its own norm"),
        Wrong(
            "x = self.update(x, self.cross_norm, look_up)",
            "pass",
            "a decoder looks up the source",
        ),
        Wrong(
            "k, v = memory.extend(layer, k, v)",
            "pass",
            "keys and values of the target so far are kept",
        ),
        Wrong(", memory.mask)", ", None)", "padding of the source is not looked up"),
    ),
    "Encoder.electra_loss": (
        Wrong(
            "replaced = drawn != original.view(B, T)",
            "replaced = targets != -100",
            "a draw that hits the right token has replaced nothing",
        ),
        Wrong("(bce * real)", "bce", "padding does not count"),
        Wrong("self.detect(drawn,", "self.detect(tokens,", "the discriminator reads the draws"),
        Wrong("self.config.detection_weight * ", "", "the discriminator's part has a weight"),
        Wrong(" * (length / count)[places // T]", "", "both parts are means over a row"),
    ),
    "shift": (
        Wrong("[..., T:]", "[..., T - 1 :]", "T numbers are skipped"),
        Wrong("R - 1)", "R)", "rows of R - 1 numbers make each row start one earlier"),
        Wrong(": R - T]", ": T]", "there are R - T keys, those of the memory too"),
    ),
}

FAULTS = (
    Fault(
        "tinyfm/xlnet.py",
        "content_mask",
        "<=",
        "<",
        "An XLNet is trained on text. Its loss falls, but a word costs as many bits with all the "
        "other words given as with none.",
        "With < instead of <=, given tokens, which all have the order 0, see nothing, not even "
        "themselves. So their states say nothing about the text around them.",
    ),
    Fault(
        "tinyfm/seq2seq.py",
        "Seq2Seq.decode",
        "keys <= queries[:, None]",
        "keys <= queries[:, None] + 1",
        "A model that translates reaches a loss near 0 within minutes, on held-out pairs too. "
        "What it writes is nonsense.",
        "In training the decoder sees the next token, and copies it. When it writes, there is "
        "none to copy.",
    ),
    Fault(
        "tinyfm/seq2seq.py",
        "Seq2Seq.loss",
        "if self.training and self.config.label_smoothing",
        "if self.config.label_smoothing",
        "With more label smoothing the validation loss gets worse, although the texts get better. "
        "Even a model that is always right would not reach 0.",
        "The loss is smoothed in evaluation too, so it is no longer the nats per token.",
    ),
)

QUESTIONS = [
    (
        "Why can the loss of a BERT not be compared with that of a GPT on the same text?",
        "A BERT predicts a share of the tokens from all the others, on both sides, and each one as "
        "if the other hidden ones stayed hidden. The product of these probabilities is not the "
        "probability of the text.",
    ),
    (
        "Why do 10% of the hidden tokens stay as they are?",
        "Users' texts have no masks. If only masks were predicted, the state of a token that can "
        "be read would not have to say anything. So any token may have to be predicted.",
    ),
    (
        "ELECTRA's generator gets better and better. What happens to the discriminator's task?",
        "Its draws are right more often, and wrong ones more plausible. There are fewer replaced "
        "tokens, and they are harder to find. That is why the generator is kept small.",
    ),
    (
        "Why is ELECTRA no GAN?",
        "The generator is trained to predict the hidden tokens, not to deceive: no gradient goes "
        "through the draw.",
    ),
    (
        "A token of XLNet's text has two states. Why does one not do?",
        "The state that predicts the token must not know it; the state that others read must. In "
        "one state, it would be given away in the second layer, or be unknown to all others.",
    ),
    (
        "A source of 100 tokens is translated into 120. How many pairs of a query and a key do the "
        "three kinds of attention have in a layer, and which of them does a GPT not have, if it "
        "reads the source and then writes?",
        "100 x 100 in the encoder, 120 x 121 / 2 in the decoder, and 120 x 100 across. A GPT has "
        "220 x 221 / 2 in all: it has the last two as well, but the source's tokens see only those "
        "before them.",
    ),
    (
        "T5 hides 15% of 512 tokens in spans of 3. How long are source and target?",
        "77 tokens are hidden, in 26 spans. Source: 435 + 26 + END = 462; target: 77 + 27 + END = "
        "105. So the decoder writes a fifth of the text.",
    ),
]
