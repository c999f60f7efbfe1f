"""What each exercise of lesson 11 must satisfy. The ranks are threads of one process here."""

import contextlib
import json
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from course.lessons import checks
from tinyfm.common.files import CheckpointError
from tinyfm.training import checkpoint, distributed, muon, parallel
from tinyfm.training.distributed import World


class Ranks:
    """The ranks of a run as threads. It stands in for torch.distributed: what one rank sends, the
    others find in a list."""

    def __init__(self, size: int):
        self.size = size
        self.own = threading.local()
        self.barrier = threading.Barrier(size, timeout=5)
        self.sent = [None] * size

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_rank(self, group=None) -> int:
        return self.own.rank

    def get_world_size(self, group=None) -> int:
        return self.size

    def swap(self, value) -> list:
        """What every rank gave."""
        self.sent[self.own.rank] = value
        self.barrier.wait()
        everyone = list(self.sent)
        self.barrier.wait()
        return everyone

    def all_reduce(self, tensor) -> None:
        tensor.copy_(sum(self.swap(tensor.detach().clone())))

    def all_gather(self, parts, tensor) -> None:
        for part, sent in zip(parts, self.swap(tensor.detach().clone())):
            part.copy_(sent)

    def all_to_all_single(self, result, values, received, sent, group=None) -> None:
        pieces = [everyone[self.own.rank] for everyone in self.swap(values.split(sent))]
        assert [len(piece) for piece in pieces] == received, (
            f"rank {self.own.rank} expects {received} numbers and is sent {list(map(len, pieces))}"
        )
        result.copy_(torch.cat(pieces))

    def run(self, work) -> list:
        """work(rank) on every rank; the results by rank. Raises the first error."""
        results = [None] * self.size
        errors = []

        def body(rank: int) -> None:
            self.own.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            broken = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
            raise (broken or errors)[0]
        return results


@pytest.fixture
def ranks(monkeypatch):
    """A function that makes n ranks and lets the modules use them."""

    def make(size: int) -> Ranks:
        together = Ranks(size)
        monkeypatch.setattr(distributed, "dist", together)
        monkeypatch.setattr(muon, "dist", together)
        monkeypatch.setattr(muon, "shard_group", lambda shard: None)
        return together

    return make


# ---- shares -------------------------------------------------------------------------------------


@checks("World.rows")
def test_ranks_read_neighbouring_blocks_of_rows():
    # 12 rows on 3 ranks: 0-3, 4-7, 8-11.
    for rank, expected in enumerate(([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11])):
        found = list(World(rank, 3).rows(12))
        assert found == expected, f"rank {rank} of 3 reads rows {expected} of 12, not {found}"


@checks("World.rows")
def test_every_row_is_read_once():
    for size in (1, 2, 5):
        found = [row for rank in range(size) for row in World(rank, size).rows(20)]
        assert found == list(range(20)), f"{size} ranks read the rows {found} of 20"


@checks("shard_heights")
def test_rows_are_cut_as_torch_cuts_them():
    # By hand: 10 rows on 4 ranks are 3 3 3 1; 5 rows on 4 ranks are 2 2 1 and none.
    for rows, size, expected in ((10, 4, [3, 3, 3, 1]), (5, 4, [2, 2, 1, 0]), (6, 3, [2, 2, 2])):
        found = list(muon.shard_heights(rows, size))
        assert found == expected, f"{rows} rows on {size} ranks are {expected}, not {found}"


@checks("shard_heights")
def test_no_row_is_lost_and_none_is_negative():
    for rows in range(1, 30):
        for size in range(1, 9):
            found = list(muon.shard_heights(rows, size))
            assert len(found) == size, f"{size} ranks have {size} heights, not {found}"
            assert sum(found) == rows, f"{found} are not {rows} rows in all"
            assert min(found) >= 0, f"no rank holds fewer than 0 rows: {found}"


def shares(size: int, items: str, together: bool) -> list[list]:
    return [list(World(rank, size).share(items, together)) for rank in range(size)]


@checks("World.share")
def test_items_are_dealt_in_turn_with_their_places():
    found = shares(2, "abcd", False)
    expected = [[(0, "a", True), (2, "c", True)], [(1, "b", True), (3, "d", True)]]
    assert found == expected, f"a b c d on two ranks are {expected}, not {found}"


@checks("World.share")
def test_ranks_that_work_together_take_equally_many_items():
    found = shares(3, "abcd", True)
    # The last round reaches rank 0 alone: ranks 1 and 2 take d again, and it does not count.
    expected = [[(0, "a", True), (3, "d", True)]]
    expected += [[(1, "b", True), (3, "d", False)], [(2, "c", True), (3, "d", False)]]
    assert found == expected, f"a b c d on three ranks together are {expected}, not {found}"


@checks("World.share")
def test_every_item_counts_once():
    for size in (1, 2, 3, 4):
        for n in range(9):
            for together in (False, True):
                found = shares(size, "abcdefgh"[:n], together)
                counted = sorted(place for own in found for place, _, counts in own if counts)
                assert counted == list(range(n)), (
                    f"{n} items on {size} ranks (together={together}): counted are {counted}"
                )
                if not together:
                    taken = sum(map(len, found))
                    assert taken == n, f"{n} items on {size} ranks that work alone: {taken} taken"
                else:
                    lengths = {len(own) for own in found}
                    assert len(lengths) == 1, f"{n} items on {size} ranks: {lengths} items a rank"


@checks("World.share")
def test_items_may_come_one_by_one():
    found = next(World(0, 2).share(iter("abc"), True))
    assert found == (0, "a", True), f"the first of an iterator is (0, 'a', True), not {found}"


# ---- gradients ----------------------------------------------------------------------------------


@checks("Gather.backward")
def test_a_row_gets_the_gradients_of_every_ranks_loss(ranks):
    together = ranks(2)
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])

    def work(rank: int) -> list[float]:
        rows = torch.zeros(2, requires_grad=True)
        (distributed.gather(rows) * weights[rank]).sum().backward()
        return rows.grad.tolist()

    found = together.run(work)
    # Rank 0 holds rows 0 and 1: their weights in both losses are 1 + 10 and 2 + 20.
    assert found[0] == [11.0, 22.0], f"rank 0's gradient is [11, 22], not {found[0]}"
    assert found[1] == [33.0, 44.0], f"rank 1's gradient is [33, 44], not {found[1]}"


@checks("Gather.backward")
def test_the_incoming_gradient_is_left_as_it_is(ranks):
    together = ranks(2)

    def work(rank: int) -> list[float]:
        gradient = torch.ones(4)
        distributed.Gather.backward(None, gradient)
        return gradient.tolist()

    found = together.run(work)[0]
    assert found == [1.0] * 4, f"the gradient that came in was ones; it has become {found}"


@checks("Gather.backward")
def test_two_ranks_have_the_gradient_of_one(ranks):
    """A loss that compares all rows with all rows, as CLIP's does."""
    generator = torch.Generator().manual_seed(0)
    everything = torch.randn(6, 3, generator=generator)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return (rows @ rows.T).logsumexp(1).mean()

    alone = everything.clone().requires_grad_()
    loss(alone).backward()
    together = ranks(3)

    def work(rank: int) -> torch.Tensor:
        rows = everything[World(rank, 3).rows(6)].clone().requires_grad_()
        loss(distributed.gather(rows)).backward()
        return rows.grad / 3  # gradients are averaged over the ranks

    found = torch.cat(together.run(work))
    assert torch.allclose(found, alone.grad, atol=1e-5), (
        f"the largest difference from one rank's gradient is {(found - alone.grad).abs().max():.2g}"
    )


class Exchange(nn.Module):
    """Records how a module of DDP or FSDP2 is told to exchange."""

    def __init__(self):
        super().__init__()
        self.said = []

    def set_requires_gradient_sync(self, wanted: bool) -> None:
        self.said.append(f"sync {wanted}")

    @contextlib.contextmanager
    def no_sync(self):
        self.said.append("no_sync")
        yield
        self.said.append("end of no_sync")


def a_parallel(size: int, sharded: bool, kept=()) -> parallel.Parallel:
    result = object.__new__(parallel.Parallel)
    result.world = World(0, size)
    result.sharded = sharded
    result.module = Exchange()
    result.kept = list(kept)
    return result


def said_in(p: parallel.Parallel, last: bool) -> list[str]:
    with p.exchanging(last):
        p.module.said.append("backward")
    return p.module.said


@checks("Parallel.exchanging")
def test_copies_exchange_in_the_last_micro_batch_alone():
    found = said_in(a_parallel(2, sharded=False), last=False)
    expected = ["no_sync", "backward", "end of no_sync"]
    assert found == expected, f"before the last one, DDP should see {expected}, it sees {found}"
    found = said_in(a_parallel(2, sharded=False), last=True)
    assert found == ["backward"], f"in the last one DDP exchanges as it likes; it sees {found}"


@checks("Parallel.exchanging")
def test_shards_are_told_before_the_backward_pass():
    for last in (False, True):
        found = said_in(a_parallel(2, sharded=True), last)
        expected = [f"sync {last}", "backward"]
        assert found == expected, f"last={last}: FSDP2 should see {expected}, it sees {found}"


@checks("Parallel.exchanging")
def test_one_process_has_nobody_to_wait_for():
    found = said_in(a_parallel(1, sharded=False), last=False)
    assert found == ["backward"], f"a run of one process has no DDP to ask; it asked {found}"


@checks("Parallel.exchanging")
def test_numbers_that_cannot_be_cut_are_averaged_once(ranks):
    together = ranks(2)

    def work(rank: int) -> list[float]:
        scalar = nn.Parameter(torch.tensor(1.0))
        p = a_parallel(2, sharded=True, kept=[scalar])
        seen = []
        for last in (False, True):
            with p.exchanging(last):
                scalar.grad = torch.tensor([3.0, 5.0][rank])
            seen.append(scalar.grad.item())
        return seen

    found = together.run(work)
    # Gradients 3 and 5: kept in the first micro-batch, averaged to 4 in the last one.
    assert found == [[3.0, 4.0], [5.0, 4.0]], (
        f"the gradients should be 3 then 4 on rank 0, and 5 then 4 on rank 1; they are {found}"
    )


# ---- checkpoints --------------------------------------------------------------------------------


def a_checkpoint(folder):
    (folder / "state").mkdir(parents=True)
    (folder / "model.bin").write_bytes(b"weights")
    (folder / "state" / "rank-0.bin").write_bytes(b"moments")
    (folder / "a.json").write_bytes(b"{}")
    manifest = checkpoint.make_manifest(folder)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    return folder


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.verify(folder)
    return str(caught.value)


@checks("verify")
def test_an_undamaged_checkpoint_passes(tmp_path):
    checkpoint.verify(a_checkpoint(tmp_path / "step-000001"))


@checks("verify")
def test_one_changed_bit_is_found(tmp_path):
    folder = a_checkpoint(tmp_path / "step-000001")
    (folder / "model.bin").write_bytes(b"weighty")
    assert "model.bin" in refusal(folder), "the message names the file that was altered"


@checks("verify")
def test_a_missing_and_an_additional_file_are_found(tmp_path):
    folder = a_checkpoint(tmp_path / "step-000001")
    (folder / "state" / "rank-0.bin").unlink()
    text = refusal(folder)
    assert "state/rank-0.bin" in text, f"the missing file should be named: {text}"
    assert "missing" in text, f"it should be called missing: {text}"
    folder = a_checkpoint(tmp_path / "step-000002")
    (folder / "more.bin").write_bytes(b"")
    text = refusal(folder)
    assert "more.bin" in text, f"the additional file should be named: {text}"


@checks("verify")
def test_the_first_file_that_differs_is_named(tmp_path):
    folder = a_checkpoint(tmp_path / "step-000001")
    (folder / "model.bin").write_bytes(b"")
    (folder / "b.json").write_bytes(b"")
    text = refusal(folder)
    assert "b.json" in text, f"of b.json and model.bin the first is b.json: {text}"


@checks("verify")
def test_a_checkpoint_without_a_manifest_is_incomplete(tmp_path):
    folder = a_checkpoint(tmp_path / "step-000001")
    (folder / checkpoint.MANIFEST).unlink()
    text = refusal(folder)
    assert checkpoint.MANIFEST in text, f"the message should name the manifest: {text}"


@checks("verify")
def test_a_manifest_that_is_no_table_is_damage(tmp_path):
    folder = a_checkpoint(tmp_path / "step-000001")
    (folder / checkpoint.MANIFEST).write_text("[]")
    text = refusal(folder)
    assert checkpoint.MANIFEST in text, f"the message should name the manifest: {text}"


# ---- Muon ---------------------------------------------------------------------------------------


def in_shards(ranks, n: int, rows: int, columns: int, size: int) -> tuple[torch.Tensor, list]:
    """n random matrices, and what each rank gets for its rows of them."""
    matrices = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(0))
    parts = matrices.split(muon.shard_heights(rows, size), dim=1)
    like = SimpleNamespace(size=lambda dim: rows)
    return matrices, ranks(size).run(lambda rank: muon.orthogonalise_shards(parts[rank], like))


@checks("orthogonalise_shards")
@pytest.mark.parametrize(("n", "size"), [(2, 2), (3, 2), (4, 3), (1, 3)])
def test_shards_give_the_products_of_whole_matrices(ranks, n, size):
    matrices, found = in_shards(ranks, n, 7, 5, size)
    expected = muon.orthogonalise(matrices)
    whole = torch.cat(found, dim=1)
    assert whole.shape == expected.shape, f"the shape should be {expected.shape}: {whole.shape}"
    difference = (whole.float() - expected.float()).abs().max().item()
    assert difference < 0.02, f"the largest difference from whole matrices is {difference:.2g}"


@checks("orthogonalise_shards")
def test_each_matrix_is_orthogonalised_once(ranks, monkeypatch):
    counts = []
    lock = threading.Lock()
    real = muon.orthogonalise

    def counted(M: torch.Tensor) -> torch.Tensor:
        with lock:
            counts.append(len(M))
        return real(M)

    monkeypatch.setattr(muon, "orthogonalise", counted)
    in_shards(ranks, 5, 6, 4, 2)
    assert sorted(counts) == [2, 3], f"5 matrices on 2 ranks are 3 and 2 products, not {counts}"


@checks("orthogonalise_shards")
def test_a_rank_without_rows_takes_part(ranks):
    # 5 rows on 4 ranks: the last one holds none, but it does orthogonalise.
    matrices, found = in_shards(ranks, 4, 5, 3, 4)
    shapes = [tuple(part.shape) for part in found]
    expected = [(4, 2, 3), (4, 2, 3), (4, 1, 3), (4, 0, 3)]
    assert shapes == expected, f"the shapes by rank should be {expected}, they are {shapes}"
    difference = (torch.cat(found, 1).float() - muon.orthogonalise(matrices).float()).abs().max()
    assert difference < 0.02, f"the largest difference from whole matrices is {difference:.2g}"


# ---- what holds them together -------------------------------------------------------------------


def test_all_ranks_stop_when_one_is_told_to(ranks):
    together = ranks(3)

    def work(rank: int) -> tuple[float, int]:
        signals = distributed.Signals()
        if rank == 1:
            signals.receive(15, None)
        sums = signals.total(torch.tensor([1.0]))
        signals.agree(sums[-1].item())
        return sums[0].item(), signals.agreed

    found = together.run(work)
    assert found == [(3.0, 15)] * 3, f"each rank should have the sum 3 and stop for 15: {found}"


def some_checkpoints(run, steps, latest: int) -> None:
    for step in steps:
        a_checkpoint(run / f"step-{step:06d}")
    (run / "latest").write_text(f"step-{latest:06d}\n")


def test_a_run_resumes_from_its_newest_checkpoint(tmp_path):
    some_checkpoints(tmp_path, (100, 200, 300), latest=300)
    found = checkpoint.find(tmp_path).name
    assert found == "step-000300", f"the newest is step-000300, found was {found}"


def test_the_last_two_and_the_best_checkpoint_are_kept(tmp_path):
    some_checkpoints(tmp_path, (100, 200, 300, 400, 500), latest=500)
    removed = sorted(folder.name for folder in checkpoint.prune(tmp_path, keep_last=2, best=200))
    assert removed == ["step-000100", "step-000300"], f"removed were {removed}"


def test_ranks_that_differ_say_so(ranks):
    together = ranks(2)

    def gather_objects(everyone, facts) -> None:
        everyone[:] = together.swap(facts)

    together.all_gather_object = gather_objects

    def work(rank: int) -> str:
        try:
            distributed.check_alike({"lr": [0.1, 0.2][rank], "seed": 0}, World(rank, 2))
        except ValueError as error:
            return str(error)
        return "no error"

    found = together.run(work)
    assert all("lr is 0.2, not 0.1" in text for text in found), f"both should name lr: {found}"
