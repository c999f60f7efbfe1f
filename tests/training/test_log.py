"""The records of a run: metrics.jsonl, the curve, printed lines and the progress bar."""

import json
import math
import sys

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from tinyfm.training import log

pytestmark = pytest.mark.usefixtures("drawing")


def open_log(run, start=0, first=True, **options) -> log.Logbook:
    return log.Logbook(run, 30, start, first, **options)


def test_rows_lines_and_curve(tmp_path, capsys):
    logbook = open_log(tmp_path)
    logbook.add({"step": 0, "val_loss": 5.5})
    logbook.add({"step": 10, "loss": 3.25, "lr": 0.5})
    logbook.say("--- step 10 writes: naïve")
    logbook.draw()
    logbook.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 0/30  val_loss 5.5",
        "step 10/30  loss 3.25",
        "--- step 10 writes: naïve",
    ]
    rows = log.read_metrics(tmp_path / "metrics.jsonl")
    times = [row.pop("time") for row in rows]
    assert rows == [{"step": 0, "val_loss": 5.5}, {"step": 10, "loss": 3.25, "lr": 0.5}]
    assert times[0] > 1.7e9  # seconds since 1970
    image = matplotlib.image.imread(tmp_path / "loss.png")
    assert image.ndim == 3 and 0.5 < image.mean() < 1 and image.min() < 0.5  # ink on white


def test_resuming_drops_later_rows_and_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (10, 20, 30)]
    path.write_text("".join(lines) + lines[0][:9], encoding="utf-8")
    logbook = open_log(tmp_path, start=20)
    logbook.add({"step": 25, "loss": 0.5})
    logbook.close()
    assert [row["step"] for row in log.read_metrics(path)] == [10, 20, 25]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_damaged_lines_are_kept_aside(tmp_path, capsys):
    """An editor, or a disk, spoils some lines. Those before and after them stay."""
    path = tmp_path / "metrics.jsonl"
    damaged = [
        b"{\n",
        b"\xff\n",
        b"[1]\n",
        b'{"loss": 1}\n',
        b'{"step": 1.5}\n',
        b"[" * 9999 + b"\n",
    ]
    damaged += [b'{"step": 10, "loss": "low"}\n']
    rows = [b'{"step": %d, "loss": 1.0, "grad_norm": Infinity}\n' % step for step in range(8)]
    path.write_bytes(b"".join(row + bad for row, bad in zip(rows, damaged)) + rows[7] + rows[0][:9])
    expected = [{"step": step, "loss": 1.0} for step in range(8)]
    assert log.read_metrics(path) == expected
    open_log(tmp_path, start=20).close()
    assert log.read_metrics(path) == expected
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == b"".join(damaged)
    assert "moved to metrics.damaged.jsonl: 7" in capsys.readouterr().out
    open_log(tmp_path, start=20).close()
    assert "damaged" not in capsys.readouterr().out


def test_a_line_is_short_and_the_file_has_all(tmp_path, capsys):
    logbook = open_log(tmp_path)
    row = {"step": 10, "loss_with_teacher": 3.25, "lr": 0.5, "tokens_per_s": 15_123.4}
    logbook.add(row)
    logbook.close()
    assert capsys.readouterr().out == "step 10/30  loss_with_teacher 3.25  15.1k tokens/s\n"
    assert log.read_metrics(tmp_path / "metrics.jsonl")[0].items() >= row.items()


@pytest.mark.parametrize(
    ("scores", "name"),
    [
        ({"step": 3, "val_loss": 2.0, "val_bpb": 1.5, "time": 0.0}, "val_bpb"),
        ({"val_loss": 2.0, "val_loss_kl": 1.0}, "val_loss"),
        (
            {"step": 3, "val_loss": 2.0, "val_loss_kl": 1.0, "zero_shot": 0.5, "other": 1},
            "zero_shot",
        ),
    ],
)
def test_the_score_that_sums_up(scores, name):
    assert log.summary_score(scores) == name


def test_the_curve_has_the_score_and_its_usual_value(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    logbook = open_log(tmp_path, usual=(1.65, 1.66))
    logbook.add({"step": 0, "val_loss": 5.5, "val_bpb": 3.5})
    logbook.add({"step": 10, "loss": 3.25})
    logbook.draw()
    logbook.close()
    losses, score = drawn[0].axes
    assert [line.get_label() for line in losses.lines] == ["loss, in training", "validation loss"]
    assert list(score.lines[0].get_ydata()) == [3.5]
    assert [line.get_ydata()[0] for line in score.lines[1:]] == [1.65, 1.66]
    assert score.get_ylabel() == "bits per byte of validation text"


def test_other_ranks_are_silent(tmp_path, capsys):
    logbook = open_log(tmp_path / "run", first=False)
    logbook.add({"step": 1, "loss": math.pi})
    logbook.say("hello")
    logbook.draw()
    logbook.close()
    out = capsys.readouterr()
    assert not (tmp_path / "run").exists() and not out.out and not out.err


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    logbook = open_log(tmp_path)
    logbook.add({"step": 10, "loss": 3.25})
    logbook.bar.update(10)
    logbook.say("a line")
    logbook.close()
    out = capsys.readouterr()
    assert out.out == "a line\n" and "10/30" in out.err and "loss 3.25" in out.err


def test_a_missing_tensorboard_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        log.summary_writer()
