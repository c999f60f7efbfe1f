"""Several processes: how they divide the rows, and what one process alone does."""

import signal

import pytest
import torch

from tinyfm.training import distributed


def test_ranks_divide_the_rows():
    parts = [distributed.World(rank, 4).rows(12) for rank in range(4)]
    assert [row for part in parts for row in part] == list(range(12))
    assert [distributed.World(rank, 4).first for rank in range(4)] == [True, False, False, False]


def test_nothing_is_shared_out():
    """A validation split may be empty, also where all ranks have to work on each item together."""
    assert [*distributed.World(1, 2).share([], together=True)] == []
    assert [*distributed.World(1, 2).share("a", together=True)] == [(0, "a", False)]
    assert [*distributed.World(1, 2).share("a", together=False)] == []


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="a signal of POSIX")
def test_a_closed_terminal_stops_a_run_unless_nohup_started_it():
    with distributed.Signals() as signals:
        signal.raise_signal(signal.SIGHUP)
    assert signals.received == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.Signals() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals.received == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_rank_that_no_longer_answers(monkeypatch):
    closed = RuntimeError(
        "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:4\nlong"
    )
    assert not distributed.is_lost(closed)  # one process has no others
    monkeypatch.setattr(distributed, "joined", lambda: True)
    assert distributed.is_lost(closed) and distributed.is_lost(torch.distributed.DistError("lost"))
    assert not distributed.is_lost(RuntimeError("a bug of ours"))
    message = distributed.lost(1, closed)
    assert "rank 1 gets no answer" in message and "closed by peer" in message
    assert "--resume" in message and "long\n" not in message


def test_one_process_does_not_communicate(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    world = distributed.start()
    with distributed.first_rank_first(world):
        assert distributed.total(torch.ones(2)).tolist() == [1, 1]
    distributed.stop()
    assert world == distributed.World()
    assert world.first
    assert world.rows(5) == range(5)


def test_more_processes_than_gpus(monkeypatch):
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--nproc_per_node=2 or less"):
        distributed.start()
