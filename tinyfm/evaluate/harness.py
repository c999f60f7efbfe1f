"""EleutherAI's evaluation harness on a run:  python -m tinyfm.evaluate.harness RUN --tasks NAME ...

lm-evaluation-harness (Gao et al. 2021) holds hundreds of published tasks. So a score from here can
be compared with that of any other model. The harness sends a model three kinds of requests, which
likelihood.py and generate.py answer:

    loglikelihood(context, continuation)  -> ln p in nats, and whether greedy decoding writes it
    loglikelihood_rolling(text)           -> ln p of a whole text, in windows of the full context
    generate_until(context, settings)     -> a text, up to a stop string

Published tasks are downloaded on first use. A task of your own needs no network: it is a folder
with a yaml file, which names the task and its jsonl, and --include-path FOLDER. In Python,
importing this file registers the model with the harness as "tinyfm".

The harness is not in requirements.txt: pip install lm-eval. Left out: chat templates. The harness
joins their parts as strings, so a message could contain text that only the template may write.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyfm import generate
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.common import device as devices
from tinyfm.common.config import FilePath, FolderPath, GivenRun, MaybeInt, Name, Names
from tinyfm.common.console import run_command
from tinyfm.common.options import parse
from tinyfm.evaluate import likelihood, suites
from tinyfm.gpt import GPT
from tinyfm.recipes import run_dir
from tinyfm.tokenizer import Tokenizer

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError as error:
    reason = f"error: this needs lm-evaluation-harness: pip install lm-eval ({error})"
    if __name__ == "__main__":
        sys.exit(reason)
    raise ImportError(reason) from error


# ---- the model, as the harness sees it ----------------------------------------------------------


@register_model("tinyfm")
class TinyFM(LM):
    """A GPT for the harness: from a run directory, or a model with its tokenizer."""

    def __init__(
        self,
        run: str = "",
        model: GPT | None = None,
        tokenizer: Tokenizer | None = None,
        batch_size: int = 32,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """max_batch_size is ignored; the harness passes it. Raises ValueError if the run holds no
        language model."""
        super().__init__()
        if model is None:
            opened = run_dir.open_run(run)
            if not isinstance(opened.model, GPT):
                raise ValueError(
                    f"{run} is of family {opened.run.family}, no language model: give a run of "
                    "family gpt"
                )
            model = opened.model
            tokenizer = opened.tokenizer
        self.model = model.to(devices.choose_device(device or "auto"))
        self.tokenizer = tokenizer
        self.rows = int(batch_size)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(ln p, greedy) of each request's continuation after its context."""
        pairs = [request.args for request in requests]
        # In one window, with as much of the context as the continuation leaves room for.
        length = self.model.config.context_length - len(prompt_ids(self.model))
        scores = likelihood.score(self.model, self.tokenizer, pairs, length, self.rows)
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """ln p of each request's text."""
        length = self.model.config.context_length - len(prompt_ids(self.model))
        texts = [("", request.args[0]) for request in requests]
        scores = likelihood.score(self.model, self.tokenizer, texts, length, self.rows)
        return [score.log_likelihood for score in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that each request's context is continued with."""
        # Requests with equal settings are generated together.
        groups: dict[str, list[int]] = {}  # settings -> places of the requests
        for i, request in enumerate(requests):
            settings = json.dumps(request.args[1], sort_keys=True)
            groups.setdefault(settings, []).append(i)
        texts = [""] * len(requests)
        for settings, places in groups.items():
            for first in range(0, len(places), self.rows):
                chunk = places[first : first + self.rows]
                contexts = [requests[i].args[0] for i in chunk]
                for i, text in zip(chunk, self.write(contexts, json.loads(settings))):
                    texts[i] = text
        return texts

    def write(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        """Continue each context up to a stop string or the end of the text.

        settings: the harness's names for those of generate.Sampling, and "until", the stop strings.
        """
        given = {"temperature": 0.0, **normalize_gen_kwargs(settings)}
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        sampling = generate.Sampling(
            max_new_tokens=given["max_gen_toks"],
            stop_tokens=(self.tokenizer.eot,),
            **{name: given[name] for name in names if name in given},
        )
        return suites.write(self.model, self.tokenizer, contexts, sampling, given["until"])


# ---- the command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    run: GivenRun  # folder of a run, or of one of its checkpoints
    tasks: Names  # names of the harness's tasks, or of those in --include-path
    include_path: FolderPath = ""  # folder with the yaml files of your own tasks
    shots: MaybeInt = None  # examples before each question (default: as the task says)
    limit: MaybeInt = None  # questions to use of each task (default: all)
    rows: int = 32  # rows that the model reads at once
    device: Name = "auto"  # device to compute on: cpu, cuda, mps, or auto
    out: FilePath = ""  # JSON file to write the results to


def find_tasks(tasks: Sequence[str], folder: str) -> TaskManager:
    """A manager that knows the tasks. Raises ValueError for an unknown task.

    The folder's tasks are tried alone first, because listing the harness's own takes seconds.
    """
    for with_defaults in (False, True) if folder else (True,):
        manager = TaskManager(include_path=folder or None, include_defaults=with_defaults)
        missing = [task for task in tasks if not manager.match_tasks([task])]
        if not missing:
            return manager
    raise ValueError(
        f"there is no task {missing[0]!r} in the harness or in --include-path: give a name that "
        "`lm-eval ls tasks` lists, or the folder of your own task"
    )


def main() -> int | str:
    """Run the command; return the exit status or the message of an error."""
    try:
        command = "python -m tinyfm.evaluate.harness"
        options = parse(Options, __doc__, command)
        model = TinyFM(options.run, batch_size=options.rows, device=options.device)
        results = simple_evaluate(
            model,
            tasks=[*options.tasks],
            num_fewshot=options.shots,
            limit=options.limit,
            task_manager=find_tasks(options.tasks, options.include_path),
            log_samples=False,
        )
    except (ValueError, OSError) as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        return 130
    print(make_table(results))
    if options.out:
        text = json.dumps(results["results"], indent=2, default=str)
        Path(options.out).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, lasting=True))
