"""Preferences: reward against KL of best-of-n, DPO and GRPO, from one base and one reward.

    python benchmarks/preference.py functions      the code model's functions that compile
    python benchmarks/preference.py films          film sentences that sound positive
        [--seeds 3] [--steps 100] [--base-steps 1000] [--record]
    python benchmarks/preference.py draw           preference.png, from both tables of README.md

For each seed a base is trained: on the source code of the standard library, or on passages of
Wikipedia and then on film sentences. --base RUN starts all seeds from that run instead. The base
answers prompts of the training split, several answers to each, and the answers with the highest and
the lowest reward are the pairs for DPO. GRPO learns from the same prompts and the same reward.
Best-of-n needs no training. Every row of the table answers the same prompts of test, which no
training read.

functions: an answer counts if the function compiles. films: two reward models learn from two halves
of the rated sentences. The first one trains, and chooses the best of n; the second says how many
answers are positive. A rater agrees with the others' sign as data/ratings.py says, which is printed
beside.

The KL is measured on the answers, with an estimate that is never negative; that of best-of-n is its
upper bound. Distinct is the number of different pairs of tokens over the number of pairs, of one
answer to each prompt. The columns have each seed; intervals are of the median seed, over prompts.
Runs are kept in --work, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.encoder import train
from benchmarks.timing import PAGE, describe_machine, record
from data import ratings
from data.report import Report
from data.splits import TEST, TRAIN
from tinyfm.adapt.constitution import best_and_worst
from tinyfm.adapt.preference import (
    GRPOConfig,
    best_of,
    best_of_kl,
    distinct,
    kl_of_answers,
    score_answers,
)
from tinyfm.adapt.rewards import Judge, Parses
from tinyfm.batches.preference import PromptConfig, PromptData, rated_pairs
from tinyfm.evaluate.metrics import Measured, ratio_of_sums
from tinyfm.recipes import run_dir
from tinyfm.recipes.base import OpenRun
from tinyfm.recipes.constitution import draw_rounds

DPO_BETAS = (0.5, 0.1, 0.03)
GRPO_BETAS = (0.2, 0.02)
GOOD = {"functions": "compile", "films": "are positive"}  # what is counted
TEST_PROMPTS = 400  # at most, in the order of their hashes
Rows = dict[str, "Row"]


class Row(NamedTuple):
    """What one way reached with one seed."""

    share: Measured  # of answers that compile or are positive
    kl: float  # nats an answer
    distinct: float


class Rewards(NamedTuple):
    """The reward to learn from, and the one that is reported."""

    own: Parses | Judge
    held_out: Parses | Judge


def write_jsonl(path: Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path.resolve())


# ---- bases and rewards --------------------------------------------------------------------------


def code_base(work: Path, seed: str, options: argparse.Namespace, more: list[str]) -> Path:
    words = ["gpt", "--data.path", "stdlib", "--train.seed", seed, "--train.eval-every", "0"]
    words += ["--train.steps", str(options.base_steps), *more]
    return train(work / f"code-{seed}", *words)


def film_base(work: Path, seed: str, options: argparse.Namespace, more: list[str]) -> Path:
    # One hash decides both splits: with the same share, the base trains on no sentence that the
    # ratings hold out.
    sentences = [{"text": row.text} for row in ratings.rows("films")]
    path = write_jsonl(work / "films.jsonl", sentences)
    share = ["--data.val-fraction", str(ratings.HELD_OUT_SHARE)]
    common = ["gpt", "--train.seed", seed, "--train.eval-every", "0"]
    words = [*common, "--data.path", "passages", "--train.steps", str(options.base_steps), *more]
    first = train(work / f"english-{seed}", *words)
    words = [*common, "--data.path", path, *share, "--init-from", str(first.resolve())]
    return train(work / f"sentences-{seed}", *words, "--train.steps", str(options.base_steps // 3))


def film_judges(work: Path, seed: str, base: Path, options: argparse.Namespace) -> list[Path]:
    """Two reward models, of two halves of the training pairs."""
    found = rated_pairs("films", Report())
    pairs = [pair._asdict() for split, pair in found if split == TRAIN]
    runs = []
    for half in range(2):
        path = write_jsonl(work / f"half-{half}.jsonl", pairs[half::2])
        words = ["gpt", "--task", "reward", "--data.path", path, "--init-from", str(base.resolve())]
        words += ["--train.seed", seed, "--train.eval-every", "0"]
        words += ["--train.steps", str(options.judge_steps)]
        runs.append(train(work / f"judge-{half}-{seed}", *words))
    return runs


# ---- measures -----------------------------------------------------------------------------------


def answer_all(opened: OpenRun, data: PromptData, split: str, most: int, times: int = 1) -> list:
    """`times` rounds of answers to the first `most` prompts of a split."""
    prompts = data.prompts(split)[:most]
    tokens = GRPOConfig().max_new_tokens
    return draw_rounds(opened, prompts, times, 1000, tokens, code=data.path == "functions")


def share_of(good: np.ndarray) -> Measured:
    return ratio_of_sums(good, np.ones(len(good)), "prompts")


def measure(run: Path, base: OpenRun, data: PromptData, rewards: Rewards) -> Row:
    opened = run_dir.open_run(str(run))
    (answers,) = answer_all(opened, data, TEST, TEST_PROMPTS)
    good = score_answers(rewards.held_out, answers).numpy() > 0
    kl = kl_of_answers(opened.model, base.model, answers).mean()
    return Row(share_of(good.astype(float)), kl, distinct([answer.tokens for answer in answers]))


def measure_best(base: OpenRun, data: PromptData, rewards: Rewards, most: int) -> Rows:
    """Best of 1, 2, 4 ... `most`; the first is the base."""
    rounds = answer_all(base, data, TEST, TEST_PROMPTS, most)
    own = np.stack([score_answers(rewards.own, answers).numpy() for answers in rounds], 1)
    good = np.stack([score_answers(rewards.held_out, some).numpy() > 0 for some in rounds], 1)
    rows = {}
    n = 1
    while n <= most:
        found = best_of(own, n, good.astype(float))
        best = own[:, :n].argmax(1)  # of the first n
        tokens = [rounds[k][i].tokens for i, k in enumerate(best)]
        rows[f"best of {n}" if n > 1 else "base"] = Row(
            share_of(found), best_of_kl(n), distinct(tokens)
        )
        n *= 2
    return rows


def make_pairs(path: Path, base: OpenRun, data: PromptData, reward, options) -> str:
    """Pairs of the best and the worst of the base's answers to prompts of training."""
    if not path.exists():
        rounds = answer_all(base, data, TRAIN, options.prompts, options.answers)
        scores = np.stack([score_answers(reward, answers).numpy() for answers in rounds], 1)
        pairs = []
        for drafts, own in zip(zip(*rounds), scores.tolist()):
            found = best_and_worst(drafts, own)
            if found:
                best, worst = found
                pairs.append({"prompt": best.before, "chosen": best.text, "rejected": worst.text})
        write_jsonl(path, pairs)
    return str(path.resolve())


# ---- the comparison -----------------------------------------------------------------------------


def compare(part: str, seed: str, options: argparse.Namespace, more: list[str]) -> Rows:
    """All ways with one seed."""
    work = Path(options.work)
    if options.base:
        start = Path(options.base)
    else:
        start = {"functions": code_base, "films": film_base}[part](work, seed, options, more)
    base = run_dir.open_run(str(start))
    task = ["--data.reward", "parses"]
    rewards = Rewards(Parses(), Parses())
    config = PromptConfig()
    if part == "films":
        runs = film_judges(work, seed, start, options)
        judges = [run_dir.open_run(str(run)) for run in runs]
        rewards = Rewards(*(Judge(judge.model, judge.tokenizer) for judge in judges))
        task = ["--data.reward", "positive", "--data.judge", str(runs[0].resolve())]
        config = PromptConfig("positive", str(runs[0]))
    room = base.model.config.context_length - GRPOConfig().max_new_tokens
    data = PromptData(config, base.tokenizer, room, batch_size=1, seed=0)

    rows = measure_best(base, data, rewards, options.answers)
    common = ["gpt", "--init-from", str(start.resolve()), "--train.seed", seed]
    common += ["--train.steps", str(options.steps), "--train.eval-every", "0"]
    pairs = make_pairs(work / f"{part}-pairs-{seed}.jsonl", base, data, rewards.own, options)
    for beta in DPO_BETAS:
        words = [*common, "--task", "dpo", "--data.path", pairs, "--dpo.beta", str(beta)]
        run = train(work / f"{part}-dpo-{beta}-{seed}", *words)
        rows[f"DPO, beta {beta}"] = measure(run, base, data, rewards)
    for beta in GRPO_BETAS:
        words = [*common, "--task", "grpo", *task, "--grpo.beta", str(beta)]
        run = train(work / f"{part}-grpo-{beta}-{seed}", *words)
        rows[f"GRPO, beta {beta}"] = measure(run, base, data, rewards)
    return rows


def table(what: str, seeds: list[Rows]) -> str:
    """Markdown: a row a way; each seed, and the interval of the median one."""
    lines = [
        f"| way | answers that {what}, % | 95% interval | KL, nats an answer | distinct |",
        "|---|---|---|---|---|",
    ]
    for name in seeds[0]:
        own = [rows[name] for rows in seeds]
        shares = [row.share for row in own]
        middle = shares[shares.index(statistics.median_low(shares))]
        cells = [
            ", ".join(f"{100 * share:.1f}" for share in shares),
            f"{100 * middle.low:.1f} to {100 * middle.high:.1f}",
            ", ".join(f"{row.kl:.2f}" for row in own),
            ", ".join(f"{row.distinct:.2f}" for row in own),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read_curves(page: str, part: str) -> dict[str, list[tuple[float, float]]]:
    """{"best of", "DPO" or "GRPO": (KL, share) of the median seed} of a recorded table. Each starts
    at the base. Raises ValueError if there is no table yet."""
    block = page.split(f"<!-- preference {part} -->")[1].split("<!-- end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in block.splitlines() if line.startswith("|")]
    if len(rows) < 3:
        raise ValueError(f"README.md has no table of {part} yet: run it with --record")
    curves: dict[str, list[tuple[float, float]]] = {}
    base = None
    for name, shares, _, kls, _ in rows[2:]:
        share, kl = [statistics.median(map(float, cell.split(", "))) for cell in (shares, kls)]
        if base is None:
            base = (kl, share)
            continue
        way = re.sub(r",? (beta )?[\d.]+$", "", name)
        curves.setdefault(way, [base]).append((kl, share))
    return curves


def draw(path: Path, page: str) -> None:
    """The share of good answers over the KL, a line a way, a panel a part."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for panel, (part, what) in zip(panels, GOOD.items()):
        for way, points in read_curves(page, part).items():
            panel.plot(*zip(*points), marker="o", label=way.replace("best of", "best of n"))
        panel.set(xlabel="KL from the base, nats an answer", ylabel=f"answers that {what}, %")
        panel.set_title(part)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=(*GOOD, "draw"))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=100, help="of DPO and of GRPO")
    parser.add_argument("--base-steps", type=int, default=1000, help="of the base")
    parser.add_argument("--base", help="a trained run to start all seeds from")
    parser.add_argument("--judge-steps", type=int, default=300, help="of a reward model")
    parser.add_argument("--prompts", type=int, default=500, help="prompts for DPO's pairs")
    parser.add_argument("--answers", type=int, default=8, help="to a prompt, for best-of-n and DPO")
    parser.add_argument("--work", default="runs/preference-benchmark", help="folder of the runs")
    parser.add_argument("--record", action="store_true", help="write the table into README.md")
    options, more = parser.parse_known_args()
    if options.part == "draw":
        try:
            draw(PAGE.with_name("preference.png"), PAGE.read_text(encoding="utf-8"))
        except ValueError as error:
            parser.error(str(error))
        return
    numbers = (options.seeds, options.steps, options.judge_steps, options.prompts)
    if min(*numbers, options.base_steps // 3, options.answers // 2) < 1:
        parser.error("use at least 1, for --base-steps at least 3, for --answers at least 2")
    ceiling = ""
    if options.part == "films":
        test = [row for row in ratings.rows("films") if row.split == TEST]  # says what is missing
        share = ratings.agreement(test)
        ceiling = f"\nA rater has the sign of the others' mean in {share:.1%} of test sentences.\n"
    Path(options.work).mkdir(parents=True, exist_ok=True)
    found = [compare(options.part, str(i), options, more) for i in range(options.seeds)]
    steps = f"{options.steps} steps of DPO and GRPO"
    start = "one base for all seeds" if options.base else "a base for each seed"
    text = (
        f"{describe_machine()}; {steps}, {start}\n\n{table(GOOD[options.part], found)}\n{ceiling}"
    )
    print(text)
    if options.record:
        record(f"preference {options.part}", text)


if __name__ == "__main__":
    main()
