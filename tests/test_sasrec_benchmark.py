"""benchmarks/sasrec.py learns what can be learned, ranks as a loop by hand does, and refuses broken lines."""

from __future__ import annotations

import json
import math
import runpy
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from e2p.errors import DataError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ITEMS = 12


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script's names; it takes the module beside it as it would when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "sasrec.py"))


def cycle_file(folder: Path, users: int = 60) -> Path:
    """Every user goes round the same items from a start of their own."""
    path = folder / "cycle.txt"
    lines = [
        f"u{user} " + " ".join(f"i{(user + step) % ITEMS}" for step in range(4 + user % 5)) for user in range(users)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_cycle_is_learned_and_every_rank_is_written(script: dict[str, Any], tmp_path: Path) -> None:
    out, work = tmp_path / "sasrec.json", tmp_path / "work"
    options = ["--sequences", str(cycle_file(tmp_path)), "--name", "cycle", "--work", str(work), "--out", str(out)]
    options += ["--seeds", "1", "2", "--hidden", "16", "--batch", "16", "--lr", "0.02", "--dropout", "0.1"]
    script["main"]([*options, "--epochs", "20"])
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["data"]["queries"] == {"validation": 60, "test": 60}
    assert [run["seed"] for run in content["runs"]] == [1, 2]
    assert str(tmp_path) not in out.read_text(encoding="utf-8").replace(content["provenance"]["command"], "")
    ranks = [pl.read_parquet(work / f"cycle-{seed}.parquet") for seed in (1, 2)]
    for table in ranks:
        assert table.columns == ["user_id", "timestamp", "item_id", "rank", "rank_unseen"]
        assert (table["rank"] == 1).mean() > 0.95
    figures = content["test"]["sasrec"]["all"]
    assert figures["mrr"]["mean"] == pytest.approx(np.mean([(1 / table["rank"]).mean() for table in ranks]))
    assert figures["mrr"]["ci"][0] <= figures["mrr"]["mean"] <= figures["mrr"]["ci"][1]
    # The next item of a cycle says nothing about which items are popular.
    assert content["test"]["popularity"]["all"]["mrr"]["mean"] < 0.5


def test_ranks_and_metrics_equal_those_counted_by_hand(script: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(0, 40, size=(20, 50)).astype(np.float32))
    targets = rng.integers(50, size=20)
    histories = [rng.integers(50, size=rng.integers(6)) for _ in range(20)]
    found = script["ranks"](scores, targets, histories)
    for row, (target, history) in enumerate(zip(targets, histories, strict=True)):
        for reading, banned in (("all", set()), ("unseen", set(history.tolist()))):
            value = [-math.inf if item in banned else float(scores[row, item]) for item in range(50)]
            better = sum(other > value[target] for other in value)
            equal = sum(other == value[target] for other in value) - 1
            assert found[reading][row] == 1 + better + math.ceil(equal / 2)
    broken = torch.full((1, 50), torch.nan)
    assert script["ranks"](broken, targets[:1], histories[:1])["all"].tolist() == [51]
    metrics = script["per_query"](np.array([1, 5, 6, 11, 31]))
    assert metrics["recall@5"].tolist() == [1, 1, 0, 0, 0]
    assert metrics["recall@30"].tolist() == [1, 1, 1, 1, 0]
    assert metrics["ndcg@10"].tolist() == pytest.approx([1, 1 / math.log2(6), 1 / math.log2(7), 0, 0])
    assert metrics["mrr"].tolist() == pytest.approx([1, 1 / 5, 1 / 6, 1 / 11, 1 / 31])


def test_the_loss_and_its_gradients_equal_pytorchs(script: dict[str, Any]) -> None:
    torch.manual_seed(0)
    targets = torch.randint(30, (11,))
    inputs = [torch.randn(11, 8, dtype=torch.double), torch.randn(30, 8, dtype=torch.double)]
    ours, theirs = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    loss = script["FullCrossEntropy"].apply(*ours, targets, 4)
    plain = torch.nn.functional.cross_entropy(theirs[0] @ theirs[1].T, targets)
    assert loss.item() == pytest.approx(plain.item())
    (3 * loss).backward()
    (3 * plain).backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_what_comes_later_or_pads_the_right_is_not_seen(script: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = script["SASRec"](20, script["Settings"](hidden=16)).eval()
    codes = torch.randint(20, (3, 9))
    torch.testing.assert_close(model(codes)[:, :5], model(codes[:, :5]))


@pytest.mark.parametrize("length", [1, 3, 50])
def test_windows_hold_every_target_once(script: dict[str, Any], length: int) -> None:
    train = [np.arange(n) + 1000 * n for n in (1, 2, 3, 4, 5, 50, 51, 52, 230)]
    cut = script["windows"](train, length, np.random.default_rng(0))
    assert max(len(window) for window in cut) <= length + 1
    found = sorted(int(item) for window in cut for item in window[1:])
    assert found == sorted(int(item) for sequence in train for item in sequence[1:])
    assert all((np.diff(window) == 1).all() for window in cut)


def tables(folder: Path, by_time: bool) -> Path:
    """A few users' plays, a minute apart, as `e2p prepare nextitem` writes them."""
    began = datetime(2020, 1, 1)
    plays = [("a", 0, "x"), ("b", 1, "y"), ("a", 2, "y"), ("b", 3, "z"), ("a", 4, "z"), ("a", 5, "x"), ("b", 5, "w")]
    plays += [("b", 6, "x"), ("c", 7, "y")]
    split = ["train"] * 4 + ["validation"] * 2 + ["test"] * 3
    if not by_time:
        split = ["train", "train", "train", "train", "validation", "test", "validation", "test", "test", "train"]
        plays.append(("d", 8, "y"))  # all of whose plays are for training, however late
    table = pl.DataFrame(plays, schema=["user_id", "timestamp", "item_id"], orient="row")
    table = table.with_columns(timestamp=began + pl.col("timestamp") * timedelta(minutes=1), split=pl.Series(split))
    table.drop("split").write_parquet(folder / "interactions.parquet")
    table.write_parquet(folder / "examples.parquet")
    pl.DataFrame({"item_id": ["never", "w", "x", "y", "z"]}).write_parquet(folder / "items.parquet")
    return folder


@pytest.mark.parametrize("by_time", [True, False])
def test_training_stops_before_what_is_held_out(script: dict[str, Any], tmp_path: Path, by_time: bool) -> None:
    data = script["load"](*script["from_tables"](tables(tmp_path, by_time)))
    names = np.array(["never", "w", "x", "y", "z"])
    # "b" plays "w" in the minute of a validation example of "a": by time, it is a test row and never trained on.
    assert [names[codes].tolist() for codes in data.train] == [["x", "y"], ["y", "z"], *([] if by_time else [["y"]])]
    assert data.items == len(names)
    assert data.about["split"] == ("time" if by_time else "each user's last")
    asked = [tuple(row) for row in data.test.rows.select("user_id", "item_id").iter_rows()]
    histories = [names[codes].tolist() for codes in data.test.histories]
    expected = {("b", "x"): ["y", "z", "w"], ("c", "y"): []}
    expected |= {("b", "w"): ["y", "z"]} if by_time else {("a", "x"): ["x", "y", "z"]}
    assert dict(zip(asked, histories, strict=True)) == expected
    assert data.about["test_without_history"] == 1
    # Where nothing is known of a user, the popular items stand first.
    model = script["SASRec"](5, script["Settings"](hidden=16))
    alone = asked.index(("c", "y"))
    assert script["rank_all"](data, data.test, model, 50)["all"][alone] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 2 3 4\n2 3 4\n", r"line 2: expected a user and at least three items .* got '2 3 4'; mend or delete"),
        ("1 2 3 4\n\n2 3 4 5\n", "line 2: expected a user"),
        ("1 2 3 4\n1 3 4 5\n", "one line for each user, got 2 lines of 1 users; join"),
        ("", "got 0 lines"),
    ],
)
def test_bad_lines_are_named(script: dict[str, Any], tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        script["from_sequences"](path)


def test_tables_that_were_not_prepared_are_named(script: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"interactions\.parquet: expected a table of `e2p prepare nextitem`"):
        script["from_tables"](tmp_path)
    pl.DataFrame({"user_id": ["a"], "item_id": ["x"]}).write_parquet(tmp_path / "interactions.parquet")
    with pytest.raises(DataError, match=r"expected the columns .* got none named \['timestamp'\]"):
        script["from_tables"](tmp_path)
