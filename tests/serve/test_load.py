"""The load of benchmarks/serve_load.py, in short: ten clients, two seconds."""

import asyncio
import importlib
import sys

import small_runs
from conftest import ROOT


def test_a_short_load_harms_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    serve_load = importlib.import_module("serve_load")
    runs = small_runs.build_runs(tmp_path, ("gpt",))
    with small_runs.serving(runs) as server:
        counts = asyncio.run(serve_load.run_load(server.port, 10, seconds=2, cancellations=20))
        engine = server.engine.models["gpt"]
        assert not engine.waiting
    sys.modules.pop("serve_load")
    assert counts.problems == []
    assert counts.met["served"] >= 6 and counts.met["cancelled"] == 20
    assert counts.met["read slowly"] and counts.met["bad"] >= 8
