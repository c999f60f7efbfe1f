"""For teachers: typical wrong answers, bugs to plant, and questions of lesson 5."""

from course.lessons import Fault, Wrong

WRONG = {
    "Layer.macs": (
        Wrong("self.weights *", "self.parameters *", "biases and tables multiply nothing"),
        Wrong(" + self.products", "", "the scores and sums of attention are work, too"),
        Wrong("self.weights *", "2 * self.weights *", "the count is of multiply-adds"),
        Wrong("self.weights * self.positions", "self.weights", "a weight is used at each position"),
    ),
    "busy_hours": (
        Wrong("* mfu)", "/ mfu)", "a lower utilisation takes longer"),
        Wrong(" / 3600", "", "these are seconds"),
        Wrong("gpu.peak(dtype)", "gpu.peaks[dtype]", "the table has TFLOP/s"),
        Wrong("check_shares(mfu=mfu)", "pass", "an MFU of 0 or 1.5 is a mistake of the caller"),
    ),
    "mlp": (
        Wrong("weights = 3 * D * F", "weights = 2 * D * F", "SwiGLU has a third matrix, the gate"),
        Wrong("weights=c.active * weights", "weights=weights", "a token passes `active` experts"),
        Wrong("(c.experts - c.active)", "c.experts", "active experts count twice"),
        Wrong("c.mlp_bias * (F + D)", "c.mlp_bias * F", "the second matrix has a bias, too"),
        Wrong("split=c.active * inside * T", "split=inside * T", "each active expert keeps some"),
    ),
    "cache_bytes": (
        Wrong("min(tokens, window)", "tokens", "a window forgets what lies before it"),
        Wrong("stack.n * (", "(", "every block keeps its own keys and values"),
        Wrong("+ stack.cross_cache", "+ tokens * stack.cross_cache", "it is for a row"),
        Wrong(" * rows * ", " * ", "every text of a batch has its own cache"),
    ),
    "state_memory": (
        Wrong("layout.zero >= stage", "layout.zero > stage", "stage 1 divides the optimizer"),
        Wrong("size * learnt, 2", "size * parameters, 2", "a frozen parameter has no gradient"),
        Wrong("averages -= 4", "averages -= 8", "Muon still keeps one average"),
        Wrong("4 * learnt if size < 4 else 0", "4 * learnt", "fp32 weights are their own master"),
        Wrong(" / (layout.tensor * layout.pipeline)", "", "tensor parallelism divides it, too"),
    ),
    "Parametric.optimum": (
        Wrong(
            "self.beta / total", "self.alpha / total", "the exponent of the data sizes the model"
        ),
        Wrong("(flops / 6) **", "flops **", "C is 6 N D"),
        Wrong("** (1 / total)", "** total", "G has the exponent 1 / (alpha + beta)"),
        Wrong("flops / 6 / N", "flops / N", "6 N D would be six times the budget"),
    ),
    "regress": (
        Wrong("np.exp(-alphas", "np.exp(alphas", "the loss falls with compute"),
        Wrong("((u - mean) ** 2)", "(u**2)", "this is a line through the origin"),
        Wrong("A * mean[:, 0]", "A", "the line passes through the mean of the points"),
        Wrong("* u) ** 2).sum(1)", "* u) ** 2).mean(1)", "the F test needs a sum"),
    ),
}

FAULTS = (
    Fault(
        "tinyfm/calc/systems.py",
        "System.flops_per_row",
        "(6 if backward else 2)",
        "(4 if backward else 2)",
        "python -m tinyfm.calc gpt3-175b --gpu v100 --gpus 1024 --tokens 300e9 counts fewer FLOPs "
        "than the rule 6 N D gives for 175e9 parameters, though it also counts attention.",
        "The backward pass multiplies each matrix twice, by the gradient for the input and by the "
        "input for the gradient: 2 forward and 4 backward, 6 in all.",
    ),
    Fault(
        "tinyfm/calc/ledgers.py",
        "attention",
        "weights=2 * D * GK",
        "weights=2 * D * NK",
        "python -m tinyfm.calc llama-7b counts 6.74 billion parameters, as published. But "
        "llama3-8b has too many: 8.8 billion, where 8.03 were published.",
        "Keys and values have G heads, not N. For models with G = N, such as Llama 1, nothing "
        "changes; only a model with grouped queries shows it.",
    ),
    Fault(
        "tinyfm/calc/memory.py",
        "activation_bytes",
        "return training.rows * per_row",
        "return per_row",
        "python -m tinyfm.calc gpt2 --rows 1 and --rows 8 print the same bytes of activations. "
        "With --fit 24GiB the largest micro-batch comes out far too large.",
        "Each row of a micro-batch keeps its own activations.",
    ),
    Fault(
        "tinyfm/calc/scaling_laws.py",
        "PowerLaw.interval",
        "variance = 1 + np.einsum",
        "variance = np.einsum",
        "Simulate a law with noise, fit it with fit_power_law, and ask interval for the place of a "
        "new noisy loss inside the range of the points. The interval of 90% contains far fewer.",
        "A new measurement has its own noise beside the error of the law: the 1 in the variance.",
    ),
)

QUESTIONS = [
    (
        "A GPT has L = 24 blocks of width D = 1024 and a vocabulary of 50,000 with a tied head. "
        "Roughly how many parameters has it, and how many FLOPs does a token of training cost?",
        "12 L D^2 = 302e6 in the blocks, V D = 51e6 in the table: 353e6. The matrices cost 6 for "
        "each of the blocks' weights and of the head's: 6 x 353e6 = 2.1e9, and attention on top.",
    ),
    (
        "Why does AdamW in mixed precision take 16 bytes a parameter, and what does LoRA save?",
        "2 (weight) + 2 (gradient) + 4 (master) + 4 + 4 (averages). LoRA freezes the large "
        "matrices: they keep 2 bytes, and the other 14 are needed for the few trained ones only.",
    ),
    (
        "ZeRO stage 1 on 64 GPUs nearly quarters the memory of the states. Why does stage 2 not "
        "save as much again?",
        "The optimizer's 12 of 16 bytes are gone after stage 1. What is left is 2 + 2, of which "
        "stage 2 divides one half.",
    ),
    (
        "A model with N / G = 8 query heads for each key/value head is served instead of one with "
        "G = N. What changes in memory, and what hardly changes in FLOPs?",
        "The cache is 8 times smaller: 2 L G K numbers a token. The products of attention remain "
        "2 N K T S; only the matrices of keys and values shrink.",
    ),
    (
        "Derive how N grows with C when L = E + A / N^alpha + B / D^beta and C = 6 N D.",
        "Put D = C / (6 N), differentiate by N and set to 0: alpha A N^-alpha = beta B D^-beta. So "
        "N = G (C / 6)^(beta / (alpha + beta)).",
    ),
    (
        "A law is fitted to runs at 1e17 to 1e19 FLOPs. Why may it fail at 1e23, though all its "
        "points lie on it?",
        "The points leave the floor E and the exponent open together: a lower floor with a slower "
        "decline fits as well. Data may also run out, or learning rates no longer suit the size.",
    ),
]
