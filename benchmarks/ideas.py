"""What would make the default run better? Ideas, each in as many seconds as the preset `gpt`.

    python benchmarks/ideas.py [IDEA ...] [--seeds 1] [--record]

An idea changes the preset in one place: an option, or a few lines below that replace a part of the
lesson. First, training steps of the preset and of the idea are timed by turns, with nothing else
running. So a run of the idea has as many steps as take the seconds of the preset's own. The table
has, of each idea:

    time of a step   as a share of the preset's
    bits per byte    of validation text, of all seeds
    better by        the mean over seeds, beside the preset with the same seeds

Runs and times are kept in --runs, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import encoder, timing
from tinyfm.common import device as devices
from tinyfm.common.options import parse
from tinyfm.gpt import GPT, Attention, Block
from tinyfm.recipes import gpt as recipe
from tinyfm.recipes import registry
from tinyfm.recipes.gpt import GPTRun
from tinyfm.training import muon
from tinyfm.training.log import METRICS, read_metrics
from tinyfm.training.optim import build_optimizers

PRESET = registry.find_preset("gpt").run
ROUNDS = 12  # timed steps of each
CAP = 15.0  # of the logits
HASHES = 16384  # rows of the table of pairs
SAFETY = 1.01  # keeps singular values below 1 despite rounding

# ---- ideas that change the model ----------------------------------------------------------------


class SoftCap(GPT):
    """Logits between -15 and 15, by a tanh (Gemma 2)."""

    def __init__(self, config):
        super().__init__(config)
        self.head.register_forward_hook(lambda module, inputs, y: CAP * torch.tanh(y / CAP))


class ValueAttention(Attention):
    def project(self, x, angles):
        q, k, v = super().project(x, angles)
        B, G, T, K = v.shape
        return q, k, v + self.value_embedding(self.tokens).view(B, T, G, K).transpose(1, 2)


class ValueEmbeddings(GPT):
    """The values of each layer get a table's row for their token (Zhou et al. 2024; nanoGPT
    speedrun)."""

    outer = (*GPT.outer, "value_embedding")

    def __init__(self, config):
        super().__init__(config)
        width = config.G * config.K
        for block in self.blocks:
            block.attention = ValueAttention(config)
            block.attention.value_embedding = nn.Embedding(config.vocab_size, width)
        self.reset_parameters()

    def hidden(self, tokens, *more, **named):
        for block in self.blocks:
            block.attention.tokens = tokens
        return super().hidden(tokens, *more, **named)


class SkipBlock(Block):
    def forward(self, x, *more):
        return super().forward(x + self.skip * self.early, *more)


class Skip(GPT):
    """The last layers see the stream before the first ones too, with a learned factor a channel: a
    U of skips, of which two layers leave one (Ronneberger et al. 2015)."""

    def __init__(self, config):
        super().__init__(config)
        last = SkipBlock(config)
        last.skip = nn.Parameter(torch.zeros(config.d_model))
        self.blocks[-1] = last
        self.reset_parameters()
        nn.init.zeros_(last.skip)
        self.blocks[0].register_forward_pre_hook(
            lambda module, inputs: setattr(last, "early", inputs[0])
        )


class Smear(GPT):
    """Each token gets a share of the embedding before it, a learned factor a channel (RWKV's token
    shift, Peng et al. 2023)."""

    def __init__(self, config):
        super().__init__(config)
        self.share = nn.Parameter(torch.zeros(config.d_model))
        self.token_embedding.register_forward_hook(self.smear)

    def smear(self, module, inputs, x):
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        return x + self.share * before


class Pairs(GPT):
    """A second table has a row for each hash of two neighbouring tokens (Huang et al. 2025)."""

    outer = (*GPT.outer, "pairs")

    def __init__(self, config):
        super().__init__(config)
        self.pairs = nn.Embedding(HASHES, config.d_model)
        self.reset_parameters()
        nn.init.zeros_(self.pairs.weight)
        self.token_embedding.register_forward_hook(self.add)

    def add(self, module, inputs, x):
        (tokens,) = inputs
        before = torch.cat((torch.zeros_like(tokens[:, :1]), tokens[:, :-1]), dim=1)
        return x + self.pairs((before * 36313 ^ tokens * 27191) % HASHES)


class Chunks(GPT):
    """The loss holds the logits of 256 tokens at a time, which stay in the processor's cache."""

    @property
    def logits_at_once(self):
        return 256 * self.config.vocab_size


# ---- ideas that change the optimizer ------------------------------------------------------------

# Amsel et al. 2025 (arXiv 2505.16932), algorithm 1: the best polynomial for each of five steps.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def polar_express(M: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """As muon.orthogonalise, with other numbers in each step."""
    X = M.bfloat16()
    tall = X.size(1) > X.size(2)
    if tall:
        X = X.mT
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in POLAR_EXPRESS[:steps]:
        a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


# ---- all ideas ----------------------------------------------------------------------------------


class Idea(NamedTuple):
    about: str
    options: tuple[str, ...] = ()  # of train.py
    model: type[GPT] = GPT
    orthogonalise: Callable[..., torch.Tensor] = muon.orthogonalise


IDEAS = {
    "soft-cap": Idea("logits between -15 and 15, by a tanh", model=SoftCap),
    "value-embeddings": Idea("values get a table's row for their token", model=ValueEmbeddings),
    "skip": Idea("the last layer reads the embeddings again", model=Skip),
    "smear": Idea("a token gets a share of the one before it", model=Smear),
    "pairs": Idea("a table for hashes of two neighbouring tokens", model=Pairs),
    "chunks": Idea("the loss in chunks of 256 tokens", model=Chunks),
    "polar-express": Idea("other numbers in Muon's iteration", orthogonalise=polar_express),
    "tied": Idea("one matrix for embedding and head", ("--model.tied",)),
    "vocab-2048": Idea("2,048 tokens instead of 4,096", ("--model.vocab-size", "2048")),
    "vocab-8192": Idea("8,192 tokens", ("--model.vocab-size", "8192")),
    "relu2": Idea("squared ReLU in the MLP", ("--model.mlp", "relu2")),
    "rows-8": Idea("batches of half the rows", ("--train.batch-size", "8")),
    "context-128": Idea(
        "rows of half the tokens, twice as many",
        ("--model.context-length", "128", "--train.batch-size", "32",
         "--train.micro-batch-size", "16"),
    ),
    "layers-3": Idea("three layers instead of two", ("--model.n-layer", "3")),
}  # fmt: skip
PLAIN = Idea("the preset")


@contextlib.contextmanager
def put_in_place(idea: Idea):
    """The recipe builds the idea's model, and Muon uses its iteration."""
    before = recipe.GPT, muon.orthogonalise
    recipe.GPT, muon.orthogonalise = idea.model, idea.orthogonalise
    try:
        yield
    finally:
        recipe.GPT, muon.orthogonalise = before


# ---- the time of a step -------------------------------------------------------------------------


def run_of(idea: Idea) -> GPTRun:
    return parse(GPTRun, "", "ideas", idea.options, PRESET)


def step_of(idea: Idea) -> Callable[[], None]:
    """A function that takes a training step."""
    run = run_of(idea)
    with put_in_place(idea):
        model = run.build_model()
    optimizers = build_optimizers(model, run.optim)
    dtype = devices.choose_dtype(run.train.dtype, torch.device("cpu"))
    micro = run.train.micro_batch_size or run.train.batch_size
    shape = (micro, run.model.context_length + 1)
    batch = {"tokens": torch.randint(run.model.vocab_size, shape)}

    def step() -> None:
        for _ in range(run.train.batch_size // micro):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss, _ = model.loss(batch)
            loss.backward()
        with put_in_place(idea):
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    return step


def time_beside_preset(name: str, folder: Path) -> float:
    """The time of a step of an idea, as a share of that of the preset; measured once."""
    kept = folder / f"{name}.txt"
    if not kept.exists():
        works = {"preset": step_of(PLAIN), "idea": step_of(IDEAS[name])}
        seconds = timing.by_turns(works, ROUNDS)
        kept.write_text(str(seconds["idea"] / seconds["preset"]), encoding="utf-8")
    return float(kept.read_text(encoding="utf-8"))


# ---- runs ---------------------------------------------------------------------------------------


def train(name: str, idea: Idea, seed: int, steps: int, folder: Path, more: list[str]) -> float:
    """Bits per byte of validation text after so many steps."""
    words = ["gpt", *idea.options, "--train.seed", str(seed), "--train.steps", str(steps), *more]
    script = (__file__, "--train", name)
    out = encoder.train(folder / f"{name}-{seed}", *words, script=script)
    return read_metrics(out / METRICS)[-1]["val_bpb"]


def train_here(name: str, words: Sequence[str]) -> None:
    """python train.py WORDS, with the idea in place."""
    import train as command

    sys.argv = ["train.py", *words]
    with put_in_place(IDEAS.get(name, PLAIN)):
        sys.exit(command.main())


def table(names: Sequence[str], seeds: int, folder: Path, more: list[str]) -> str:
    steps = PRESET.train.steps
    plain = [train("preset", PLAIN, seed, steps, folder, more) for seed in range(seeds)]
    lines = ["| idea | | time of a step | steps | bits per byte | better by |", "|" + "---|" * 6]
    found = {"preset": (1.0, steps, plain)}
    for name in names:
        share = time_beside_preset(name, folder)
        own = round(steps / share)
        bpb = [train(name, IDEAS[name], seed, own, folder, more) for seed in range(seeds)]
        found[name] = (share, own, bpb)
        print(name, f"{share:.2f}", own, bpb, file=sys.stderr, flush=True)
    for name, (share, own, bpb) in found.items():
        about = IDEAS.get(name, PLAIN).about
        better = 1 - mean(bpb) / mean(plain)
        values = ", ".join(f"{value:.3f}" for value in bpb)
        lines.append(f"| {name} | {about} | {share:.2f} | {own} | {values} | {better:+.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("ideas", nargs="*", help=f"of {', '.join(IDEAS)} (default: all)")
    add("--seeds", type=int, default=1, help="number of seeds")
    add("--runs", default="runs/ideas", help="folder of the runs")
    add("--record", action="store_true", help="write the table into README.md")
    options, more = parser.parse_known_args()
    unknown = set(options.ideas) - set(IDEAS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(IDEAS)}")
    found = table(options.ideas or list(IDEAS), options.seeds, Path(options.runs), more)
    text = f"{timing.describe_machine()}\n\n{found}\n"
    print(text)
    if options.record:
        timing.record("ideas", text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train_here(sys.argv[2], sys.argv[3:])
    main()
