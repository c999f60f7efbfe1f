"""EleutherAI's evaluation harness over a run:  python -m tinyfm.harness RUN --tasks NAME ...

lm-evaluation-harness (Gao et al. 2021) holds hundreds of published tasks, so that a number found
here compares with that of any other model. It asks three things of a model, and scoring.py and
generate.py have the answers:

    loglikelihood(context, continuation)  -> ln p in nats, and whether greedy decoding writes it
    loglikelihood_rolling(text)           -> ln p of a whole text, in windows of the full context
    generate_until(context, settings)     -> a text, up to a stop string

Published tasks are downloaded when they are asked for. One of your own is a folder with a yaml file
that names a task and its jsonl: --include-path FOLDER, and needs no network. In Python, importing
this file registers the model as "tinyfm".

It is no requirement of the rest: pip install lm-eval. Left out: chat templates, which it joins as
strings, where a message could then write what only the template may.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from tinyfm import generate
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.common import device as machine
from tinyfm.evaluate import likelihood
from tinyfm.gpt import GPT
from tinyfm.recipes import run_dir

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


@register_model("tinyfm")
class TinyFM(LM):
    """A GPT as the harness sees it: of a run directory, or a model with its tokenizer."""

    def __init__(self, run: str = "", model=None, tokenizer=None, batch_size: int = 32,
                 device: str | None = None, max_batch_size: int | None = None):  # fmt: skip
        """Raises ValueError if the run holds no language model."""
        super().__init__()
        if model is None:
            opened = run_dir.open_run(run)
            if not isinstance(opened.model, GPT):
                raise ValueError(f"{run} is of family {opened.run.family}: no language model")
            model, tokenizer = opened.model, opened.tokenizer
        self.model = model.to(machine.choose_device(device or "auto"))
        self.tokenizer, self.rows = tokenizer, int(batch_size)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple]:
        pairs = [request.args for request in requests]
        scores = likelihood.score(self.model, self.tokenizer, pairs, rows=self.rows)
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        whole = self.model.config.context_length - len(prompt_ids(self.model))
        texts = [("", request.args[0]) for request in requests]
        scores = likelihood.score(self.model, self.tokenizer, texts, whole, self.rows)
        return [score.log_likelihood for score in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}  # settings -> places of the requests that have them
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for settings, places in groups.items():
            for first in range(0, len(places), self.rows):
                chunk = places[first : first + self.rows]
                contexts = [requests[i].args[0] for i in chunk]
                for i, text in zip(chunk, self.write(contexts, json.loads(settings))):
                    texts[i] = text
        return texts

    def write(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        """Continue each context as the harness's settings say, to a stop string or the text's end.

        A context keeps its latest tokens: as many as leave room for the new ones, half at least.
        """
        given = {"temperature": 0.0, **normalize_gen_kwargs(settings)}
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        sampling = generate.Sampling(
            max_new_tokens=given["max_gen_toks"], stop_tokens=(self.tokenizer.eot,),
            **{name: given[name] for name in names if name in given},
        )  # fmt: skip
        front, length = prompt_ids(self.model), self.model.config.context_length
        room = max(length - sampling.max_new_tokens, length // 2) - len(front)
        ids = [self.tokenizer.encode(context) or [self.tokenizer.eot] for context in contexts]
        rows = [front + row[-room:] for row in ids]
        streams = [generate.TextStream(given["until"]) for _ in rows]
        texts = [""] * len(rows)
        for step in generate.stream(self.model, rows, sampling):
            for i, token in enumerate(step):
                data = b"" if token is None else self.tokenizer.token_bytes(token)
                texts[i] += streams[i].feed(data, token is None)
            if all(stream.stopped for stream in streams):
                break
        return [text + stream.feed(b"", final=True) for text, stream in zip(texts, streams)]


# ---- the command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[str]  # run directory, or one checkpoint in it
    tasks: tuple[str, ...]  # names of the harness's tasks, or of those in --include-path
    include_path: str = ""  # a folder with tasks of your own, yaml files
    shots: int | None = None  # examples before each question, else as the task says
    limit: int | None = None  # questions of each task, else all
    rows: int = 32  # read at once
    device: str = "auto"  # cpu, cuda, mps, or auto
    out: str = ""  # also write the results to this JSON file


def find_tasks(tasks: Sequence[str], folder: str) -> TaskManager:
    """What knows the tasks: those of the folder, and if need be the harness's own, which takes it
    seconds to list. Raises ValueError for a task that neither has."""
    for own in (True, False) if folder else (False,):
        manager = TaskManager(include_path=folder or None, include_defaults=not own)
        missing = [task for task in tasks if not manager.match_tasks([task])]
        if not missing:
            return manager
    raise ValueError(f"there is no task {missing[0]!r}, in the harness or in --include-path")


def main() -> int | str:
    try:
        options = tyro.cli(Options, description=__doc__)
        model = TinyFM(options.run, batch_size=options.rows, device=options.device)
        results = simple_evaluate(
            model, tasks=[*options.tasks], num_fewshot=options.shots, limit=options.limit,
            task_manager=find_tasks(options.tasks, options.include_path), log_samples=False,
        )  # fmt: skip
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
    sys.exit(main())
