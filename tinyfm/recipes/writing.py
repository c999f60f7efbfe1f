"""What sample.py does with a GPT: texts are drawn or searched for, prompts classified."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data import labelled as tables
from data.modality import Modality
from data.report import Report
from tinyfm import beam, compiled, generate, speculative
from tinyfm.adapt.soft_prompt import prompt_ids
from tinyfm.beam import Beams
from tinyfm.evaluate import likelihood
from tinyfm.gpt import GPT
from tinyfm.recipes.base import OpenRun, print_shares


def drafted(opened: OpenRun, options: Any, counts: speculative.Counts) -> Callable:
    """The function that yields tokens with --draft. Raises ValueError if the two do not fit."""
    if options.compile:
        raise ValueError("--compile is for one token at a time, --draft for several: use one")
    draft = None
    if opened.draft:
        draft = opened.draft.model
        if not isinstance(draft, GPT):
            raise ValueError(
                f"{opened.draft.folder} is a run of family {opened.draft.run.family}: a draft is a "
                "smaller run of family gpt, or ngram"
            )
        speculative.check_draft(opened.model, draft)
        if opened.draft.tokenizer.fingerprint() != opened.tokenizer.fingerprint():
            raise ValueError(
                f"{opened.draft.folder} has another tokenizer than {opened.folder}: train a draft "
                f"with --data.tokenizer {opened.folder.parent}, or use --draft ngram"
            )
    return partial(
        speculative.stream, draft=draft, n_draft=options.draft_tokens, pack=True, counts=counts
    )


def write_texts(
    opened: OpenRun, options: Any, from_start: bool = False, shown: bool = True
) -> list[str]:
    """Print n texts, each with its prompt; the first one is printed while it is written.

    from_start: the prompt is the start of a document. shown: False prints nothing.
    """
    counts = speculative.Counts()
    write = generate.stream
    if options.draft_tokens != speculative.DRAFT_TOKENS and not options.draft:
        raise ValueError("--draft-tokens is for --draft ngram, or --draft with a run: add it")
    if options.draft:
        write = drafted(opened, options, counts)
    if options.compile:
        compiled.compile_decoding(opened.model)
    stops = [stop.replace("\\n", "\n") for stop in options.stop]
    prompt = options.prompt or ""
    prompts = [prompt] * (options.n or 1)
    texts = prompts
    front = prompt_ids(opened.model)
    if prompt and from_start:
        front = [*front, opened.tokenizer.eot]
    say = print if shown else lambda *parts, **how: None
    say(prompt, end="", flush=True)
    stream = generate.stream_text(
        opened.model, opened.tokenizer, prompts, options.sampling, stops, front, write
    )
    for parts in stream:
        texts = [text + part for text, part in zip(texts, parts)]
        say(parts[0], end="", flush=True)
    say()
    for text in texts[1:]:
        say(f"----\n{text}")
    if options.draft:
        print(counts, file=sys.stderr)
    if options.out:
        Path(options.out).write_text("\n----\n".join(texts) + "\n", encoding="utf-8")
    return texts


def search_text(
    opened: OpenRun, options: Any, beams: Beams, modality: Modality | None = None
) -> None:
    """Print the prompt and its likeliest continuation that beam search finds.

    modality: of texts that are no prose; then the prompt is the start of a document.
    """
    for name in ("stop", "compile", "draft"):
        if getattr(options, name):
            raise ValueError(f"--beams does not know --{name}: leave one of them out")
    tokenizer = opened.tokenizer
    prompt = options.prompt or ""
    front = prompt_ids(opened.model)
    if prompt and modality:
        prompt = modality.read_prompt(prompt)
        front = [*front, tokenizer.eot]
    ids = [*front, *(tokenizer.encode(prompt) or [tokenizer.eot])]
    never = tokenizer.without_token(opened.model.config.vocab_size)
    (found,) = beam.complete(opened.model, [ids], beams, never)
    text = prompt + tokenizer.decode(found)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")


def classify_prompt(opened: OpenRun, options: Any) -> None:
    """Print how probable each label is for the prompt, after labelled examples in the context."""
    if not options.examples:
        raise ValueError("--shots needs labelled examples: --examples FILE")
    if not options.prompt:
        raise ValueError("--examples needs a text to classify: --prompt TEXT")
    report = Report()
    rows = tables.text_rows(options.examples, report, "", tables.LABEL_COLUMNS)
    if report.skipped or report.notes:
        print(f"{options.examples}: {report}", file=sys.stderr)
    pool = [(row.source, row.labels[0]) for row in rows]
    (found,) = likelihood.classify(
        opened.model,
        opened.tokenizer,
        pool,
        [options.prompt],
        sorted({label for _, label in pool}),
        options.shots,
        options.sampling.seed,
        calibrate=True,
    )
    if options.shots:
        print(f"{found.shots} of {options.shots} examples fit into the context", file=sys.stderr)
    print_shares(found.probabilities)
