"""Rate limits and quotas: buckets by the clock, accounts by key or address, and what clients are told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxd.api.limits import Account, Bucket, DailyQuota, RateLimiter, _duration
from mlxd.config import ApiKeyConfig, LimitsConfig
from mlxd.engine.request import FinishReason
from mlxd.errors import RateLimitError
from tests.unit.api.fakes import FakeEngine, Wire, call, client, make_app, says, until

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
PROMPT = {"prompt": [65] * 10}
DAY = 86400


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


# Buckets


def test_a_bucket_gives_a_minutes_worth_at_once_and_fills_by_the_second() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    assert bucket.seconds_until(60) == 0
    bucket.take(60)
    assert bucket.seconds_until(1) == 1.0
    clock.now += 0.5
    assert bucket.seconds_until(1) == 0.5
    clock.now += 1e9
    assert bucket.level == 60


def test_a_bucket_may_be_in_debt_and_asks_for_no_more_than_it_holds() -> None:
    clock = Clock()
    bucket = Bucket(100, clock)
    bucket.take(150)
    assert bucket.level == -50
    assert bucket.seconds_until(1) == pytest.approx(30.6)
    assert bucket.seconds_until(100_000) == pytest.approx(90)


@pytest.mark.parametrize("per_minute", [1, 7, 11, 60, 97, 601])
def test_who_waits_to_the_fraction_is_let_in(per_minute: int) -> None:
    clock = Clock(0.1)
    bucket = Bucket(per_minute, clock)
    bucket.take(per_minute)
    for _ in range(200):
        clock.now += bucket.seconds_until(1)
        assert bucket.seconds_until(1) == 0
        bucket.take(1)


@given(
    st.integers(1, 600),
    st.lists(st.floats(0, 40), min_size=1, max_size=80),
)
def test_nobody_gets_more_than_the_rate_and_who_waits_as_told_is_let_in(
    per_minute: int, pauses: list[float]
) -> None:
    clock = Clock(0.0)
    account = Account(requests=Bucket(per_minute, clock))
    taken = 0
    for pause in pauses:
        clock.now += pause
        for _ in range(100):
            try:
                account.take_request()
            except RateLimitError as error:
                wait = int(error.headers["retry-after"])
                break
            taken += 1
        else:
            continue
        assert taken <= per_minute + clock.now * per_minute / 60 + 1e-6
        clock.now += wait
        account.take_request()
        taken += 1


def test_a_quota_is_a_days() -> None:
    clock = Clock(DAY * 20_000 + 3600.0)
    quota = DailyQuota(100, clock)
    quota.take(70)
    assert (quota.used, quota.seconds_until_tomorrow()) == (70, DAY - 3600)
    clock.now += DAY - 3600
    assert quota.used == 0
    quota.take(5)
    assert quota.used == 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0121, "13ms"), (0.9999, "1000ms"), (1, "1s"), (8.2, "9s"), (60, "1m0s"), (3723, "62m3s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


# Accounts


def limiter(clock: Clock, **limits: Any) -> RateLimiter:
    return RateLimiter(LimitsConfig(**limits), clock, clock)


def test_addresses_have_accounts_of_their_own_and_the_oldest_is_forgotten() -> None:
    rates = limiter(Clock(), rate_limit=1, max_tracked_clients=3)
    for address in "abc":
        rates.account(None, address).take_request()
    with pytest.raises(RateLimitError):
        rates.account(None, "a").take_request()
    rates.account(None, "d").take_request()
    assert len(rates) == 3
    rates.account(None, "b").take_request()  # forgotten: it was seen longest ago
    with pytest.raises(RateLimitError):
        rates.account(None, "a").take_request()


def test_nobody_is_remembered_where_there_is_no_limit() -> None:
    rates = limiter(Clock())
    rates.account(None, "a").take_request()
    assert len(rates) == 0


def test_a_keys_own_limits_replace_the_servers_and_0_lifts_them() -> None:
    rates = limiter(Clock(), rate_limit=2, token_rate_limit=100)
    usual = rates.account(ApiKeyConfig(name="usual"), "a")
    own = rates.account(ApiKeyConfig(name="own", rate_limit=5, token_rate_limit=7, token_quota=9), "a")
    free = rates.account(ApiKeyConfig(name="free", rate_limit=0, token_rate_limit=0), "a")
    assert usual.requests and usual.tokens and own.requests and own.tokens and own.quota
    assert (usual.requests.per_minute, usual.tokens.per_minute, usual.quota) == (2, 100, None)
    assert (own.requests.per_minute, own.tokens.per_minute, own.quota.limit) == (5, 7, 9)
    assert free == Account()
    assert rates.account(ApiKeyConfig(name="usual"), "elsewhere") is usual
    assert len(rates) == 0


# Over HTTP


def play(scenario: Callable[[httpx.AsyncClient, FakeEngine, Clock], Any], **limits: Any) -> None:
    async def main() -> None:
        clock, engine = Clock(), FakeEngine(says("abcde", finish=FinishReason.LENGTH))
        async with client(make_app(engine, {"limits": limits}, clock=clock)) as http:
            await scenario(http, engine, clock)

    asyncio.run(main())


def test_one_request_too_many_is_429_with_all_that_a_client_needs() -> None:
    async def scenario(http: httpx.AsyncClient, engine: FakeEngine, clock: Clock) -> None:
        first = await http.post(COMPLETIONS, json=PROMPT)
        assert first.status_code == 200
        assert {k: v for k, v in first.headers.items() if k.startswith("x-ratelimit")} == {
            "x-ratelimit-limit-requests": "2",
            "x-ratelimit-remaining-requests": "1",
            "x-ratelimit-reset-requests": "30s",
        }
        await http.post(COMPLETIONS, json=PROMPT)
        refused = await http.post(COMPLETIONS, json={**PROMPT, "stream": True})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "30"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert refused.headers["x-ratelimit-reset-requests"] == "1m0s"
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "2 requests a minute" in error["message"]
        assert len(engine.submitted) == 2
        clock.now += 30
        assert (await http.post(COMPLETIONS, json=PROMPT)).status_code == 200

    play(scenario, rate_limit=2)


def test_what_is_looked_at_and_stopped_is_not_counted() -> None:
    async def scenario(http: httpx.AsyncClient, engine: FakeEngine, clock: Clock) -> None:
        for _ in range(3):
            for path in ("/health", "/health/ready", "/v1/models", "/v1/status"):
                assert (await http.get(path)).status_code == 200
            assert (await http.post("/v1/requests/x/cancel")).status_code == 404
            assert (await http.options(CHAT)).status_code == 204
        assert (await http.post("/tokenize", json={"prompt": "a"})).status_code == 200
        assert (await http.post("/tokenize", json={"prompt": "a"})).status_code == 429
        assert (await http.post("/v1/requests/x/cancel")).status_code == 404

    play(scenario, rate_limit=1)


def test_tokens_are_charged_at_admission_and_as_they_come() -> None:
    async def scenario(http: httpx.AsyncClient, engine: FakeEngine, clock: Clock) -> None:
        whole = await http.post(COMPLETIONS, json=PROMPT)
        # The head of a whole answer is written when it is complete: 10 + 5 tokens.
        assert whole.headers["x-ratelimit-remaining-tokens"] == "45"
        streamed = await http.post(COMPLETIONS, json={**PROMPT, "n": 3, "stream": True})
        assert streamed.headers["x-ratelimit-remaining-tokens"] == "35"
        assert streamed.headers["x-ratelimit-limit-tokens"] == "60"
        refused = await http.post(COMPLETIONS, json={"prompt": [65] * 21})
        assert refused.status_code == 429
        assert "60 tokens a minute" in refused.json()["error"]["message"]
        assert refused.headers["x-ratelimit-remaining-tokens"] == "20"
        assert refused.headers["retry-after"] == "1"
        clock.now += 1
        assert (await http.post(COMPLETIONS, json={"prompt": [65] * 21})).status_code == 200

    play(scenario, token_rate_limit=60)


def test_a_prompt_larger_than_a_minutes_tokens_waits_for_a_full_bucket() -> None:
    async def scenario(http: httpx.AsyncClient, engine: FakeEngine, clock: Clock) -> None:
        assert (await http.post(COMPLETIONS, json={"prompt": [65] * 100})).status_code == 200
        refused = await http.post(COMPLETIONS, json={"prompt": [65]})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "46")  # (100 + 5 - 60 + 1) / 1
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"

    play(scenario, token_rate_limit=60)


def test_a_client_that_leaves_pays_for_what_was_made_for_it() -> None:
    async def main() -> None:
        clock, engine = Clock(), FakeEngine(says("abcde" * 10))
        limits = {"token_rate_limit": 100, "api_keys": [{"name": "a", "key": "ka"}]}
        app = make_app(engine, {"limits": limits}, clock=clock)
        body = json.dumps({**PROMPT, "stream": True}).encode()
        wire = Wire(app, "POST", COMPLETIONS, body, x_api_key="ka")
        await until(lambda: wire.body.count(b"data:") >= 7)
        engine.held = True
        wire.disconnect()
        await wire.task
        async with client(app, headers={"x-api-key": "ka"}) as http:
            response = await http.get("/v1/models")
        remaining = int(response.headers["x-ratelimit-remaining-tokens"])
        assert 100 - 10 - 20 < remaining <= 100 - 10 - 7

    asyncio.run(main())


def test_a_refused_submission_costs_no_tokens() -> None:
    async def scenario(http: httpx.AsyncClient, engine: FakeEngine, clock: Clock) -> None:
        engine.refusal = RateLimitError("any refusal of the engine", retry_after=1)
        refused = await http.post(COMPLETIONS, json=PROMPT)
        assert refused.headers["x-ratelimit-remaining-tokens"] == "60"

    play(scenario, token_rate_limit=60)


def test_a_spent_quota_is_429_that_sdks_do_not_retry() -> None:
    async def main() -> None:
        keys = [{"name": "a", "key": "ka", "token_quota": 20}, {"name": "b", "key": "kb"}]
        now = Clock(DAY * 20_000 + 100.0)
        engine = FakeEngine(says("abcde", finish=FinishReason.LENGTH))
        app = make_app(engine, {"limits": {"api_keys": keys}}, now=now)
        async with client(app, headers={"x-api-key": "ka"}) as http:
            assert (await http.post(COMPLETIONS, json=PROMPT)).status_code == 200
            refused = await http.post(COMPLETIONS, json=PROMPT)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == str(DAY - 100)
            assert refused.headers["x-should-retry"] == "false"
            error = refused.json()["error"]
            assert error["code"] == "insufficient_quota"
            assert error["message"] == "the prompt has 10 tokens, and 5 of 20 a day are left"
            other = await http.post(COMPLETIONS, json=PROMPT, headers={"x-api-key": "kb"})
            assert other.status_code == 200
            now.now += DAY
            assert (await http.post(COMPLETIONS, json=PROMPT)).status_code == 200

    asyncio.run(main())


# Keys beyond limits


def submitted(headers: dict[str, str], **fields: Any) -> Any:
    keys = [
        {"name": "plain", "key": "k1"},
        {"name": "batch", "key": "k2", "priority": 5, "weight": 0.5},
    ]
    engine = FakeEngine()
    app = make_app(engine, {"limits": {"api_keys": keys}})
    response = call(app, "POST", COMPLETIONS, json={**PROMPT, **fields}, headers=headers)
    return engine.submitted[0] if response.status_code == 200 else response


@pytest.mark.parametrize(
    ("key", "fields", "expected"),
    [
        ("k1", {}, ("plain", 0, 1.0)),
        ("k1", {"priority": 3}, ("plain", 3, 1.0)),
        ("k2", {}, ("batch", 5, 0.5)),
        ("k2", {"priority": 3}, ("batch", 8, 0.5)),
    ],
)
def test_the_engine_is_told_whose_requests_they_are(
    key: str, fields: dict[str, int], expected: tuple[str, int, float]
) -> None:
    sequence = submitted({"x-api-key": key}, **fields)
    assert (sequence.client, sequence.priority, sequence.weight) == expected


def test_a_key_cannot_pass_its_own_priority() -> None:
    response = submitted({"x-api-key": "k2"}, priority=-1)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "priority"


def test_without_keys_a_client_is_its_address_and_may_ask_for_any_priority() -> None:
    engine = FakeEngine()
    assert call(make_app(engine), "POST", COMPLETIONS, json={**PROMPT, "priority": -7}).status_code == 200
    [sequence] = engine.submitted
    assert (sequence.client, sequence.priority) == ("127.0.0.1", -7)


@pytest.mark.parametrize(
    ("bearer", "key", "status"),
    [("k1", "wrong", 200), ("wrong", "k1", 200), ("k1", "k2", 200), ("wrong", "worse", 401)],
)
def test_of_two_keys_shown_one_has_to_be_right(bearer: str, key: str, status: int) -> None:
    keys = [{"name": "plain", "key": "k1"}, {"name": "other", "key": "k2"}]
    app = make_app(FakeEngine(), {"limits": {"api_keys": keys}})
    headers = {"authorization": f"Bearer {bearer}", "x-api-key": key}
    assert call(app, "GET", "/v1/models", headers=headers).status_code == status


def test_one_key_cannot_cancel_what_another_runs() -> None:
    async def main() -> None:
        keys = [{"name": "a", "key": "ka"}, {"name": "b", "key": "kb"}]
        engine = FakeEngine()
        engine.held = True
        app = make_app(engine, {"limits": {"api_keys": keys}})
        wire = Wire(app, "POST", COMPLETIONS, json.dumps(PROMPT).encode(), x_api_key="ka", x_request_id="r")
        await until(lambda: engine.num_running > 0)
        choice = engine.submitted[0].request_id
        async with client(app) as http:
            for name in ("r", choice, choice.removesuffix("-0")):
                refused = await http.delete(f"/v1/requests/{name}", headers={"x-api-key": "kb"})
                assert refused.status_code == 404
            done = await http.delete(f"/v1/requests/{choice}", headers={"x-api-key": "ka"})
            assert done.status_code == 200
        await wire.task

    asyncio.run(main())
