"""The playground: what it shows is what the API answers, to whoever may see it, and its routes open nothing else."""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest
from test_app_auth import flat
from test_serve import process

import chromium
from chromium import text, until
from e2p.cli import main
from e2p.config import BackboneConfig, DataConfig, RunConfig
from e2p.config_io import save_yaml
from e2p.config_serving import LimitsConfig, PoliciesConfig, ServingConfig
from e2p.errors import ConfigError, MissingExtraError
from e2p.serving import playground
from e2p.serving.engine import AdapterInfo, EngineError
from e2p.serving.fake_engine import ADAPTERS, Failure, FakeEngine
from e2p.serving.http.app import create_app
from e2p.serving.http.inside import OPEN
from e2p.serving.http.page import COLUMNS, Page
from e2p.serving.known_people import KnownPeople, Place, draw_map, known_people
from e2p.serving.playground import require_playground
from e2p.users.store import open_store
from served import Server, error_of, key, secret, serving, stored, wait_until
from tiny_run import tiny_run, write_config

# Gradio sums up its events by pandas in a way that pandas no longer likes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.future.no_silent_downcasting."),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]

PLACES = {name: Place((0.1 * n, 0.5), (0.5, 0.1 * n)) for n, name in enumerate(("ana", "ben", "shop-1", "shop-2"))}
KNOWN = KnownPeople(PLACES, {"ana": "likes <jazz>", "shop-1": "likes soul"}, ("a playlist", "a song"))
BOTH = key("both", "generate", "users:read")


def page(
    engine: FakeEngine | None = None, known: KnownPeople = KNOWN, keys: Sequence[Any] = (), **settings: Any
) -> Page:
    """The page over a fake engine and four users."""
    engine = engine or FakeEngine()
    asyncio.run(engine.start())
    store = open_store("memory://")
    for number, user in enumerate(("ana", "ben", "shop-1", "shop-2")):
        at = datetime.now(UTC) - timedelta(hours=number + 1, minutes=1)
        store.put(stored(user, number, 0, 0, at=at, version="v2" if user == "shop-2" else "v1"))
    app = create_app(engine, store, ServingConfig(**settings), keys)
    return Page(app, app.state.service, {"taste": known})


def column(page: Page, user: str | None, **changes: Any) -> list[str]:
    """All that a column shows, one after the other."""

    async def collect() -> list[str]:
        return [card async for card in page.answer(**arguments)]

    defaults = {"name": "taste", "prompt": "hi", "strength": 1, "heat": 0, "longest": 64, "seed": 0}
    arguments: dict[str, Any] = {"key": None, "user": user, **defaults, **changes}
    return asyncio.run(collect())


def shown(card: str) -> str:
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", card).split()))


def test_a_column_streams_what_the_api_answers_and_says_who_gave_it() -> None:
    cards = column(page(), "ana")
    assert [shown(card) for card in cards[:3]] == ["…", "…", "taste …"]
    assert len(cards) == 12  # a beginning, the role, seven words, their end, usage, and what gave it
    assert shown(cards[-1]) == "taste user 1 [0 0 0] hi this user's own soft token · version v1, 1 hour old · 7 tokens"
    assert shown(column(page(), "")[-1]).startswith("taste null 1 [] hi the null user: a soft token that stands for")
    assert shown(column(page(), "ben", name="backbone")[-1]).endswith(
        "the bare model, without a soft token · this model takes no users · 5 tokens"
    )


def test_all_columns_go_on_at_once() -> None:
    engine = FakeEngine(delay=0.02)
    here = page(engine)

    async def collect(third: bool) -> list[tuple[str, ...]]:
        asked = ("hi", 1, 0, 64, 0)
        return [cards async for cards in here.answers(None, "taste", third, "ana", "ben", "", *asked)]

    pictures = asyncio.run(collect(third=True))
    assert [shown(card)[:20] for card in pictures[-1]] == [
        "taste user 1 [0 0 0]",
        "taste user 1 [1 0 0]",
        "taste null 1 [] hi t",
    ]
    assert any(all("…" in card for card in cards) for cards in pictures)
    assert asyncio.run(collect(third=False))[-1][2] == ""
    assert len(engine.requests) == 5


def test_settings_reach_the_engine() -> None:
    engine = FakeEngine()
    here = page(engine)
    for strength in (0, 0.5, 2):
        assert f"strength {strength:g}" in shown(
            column(here, "ana", strength=strength, heat=0.5, longest=3, seed=7)[-1]
        )
    assert [r.personal.strength for r in engine.requests] == [0, 0.5, 2]
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.seed) == (0.5, 3, 7)
    column(here, None, strength=0.5, seed=None)
    assert (engine.requests[-1].personal.mode, engine.requests[-1].sampling.seed) == ("null", None)


@pytest.mark.parametrize(
    ("queued", "user", "changes", "said"),
    [
        (None, "nowhere", {}, "the store holds no vector of this user; PUT one first"),
        (None, "shop-2", {}, "this user's vector is of another version than the adapter was trained with; PUT one of"),
        (Failure(EngineError("the engine is\naway")), "ana", {}, "the engine is away"),
        (Failure(EngineError("away"), after=2), "ana", {}, "one two away"),
        (Failure(ValueError("quoted prompt"), after=2), "ana", {}, "one two something broke here; the operator's log"),
        (Failure(ValueError("quoted prompt")), "ana", {}, "something broke here; the operator's log"),
        (None, "ana", {"prompt": "  "}, "type a prompt, then press Ask"),
        (None, "ana", {"prompt": "x" * 100_001}, "messages: expected at most 100000, got 100001"),
        (None, "ana", {"longest": 5000}, "max_tokens: expected at most 2048, got 5000; ask for less"),
        (None, "ana", {"name": "other"}, "model: expected one of taste, backbone; got another"),
        (None, "ana", {"strength": "much"}, "e2p.strength: Input should be a valid number"),
        (None, "ana", {"longest": None}, "settings: expected numbers within their ranges"),
    ],
)
def test_an_error_is_one_line_in_its_column(queued: Any, user: str, changes: Any, said: str) -> None:
    engine = FakeEngine()
    if queued is not None:
        engine.queue(queued)
    last = column(page(engine, policies=PoliciesConfig(unknown_user="error")), user, **changes)[-1]
    assert shown(last).startswith(said)
    assert last.count("e2p-error") == 1
    assert "Traceback" not in last


def test_a_full_queue_is_a_line_too() -> None:
    here = page(FakeEngine(delay=0.05), limits=LimitsConfig(running=1, waiting=0))

    async def collect() -> tuple[str, ...]:
        asked = ("hi", 1, 0, 64, 0)
        return [cards async for cards in here.answers(None, "taste", False, "ana", "ben", "", *asked)][-1]

    texts = [shown(card) for card in asyncio.run(collect())]
    assert sum("requests are running" in text for text in texts) == 1
    assert sum("own soft token" in text for text in texts) == 1


def test_who_stops_ends_the_work() -> None:
    engine = FakeEngine(delay=0.05)
    here = page(engine)

    async def stop() -> None:
        cards = here.answers(None, "taste", True, "ana", "ben", "", "hi", 1, 0, 64, 0)
        while engine.running < 3:
            await anext(cards)
        await cards.aclose()

    asyncio.run(stop())
    assert (engine.running, engine.cancelled) == (0, 3)


def test_texts_stay_texts() -> None:
    engine = FakeEngine()
    engine.queue("<script>alert(1)</script>")
    card = column(page(engine), "ana")[-1]
    assert "<script>" not in card
    assert shown(card.replace("&lt;", "(")).startswith("(script>alert(1)")
    svg = draw_map({'<b>"': Place((0, 0), (1, 1))}, [('<b>"', "A", "#000")])
    assert "<b>" not in svg
    assert "&lt;b&gt;" in svg
    _, about, *_ = page().look(None, "taste", True, "ana", "ben", "")
    assert "likes &lt;jazz&gt;" in about


# ---------------------------------------------------------------- what the page is filled with


def opened(here: Page, key_: str | None = None) -> dict[str, Any]:
    names = ("note", "gate", "body", "adapter", *"ABC", "prompt", "examples", "strength")
    return dict(zip(names, asyncio.run(here.open(key_)), strict=True))


def test_the_page_begins_with_two_users_who_lie_far_apart_and_nobody() -> None:
    found = opened(page())
    assert [found[name]["value"] for name in "ABC"] == ["ana", "shop-2", ""]
    assert found["A"]["choices"] == [("nobody", ""), *((user, user) for user in PLACES)]
    assert found["adapter"]["value"] == "taste"
    assert found["prompt"]["value"] == "a playlist"
    assert found["strength"]["interactive"]
    assert found["body"]["visible"]
    assert not found["note"]["visible"]


def test_a_store_of_many_users_is_not_listed() -> None:
    here, read = page(known=KnownPeople()), []
    store = here.service.store
    assert store is not None

    def many() -> Iterator[Any]:
        for number in range(10**9):
            read.append(number)
            yield stored(f"u{number}", 1, 2, 3)

    store.iterate = many  # type: ignore[method-assign]
    assert len(opened(here)["A"]["choices"]) == 201
    assert len(read) <= 1000


def test_nothing_known_and_nobody_stored() -> None:
    engine = FakeEngine([AdapterInfo("plain", 3, (), False, "r1", 1, "before_completion")])
    asyncio.run(engine.start())
    app = create_app(engine, None, ServingConfig())
    here = Page(app, app.state.service, {})
    found = opened(here)
    assert [found[name]["value"] for name in "ABC"] == ["", "", ""]
    assert "No user has a vector here yet" in found["note"]["value"]
    assert (found["strength"]["value"], found["strength"]["interactive"]) == (1, False)
    assert "No map" in here.look(None, "plain", True, "", "", "")[0]
    assert "without a soft token" in shown(column(here, "", name="plain")[-1])


def test_the_map_marks_who_is_picked_and_says_who_is_not_on_it() -> None:
    svg, *_ = page().look(None, "taste", True, "ana", "nowhere", "")
    assert svg.count('class="e2p-mark"') == 2  # on both maps
    assert svg.count("<title>") == 2 * (len(PLACES) + 1)
    assert "Not on the map: nowhere." in svg
    hidden = page().look(None, "taste", False, "", "", "ana")[0]
    assert 'class="e2p-mark"' not in hidden
    assert COLUMNS[0][1] in svg


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "expected a valid key"),
        ("wrong", "expected a valid key"),
        ("generate", "this key lacks the scope users:read"),
        ("users:read", "this key lacks the scope generate"),
    ],
)
def test_without_a_key_with_both_scopes_nothing_is_told(name: str, said: str) -> None:
    engine = FakeEngine()
    here = page(engine, keys=[key("generate", "generate"), key("users:read", "users:read"), BOTH])
    given = secret(name) if name else None
    note, *rest = asyncio.run(here.open(given))
    assert said in shown(note["value"])
    assert "ana" not in str(rest)
    assert said in shown(column(here, "ana", key=given)[-1])
    assert here.look(given, "taste", True, "ana", "ben", "") == ("", "", "", "")
    assert engine.requests == []
    assert opened(here, f" {secret('both')}\n")["A"]["value"] == "ana"
    assert "[0 0 0]" in column(here, "ana", key=secret("both"))[-1]


def test_a_key_with_a_prefix_sees_its_own_users_alone() -> None:
    shop = key("shop", "generate", "users:read", prefix="shop-")
    here, given = page(keys=[shop]), secret("shop")
    found = opened(here, given)
    assert [found[name]["value"] for name in "ABC"] == ["shop-1", "shop-2", ""]
    assert "ana" not in str(found)
    assert not any(prompt in str(found) for prompt in KNOWN.prompts), "which others have asked"
    svg, *about = here.look(given, "taste", True, "ana", "shop-1", "")
    assert "ana" not in svg
    assert svg.count("<title>") == 2 * (2 + 1)
    assert about[0] == ""
    assert "likes soul" in about[1]
    assert "this key is bound to other user ids" in column(here, "ana", key=given)[-1]


def test_it_is_there_for_this_machine_or_for_a_key_that_may_see_people(monkeypatch: pytest.MonkeyPatch) -> None:
    require_playground(ServingConfig(), ())
    require_playground(ServingConfig(host="0.0.0.0"), [BOTH])
    with pytest.raises(
        ConfigError, match=r"0\.0\.0\.0, which is reached from other machines, needs keys, also with --ins"
    ):
        require_playground(ServingConfig(host="0.0.0.0", insecure=True), ())
    with pytest.raises(ConfigError, match="expected a key with the scopes generate and users:read, got none"):
        require_playground(ServingConfig(), [key("a", "generate"), key("b", "users:read")])
    monkeypatch.setattr(playground, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'e2p\[playground\]'"):
        require_playground(ServingConfig(), ())


# ---------------------------------------------------------------- what a run's folder tells


def write_folder(folder: Path, rows: list[dict[str, Any]], users: Sequence[str] = ("u1", "u2", "u3")) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows).write_parquet(folder / "examples.parquet")
    data = DataConfig(examples=str(folder / "examples.parquet"), embeddings="elsewhere.parquet")
    save_yaml(RunConfig(backbone=BackboneConfig(model="m"), data=data), folder / "config.yaml")
    places = {"embedding_x": [-10.0, 0, 30], "embedding_y": [0.0, 10, 20], "prefix_x": [0.0] * 3, "prefix_y": [0.0] * 3}
    pl.DataFrame({"user_id": users, "cluster": ["c"] * 3, **places}).write_parquet(folder / "space.parquet")
    return str(folder)


def test_a_runs_folder_tells_places_profiles_and_what_is_asked(tmp_path: Path) -> None:
    rows = [
        {"user_id": "u1", "prompt": "often", "completion": "x", "profile": "one"},
        {"user_id": "u2", "prompt": "often", "completion": "x", "profile": None},
        {"user_id": "u9", "prompt": "once", "completion": "x", "profile": "not on the map"},
        {"user_id": "u1", "prompt": "long" * 99, "completion": "x", "profile": "one again"},
    ]
    folder = write_folder(tmp_path / "run", rows)
    known = known_people(folder)
    assert known.profiles == {"u1": "one"}
    assert known.prompts == ("often", "once")
    # 40 wide and 20 high: one scale for both, the lower one in the middle.
    assert [place.vector for place in known.places.values()] == [(0.0, 0.25), (0.25, 0.5), (1.0, 0.75)]
    assert {place.prefix for place in known.places.values()} == {(0.5, 0.5)}
    (tmp_path / "run" / "adapter").mkdir()
    assert known_people(f"{folder}/adapter") == known
    (tmp_path / "run" / "space.parquet").write_bytes(b"no parquet")
    assert known_people(folder).places == {}
    assert known_people(folder).profiles == {"u1": "one", "u9": "not on the map"}
    assert known_people(str(tmp_path / "nowhere")) == KnownPeople()


def test_prompts_of_one_turn_alone(tmp_path: Path) -> None:
    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]

    rows = [{"user_id": "u1", "messages": turns("hello"), "completion": "x"}]
    rows += [{"user_id": "u1", "messages": turns("hello", "there"), "completion": "x"}] * 3
    assert known_people(write_folder(tmp_path, rows)).prompts == ("hello",)


# ---------------------------------------------------------------- the routes

KEYS = (BOTH, key("generate", "generate"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(keys=KEYS, playground={}, limits=LimitsConfig(body_bytes=5000)) as running:
        running.http.put(
            "/v1/users/sentinel/embedding",
            json={"embedding": [1, 2, 3]},
            headers={"authorization": f"Bearer {secret('both')}"},
        )
        yield running


def brought_along(server: Server) -> list[tuple[str, str]]:
    """Method and path of every route that mounting Gradio adds, below /playground."""
    mount = server.app.routes[-1]
    assert mount.path == "/playground"
    found = []
    for route in flat(mount.routes):
        methods = getattr(route, "methods", None) or {"GET"}  # something mounted again
        found += [(method, re.sub(r"\{\w+(:path)?\}", "x", route.path)) for method in sorted(methods)]
    return found


def test_of_all_routes_that_gradio_brings_the_pages_own_are_open(server: Server) -> None:
    routes = brought_along(server)
    assert len(routes) > 60
    assert {("POST", "/gradio_api/upload"), ("GET", "/gradio_api/file=x"), ("POST", "/gradio_api/call/x")} <= set(
        routes
    )
    passed = {route for route in routes if route[0] in OPEN and OPEN[route[0]].fullmatch(route[1])}
    assert passed == {
        ("GET", "/"),
        ("GET", "/theme.css"),
        ("GET", "/assets/x"),
        ("GET", "/static/x"),
        ("GET", "/gradio_api/queue/data"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/gradio_api/cancel"),
    }
    for method, path in routes:
        if (method, path) not in passed:
            for headers in ({}, {"authorization": f"Bearer {secret('both')}"}):
                response = server.http.request(method, f"/playground{path}", headers=headers)
                assert response.status_code == 404, (method, path)


@pytest.mark.parametrize("path", ["/static/../config", "/assets/%2e%2e/%2e%2e/blocks.py", "/assets//etc/passwd", "/x"])
def test_no_way_around(path: str, server: Server) -> None:
    assert server.http.get(f"/playground{path}").status_code in (403, 404)


def test_the_page_without_a_key_knows_nobody_and_names_nobody_else(server: Server) -> None:
    response = server.http.get("/playground", follow_redirects=True)
    assert str(response.url).endswith("/playground/")
    for secret_ in ("sentinel", "taste", "backbone", secret("both")):
        assert secret_ not in response.text
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    loaded = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="([^"]*)"', response.text)
    assert loaded
    assert not [address for address in loaded if "//" in address]
    assert '"analytics_enabled":false' in response.text
    assert '"run_history":false' in response.text


def join(server: Server, data: list[Any], function: str, headers: Any = None) -> httpx.Response:
    """Do what the page does where a function is called."""
    text = server.http.get("/playground/").text
    config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});</script>", text)[1])  # type: ignore[index]
    numbers = [
        d["id"] for d in config["dependencies"] if d["api_name"].startswith(function) or d["api_name"] == function
    ]
    body = {"data": data, "fn_index": numbers[0], "session_hash": "s", "event_data": None, "trigger_id": None}
    return server.http.post("/playground/gradio_api/queue/join", json=body, headers=headers or {})


ASK = ["taste", True, "sentinel", "", "", "sentinel-prompt", 1, 0, 8, 0]


def outcome(server: Server) -> str:
    with server.http.stream("GET", "/playground/gradio_api/queue/data", params={"session_hash": "s"}) as response:
        return "".join(response.iter_text())


def test_the_pages_functions_ask_for_the_key(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    for given, said in ((None, "expected a valid key"), (secret("generate"), "lacks the scope users:read")):
        assert join(server, [given, *ASK], "answers").status_code == 200
        assert said in outcome(server)
        assert join(server, [given], "open").status_code == 200
        told = outcome(server)
        assert said in told
        assert "taste" not in told
    assert server.engine.requests == []
    assert join(server, [secret("both"), *ASK], "answers").status_code == 200
    assert "taste null 1" in outcome(server)
    assert len(server.engine.requests) == 3
    logged = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("e2p"))
    assert "sentinel" not in logged
    assert secret("both") not in logged
    assert "session_hash" not in logged


def test_another_page_cannot_use_it_and_bodies_are_limited(server: Server) -> None:
    where = "/playground/gradio_api/queue/join"
    response = join(server, ["x"], "open", {"origin": "http://evil.example"})
    assert error_of(response) == (403, "origin_not_allowed", None)
    plain = server.http.post(where, content="{}", headers={"content-type": "text/plain"})
    assert error_of(plain)[1] == "unsupported_media_type"
    assert error_of(server.http.post(where, json={"data": "x" * 6000}))[1] == "body_too_large"
    assert server.http.options(where).status_code == 404
    assert server.http.get("/playground/", headers={"host": "evil.example"}).status_code == 200  # keys guard it


def test_without_keys_it_answers_to_this_machines_name_alone() -> None:
    with serving(playground={}) as server:
        assert server.http.get("/playground/").status_code == 200
        assert error_of(server.http.get("/playground/", headers={"host": "evil.example"}))[1] == "host_not_allowed"
        engine = server.engine
        engine.delay = 0.2
        assert join(server, [None, *ASK], "answers").status_code == 200
        with server.http.stream("GET", "/playground/gradio_api/queue/data", params={"session_hash": "s"}) as response:
            parts = response.iter_text()
            while "taste" not in next(parts):
                pass
        wait_until(lambda: engine.cancelled == 3)  # the browser went away
        assert [info.name for info in ADAPTERS] == ["taste", "backbone"]


# ---------------------------------------------------------------- in a browser


@pytest.mark.slow
@pytest.mark.skipif(chromium.programs() is None, reason=chromium.NEEDS)
def test_two_users_get_two_answers_in_a_browser_that_asks_nobody_else(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, epochs=20)
    assert main(["train", write_config(config, tmp_path / "run.yaml")]) == 0
    assert main(["users", "import", config.data.embeddings, str(tmp_path / "store"), "--timestamp", "now"]) == 0
    users = [f"u{number:02d}" for number in range(20)]
    spread = {f"{part}_{axis}": [float(number * sign) for number in range(20)]
              for part, sign in (("embedding", 1), ("prefix", -1)) for axis in "xy"}  # fmt: skip
    places = pl.DataFrame({"user_id": users, "cluster": ["c"] * 20, **spread})
    places.write_parquet(Path(config.output) / "space.parquet")  # t-SNE needs more users than these
    words = ["-m", "e2p.cli", "serve", config.output, "--store", str(tmp_path / "store"), "--port", "0", "--playground"]
    with process(*words) as (server, _), chromium.chromium() as driver:
        assert server.stdout is not None
        address = server.stdout.readline().split(" ")[0]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/playground/", address)
        driver.get(address)
        until(lambda: text(driver, "e2p-places"))
        assert [picked(driver, label) for label in "ABC"] == ["u00", "u19", "nobody"]
        assert len(driver.find_elements("css selector", "#e2p-places .e2p-mark")) == 4  # two users on two maps
        assert "likes jazz" in text(driver, "e2p-about-A")

        driver.find_element("id", "e2p-ask").click()
        first, second, _ = answers(driver)
        assert first
        assert second
        assert first != second
        assert "this user's own soft token · version v1" in text(driver, "e2p-answer-A")
        assert "null user" in text(driver, "e2p-answer-C")

        # The slider at 0 asks again, and everybody gets what nobody gets.
        slide(driver, 0)
        until(lambda: all("strength 0" in text(driver, f"e2p-answer-{label}") for label in "AB"))
        assert len(set(answers(driver))) == 1

        pick(driver, "B", "nowhere")
        until(lambda: "the store has no vector of this user" in text(driver, "e2p-answer-B"))
        until(lambda: "Not on the map: nowhere." in text(driver, "e2p-places"))

        asked = chromium.asked_for(driver)
        assert any(where.endswith("/queue/join?") for where in asked)
        assert not [where for where in asked if not where.startswith(address.removesuffix("playground/"))]
        # Gradio's page asks for these two at the server's root, where nothing is.
        faults = [e["message"] for e in driver.get_log("browser") if not re.search("anifest|favicon", e["message"])]
        assert faults == []


def picked(driver: Any, label: str) -> str:
    return driver.find_element("css selector", f"#e2p-user-{label} input").get_attribute("value")


def pick(driver: Any, label: str, user: str) -> None:
    field = driver.find_element("css selector", f"#e2p-user-{label} input")
    field.click()
    field.send_keys("\ue009a\ue000", user, "\ue007")  # all of it, the id, enter


def slide(driver: Any, value: float) -> None:
    field = driver.find_element("css selector", "#e2p-strength input[type=number]")
    field.click()
    field.send_keys("\ue009a\ue000", f"{value:g}", "\ue004")


def answers(driver: Any) -> list[str]:
    """What the columns say once all have come to their end."""
    until(lambda: all("tokens" in text(driver, f"e2p-answer-{label}") for label in "ABC"))
    places = [driver.find_element("css selector", f"#e2p-answer-{label} .e2p-answer") for label in "ABC"]
    return [place.get_property("textContent") for place in places]  # a model this small also says what nobody sees
