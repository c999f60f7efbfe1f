"""For teachers: wrong answers that the checks of lesson 10 must find, bugs to plant, questions."""

from course.lessons import Fault, Wrong

WRONG = {
    "Classifier.loss": (
        Wrong("losses).mean()", "losses).sum()", "the loss is a mean over the questions"),
        Wrong("if self.training else 0.0", "", "evaluation must not smooth the labels"),
        Wrong(", label_smoothing=smoothing", "", "training smooths the labels"),
        Wrong("argmax(1)", "argmin(1)", "the prediction is the most likely class"),
    ),
    "LoRA.forward": (
        Wrong("self.scale * ", "", "the product is scaled by alpha / rank"),
        Wrong(
            "self.B(self.A(self.dropout(x)))",
            "self.B(self.dropout(self.A(x)))",
            "dropout acts on the input, not between A and B",
        ),
        Wrong("self.A(self.dropout(x))", "self.A(x)", "dropout is left out"),
        Wrong("return self.scale", "return x + self.scale", "the layer's own output is not x"),
    ),
    "LoRA.product": (
        Wrong("self.scale * (B.flatten(1)", "(B.flatten(1)", "the product is scaled"),
        Wrong("self.scale * A @ B.T", "A @ B.T", "the product of a table is scaled too"),
        Wrong(
            "B.flatten(1) @ A.flatten(1)",
            "(A.flatten(1).T @ B.flatten(1).T)",
            "B A is (out, in), not (in, out)",
        ),
        Wrong("A = self.A.weight.float()", "A = self.A.weight", "the product is float32"),
    ),
    "PromptedEmbedding.forward": (
        Wrong("(ids >= V)", "(ids > V)", "id V is the first row of the prompt"),
        Wrong("(ids - V)", "(ids - V + 1)", "id V + i is row i of the prompt, not row i + 1"),
        Wrong("prompt, tokens)", "tokens, prompt)", "new ids read the prompt, old ids the table"),
        Wrong("self.prompt[", "self.prompt.detach()[", "the prompt needs its gradient"),
    ),
    "divergence": (
        Wrong("temperature**2 * ", "", "the square of the temperature is missing"),
        Wrong(
            "log_p.exp() * (log_p - log_q)",
            "log_q.exp() * (log_q - log_p)",
            "the divergence is KL(teacher || student), not the other way round",
        ),
        Wrong(".sum(-1)", ".mean(-1)", "an expectation is a sum over the vocabulary"),
        Wrong(
            "student.float() / temperature",
            "student.float()",
            "both distributions are softened",
        ),
    ),
    "encode_message": (
        Wrong("[False] * len(role)", "[trained] * len(role)", "the role is given, not learnt"),
        Wrong(", tokenizer.eot]", "]", "an answer ends with the end of text, which is learnt"),
        Wrong('f" {message', 'f"{message', "a space stands before the content"),
        Wrong('message["role"] == "assistant" and ', "", "only the assistant's words are learnt"),
        Wrong('message.get("weight", 1)', 'message.get("weight", 0)', "the weight is 1 by default"),
    ),
    "trim_history": (
        Wrong("system + recent", "recent", "the system messages stay"),
        Wrong("exchanges[first:]", "exchanges[: len(exchanges) - first]", "the oldest go first"),
        Wrong("<= room", "< room", "a conversation of exactly this length fits"),
        Wrong("max(1, len(exchanges))", "len(exchanges)", "there may be no exchange at all"),
        Wrong("max(1, len(exchanges))", "len(exchanges) + 1", "the last exchange must stay"),
    ),
}

FAULTS = (
    Fault(
        "tinyfm/adapt/lora.py",
        "LoRA.__init__",
        "nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))",
        "nn.init.zeros_(self.A.weight)",
        "A model is adapted with LoRA and trained for 100 steps. There is no error, but the loss "
        "is the same in the last step as in the first, to the last digit.",
        "A starts at 0 like B. The gradient of B is a multiple of A x, that of A a multiple of B: "
        "both are 0 for ever.",
    ),
    Fault(
        "tinyfm/adapt/soft_prompt.py",
        "prepend",
        "F.pad(mask, (n, 0))",
        "F.pad(mask, (n, 0), value=True)",
        "With a soft prompt of 8 rows, and before any training, the loss of a small GPT is "
        "infinite.",
        "The ids of the prompt count as targets. The head gives them the lowest logit that there "
        "is, so -ln p is enormous.",
    ),
    Fault(
        "tinyfm/adapt/lora.py",
        "set_weights",
        "lora.config.alpha / lora.config.rank",
        "lora.config.alpha",
        'After training a LoRA of rank 4, set_weights(model, {"default": 1.0}) should change '
        "nothing. The loss gets far worse.",
        "The product is scaled by alpha / rank; here it is scaled by alpha alone.",
    ),
    Fault(
        "tinyfm/adapt/distill.py",
        "distil",
        "teacher.requires_grad_(False).eval()",
        "teacher.requires_grad_(False).train()",
        "The student has no dropout, its teacher has. Two calls of student.loss on the same batch "
        "give two numbers.",
        "The teacher judges in training mode, so its dropout is on: the student learns its noise.",
    ),
    Fault(
        "tinyfm/adapt/distill.py",
        "distillation_loss",
        ".masked_fill(~counts, 0)",
        "",
        "In a chat only the assistant's tokens count. Changing what the teacher predicts in the "
        "user's words changes the loss of the student all the same.",
        "The divergence is summed over all positions, also those whose target is -100.",
    ),
)

QUESTIONS = [
    (
        "A matrix has 4,096 x 4,096 numbers. How many does a LoRA of rank 8 train, and which "
        "share is that?",
        "8 (4,096 + 4,096) = 65,536, which is 65,536 / 16,777,216 = 0.39%.",
    ),
    (
        "Why does B start at 0 but A does not? What happens if both start at 0, or neither?",
        "With B = 0 the adapted model is the base, so training starts from what it knows. The "
        "gradient of B is scale g (A x)', so A must not be 0, or nothing ever moves. If neither is "
        "0, the model is disturbed at random before the first step.",
    ),
    (
        "An adapter is merged into its base. What is gained, and what is lost?",
        "The model is as fast as the base and can be exported as a plain one. The adapter can no "
        "longer be weighted, exchanged or taken off, unless the base's weights are kept.",
    ),
    (
        "Your LoRA adds half of what it learnt (weight 0.5). Is the result half as far from the "
        "base in its weights? And in its loss?",
        "In its weights yes, as W + 0.5 scale B A. Not in its loss. Near a minimum the loss is a "
        "parabola: half the weight keeps about three quarters of the gain on the new texts, and "
        "costs about a quarter of the damage on the old ones.",
    ),
    (
        "Derive the gradient of tau^2 KL(p || q) for a student's logit. Why the square?",
        "KL has the gradient (q - p) / tau, and for a large tau q - p is about (z_s - z_t) / "
        "(V tau). So the gradient shrinks as 1 / tau^2, and the factor keeps the share of the two "
        "losses.",
    ),
    (
        "A student trains a chat model on all tokens, also the user's. What will he observe?",
        "The loss also rewards guessing the user's questions. Part of the capacity goes there, the "
        "loss cannot be compared with one over answers, and the model may write the user's next "
        "question after its own answer.",
    ),
    (
        "Why are role and content encoded separately?",
        "A tokenizer may join the last letters of one with the first of the other. Sampling begins "
        "after the tokens of 'assistant:' alone, so training must see the same tokens there.",
    ),
]
