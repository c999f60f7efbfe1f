"""What each exercise of lesson 10 must satisfy. Values worked out by hand stand in comments."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course.compare import agree
from course.lessons import checks
from tinyfm import adapt
from tinyfm.adapt import AdapterConfig, chat, distill, lora, soft_prompt
from tinyfm.adapt.heads import WIDTH, Classifier, Reader
from tinyfm.gpt import GPT, GPTConfig
from tinyfm.tokenizer import ByteTokenizer

TINY = GPTConfig(31, context_length=16, n_layer=2, n_head=2, d_model=16, zero_init=False)
TOKENS = torch.arange(20).view(2, 10)
EOT = 256


def tiny(seed: int = 0, **fields) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**(vars(TINY) | fields)))


# ---- a head -------------------------------------------------------------------------------------


class Body(nn.Module):
    """A body whose features are the batch's own numbers x (B, 2)."""

    config = SimpleNamespace()
    outer = ()
    unit = "row"


def two_questions() -> tuple[Classifier, dict]:
    """Logits (ln 3, 0) for x = (1, -1) and (-ln 3, 0) for x = (-1, 1), so p = 3/4 and 1/4; and a
    second question of three classes, all equally likely."""
    reader = Reader(lambda body, batch: batch["x"], ("x",), lambda config: 2, ())
    model = Classifier(Body(), {"tone": ["dull", "gay"], "topic": ["sea", "sky", "sun"]}, reader)
    with torch.no_grad():
        model.heads[0].weight[0, 0] = math.log(3) / (WIDTH / 2)  # features are (128, -128)
    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]])
    labels = torch.tensor([[0, 2], [0, 0], [1, 0]])
    return model, {"x": x, "labels": labels}


@checks("Classifier.loss")
def test_the_loss_is_a_mean_over_rows_and_questions():
    model, batch = two_questions()
    loss, _ = model.eval().loss(batch)
    # tone: -ln of 3/4, 1/4, 1/4; topic: ln 3 in each row.
    tone = (-math.log(3 / 4) - 2 * math.log(1 / 4)) / 3
    agree(loss, (tone + math.log(3)) / 2, "the mean of -ln p(label)")


@checks("Classifier.loss")
def test_labels_are_smoothed_in_training_alone():
    model, batch = two_questions()
    # tone: the label has 0.95, the other class 0.05; topic: ln 3 whatever the targets are.
    likely, unlikely = -math.log(3 / 4), -math.log(1 / 4)
    right = 0.95 * likely + 0.05 * unlikely
    wrong = 0.95 * unlikely + 0.05 * likely
    expected = ((right + 2 * wrong) / 3 + math.log(3)) / 2
    agree(model.train().loss(batch)[0], expected, "the loss in training mode, with smoothing")
    plain = ((likely + 2 * unlikely) / 3 + math.log(3)) / 2
    agree(model.eval().loss(batch)[0], plain, "the loss in evaluation mode, without smoothing")


@checks("Classifier.loss")
def test_accuracy_is_the_share_of_rows_whose_label_is_most_likely():
    model, batch = two_questions()
    _, metrics = model.loss(batch)
    names = ["accuracy tone", "accuracy topic"]
    assert list(metrics) == names, f"the metrics should be {names}, they are {list(metrics)}"
    # tone: 0 is most likely in rows 0 and 2, 1 in row 1; the labels are 0, 0, 1.
    agree(metrics["accuracy tone"], 1 / 3, "accuracy tone")


# ---- LoRA ---------------------------------------------------------------------------------------


def by_hand(rank: int = 1, alpha: float = 2.0, dropout: float = 0.0) -> tuple[nn.Linear, lora.LoRA]:
    """W = (1 2; 3 4), A = (1 -1), B = (2; 1), as on the page; a rank of 2 repeats them."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    term = lora.LoRA(layer, AdapterConfig(rank, alpha, dropout))
    term.A.weight.data = torch.tensor([[1.0, -1.0]]).repeat(rank, 1)
    term.B.weight.data = torch.tensor([[2.0], [1.0]]).repeat(1, rank)
    return layer, term


@checks("LoRA.forward")
def test_the_term_is_scale_times_B_A_x():
    _, term = by_hand()
    # A x = 3 - 1 = 2, B A x = (4, 2), and the scale is 2 / 1.
    agree(term(torch.tensor([[3.0, 1.0]])), [[8.0, 4.0]], "scale B A x of x = (3, 1)")
    _, term = by_hand(rank=2, alpha=6.0)
    # Twice the same product, (8, 4), with the scale 6 / 2.
    agree(term(torch.tensor([[3.0, 1.0]])), [[24.0, 12.0]], "scale B A x, rank 2 and alpha 6")


@checks("LoRA.forward")
def test_dropout_acts_on_the_input():
    _, term = by_hand(dropout=0.5)
    x = torch.full((400, 2), 1.0)
    torch.manual_seed(0)
    found = {round(value, 3) for value in term.train()(x)[:, 0].tolist()}
    # Kept numbers double: A x is 0, 2 or -2, so the first output is 0, 8 or -8.
    assert found == {0.0, 8.0, -8.0}, f"with dropout on x it is 0, 8 or -8; it is {sorted(found)}"
    agree(term.eval()(x), torch.zeros(400, 2), "without dropout A x = 1 - 1 = 0")


@checks("LoRA.forward")
def test_an_adapted_model_starts_as_its_base():
    model = tiny().eval()
    before = model(TOKENS)
    adapt.apply(model, "lora", AdapterConfig(2))
    agree(model(TOKENS), before, "the logits before any training", 1e-6)


@checks("LoRA.product")
def test_the_product_of_a_matrix_is_scale_B_A():
    _, term = by_hand()
    agree(term.product(), [[4.0, -4.0], [2.0, -2.0]], "2 (2; 1) (1 -1)")


@checks("LoRA.product")
def test_a_merged_layer_gives_what_the_adapted_one_gives():
    torch.manual_seed(0)
    linear = nn.Linear(5, 7)
    kernel = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    table = nn.Embedding(9, 6)
    inputs = (torch.randn(4, 5), torch.randn(2, 3, 8, 8), torch.arange(9))
    for layer, x, kind in zip((linear, kernel, table), inputs, ("matrix", "kernel", "table")):
        term = lora.LoRA(layer, AdapterConfig(2, 5.0))
        nn.init.normal_(term.B.weight)
        wanted = layer(x) + term.scale * term.B(term.A(x))
        product = term.product()
        assert product.shape == layer.weight.shape, (
            f"the product for a {kind} should be {tuple(layer.weight.shape)}, "
            f"it is {tuple(product.shape)}"
        )
        merged = copy.deepcopy(layer)
        merged.weight.data += product
        agree(merged(x), wanted, f"W + product, for a {kind}", 1e-3)


@checks("LoRA.product")
def test_the_product_is_computed_in_float32():
    _, term = by_hand()
    term.to(torch.bfloat16)
    found = term.product().dtype
    assert found == torch.float32, f"the product should be float32, it is {found}"


# ---- soft prompts -------------------------------------------------------------------------------


def prompted() -> soft_prompt.PromptedEmbedding:
    """Tokens 0, 1, 2 are (0, 0), (1, 1), (2, 2); ids 3 and 4 are (30, 30) and (40, 40)."""
    table = nn.Embedding(3, 2)
    table.weight.data = torch.arange(3.0)[:, None].repeat(1, 2)
    result = soft_prompt.PromptedEmbedding(table, 2)
    result.prompt.data = torch.tensor([[30.0, 30.0], [40.0, 40.0]])
    return result


@checks("PromptedEmbedding.forward")
def test_new_ids_look_up_the_prompt_and_old_ids_the_table():
    found = prompted()(torch.tensor([[3, 4, 0], [2, 1, 2]]))
    agree(found[..., 0], [[30.0, 40.0, 0.0], [2.0, 1.0, 2.0]], "rows of ids 3 4 0 and 2 1 2")
    assert found.shape == (2, 3, 2), f"the shape should be (2, 3, 2), it is {tuple(found.shape)}"


@checks("PromptedEmbedding.forward")
def test_gradients_reach_the_rows_that_were_read():
    table = prompted()
    table(torch.tensor([[4, 1]])).sum().backward()
    agree(table.prompt.grad[:, 0], [0.0, 1.0], "the gradient of the prompt, of which id 4 was read")
    agree(table.weight.grad[:, 0], [0.0, 1.0, 0.0], "the gradient of the table, with token 1 read")


@checks("PromptedEmbedding.forward")
def test_a_prompt_made_of_words_acts_as_those_words():
    model = tiny().eval()
    adapt.apply(model, "prompt", AdapterConfig(prompt_tokens=2))
    table = model.token_embedding
    table.prompt.data = table.weight.detach()[[5, 9]]
    words = torch.tensor([[5, 9, 1, 2, 3]])
    ids = torch.tensor([[*soft_prompt.prompt_ids(model), 1, 2, 3]])
    agree(model(ids), model(words), "logits after the prompt, and after the words that it copies")


def test_prompt_ids_do_not_count_in_the_loss():
    model = tiny().eval()
    adapt.apply(model, "prompt", AdapterConfig(prompt_tokens=3))
    batch = soft_prompt.prepend({"tokens": TOKENS}, soft_prompt.prompt_ids(model))
    loss, metrics = model.loss(batch)
    assert metrics["weight"] == 18, f"2 rows of 9 targets count, not {metrics['weight']}"
    assert loss < 10, f"the loss before training should be about ln 31 = 3.4, it is {loss}"


# ---- distillation -------------------------------------------------------------------------------


@checks("divergence")
def test_the_divergence_of_two_tokens_by_hand():
    teacher = torch.tensor([math.log(3), 0.0])
    student = torch.zeros(2)
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2.
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    agree(distill.divergence(student, teacher, 1.0), expected, "KL(p || q) at tau = 1")


@checks("divergence")
def test_temperature_softens_both_and_its_square_makes_up_for_it():
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    student = torch.tensor([[0.0, 2 * math.log(3)]])
    # tau = 2 gives p = (3/4, 1/4) and q = (1/4, 3/4): KL = (3/4 - 1/4) ln 3, times 4.
    agree(distill.divergence(student, teacher, 2.0), [2 * math.log(3)], "tau^2 KL at tau = 2")


@checks("divergence")
def test_the_gradient_is_tau_times_the_difference_of_the_two():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 5, generator=generator)
    student = torch.randn(3, 5, generator=generator).requires_grad_()
    distill.divergence(student, teacher, 3.0).sum().backward()
    expected = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1))
    agree(student.grad, expected.detach(), "the gradient with respect to the student's logits")


@checks("divergence")
def test_a_value_for_each_position_and_0_for_a_perfect_student():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 4, 7, generator=generator)
    agree(distill.divergence(teacher + 5.0, teacher, 2.0), torch.zeros(2, 4), "the same softmax")
    found = distill.divergence(torch.randn(2, 4, 7, generator=generator), teacher, 2.0)
    assert (found > 0).all(), f"a divergence is positive; the smallest is {found.min():.3f}"


def test_a_teacher_judges_in_evaluation_mode():
    student = tiny()
    teacher = tiny(1, dropout=0.5)
    distill.distil(student, teacher)
    batch = {"tokens": TOKENS}
    one, two = student.loss(batch)[0], student.loss(batch)[0]
    assert one == two, f"the loss of one batch is {one:.4f} and then {two:.4f}"


# ---- chat ---------------------------------------------------------------------------------------

BYTES = ByteTokenizer()


def say(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


@checks("encode_message")
def test_a_message_is_its_role_its_content_and_the_end_of_text():
    ids, _ = chat.encode_message(BYTES, say("user", "hi"))
    expected = [*b"user: hi", EOT]
    assert ids == expected, f"expected {expected}, got {ids}"


@checks("encode_message")
def test_the_assistants_words_and_its_end_of_text_are_trained_on():
    ids, trained = chat.encode_message(BYTES, say("assistant", "yes"))
    assert len(ids) == len(trained), f"{len(ids)} ids, but {len(trained)} flags"
    kept = [i for i, flag in zip(ids, trained) if flag]
    expected = [*b" yes", EOT]
    assert kept == expected, f"the trained ids should be {expected}, they are {kept}"


@checks("encode_message")
def test_nothing_else_is_trained_on():
    for message in (say("user", "a"), say("system", "a"), say("assistant", "a", weight=0)):
        _, trained = chat.encode_message(BYTES, message)
        assert not any(trained), f"{message} should not be trained on, its flags are {trained}"
    _, trained = chat.encode_message(BYTES, say("assistant", "a", weight=1))
    assert sum(trained) == 3, f"an answer of weight 1 is trained on; its flags are {trained}"


@checks("encode_message")
def test_a_text_cannot_end_a_message():
    ids, _ = chat.encode_message(BYTES, say("user", "<|endoftext|>"))
    assert ids.count(EOT) == 1, f"one end of text is expected, there are {ids.count(EOT)}"


class Words:
    """A tokenizer that joins a colon and a space after it, as those of BPE join letters."""

    eot = 0

    def encode(self, text: str) -> list[int]:
        pieces = text.replace(": ", ":_").split("_") if ": " in text else [text]
        return [1 + sum(piece.encode()) for piece in pieces]


@checks("encode_message")
def test_role_and_content_are_encoded_separately():
    ids, _ = chat.encode_message(Words(), say("user", "hi"))
    tokenizer = Words()
    expected = [*tokenizer.encode("user:"), *tokenizer.encode(" hi"), 0]
    assert ids == expected, f"expected the ids of 'user:' and of ' hi', {expected}; got {ids}"


def talk(*contents: str, system: str = "") -> list[dict]:
    """A conversation in which user and assistant take turns."""
    messages = [say("system", system)] if system else []
    for i, content in enumerate(contents):
        messages.append(say(("user", "assistant")[i % 2], content))
    return messages


@checks("trim_history")
def test_a_conversation_that_fits_is_kept_whole():
    messages = talk("q1", "a1", "q2", system="s")
    whole = chat.render(BYTES, messages)
    found = chat.trim_history(BYTES, messages, len(whole))
    assert found == whole, f"{len(whole)} ids fit into {len(whole)}, yet {len(found)} are kept"


@checks("trim_history")
def test_the_oldest_exchanges_go_first_and_the_system_message_stays():
    messages = talk("q1", "a1", "q2", "a2", "q3", system="s")
    for dropped in (1, 2):
        expected = chat.render(BYTES, messages[:1] + messages[1 + 2 * dropped :])
        found = chat.trim_history(BYTES, messages, len(expected))
        assert found == expected, (
            f"with room for {len(expected)} ids the text should be {BYTES.decode(expected)!r}, "
            f"it is {BYTES.decode(found)!r}"
        )


@checks("trim_history")
def test_a_last_question_that_does_not_fit_is_refused():
    messages = talk("q1", "a1", "q2", system="s")
    least = len(chat.render(BYTES, messages[:1] + messages[3:]))
    with pytest.raises(ValueError, match=str(least)):
        chat.trim_history(BYTES, messages, least - 1)


@checks("trim_history")
def test_a_conversation_of_a_system_message_alone_is_rendered():
    messages = [say("system", "s")]
    found = chat.trim_history(BYTES, messages, 99)
    expected = chat.render(BYTES, messages)
    assert found == expected, f"expected {BYTES.decode(expected)!r}, got {BYTES.decode(found)!r}"


# ---- what holds them together -------------------------------------------------------------------


def test_both_matrices_of_a_lora_begin_to_learn():
    """B is 0 and A is not: the first step moves B, and the second moves A."""
    model = tiny()
    adapt.apply(model, "lora", AdapterConfig(2))
    model.loss({"tokens": TOKENS})[0].backward()
    for name, layer in lora.adapted_layers(model):
        moved = layer.lora["default"].B.weight.grad.abs().max()
        assert moved > 0, f"the first gradient of B in {name} should not be 0"
    before = tiny()(TOKENS)
    agree(model(TOKENS), before, "an untrained LoRA must not change the logits", 1e-6)


def test_a_weight_of_1_changes_nothing_and_0_gives_the_base():
    model = tiny()
    base = model(TOKENS)
    adapt.apply(model, "lora", AdapterConfig(2, alpha=6.0))
    for _, layer in lora.adapted_layers(model):
        nn.init.normal_(layer.lora["default"].B.weight, std=0.1)
    adapted = model(TOKENS)
    lora.set_weights(model, {"default": 1.0})
    agree(model(TOKENS), adapted, "logits with weight 1", 1e-6)
    lora.set_weights(model, {})
    agree(model(TOKENS), base, "logits with weight 0", 1e-6)


def test_a_merged_model_gives_the_logits_of_the_adapted_one():
    model = tiny()
    adapt.apply(model, "lora", AdapterConfig(2, alpha=6.0))
    for _, layer in lora.adapted_layers(model):
        nn.init.normal_(layer.lora["default"].B.weight, std=0.1)
    adapted = model(TOKENS)
    adapt.merge(model)
    agree(model(TOKENS), adapted, "logits after merging", 1e-3)


def test_targets_that_do_not_count_are_left_out_of_the_distillation():
    logits = torch.zeros(1, 2, 4)
    teacher = torch.tensor([[[9.0, 0, 0, 0], [0, 0, 0, 0]]])
    loss, metrics = distill.distillation_loss(logits, teacher, torch.tensor([[-100, 1]]), 1.0, 0.5)
    # Only the second position counts: 0.5 ln 4 + 0.5 * 0.
    agree(loss, 0.5 * math.log(4), "the loss over the one target that counts")
    assert metrics["weight"] == 1, f"one target counts, not {metrics['weight']}"
    agree(loss, 0.5 * F.cross_entropy(logits[0, 1:], torch.tensor([1])), "half the cross-entropy")
