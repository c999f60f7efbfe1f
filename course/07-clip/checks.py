"""Checks of the exercises of lesson 7."""

import math

import pytest
import torch
import torch.nn.functional as F

from course.compare import agree
from course.lessons import checks
from tinyfm.clip import CLIP, CLIPConfig, contrast, log_weights, sigmoid_loss, softmax_loss
from tinyfm.evaluate.zero_shot import class_logits, embed_texts, nearest_neighbours, recall


def unit(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane, (n, 2), at these angles."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack((angles.cos(), angles.sin()), dim=1)


# ---- sigmoid_loss -------------------------------------------------------------------------------

PAIRED = torch.eye(2, dtype=torch.bool)


@checks("sigmoid_loss")
def test_siglip_by_hand():
    z = torch.tensor([[math.log(3), 0.0], [-math.log(3), math.log(9)]])
    # Probabilities of the right label: 3/4, 1/2, 3/4, 9/10.
    expected = -math.log(3 / 4) - math.log(1 / 2) - math.log(3 / 4) - math.log(9 / 10)
    agree(sigmoid_loss(z, PAIRED), expected, "sum over the four pairs of -ln P(label)")


@checks("sigmoid_loss")
def test_large_logits_neither_overflow_nor_vanish():
    right = torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0]])
    agree(sigmoid_loss(right, PAIRED), 0.0, "loss where all labels are certain and right")
    agree(sigmoid_loss(-right, PAIRED), 4000.0, "loss where all labels are certain and wrong")


# ---- softmax_loss -------------------------------------------------------------------------------


@checks("softmax_loss")
def test_infonce_by_hand():
    z = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])  # probabilities 3/4 and 1/2
    expected = -math.log(3 / 4) - math.log(1 / 2)
    agree(softmax_loss(z, PAIRED), expected, "sum over the two rows of -ln softmax")


@checks("softmax_loss")
def test_several_positives_of_a_row_are_averaged():
    z = torch.tensor([[math.log(2), 0.0, 0.0]])  # probabilities 1/2, 1/4, 1/4
    positive = torch.tensor([[True, True, False]])
    expected = (-math.log(1 / 2) - math.log(1 / 4)) / 2
    agree(softmax_loss(z, positive), expected, "mean of -ln softmax at two positives")


@checks("softmax_loss")
def test_each_row_is_a_classification_among_all_columns():
    z = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    positive = torch.tensor([[False, False, True, False]])
    agree(softmax_loss(z, positive), math.log(4), "loss of a guess among four columns, ln 4")


@checks("softmax_loss")
def test_an_empty_column_changes_nothing():
    z = torch.tensor([[math.log(3), 0.0, -math.inf]])
    loss = softmax_loss(z, torch.tensor([[True, False, False]]))
    agree(loss, -math.log(3 / 4), "loss with a column of logit -inf")


@checks("softmax_loss")
def test_softmax_of_large_logits_does_not_overflow():
    z = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]])
    agree(softmax_loss(z, PAIRED), 0.0, "loss where both rows are certain and right")
    agree(softmax_loss(z, ~PAIRED), 2000.0, "loss where both rows are certain and wrong")


@checks("softmax_loss")
def test_the_gradient_is_probability_minus_target():
    z = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
    softmax_loss(z, torch.tensor([[True, False]])).backward()
    agree(z.grad, [[-0.25, 0.25]], "gradient of the logits")


# ---- log_weights --------------------------------------------------------------------------------


@checks("log_weights")
def test_ten_negatives_stand_for_a_thousand():
    weights = log_weights(torch.arange(11), 1001)
    agree(weights, torch.full((11,), math.log(100)), "ln of (1001 - 1) / (11 - 1)")


@checks("log_weights")
def test_empty_columns_count_as_none_and_the_others_for_them():
    weights = log_weights(torch.tensor([7, -1, 2, 0, -1]), 21)
    full = math.log(20 / 2)
    expected = [full, -math.inf, full, full, -math.inf]
    got = [round(weight, 5) for weight in weights.tolist()]
    assert weights.shape == (5,) and torch.allclose(weights, torch.tensor(expected)), (
        f"ln weights with two of five columns empty: expected {expected}, got {got}"
    )


@checks("log_weights")
@pytest.mark.parametrize("n_pairs", [0, 3, 5])
def test_few_data_leave_every_column_at_its_own_weight(n_pairs):
    weights = log_weights(torch.arange(5), n_pairs)
    agree(weights, torch.zeros(5), f"ln weights of 5 columns where the data have {n_pairs} pairs")


# ---- class_logits -------------------------------------------------------------------------------


@checks("class_logits")
def test_probabilities_of_two_templates_by_hand():
    # Two templates, two classes; exp(logit) = 3^cosine. Class 0: 3 + 1 = 4. Class 1: 1 + 1/3.
    classes = torch.stack((unit(0, 90), unit(90, 180)))  # (n, M, E)
    logits = class_logits(unit(0), classes, torch.tensor(math.log(3)))
    agree(logits, [[math.log(4), math.log(4 / 3)]], "ln of the sum over templates")
    agree(logits.softmax(1), [[0.75, 0.25]], "P(class | image)")


@checks("class_logits")
def test_the_probability_of_a_class_is_the_sum_over_its_captions():
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(5, 4, generator=generator), dim=1)
    classes = F.normalize(torch.randn(3, 6, 4, generator=generator), dim=2)
    scale = torch.tensor(7.0)
    every = (scale * x @ classes.flatten(0, 1).T).softmax(1)  # over all 18 captions
    expected = every.view(5, 3, 6).sum(1)
    agree(class_logits(x, classes, scale).softmax(1), expected, "P(class | image)")


@checks("class_logits")
def test_a_single_template_gives_scaled_cosines():
    logits = class_logits(unit(0, 90), unit(0, 60, 90)[None], torch.tensor(10.0))
    agree(logits, [[10.0, 5.0, 0.0], [0.0, 10 * 3**0.5 / 2, 10.0]], "scale times cosine", 1e-4)


@checks("class_logits")
def test_class_logits_do_not_overflow():
    logits = class_logits(unit(0), torch.stack((unit(0, 90), unit(0, 90))), torch.tensor(1000.0))
    agree(logits, [[1000 + math.log(2), math.log(2)]], "logits at scale 1000", 1e-4)


# ---- nearest_neighbours -------------------------------------------------------------------------


@checks("nearest_neighbours")
def test_the_nearest_decides_if_k_is_1():
    found = nearest_neighbours(unit(10, 100), unit(0, 30, 90), torch.tensor([5, 6, 7]))
    agree(found, [5, 7], "classes of the nearest")


@checks("nearest_neighbours")
def test_the_majority_of_k_decides():
    found = nearest_neighbours(unit(0), unit(1, 2, -3, 90), torch.tensor([4, 9, 9, 4]), k=3)
    agree(found, [9], "most common class among the 3 nearest, of classes 4, 9, 9")


@checks("nearest_neighbours")
def test_of_equally_common_classes_that_of_the_nearest_wins():
    found = nearest_neighbours(unit(0), unit(4, 1, 2, 3), torch.tensor([2, 8, 2, 8]), k=4)
    agree(found, [8], "two votes each for 8 (the nearest) and 2")


@checks("nearest_neighbours")
def test_all_rows_of_a_large_batch_are_classified():
    found = nearest_neighbours(unit(0, 90).repeat(600, 1), unit(1, 91), torch.tensor([0, 1]))
    agree(found, torch.tensor([0, 1]).repeat(600), "classes of 1,200 rows")


# ---- recall -------------------------------------------------------------------------------------


def scores(x, y, owner, ks=(1, 2)) -> dict[str, float]:
    found = recall(x, y, torch.tensor(owner), ks)
    return {name: float(value) for name, value in found.items()}


@checks("recall")
def test_recall_by_hand():
    # Images at 0, 40 and 90 degrees, their captions at 10, 80 and 60. Image 0 is nearest to its
    # caption. Image 1 (40) has 60 (20 off), 10 (30 off) before its own (40 off): rank 2. Image 2
    # (90) has its own 30 off, and 80 nearer: rank 1. Caption 10 finds 0; caption 80 has 90 nearer
    # than its 40: rank 1; caption 60 has 40 nearer than its 90: rank 1.
    found = scores(unit(0, 40, 90), unit(10, 80, 60), [0, 1, 2])
    expected = {
        "image_to_text_at_1": 1 / 3,
        "image_to_text_at_2": 2 / 3,
        "text_to_image_at_1": 1 / 3,
        "text_to_image_at_2": 1.0,
    }
    assert set(found) == set(expected), f"expected {sorted(expected)}, got {sorted(found)}"
    for name, value in expected.items():
        agree(found[name], value, name)


@checks("recall")
def test_the_best_of_an_images_captions_counts():
    found = scores(unit(0, 90), unit(80, 2, 85), [0, 0, 1])
    agree(found["image_to_text_at_1"], 1.0, "image_to_text_at_1, where image 0 has two captions")
    agree(found["text_to_image_at_1"], 2 / 3, "text_to_image_at_1: one caption of image 0 is far")


@checks("recall")
def test_other_captions_of_the_same_image_are_not_wrong():
    found = scores(unit(0, 90), unit(1, 2, 3, 88), [0, 0, 0, 1])
    agree(found["image_to_text_at_1"], 1.0, "image_to_text_at_1 with three captions of image 0")


@checks("recall")
def test_a_tie_counts_against_the_model():
    found = scores(unit(0, 0, 0), unit(0, 0, 0), [0, 1, 2])
    agree(found["image_to_text_at_1"], 0.0, "image_to_text_at_1 where everything is alike")
    agree(found["text_to_image_at_2"], 0.0, "text_to_image_at_2 where everything is alike")


# ---- what no exercise covers, but a debugging exercise breaks ------------------------------------

SMALL = CLIPConfig(
    image_size=8,
    patch_size=4,
    image_layer=1,
    image_width=8,
    image_head=2,
    vocab_size=10,
    context_length=8,
    text_layer=1,
    text_width=8,
    text_head=2,
    embed_dim=4,
    end_token=0,
)


def small_model() -> CLIP:
    torch.manual_seed(0)
    model = CLIP(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
    return model.eval()


@torch.no_grad()
def test_padding_does_not_change_a_caption():
    model = small_model()
    short = model.encode_text(torch.tensor([[3, 4, 0]]))
    padded = model.encode_text(torch.tensor([[3, 4, 0, 0, 0], [1, 2, 3, 4, 0]]))[:1]
    agree(padded, short, "vector of a caption with and without padding")


@torch.no_grad()
def test_an_images_vector_does_not_depend_on_the_batch():
    model = small_model()
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    agree(model.encode_image(images)[:1], model.encode_image(images[:1]), "vector of an image")


def test_equal_captions_are_positives_of_each_other():
    x = unit(0, 0)
    ids = torch.tensor([5, 5])
    loss = contrast(softmax_loss, x, x, ids, ids, torch.tensor(1.0))
    agree(loss, math.log(2), "loss of two equal pairs: each caption is right half of the time")
    z = torch.tensor(3.0)
    far = contrast(softmax_loss, unit(0, 180), unit(0, 180), ids, ids, z)
    agree(far, (math.log(1 + math.exp(-6)) + math.log(1 + math.exp(6))) / 2, "both are positives")


class Digits:
    """A tokenizer of digits; 0 is the end."""

    bot = None
    eot = 0

    def encode_batch(self, captions):
        return [[int(digit) for digit in caption] for caption in captions]


def test_texts_of_different_lengths_keep_their_order():
    model = small_model()
    captions = ["1234", "5", "678", "12"]
    alone = torch.cat([embed_texts(model, Digits(), [caption]) for caption in captions])
    agree(embed_texts(model, Digits(), captions), alone, "vectors in the order of the captions")
