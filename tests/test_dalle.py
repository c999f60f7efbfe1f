"""DALL-E: the loss by hand, drawing with the mask and guidance, learning, errors."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import generators, normal

from tinyfm.dalle import DALLE, DALLEConfig, counted_text
from tinyfm.generate import Sampling
from tinyfm.vq import VQConfig

VQ = VQConfig(image_size=8, channels=(4, 8, 8), groups=4, latent_channels=4, n_code=8, n_book=2)
TINY = DALLEConfig(
    n_layer=1, n_head=2, d_model=32, text_vocab_size=12, text_length=5, text_drop=0.0, vq=VQ
)
END = 11
TEXTS = torch.tensor([[1, 2, 3, END], [4, END, END, END], [5, 6, END, END], [7, 8, 9, END]])
LIKELIEST = Sampling(temperature=0)


def build(**fields) -> DALLE:
    torch.manual_seed(0)
    model = DALLE(replace(TINY, **fields))
    with torch.no_grad():
        model.gpt.head.weight.add_(0.3 * normal(*model.gpt.head.weight.shape))
    return model


def nats_of(model, text, codes):
    """-ln p of each token after the first one, (B, T + N - 1), from logits of all ids."""
    firsts = torch.tensor([12, 20] * 4)  # two codebooks of 8 codes behind 12 tokens
    tokens = torch.cat((text, firsts + codes), dim=1)
    log_p = model.gpt(tokens[:, :-1]).log_softmax(-1)
    return -log_p.gather(2, tokens[:, 1:, None])[..., 0]


# ---- the loss -----------------------------------------------------------------------------------


def test_the_loss_by_hand():
    model = build()
    assert model.config.gpt.vocab_size == 12 + 2 * 8
    images = normal(4, 1, 8, 8)
    codes = model.encode_images(images)
    assert codes.shape == (4, 2 * 2 * 2)
    book = model.vq.encode(images)  # (B, Q, h, w)
    assert torch.equal(codes[:, 2:4], book[:, :, 0, 1])  # the codes of a place, side by side
    loss, metrics = model.loss({"tokens": TEXTS, "images": images}, generators(4))
    filled = F.pad(TEXTS, (0, 1), value=END)
    nats = nats_of(model, filled, codes)
    counts = [3, 1, 2, 3]  # tokens after the first one, with the end
    text = sum(row[:n].mean() for row, n in zip(nats, counts)) / 4
    image = nats[:, 4:].mean()
    assert metrics["text_nats"].item() == pytest.approx(text.item(), rel=1e-5)
    assert metrics["image_nats"].item() == pytest.approx(image.item(), rel=1e-5)
    assert loss.item() == pytest.approx((text / 8 + image * 7 / 8).item(), rel=1e-5)
    stored, _ = model.loss({"tokens": TEXTS, "codes": codes}, generators(4))
    assert torch.equal(loss, stored)


def test_what_counts_in_a_text():
    text = torch.tensor([[1, END, END], [END, END, END], [1, 2, END]])
    assert counted_text(text).tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


def test_the_loss_does_not_depend_on_the_micro_batch():
    model = build(text_drop=0.5)
    codes = torch.randint(8, (4, 8), generator=generators(1)[0])
    batch = {"tokens": TEXTS, "codes": codes}
    whole, _ = model.loss(batch, generators(4))
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        loss, _ = model.loss(part, generators(4)[rows])
        parts.append(loss.item())
    assert whole.item() == pytest.approx((parts[0] + 3 * parts[1]) / 4, rel=1e-5)


def test_texts_are_dropped_in_training_alone():
    model = build(text_drop=0.5)
    text = model.fill(TEXTS).repeat(25, 1)
    dropped = (model.drop_texts(text, generators(100)) == END).all(1)
    assert 30 < dropped.sum() < 70
    batch = {"tokens": TEXTS, "codes": torch.zeros(4, 8, dtype=torch.long)}
    model.eval()
    assert torch.equal(model.loss(batch, generators(4))[0], model.loss(batch, generators(4, 1))[0])
    model.train()
    assert model.loss(batch, generators(4))[0] != model.loss(batch, generators(4, 1))[0]


def test_the_vq_vae_is_frozen():
    model = build()
    loss, _ = model.loss({"tokens": TEXTS, "images": normal(4, 1, 8, 8)}, generators(4))
    loss.backward()
    assert not model.vq.training and model.training
    assert all(p.grad is None for p in model.vq.parameters())
    assert all(p.grad is not None for p in model.gpt.parameters())


# ---- drawing ------------------------------------------------------------------------------------


def draw_slowly(model, text, guidance):
    """The likeliest codes, each from the whole sequence again."""
    codes = torch.zeros(len(text), 0, dtype=torch.long)
    empty = torch.full_like(text, END)
    for i in range(8):
        first = (12, 20)[i % 2]
        ids = codes + torch.tensor([12, 20] * 4)[:i]
        given, without = (
            model.gpt(torch.cat((front, ids), dim=1))[:, -1, first : first + 8]
            for front in (text, empty)
        )
        logits = without + guidance * (given - without)
        codes = torch.cat((codes, logits.argmax(1, keepdim=True)), dim=1)
    return codes


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_codes_are_drawn_as_the_slow_way_draws_them(guidance):
    """With the cache, the mask and guidance; without the mask, texts would go on."""
    model = build().eval()
    text = model.fill(TEXTS)
    codes = model.draw_codes(text, LIKELIEST, guidance, generators(4))
    assert torch.equal(codes, draw_slowly(model, text, guidance))
    assert (model.gpt(text)[:, -1].argmax(1) < 12).any()
    images = model.generate(TEXTS, LIKELIEST, guidance)
    torch.testing.assert_close(images, model.decode(codes), atol=1e-5, rtol=1e-5)
    assert images.shape == (4, 1, 8, 8) and images.abs().max() <= 1


def test_a_drawing_does_not_depend_on_the_others():
    model = build()
    text = model.fill(TEXTS)
    four = model.draw_codes(text, Sampling(temperature=1.0), 2.0, generators(4))
    last = model.draw_codes(text[3:], Sampling(temperature=1.0), 2.0, generators(4)[3:])
    assert torch.equal(four[3:], last)
    assert len(four.unique(dim=0)) > 1


def test_it_learns_which_picture_belongs_to_which_text():
    model = build(d_model=32)
    codes = torch.randint(8, (4, 8), generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam(model.gpt.parameters(), lr=1e-2)
    for _ in range(80):
        loss, metrics = model.loss({"tokens": TEXTS, "codes": codes}, generators(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["image_nats"] < 0.1
    model.eval()
    assert torch.equal(model.draw_codes(model.fill(TEXTS), Sampling(), 1.0, generators(4)), codes)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"text_length": 1}, "text_length is 1; .*at least 2"),
        ({"text_weight": 1.0}, "text_weight is 1.0; .*below 1"),
        ({"d_model": 30, "n_head": 4}, "d_model 30 is not divisible by n_head 4"),
    ],
)
def test_configs_that_cannot_be_built(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)


def test_inputs_that_do_not_fit():
    model = build()
    with pytest.raises(ValueError, match="6 tokens exceeds text_length 5"):
        model.generate(torch.zeros(1, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="no prompt; give at least one"):
        model.generate(torch.zeros(0, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="outside 0 to 11"):
        model.generate(torch.tensor([[12, 0]]))
    with pytest.raises(ValueError, match="a text needs a tokenizer"):
        model.generate("a cat")
    with pytest.raises(ValueError, match="guidance is -1"):
        model.generate(TEXTS, guidance=-1)
    with pytest.raises(ValueError, match="4 prompts, 3 generators"):
        model.generate(TEXTS, generators=generators(3))
    with pytest.raises(ValueError, match="no code 8: the codebook has 0 to 7"):
        model.decode(torch.full((1, 8), 8))
