"""The exercises of lesson 10: a head, LoRA, a soft prompt, distillation, and a chat."""

from course.lessons import Exercise

TITLE = "Adaptation: heads, LoRA, soft prompts, distillation, chat"
NEEDS = (2,)

EXERCISES = (
    Exercise(
        "Classifier.loss",
        "tinyfm/adapt/heads.py",
        1,
        "self(batch) gives the logits of each head, self.classes the names of the questions; "
        "F.cross_entropy has an argument for label smoothing.",
    ),
    Exercise(
        "LoRA.forward",
        "tinyfm/adapt/lora.py",
        1,
        "self.A and self.B are layers, so calling them multiplies by their matrices.",
    ),
    Exercise(
        "LoRA.product",
        "tinyfm/adapt/lora.py",
        2,
        "Begin with matrices, B @ A. flatten(1) makes a matrix of a kernel, and view takes that "
        "back. isinstance(self.A, nn.Embedding) tells you that the layer is a table.",
    ),
    Exercise(
        "PromptedEmbedding.forward",
        "tinyfm/adapt/soft_prompt.py",
        2,
        "Look up every id in both tables and choose with torch.where. Clamp the ids first: neither "
        "table may be asked for a row that it does not have.",
    ),
    Exercise(
        "divergence",
        "tinyfm/adapt/distill.py",
        2,
        "Work with log_softmax in float32. p is the teacher's distribution, q the student's.",
    ),
    Exercise(
        "encode_message",
        "tinyfm/adapt/chat.py",
        2,
        "Two calls of tokenizer.encode, and two lists of equal length. tokenizer.eot is an id, not "
        "a text.",
    ),
    Exercise(
        "trim_history",
        "tinyfm/adapt/chat.py",
        3,
        "split_exchanges gives the system messages and the exchanges. Drop none, then one, then "
        "two of the oldest, until `render` of the rest fits. There may be no exchange at all.",
    ),
)
