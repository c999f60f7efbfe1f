"""How much does the wording of a class's name matter to a model that was never told of classes?"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from course.letters import PLAIN, SIDE, Letters, draw_letters, split_letters
from tinyfm.clip import CLIP, CLIPConfig
from tinyfm.evaluate.zero_shot import classify, nearest_neighbours, recall

UNITS = {
    "own_style": "share right",
    "no_style": "share right",
    "one_style": "share right",
    "sum_of_styles": "share right",
    "mean_of_styles": "share right",
    "neighbour_on_pixels": "share right",
    "neighbour_on_vectors": "share right",
    "caption_found": "share right",
}
LABELS = {  # in the figure
    "own_style": 'right style: "serif bold italic {}"',
    "no_style": 'no style: "{}"',
    "one_style": 'one style: "mono regular upright {}"',
    "sum_of_styles": "12 styles, probabilities added",
    "mean_of_styles": "12 styles, mean vector",
    "neighbour_on_pixels": "no text: nearest pixels",
    "neighbour_on_vectors": "no text: nearest vectors",
    "caption_found": "whole caption among 248",
}
VARIANTS = ("64", "16", "32", "128")  # rows of a batch; all see the same number of pictures
PAIRS = 64_000  # pictures seen in training, with repetition
PEAK = 2e-3  # learning rate at 64 rows
WIDTH = 64


def name_of(character: str) -> str:
    """The words for a character: "small a", "capital a", "digit 7"."""
    if character.isdigit():
        return f"digit {character}"
    return ("small " if character.islower() else "capital ") + character.lower()


def words_for(style: str) -> str:
    """Three words for a style: "serif bold" is "serif bold upright"."""
    weight = "bold" if "bold" in style else "regular"
    slant = "italic" if "italic" in style else "upright"
    return f"{style.split()[0]} {weight} {slant}"


class Words:
    """A vocabulary of whole words; 0 ends a caption."""

    def __init__(self, captions: list[str]):
        words = sorted({word for caption in captions for word in caption.split()})
        self.ids = {word: i + 1 for i, word in enumerate(words)}
        self.longest = max(len(caption.split()) for caption in captions) + 1

    def encode(self, captions: list[str]) -> Tensor:
        """Captions -> (B, T), padded with the end."""
        tokens = torch.zeros(len(captions), self.longest, dtype=torch.long)
        for row, caption in enumerate(captions):
            ids = [self.ids[word] for word in caption.split()]
            tokens[row, : len(ids)] = torch.tensor(ids)
        return tokens


def captions_of(letters: Letters) -> list[str]:
    pairs = zip(letters.styles, letters.characters)
    return [f"{words_for(style)} {name_of(character)}" for style, character in pairs]


@torch.enable_grad()
def train(letters: Letters, words: Words, rows: int, seed: int) -> CLIP:
    torch.manual_seed(seed)
    config = CLIPConfig(
        image_size=SIDE,
        patch_size=4,
        image_layer=2,
        image_width=WIDTH,
        image_head=2,
        vocab_size=len(words.ids) + 1,
        context_length=words.longest,
        text_layer=1,
        text_width=WIDTH,
        text_head=2,
        embed_dim=WIDTH,
        end_token=0,
        augment=0.5,
    )
    model = CLIP(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    tokens = words.encode(captions_of(letters))
    order = torch.Generator().manual_seed(seed)
    noise = [torch.Generator().manual_seed(seed * 1000 + i) for i in range(rows)]
    steps = PAIRS // rows
    for step in range(steps):
        for group in optimizer.param_groups:
            rate = PEAK * (rows / 64) ** 0.5
            group["lr"] = rate * min(1, 20 * (step + 1) / steps, 1.6 * (1 - step / steps))
        picked = torch.randperm(len(letters), generator=order)[:rows]
        batch = {"images": letters.images[picked], "tokens": tokens[picked], "labels": picked}
        loss, _ = model.loss(batch, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.after_step()
        if (step + 1) % (steps // 6) == 0:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}")
            sys.stdout.flush()
    return model.eval()


@torch.no_grad()
def measure(seed: int, variant: str) -> dict:
    letters, unseen = split_letters(draw_letters())
    words = Words(captions_of(letters))
    model = train(letters, words, int(variant), seed)
    scale = model.scale()
    truth = torch.tensor([PLAIN.index(character) for character in unseen.characters])
    x = model.encode_image(unseen.images)

    def vectors_of(style: str) -> Tensor:
        """(62, E): the vector of each character's name after these words."""
        return model.encode_text(words.encode([f"{style} {name_of(c)}" for c in PLAIN]))

    def right(guesses: Tensor, of: Tensor = truth) -> float:
        return (guesses == of).float().mean().item()

    own = torch.zeros_like(truth)
    for style in set(unseen.styles):
        rows = torch.tensor([s == style for s in unseen.styles])
        own[rows] = classify(x[rows], vectors_of(words_for(style))[None], scale)
    styles = list(dict.fromkeys(letters.styles))
    every = torch.stack([vectors_of(words_for(style)) for style in styles])  # (12, 62, E)
    mean = F.normalize(every.mean(0, keepdim=True), dim=-1)
    train_truth = torch.tensor([PLAIN.index(character) for character in letters.characters])
    pixels = [F.normalize(part.images.flatten(1), dim=-1) for part in (unseen, letters)]
    captions = model.encode_text(words.encode(captions_of(unseen)))
    found = recall(x, captions, torch.arange(len(x)), (1,))
    return {
        "own_style": right(own),
        "no_style": right(classify(x, vectors_of("")[None], scale)),
        "one_style": right(classify(x, vectors_of("mono regular upright")[None], scale)),
        "sum_of_styles": right(classify(x, every, scale)),
        "mean_of_styles": right(classify(x, mean, scale)),
        "neighbour_on_pixels": right(nearest_neighbours(*pixels, train_truth)),
        "neighbour_on_vectors": right(
            nearest_neighbours(x, model.encode_image(letters.images), train_truth)
        ),
        "caption_found": float(found["image_to_text_at_1"]),
    }


def draw(figure, results):
    axes = figure.subplots()
    names = list(LABELS)
    for i, name in enumerate(names):
        values = [100 * result[name] for result in results]
        middle = sum(values) / len(values)
        colour = "C1" if name.startswith("neighbour") else "C2" if name == "caption_found" else "C0"
        axes.barh(i, middle, color=colour, alpha=0.5)
        axes.plot(values, [i] * len(values), "o", color="#000000", markersize=4)
        axes.text(2, i, f"{middle:.0f}", va="center")
    axes.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlim=(0, 100), xlabel="found in unseen fonts (%); a dot is a seed")
