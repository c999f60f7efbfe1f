"""A stand-in for minigrid: corridors with one object at the end, and an expert."""

import enum

import numpy as np

from data import episodes

Actions = enum.IntEnum(
    "Actions", ["left", "right", "forward", "pickup", "drop", "toggle", "done"], start=0
)
AHEAD = ((1, 0), (0, 1), (-1, 0), (0, -1))
EMPTY, WALL = (1, 0, 0), (2, 5, 0)


class Grid:
    """The numbers of all cells, (column, row, 3)."""

    def __init__(self, cells: np.ndarray):
        self.cells = cells

    def encode(self) -> np.ndarray:
        return self.cells


class Corridor:
    """Seven cells from wall to wall; a seed gives the object, and where the robot starts."""

    actions = Actions

    def reset(self, seed: int):
        cells = np.full((5, 9, 3), WALL, dtype=np.uint8)
        cells[2, 1:8] = EMPTY
        thing, colour = seed % 3, seed // 3 % 6
        cells[2, 1] = (5 + thing, colour, 0)
        self.grid = Grid(cells)
        self.agent_pos = (2, 3 + seed % 5)
        self.agent_dir = seed // 5 % 4
        self.count = 0
        self.mission = f"go to the {episodes.COLOURS[colour]} {episodes.THINGS[thing]}"
        return self.look(), {}

    def cell(self, ahead: int, right: int) -> tuple[int, int]:
        (ax, ay), (x, y) = AHEAD[self.agent_dir], self.agent_pos
        return x + ahead * ax - right * ay, y + ahead * ay + right * ax

    def look(self) -> dict:
        image = np.zeros((7, 7, 3), dtype=np.uint8)
        for column in range(7):
            for row in range(7):
                x, y = self.cell(6 - row, column - 3)
                if 0 <= x < 5 and 0 <= y < 9 and abs(column - 3) < 2:
                    image[column, row] = self.grid.cells[x, y]
        return {"image": image, "mission": self.mission}

    def step(self, action: int):
        self.count += 1
        self.agent_dir = (self.agent_dir + {0: -1, 1: 1}.get(int(action), 0)) % 4
        front = self.cell(1, 0)
        if action == Actions.forward and tuple(self.grid.cells[front]) == EMPTY:
            self.agent_pos = front
        reached = self.grid.cells[self.cell(1, 0)][0] >= 5
        return self.look(), float(reached), reached, self.count >= 12, {}

    def get_pov_render(self, tile: int) -> np.ndarray:
        return np.full((7 * tile, 7 * tile, 3), self.count, dtype=np.uint8)


class Expert:
    """It turns to the object and walks; where that is grey, it picks something up."""

    def __init__(self, env: Corridor):
        self.env = env

    def replan(self) -> Actions:
        if self.env.grid.cells[2, 1][1] == 5:
            return Actions.pickup
        if self.env.agent_dir == 3:
            return Actions.forward
        return Actions.left if self.env.agent_dir == 0 else Actions.right


def install(monkeypatch) -> None:
    """Let the episodes be played in corridors."""
    worlds = dict.fromkeys(episodes.LEVELS, Corridor)
    monkeypatch.setattr(episodes, "load", lambda: (worlds, Expert))
    monkeypatch.setattr(episodes, "seeds", episodes.seeds.__wrapped__)
    monkeypatch.setattr(episodes, "SEEDS", 120)
    monkeypatch.setattr(episodes, "HELD_OUT", 0.1)
