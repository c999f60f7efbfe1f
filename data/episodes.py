"""Episodes of a small robot as texts: a sentence, what it sees, and what an expert does.

The package minigrid has rooms with keys, balls and boxes, a robot that sees 7 x 7 cells ahead of it
and missions such as "go to the red ball" (BabyAI, Chevalier-Boisvert et al. 2019). It also has an
expert that carries them out. Its code makes the data, so it is installed and run:

    pip install minigrid==3.2.0
    python -m data.episodes

Two levels are played: GoToObj has one object in a room, GoToLocal nine. A text has the mission, and
then for each step the view and the action, `left`, `right` or `forward`:

    go to the red ball
    #......
    #...k..
    #..^...
    forward

The robot is `^` and looks up. Rows of which it sees nothing are left out.

    .  nothing       #  wall       ?  not seen
    a to f  a key, red green blue purple yellow grey;   g to l  a ball;   m to r  a box

An episode ends as soon as the robot stands before such an object and faces it. `fault` lays the
views of a text on one map and moves along it: no view may contradict an earlier one, and the last
action, none before it, reaches the goal. So it needs no package. minigrid agrees with it.

A model is also a player: it reads the text so far, and what it writes is done. `play` gives the
share of worlds in which a player reaches the goal within 64 steps. `steps` yields (picture,
mission, action) for models that see, as RT-2 does (Brohan et al. 2023): an action is a word.
`records` are those steps in the splits, from the first PICTURED worlds, whose pictures take 300 MB.

A seed makes a world. The split is by worlds, whatever the mission, so a robot never trained in the
rooms where it is tested. Episodes in which the expert carries an obstacle away are left out.

Licence: MIT (minigrid).
"""

import contextlib
import importlib.metadata
import io
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data import command, modality
from data.report import Report, counted
from data.splits import TEST, Document, split_of

if TYPE_CHECKING:
    from data import pictures

LEVELS = ("GoToObj", "GoToLocal")
ACTIONS = ("left", "right", "forward")
WAIT = "done"  # the environment's name of an action that changes nothing
SEEDS = 9_000  # worlds of each level
HELD_OUT = 0.06  # share of the worlds, half for validation and half for test
PLAYED = 200  # test episodes
PAST = 200  # characters of an episode that a player reads, at most
LONGEST = 700  # characters of an episode that is written
TILE = 8  # pixels of a cell of a picture
PICTURED = 3_000  # worlds of each level whose steps are pictures

SIDE = 7  # cells of a view
MIDDLE = SIDE // 2  # the robot's column; its row is the last
UNSEEN, EMPTY, WALL, ROBOT = "?.#^"
# The numbers that the environment gives to things are 0, 1, 2, 5, 6 and 7; those of colours are
# their places.
COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
THINGS = ("key", "ball", "box")
FIRST_THING = 5
OBJECTS = {
    (thing, colour): chr(ord("a") + len(COLOURS) * i + j)
    for i, thing in enumerate(THINGS)
    for j, colour in enumerate(COLOURS)
}
MISSION = re.compile(rf"go to (?:the|a) ({'|'.join(COLOURS)}) ({'|'.join(THINGS)})")
ROW = re.compile(rf"[?.#^a-r]{{{SIDE}}}")


class Installed(NamedTuple):
    """A package whose code is run, and so is installed."""

    name: str
    version: str
    licence: str

    @property
    def command(self) -> str:
        """The command that installs it."""
        return f"pip install {self.name}=={self.version}"

    def check(self) -> None:
        """Raise ValueError, with the command, if it is absent or of another version."""
        try:
            found = importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            found = ""
        if found != self.version:
            problem = f"{found} is installed" if found else "is not installed"
            raise ValueError(
                f"the episodes need the package {self.name} {self.version}; {self.name} {problem}, "
                f"so run: {self.command}"
            )


PACKAGE = Installed("minigrid", "3.2.0", "MIT")


# ---- the environment -----------------------------------------------------------------------------


@cache
def load() -> tuple[dict[str, type], type]:
    """{level: its environment}, and the expert. Raises ValueError as Installed.check does."""
    PACKAGE.check()
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        from minigrid.envs.babyai import goto
        from minigrid.utils.baby_ai_bot import BabyAIBot
    except ImportError as error:
        raise ValueError(
            f"minigrid lacks what it builds on ({error}), so run: {PACKAGE.command}"
        ) from error
    return {level: getattr(goto, level) for level in LEVELS}, BabyAIBot


def draw_view(image: np.ndarray) -> str:
    """The lines of a view, from the environment's numbers (column, row, (thing, colour, state))."""
    rows = []
    for j in range(SIDE):
        row = ""
        for thing, colour, _ in image[:, j]:
            if thing < FIRST_THING:
                row += (UNSEEN, EMPTY, WALL)[thing]
            else:
                row += OBJECTS[THINGS[thing - FIRST_THING], COLOURS[colour]]
        rows.append(row)
    rows[-1] = rows[-1][:MIDDLE] + ROBOT + rows[-1][MIDDLE + 1 :]
    while rows[0] == UNSEEN * SIDE:
        rows.pop(0)
    return "\n".join(rows)


class Episode:
    """A world, and what happened in it so far.

    mission, views (texts), pictures (uint8, (56, 56, 3), by the environment), actions (words);
    reached: whether the goal was; over: whether the episode has ended.
    """

    def __init__(self, level: str, seed: int):
        worlds, self.make_expert = load()
        if level not in worlds:
            raise ValueError(f"{level!r} is no level; choose one of {', '.join(LEVELS)}")
        self.env = worlds[level]()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it rejects
            seen, _ = self.env.reset(seed=seed)
        self.mission: str = seen["mission"]
        self.views: list[str] = []
        self.pictures: list[np.ndarray] = []
        self.actions: list[str] = []
        self.reached = self.over = False
        self.bot = None
        self._see(seen["image"])

    def _see(self, image: np.ndarray) -> None:
        self.views.append(draw_view(image))
        self.pictures.append(self.env.get_pov_render(TILE))

    @property
    def world(self) -> str:
        """A name for the room, what is in it, and where the robot starts."""
        x, y = map(int, self.env.agent_pos)
        cells = self.env.grid.encode().tobytes().hex()
        return f"{cells} {x} {y} {int(self.env.agent_dir)}"

    def expert(self) -> str:
        """The expert's next action. Ask before each action, or never: it remembers."""
        if self.bot is None:
            self.bot = self.make_expert(self.env)
        return self.bot.replan().name

    def act(self, word: str) -> None:
        """Do what a word says. A word that is no action lets a step pass."""
        known = self.env.actions.__members__
        seen, reward, ended, too_long, _ = self.env.step(known.get(word, known[WAIT]))
        self.actions.append(word)
        self.reached = bool(reward > 0)
        self.over = ended or too_long
        if not self.over:
            self._see(seen["image"])

    def text(self, most: int = 0) -> str:
        """The mission, and the views and actions, the last ones if there is a limit of characters.

        After the last action of an episode there is no view.
        """
        parts = [f"{view}\n{word}\n" for view, word in zip(self.views, self.actions)]
        if not self.over:
            parts.append(f"{self.views[-1]}\n")
        start = f"{self.mission}\n"
        while most and len(start) + sum(map(len, parts)) > most and len(parts) > 1:
            parts.pop(0)
        return start + "".join(parts)


# ---- players -------------------------------------------------------------------------------------

# What a player does in each of several episodes.
Policy = Callable[[Sequence[Episode]], Sequence[str]]


def follow_expert(episodes: Sequence[Episode]) -> list[str]:
    """What the expert does."""
    return [episode.expert() for episode in episodes]


def at_random(seed: int = 0) -> Policy:
    """A player that draws each action."""
    generator = random.Random(seed)
    return lambda episodes: [generator.choice(ACTIONS) for _ in episodes]


@cache
def seeds(level: str, split: str, n: int) -> tuple[int, ...]:
    """The first n seeds of SEEDS whose worlds are in a split."""
    found = []
    for seed in range(SEEDS):
        if len(found) == n:
            break
        if split_of(Episode(level, seed).world, HELD_OUT) == split:
            found.append(seed)
    return tuple(found)


def finish(policy: Policy, episodes: Sequence[Episode]) -> None:
    """Let a player act until all episodes are over.

    It acts in all of them at a time, so that a model reads several texts or pictures at once.
    """
    running = list(episodes)
    while running:
        for episode, word in zip(running, policy(running), strict=True):
            episode.act(word)
        running = [episode for episode in running if not episode.over]


def play(policy: Policy, level: str, worlds: Sequence[int] = ()) -> list[Episode]:
    """The episodes of a player in the worlds of these seeds; by default in PLAYED test worlds."""
    episodes = [Episode(level, seed) for seed in worlds or seeds(level, TEST, PLAYED)]
    finish(policy, episodes)
    return episodes


def steps(level: str, worlds: Sequence[int]) -> Iterator[tuple[np.ndarray, str, str]]:
    """(picture, mission, action) of each step of the expert in these worlds.

    A picture is uint8, (56, 56, 3): what the robot sees, 8 pixels a cell.
    """
    for seed in worlds:
        (episode,) = play(follow_expert, level, (seed,))
        if episode.reached and set(episode.actions) <= set(ACTIONS):
            for picture, action in zip(episode.pictures, episode.actions):
                yield picture, episode.mission, action


def records(report: Report | None = None) -> "Iterator[pictures.Record]":
    """Yield the steps of PICTURED worlds of each level; the captions are mission and action.

    Raises ValueError, with a command, without the package.
    """
    from data import pictures  # loads Pillow, which texts do not need

    if report is None:
        report = Report()
    load()
    report.note(f"licence: {PACKAGE.licence}")
    for level in LEVELS:
        for seed in range(PICTURED):
            split = split_of(Episode(level, seed).world, HELD_OUT)
            for picture, mission, action in steps(level, (seed,)):
                report.found += 1
                report.used += 1
                yield pictures.Record(picture, (mission, action), f"{mission}: {action}", split)


def play_texts(level: str, answer: Callable[[Sequence[str]], Sequence[str]]) -> list[bool]:
    """Whether a model that continues texts reaches the goal of each test episode."""

    def policy(episodes: Sequence[Episode]) -> list[str]:
        found = answer([episode.text(PAST) for episode in episodes])
        return [text.partition("\n")[0] for text in found]

    return [episode.reached for episode in play(policy, level)]


def results(policy: Policy) -> dict[str, list[bool]]:
    """{"success, LEVEL": whether a player reached the goal of each test episode}."""
    found = {}
    for level in LEVELS:
        found[f"success, {level}"] = [episode.reached for episode in play(policy, level)]
    return found


# ---- does a text reach its goal? -----------------------------------------------------------------


def read_steps(text: str) -> tuple[str, list[tuple[list[str], str]]]:
    """The sign of the object that is looked for, and the (rows, action) of each step.

    Raises ValueError for a text that is no episode.
    """
    mission, *lines = text.strip().split("\n")
    found = MISSION.fullmatch(mission)
    if not found:
        raise ValueError(f"{mission[:40]!r} is no mission")
    steps = []
    rows: list[str] = []
    for line in lines:
        if line not in ACTIONS:
            rows.append(line)
            continue
        if not rows or len(rows) > SIDE:
            raise ValueError(f"a view has {counted(len(rows), 'rows')}, not 1 to {SIDE}")
        wrong = [row for row in rows if not ROW.fullmatch(row)]
        if wrong:
            raise ValueError(f"{wrong[0][:20]!r} is no row of {SIDE} cells")
        if "".join(rows).count(ROBOT) != 1 or rows[-1][MIDDLE] != ROBOT:
            raise ValueError("the robot is not in the middle of the last row")
        steps.append((rows, line))
        rows = []
    if rows or not steps:
        raise ValueError("the last line is no action")
    colour, thing = found.groups()
    return OBJECTS[thing, colour], steps


def check(text: str) -> None:
    """Raise ValueError unless the actions of a text reach its goal in the world that it shows."""
    wanted, steps = read_steps(text)
    known: dict[tuple[int, int], str] = {}
    x = y = 0
    ahead = (0, -1)
    for number, (rows, action) in enumerate(steps, 1):
        right = (-ahead[1], ahead[0])
        for distance, row in enumerate(reversed(rows)):
            for column, cell in enumerate(row):
                if cell == UNSEEN:
                    continue
                side = column - MIDDLE
                place = (
                    x + distance * ahead[0] + side * right[0],
                    y + distance * ahead[1] + side * right[1],
                )
                cell = EMPTY if cell == ROBOT else cell
                if known.setdefault(place, cell) != cell:
                    raise ValueError(f"view {number} contradicts an earlier one")
        if action == "left":
            ahead = (-right[0], -right[1])
        elif action == "right":
            ahead = right
        elif known.get((x + ahead[0], y + ahead[1])) == EMPTY:
            x += ahead[0]
            y += ahead[1]
        reached = known.get((x + ahead[0], y + ahead[1])) == wanted
        if reached and number < len(steps):
            raise ValueError(f"the goal is reached by action {number} of {len(steps)}")
    if not reached:
        raise ValueError("the goal is not reached")


def fault(text: str) -> str:
    """What keeps a text from being an episode that reaches its goal; "" if it is one."""
    try:
        check(text)
    except ValueError as error:
        return str(error)
    return ""


def describe(text: str) -> dict[str, tuple[float, float]]:
    """The number of actions."""
    return {"actions": (sum(line in ACTIONS for line in text.split("\n")), 1)}


def read_prompt(prompt: str) -> str:
    """A mission, and perhaps the first lines after it, in which \\n is a line end.

    Raises ValueError for others.
    """
    mission, *lines = prompt.replace("\\n", "\n").removesuffix("\n").split("\n")
    fine = all(line in ACTIONS or ROW.fullmatch(line) for line in lines)
    if not MISSION.fullmatch(mission) or not fine:
        raise ValueError(
            f"--prompt {prompt[:40]!r} starts no episode: give a mission such as 'go to the red "
            f"ball', with a colour of {', '.join(COLOURS)}, and a {', '.join(THINGS[:-1])} or "
            f"{THINGS[-1]}"
        )
    return "\n".join([mission, *lines, ""])


PAINTS = {
    "red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "purple": (112, 39, 195),
    "yellow": (230, 210, 0), "grey": (100, 100, 100),
}  # fmt: skip
DRAWN = 12  # episodes in a picture, and views of each


def draw_cell(cell: str) -> np.ndarray:
    """uint8 (12, 12, 3): a ball is a disc, a box a frame, a key a bar."""
    image = np.full((12, 12, 3), 255, dtype=np.uint8)
    y, x = np.mgrid[-5.5:6, -5.5:6]
    if cell in (UNSEEN, WALL):
        image[:] = 0 if cell == WALL else 200
    elif cell == ROBOT:
        image[np.abs(x) < (y + 5) / 2] = (220, 60, 60)
    for (thing, colour), sign in OBJECTS.items():
        if sign == cell:
            shapes = {
                "key": np.abs(x) < 2,
                "ball": x**2 + y**2 < 22,
                "box": (np.maximum(np.abs(x), np.abs(y)) // 1.5 == 2),
            }
            image[shapes[thing] & (np.abs(y) < 5)] = PAINTS[colour]
    return image


def draw(texts: Sequence[str], path: Path) -> None:
    """Draw up to DRAWN episodes, each a row of its first views."""
    from data import pictures  # loads Pillow, which texts do not need

    blank = [UNSEEN * SIDE]
    strips = []
    for text in texts[:DRAWN]:
        views = [rows for rows, _ in read_steps(text)[1]][:DRAWN]
        views += [blank] * (DRAWN - len(views))
        panels = []
        for rows in views:
            whole = blank * (SIDE - len(rows)) + rows
            image = np.block([[[draw_cell(cell)] for cell in row] for row in whole])
            panels.append(np.pad(image, ((3, 3), (3, 3), (0, 0)), constant_values=255))
        strips.append(np.concatenate(panels, axis=1))
    pictures.save(np.concatenate(strips), path.with_suffix(".png"))


MODALITY = modality.Modality(
    about="episodes of a robot in a room with keys, balls and boxes",
    unit="episodes",
    meaning="the last action reaches the goal, and the views are of one world",
    fault=fault,
    longest=LONGEST,
    describe=describe,
    read_prompt=read_prompt,
    games={f"success, {level}": partial(play_texts, level) for level in LEVELS},
    players={"expert": partial(results, follow_expert), "random": lambda: results(at_random())},
    draw=draw,
    endings=(".png",),
)


# ---- the source ----------------------------------------------------------------------------------


def version() -> str:
    """A name for the exact documents and records: it changes if they do."""
    return f"episodes-2 {PACKAGE.name} {PACKAGE.version}"


def documents(report: Report | None = None) -> Iterator[Document]:
    """Yield the expert's episodes. Raises ValueError, with a command, without the package."""
    if report is None:
        report = Report()
    load()
    report.note(f"licence: {PACKAGE.licence}")
    known = set()
    for seed in range(SEEDS):
        for level in LEVELS:
            report.found += 1
            name = f"{level}, seed {seed}"
            episode = Episode(level, seed)
            split = split_of(episode.world, HELD_OUT)
            finish(follow_expert, [episode])
            text = episode.text()
            if not set(episode.actions) <= set(ACTIONS):
                report.skip("the expert carries an obstacle away", name)
            elif not episode.reached:
                report.skip("the expert does not reach the goal", name)
            elif text in known:
                report.skip("the same episode as an earlier one", name)
            else:
                known.add(text)
                report.used += 1
                yield Document(text, split, name)


def look() -> None:
    """Print the size of the data set, an episode, how many are valid, and who reaches the goal."""
    modality.look(sys.modules[__name__])
    for name, player in MODALITY.players.items():
        for game, found in player().items():
            print(f"{name}: {game} {sum(found)} of {counted(len(found), 'episodes')}")


if __name__ == "__main__":
    command.run("episodes", __doc__, look)
