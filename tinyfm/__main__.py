"""What there is to run:  python -m tinyfm; and the runs so far:  python -m tinyfm runs [FOLDER]

    python train.py [PRESET]                train a preset, or continue a run
    python sample.py RUN                    sample from a run
    python -m tinyfm runs [FOLDER]          list the runs in a folder (default: runs)
    python -m tinyfm runs --plot runs.png   and draw their scores by step, side by side
    python -m tinyfm index PATH FOLDER      make passages of a text ready for search
    python -m tinyfm search FOLDER TEXT     find the passages that answer a question
    python -m tinyfm.evaluate RUN           measure a run on held-out data
    python -m tinyfm.evaluate suites RUN    examine GPTs with published questions
    python -m tinyfm.adapt compare RUN      compare ways to adapt a run to a task
    python -m tinyfm.adapt constitution RUN make pairs of answers by written principles
    python -m tinyfm.adapt policies RUN ... compare runs that learned preferences
    python -m tinyfm.hub RUN FOLDER         export a run to the layout of transformers or diffusers
    python -m tinyfm.serve RUN ...          serve runs: an API for OpenAI's clients, and a page
    python -m tinyfm.calc NAME              parameters, memory, FLOPs, time and cost of a model
    python data/prepare.py --out FOLDER     prepare a large corpus

Each command lists its options with --help.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from data.pictures import check_free
from tinyfm.common import schema
from tinyfm.common.console import console
from tinyfm.common.figures import new_figure, save_figure
from tinyfm.training.log import METRICS, read_metrics, summary_score


@dataclass(frozen=True)
class Summary:
    """One run, as its folder describes it."""

    folder: Path
    preset: str
    steps: int  # of the whole run
    evaluations: list[dict[str, float]]  # by step

    @property
    def score(self) -> str:
        return summary_score(self.evaluations[-1]) if self.evaluations else "val_loss"

    def __str__(self) -> str:
        if not self.evaluations:
            return f"{self.folder!s:32} {self.preset:14} not evaluated yet"
        first, last = self.evaluations[0], self.evaluations[-1]
        step = f"{last['step']:,} of {self.steps:,}"
        scores = f"{first.get(self.score, float('nan')):.4g} -> {last[self.score]:.4g}"
        return f"{self.folder!s:32} {self.preset:14} {step:>17}  {self.score} {scores}"


def read_summary(folder: Path) -> Summary:
    """The run in a folder. Raises ValueError or KeyError if its config.json is none of a run."""
    config = schema.parse_json((folder / "config.json").read_bytes())
    rows = read_metrics(folder / METRICS)
    evaluations = [row for row in rows if "val_loss" in row]
    return Summary(folder, str(config["preset"]), int(config["train"]["steps"]), evaluations)


def find_runs(folder: Path) -> list[Summary]:
    """The runs in a folder and the folders below it, by name. Folders of others are left out."""
    found = []
    for path in sorted(folder.glob("**/config.json")):
        if not (path.parent / METRICS).is_file():
            continue
        try:
            found.append(read_summary(path.parent))
        except (ValueError, KeyError, TypeError) as error:
            print(f"{path} is not read: {type(error).__name__} {error}", file=sys.stderr)
    return found


def draw(runs: list[Summary], path: Path) -> None:
    """The score of each run by step; a panel for each kind of score."""
    scores = list(dict.fromkeys(run.score for run in runs))
    figure = new_figure(7, 3 * len(scores) + 1)
    panels = figure.subplots(len(scores), squeeze=False)[:, 0]
    for score, axes in zip(scores, panels):
        for run in runs:
            rows = [row for row in run.evaluations if score in row]
            if run.score == score and rows:
                points = [row["step"] for row in rows], [row[score] for row in rows]
                axes.plot(*points, marker="o", label=str(run.folder))
        axes.set_xlabel("step")
        axes.set_ylabel(score)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def list_runs(words: list[str]) -> int | str:
    parser = argparse.ArgumentParser(prog="python -m tinyfm runs", description="List runs.")
    parser.add_argument("folder", nargs="?", default="runs", help="where they are; default: runs")
    parser.add_argument("--plot", metavar="PNG", help="draw their scores by step into this picture")
    given = parser.parse_args(words)
    runs = find_runs(Path(given.folder))
    if not runs:
        return f"error: there is no run in {given.folder}; train one: python train.py"
    print("\n".join(map(str, runs)))
    try:
        if given.plot:
            check_free(given.plot)
            draw(runs, Path(given.plot))
    except (ValueError, OSError) as error:
        return f"error: {error}"
    return 0


def search(name: str, words: list[str]) -> int | str:
    """Carry out `index` or `search`."""
    from tinyfm.recipes.search import COMMANDS  # loads torch, which the list of runs does not need

    try:
        COMMANDS[name](words)
    except (ValueError, OSError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> int | str:
    with console():
        match sys.argv[1:]:
            case ["runs", *words]:
                return list_runs(words)
            case ["index" | "search" as name, *words]:
                return search(name, words)
            case [] | ["-h" | "--help"]:
                print(__doc__)
                return 0
            case [word, *_]:
                return f"error: there is no command {word!r}\n\n{__doc__}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
