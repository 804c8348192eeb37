"""The users' map against a naive count of neighbours, and prefixes whose likeness is known."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from e2p.data.tables import write_embeddings
from e2p.errors import DataError
from e2p.evaluation import space
from e2p.evaluation.space import describe_prefix, describe_space, known_attribute, preservation
from e2p.model.e2p import E2PModel
from e2p.training.inputs import RunInputs
from tiny_run import inputs_of, tiny_run

USERS, DIM = 60, 6  # of which 36 train, 12 are for validation and 12 for test


def naive(before: np.ndarray, after: np.ndarray, k: int) -> float:
    """Share of kept neighbours, one user and one neighbour at a time."""
    shares = []
    for user in range(len(before)):
        near = []
        for points in (before, after):
            far = [(float(np.linalg.norm(points[user] - other)), n) for n, other in enumerate(points) if n != user]
            near.append({n for _, n in sorted(far)[:k]})
        shares.append(len(near[0] & near[1]) / k)
    return float(np.mean(shares))


def made(folder: Path, vectors: np.ndarray | None = None, tokens: int = 1) -> tuple[E2PModel, RunInputs]:
    """A fresh phi and inputs with random vectors, or the ones given, for 60 users."""
    config = tiny_run(folder, users=USERS, each=1)
    config = replace(config, projector=replace(config.projector, prefix_tokens=tokens))
    if vectors is None:
        vectors = np.random.default_rng(0).normal(size=(USERS, DIM)).astype(np.float32)
    write_embeddings(config.data.embeddings, [f"u{u:02d}" for u in range(USERS)], vectors)
    backbone, inputs = inputs_of(config)
    model = E2PModel.from_backbone(backbone, vectors.shape[1], config.projector, data=config.data, seed=1)
    model.projector.fit_input(torch.from_numpy(inputs.train_vectors()))
    return model, inputs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[E2PModel, RunInputs]:
    return made(tmp_path_factory.mktemp("space"))


def constant(model: E2PModel, *rows: torch.Tensor) -> None:
    """Make phi say the same for everybody: these soft tokens."""
    with torch.no_grad():
        model.projector.w2.weight.zero_()
        model.projector.w2.bias.copy_(torch.cat(rows))


def test_preservation_is_that_of_a_naive_count() -> None:
    rng = np.random.default_rng(3)
    before = rng.normal(size=(40, 5))
    after = before[:, :3] + rng.normal(size=(40, 3))
    for k in (1, 5, 10):
        assert preservation(before, after, k) == pytest.approx(naive(before, after, k))
    assert 0.2 < preservation(before, after, 10) < 0.9


def test_preservation_of_an_isometry_and_of_chance() -> None:
    rng = np.random.default_rng(4)
    points = rng.normal(size=(300, 8))
    turn, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    assert preservation(points, 3 * points @ turn + 7, 10) == 1
    assert preservation(points, rng.normal(size=(300, 8)), 10) == pytest.approx(10 / 299, abs=0.02)


def test_ties_are_no_agreement() -> None:
    alike = np.eye(200)  # everybody is as far from everybody
    assert preservation(alike, alike, 10) == pytest.approx(10 / 199, abs=0.02)


def test_space_of_a_run(tiny: tuple[E2PModel, RunInputs], tmp_path: Path) -> None:
    model, inputs = tiny
    found = describe_space(model, inputs, tmp_path, seed=5)
    table = pl.read_parquet(tmp_path / "space.parquet")
    assert found is not None
    assert table.columns == ["user_id", "cluster", "embedding_x", "embedding_y", "prefix_x", "prefix_y"]
    assert np.isfinite(table.select(table.columns[2:]).to_numpy()).all()
    parts = {part: set(inputs.keys[inputs.rows(part)]["user_id"]) for part in ("test", "train")}
    assert set(table["user_id"][:12]) == parts["test"]
    assert set(table["user_id"][12:]) == parts["train"]
    # Standardised vectors and flattened soft tokens, by hand.
    rows = [int(user[1:]) for user in table["user_id"]]
    vectors = np.asarray(inputs.embeddings.vectors)[rows].astype(float)
    train = inputs.train_vectors().astype(float)
    before = (vectors - train.mean(0)) / train.std(0)
    after = model.prefix(vectors, len(vectors)).detach().numpy().reshape(len(vectors), -1)
    assert found["preservation"] == pytest.approx(naive(before, after, 10))
    assert (found["users"], found["neighbours"], found["chance"]) == (48, 10, 10 / 47)
    assert {c["name"]: c["users"] for c in found["clusters"]} == dict(table["cluster"].value_counts().iter_rows())
    assert len(found["clusters"]) == 6
    assert [c["users"] for c in found["clusters"]] == sorted((c["users"] for c in found["clusters"]), reverse=True)


def test_space_is_seeded_and_limited(tiny: tuple[E2PModel, RunInputs], tmp_path: Path) -> None:
    tables = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        describe_space(*tiny, tmp_path / folder, seed=seed, limit=20)
        tables.append(pl.read_parquet(tmp_path / folder / "space.parquet"))
    assert tables[0].equals(tables[1])
    assert not tables[0]["user_id"].equals(tables[2]["user_id"])
    test = set(tiny[1].keys[tiny[1].rows("test")]["user_id"])
    assert [len(table) for table in tables] == [20] * 3
    assert all(test < set(table["user_id"]) for table in tables)


def test_a_known_attribute_colours_the_users(tiny: tuple[E2PModel, RunInputs], tmp_path: Path) -> None:
    tastes = {f"u{user:02d}": ("jazz", "soul")[user % 2] for user in range(USERS - 1)}
    found = describe_space(*tiny, tmp_path, seed=5, attribute=tastes)
    table = pl.read_parquet(tmp_path / "space.parquet")
    assert found is not None
    assert {c["name"] for c in found["clusters"]} == set(table["cluster"])
    for user, cluster in table.select("user_id", "cluster").iter_rows():
        assert cluster == tastes.get(user, "unknown")
    many = {f"u{user:02d}": f"value {user // 4:02d}" for user in range(USERS)}
    found = describe_space(*tiny, tmp_path, seed=5, attribute=many)
    assert found is not None
    assert len(found["clusters"]) == 8
    assert found["clusters"][0]["name"] == "other"


def test_users_of_one_vector_are_one_point(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    few = rng.normal(size=(15, DIM)).astype(np.float32)
    found = describe_space(*made(tmp_path / "a", few[np.arange(USERS) % 15]), tmp_path / "a", seed=1)
    assert found is not None
    assert found["users"] == 15
    assert found["neighbours"] == 7  # of 14 others; 10 would be nearly all of them
    none = describe_space(*made(tmp_path / "b", few[np.arange(USERS) % 9]), tmp_path / "b", seed=1)
    assert none is None
    assert not (tmp_path / "b" / "space.parquet").exists()


def test_a_phi_that_sees_nobody_keeps_neighbours_by_chance(tmp_path: Path) -> None:
    model, inputs = made(tmp_path)
    constant(model, torch.ones(model.backbone.hidden_size))
    found = describe_space(model, inputs, tmp_path, seed=1)
    assert found is not None
    assert found["preservation"] == pytest.approx(found["chance"], abs=0.1)
    assert not pl.read_parquet(tmp_path / "space.parquet").select("prefix_x", "prefix_y").to_numpy().any()


def test_vectors_of_one_number_can_be_mapped(tmp_path: Path) -> None:
    vectors = np.random.default_rng(2).normal(size=(USERS, 1)).astype(np.float32)
    found = describe_space(*made(tmp_path, vectors), tmp_path, seed=1)
    assert found is not None
    assert found["users"] == 48


def test_the_newest_vector_counts(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, users=USERS, each=1)
    now = pl.lit(datetime(2024, 6, 1, tzinfo=UTC)).alias("timestamp")
    pl.read_parquet(config.data.examples).with_columns(now).write_parquet(config.data.examples)
    users = [f"u{user:02d}" for user in range(USERS)]
    new = np.random.default_rng(0).normal(size=(USERS, DIM)).astype(np.float32)
    times = [datetime(2024, 5, 1, tzinfo=UTC)] * USERS + [datetime(2024, 4, 1, tzinfo=UTC)] * USERS
    write_embeddings(config.data.embeddings, users * 2, np.concatenate([new, np.zeros_like(new)]), times)
    backbone, inputs = inputs_of(config)
    model = E2PModel.from_backbone(backbone, DIM, config.projector, data=config.data)
    found = describe_space(model, inputs, tmp_path, seed=1)
    assert found is not None, "the older vectors are all one point"


def nearest_by_hand(model: E2PModel, direction: np.ndarray, count: int) -> list[tuple[str, float]]:
    """Tokens and cosines from the whole table at once."""
    table = model.backbone.model.get_input_embeddings().weight.detach().double().numpy()
    table = table[: len(model.backbone.tokenizer)]
    cosine = table @ direction / np.linalg.norm(table, axis=1).clip(1e-9) / np.linalg.norm(direction)
    return [(model.backbone.tokenizer.decode([i]), float(cosine[i])) for i in np.argsort(-cosine)[:count]]


@pytest.mark.parametrize("chunk", [7, 100_000])
def test_prefix_against_plain_numpy(
    tiny: tuple[E2PModel, RunInputs], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "_VOCABULARY_CHUNK", chunk)
    model, inputs = tiny
    found = describe_prefix(model, inputs, seed=2, tokens=5)
    assert found is not None
    test = sorted(set(inputs.keys[inputs.rows("test")]["user_id"]))
    vectors = np.asarray(inputs.embeddings.vectors)[[int(user[1:]) for user in test]]
    prefixes = model.prefix(vectors, len(vectors)).detach().double().numpy()[:, 0]
    mean = prefixes.mean(0)
    norms = np.linalg.norm(prefixes, axis=1)
    assert found["norm"] == pytest.approx({"mean": norms.mean(), "std": norms.std(ddof=1)}, rel=1e-5)
    assert found["token_norm"] == pytest.approx(model.backbone.token_norm())
    share = ((prefixes - mean) ** 2).sum(1).mean() / (prefixes**2).sum(1).mean()
    assert found["user_share"] == pytest.approx(share, rel=1e-4)
    assert [n["cosine"] for n in found["nearest"]] == pytest.approx(
        [cosine for _, cosine in nearest_by_hand(model, mean, 5)], abs=1e-4
    )
    assert len({user["user_id"] for user in found["users"]} & set(test)) == 3
    for user in found["users"]:
        own = prefixes[test.index(user["user_id"])] - mean
        expected = [cosine for _, cosine in nearest_by_hand(model, own, 5)]
        assert [n["cosine"] for n in user["nearest"]] == pytest.approx(expected, abs=1e-4)
    assert 0.3 < found["chance"] < 0.8  # the best of 300 tokens in 32 dimensions


def test_a_prefix_that_is_a_token_is_found(tmp_path: Path) -> None:
    model, inputs = made(tmp_path, tokens=2)
    ids = [model.backbone.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("jazz", "home")]
    rows = model.backbone.embed(torch.tensor(ids)).float()
    constant(model, rows[0] * 3, rows[1])
    found = describe_prefix(model, inputs, seed=1, tokens=3)
    assert found is not None
    assert found["user_share"] == pytest.approx(0, abs=1e-6)
    assert found["norm"]["mean"] == pytest.approx(float(3 * rows[0].norm() + rows[1].norm()) / 2, rel=1e-5)
    assert [n["soft_token"] for n in found["nearest"]] == [1, 1, 1, 2, 2, 2]
    for near, token in ((found["nearest"][0], ids[0]), (found["nearest"][3], ids[1])):
        assert near["token"] == model.backbone.tokenizer.decode([token])
        assert near["cosine"] == pytest.approx(1)


def test_tokens_without_a_letter_are_named(tiny: tuple[E2PModel, RunInputs]) -> None:
    tokenizer: Any = tiny[0].backbone.tokenizer
    for token in range(len(tokenizer)):
        assert space._readable(tiny[0], token).strip()
    byte = tokenizer.convert_tokens_to_ids("Ã")  # half of a letter
    assert space._readable(tiny[0], byte) == "Ã"


def test_one_test_user_has_no_prefix_to_describe(tiny: tuple[E2PModel, RunInputs]) -> None:
    model, inputs = tiny
    rows = inputs.rows("test")
    split = inputs.split.copy()
    split[rows[1:]] = -1
    assert describe_prefix(model, replace(inputs, split=split), seed=1) is None


def test_the_attribute_of_a_user_is_his_commonest_value(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": ["a", "a", "a", "b", "b", "c"], "genre": ["x", "y", "y", "z", "w", None]})
    frame.write_parquet(tmp_path / "examples.parquet")
    assert known_attribute(str(tmp_path / "examples.parquet"), "genre") == {"a": "y", "b": "w"}
    with pytest.raises(DataError, match="country"):
        known_attribute(str(tmp_path / "examples.parquet"), "country")
