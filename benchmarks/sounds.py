"""Speed of the codec and of MusicGen, against transformers; and of the delay, against one by one.

    python benchmarks/sounds.py [--seconds 2] [--frames 50] [--repeats 3]

Weights are random and the same on both sides: a model of transformers is saved, and opened here.
The codec has the sizes of EnCodec for 24 kHz, with the 32 codebooks of its largest bandwidth. The
decoder has four codebooks of 1024 codes and 8 blocks of width 512. It writes frames, greedy, by a
cache. The third row is a GPT with the same blocks that writes the same number of codes flattened,
one after the other. All take turns in this process; times are medians. Before, codes are compared.

Prints milliseconds here and there, and their ratio: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import timing
from tinyfm.codec import Codec
from tinyfm.generate import Sampling, complete
from tinyfm.gpt import GPT
from tinyfm.musicgen import MusicGen

Q, K = 4, 1024
DECODER = {
    "vocab_size": K, "num_codebooks": Q, "num_hidden_layers": 8, "hidden_size": 512,
    "ffn_dim": 2048, "num_attention_heads": 8, "pad_token_id": K, "bos_token_id": K,
}  # fmt: skip


def opened(theirs: torch.nn.Module, ours: type) -> torch.nn.Module:
    """A model of transformers, as one of ours."""
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return ours.from_pretrained(folder)


def codec_works(seconds: float) -> dict[str, timing.Work]:
    """Encoding and decoding of a sound of noise, here and there."""
    theirs = transformers.EncodecModel(transformers.EncodecConfig()).eval()
    for layer in theirs.quantizer.layers:
        layer.codebook.embed.normal_(std=0.1)
    ours = opened(theirs, Codec)
    sound = 0.1 * torch.randn(1, 1, int(seconds * ours.config.rate))
    bandwidth = theirs.config.target_bandwidths[-1]
    codes = theirs.encode(sound, bandwidth=bandwidth).audio_codes
    same = (ours.encode(sound) == codes[0]).float().mean()
    print(f"codec: {same:.2%} of {codes.numel()} codes are equal")
    return {
        "encode": lambda: ours.encode(sound),
        "encode, there": lambda: theirs.encode(sound, bandwidth=bandwidth),
        "decode": lambda: ours.decode(codes[0]),
        "decode, there": lambda: theirs.decode(codes, [None]),
    }


def decoder_works(frames: int) -> dict[str, timing.Work]:
    """Writing of frames: here, there, and flattened by a GPT with as many blocks."""
    theirs = transformers.MusicgenForCausalLM(transformers.MusicgenDecoderConfig(**DECODER)).eval()
    ours = opened(theirs, MusicGen)
    greedy = Sampling(max_new_tokens=frames * Q, temperature=0)
    empty = torch.zeros(1, Q, 0, dtype=torch.long)
    start = torch.full((Q, 1), K)
    settings = {
        "attention_mask": torch.ones(1, 1), "max_length": frames + Q, "do_sample": False,
        "num_return_sequences": 1, "decoder_start_token_id": K,
    }  # fmt: skip
    found = ours.generate(empty, frames, greedy)
    same = (found == theirs.generate(start, **settings)).float().mean()
    print(f"MusicGen: {same:.2%} of {found.numel()} codes are equal")
    flat = GPT(replace(ours.config.gpt, vocab_size=Q * K, context_length=Q * frames + 1))
    return {
        f"write, {frames + Q - 1} steps": lambda: ours.generate(empty, frames, greedy),
        f"write, {frames + Q - 1} steps, there": lambda: theirs.generate(start, **settings),
        f"write flattened, {frames * Q} steps": lambda: complete(flat, [[0]], greedy),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2, help="length of the sound")
    parser.add_argument("--frames", type=int, default=50, help="number of frames to write")
    parser.add_argument("--repeats", type=int, default=3, help="number of timed rounds")
    given = parser.parse_args()
    if given.seconds < 0.1 or min(given.frames, given.repeats) < 1:
        parser.error("--seconds must be at least 0.1, the other numbers at least 1")
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    print(timing.describe_machine())
    times = {}
    for works in (codec_works(given.seconds), decoder_works(given.frames)):
        times |= timing.by_turns(works, given.repeats)
    print("\n| work | ms here | ms in transformers | ratio |\n|---|---|---|---|")
    for name, here in times.items():
        if name.endswith(", there"):
            continue
        there = times.get(f"{name}, there")
        cells = ["", ""] if there is None else [f"{1000 * there:.0f}", f"{there / here:.2f}"]
        print(f"| {name} | {1000 * here:.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
