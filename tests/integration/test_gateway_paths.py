"""What the gateway passes on by its path, what it answers itself, and its second address."""

import httpx

from defib.demo.stack import reserve_ports
from tests.integration.model_api import ADMIN, KEY, Gateway, ModelApi
from tests.support import NO_TLS, eventually

OWN = ("/metrics", "/health", "/health/ready", "/status", "/api/v1/status", "/-/healthy", "/-/ready")


async def test_paths_outside_v1_go_to_the_url_without_its_v1(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(), "plain": gateway.upstream(url=f"http://127.0.0.1:{api.port}/own")})
    await gateway.start()
    for path in ("/tokenize", "/v2/rerank", "/score?a=%2Fb", "/api/chat", "/v1beta/x", "/v1", "/a%2fb/", "/statusx"):
        assert (await gateway.chat(path=path)).is_success, path
        assert api.received[-1].target == path
        assert api.received[-1].header("Authorization") == [f"Bearer {KEY}"]
    count = len(api.received)
    assert (await gateway.status())["requests_in_window"] == count
    refused = await gateway.chat(path="/tokenize", X_Upstream="plain")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "path_not_found")
    assert refused.json()["error"]["message"] == "plain has no paths outside /v1: its url does not end in /v1"
    assert len(api.received) == count
    assert (await gateway.chat(path="/v1/x", X_Upstream="plain")).is_success
    assert api.received[-1].target == "/own/x"


async def test_a_path_without_a_model_goes_to_the_default(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure(default=None)
    await gateway.start()
    assert (await gateway.client.get("/version")).json()["error"]["code"] == "model_not_found"
    gateway.configure()
    assert (await gateway.client.post("/-/reload", headers=ADMIN)).is_success
    assert (await gateway.client.get("/version")).is_success
    assert [each.target for each in api.received] == ["/version"]


async def test_other_paths_have_the_same_access(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure(clients={"coder": {"token": "t-coder"}})
    await gateway.start()
    assert (await gateway.chat(path="/tokenize")).json()["error"]["code"] == "invalid_api_key"
    assert (await gateway.chat(path="/tokenize", Authorization="Bearer t-coder")).is_success
    assert (await gateway.chat(path="/a/%2e%2e/b", Authorization="Bearer t-coder")).status_code == 400
    gateway.configure()
    assert (await gateway.client.post("/-/reload", headers=ADMIN)).is_success
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert (await gateway.chat(path="/tokenize", **headers)).status_code == 403, headers
    assert len(api.received) == 1


async def test_its_own_paths_are_never_passed_on(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure()
    await gateway.start()
    for path in OWN:
        assert (await gateway.client.get(path, headers=ADMIN)).is_success, path
        assert (await gateway.client.delete(path, headers=ADMIN)).status_code == 405, path
    others = ("/", "/?x", "/-/", "/-/other", "/api/v1", "/api/v1/other", "/health/other", "/metrics/", "//metrics")
    for path in (*others, "/%2d/other", "/api/v1/upstreams/api/other", "/favicon.ico"):
        response = await gateway.client.get(f"http://127.0.0.1:{gateway.port}{path}", headers=ADMIN)
        assert response.status_code == 404, path
        assert response.json()["error"]["code"] == "not_found"
    assert (await gateway.client.get("/status")).status_code == 401
    assert api.received == []


async def test_health_needs_no_credential(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure({"api": gateway.upstream(rate="1/min")}, clients={"coder": {"token": "t-coder"}})
    await gateway.start()
    assert (await gateway.client.get("/health")).json() == {"status": "ok"}
    ready = await gateway.client.get("/health/ready")
    assert ready.json() == {"status": "ready", "upstream": True, "queue": True, "requests_available": True}
    assert (await gateway.chat(Authorization="Bearer t-coder")).is_success
    busy = await gateway.client.get("/health/ready")
    assert (busy.status_code, busy.json()["requests_available"]) == (200, False)
    assert (await gateway.client.get("/-/ready")).is_success
    shown, same = [(await gateway.client.get(path, headers=ADMIN)).json() for path in ("/status", "/api/v1/status")]
    assert shown.pop("uptime_seconds") <= same.pop("uptime_seconds")
    assert shown == same


async def test_an_upstream_that_fails_makes_it_not_ready(gateway: Gateway) -> None:
    gateway.configure({"api": gateway.upstream(url="http://127.0.0.1:1/v1")})
    await gateway.start()
    for _ in range(5):
        assert (await gateway.chat()).status_code == 502
    response = await gateway.client.get("/health/ready")
    assert (response.status_code, response.json()["status"], response.json()["upstream"]) == (503, "not_ready", False)
    assert (await gateway.client.get("/health")).is_success


async def test_a_second_address_serves_metrics_and_health_only(gateway: Gateway, api: ModelApi) -> None:
    (port,) = reserve_ports(1)
    gateway.configure(metrics_listen=f"127.0.0.1:{port}")
    await gateway.start()
    async with httpx.AsyncClient(verify=NO_TLS, base_url=f"http://127.0.0.1:{port}", trust_env=False) as second:
        page = await second.get("/metrics")
        assert "gateway_rate_limit_per_minute" in page.text
        assert (await second.get("/health")).is_success
        assert (await second.get("/health/ready")).is_success
        for path in ("/status", "/api/v1/status", "/v1/models", "/tokenize", "/-/reload"):
            assert (await second.get(path, headers=ADMIN)).status_code == 404, path
    assert api.received == []


async def test_an_address_that_is_in_use_is_named(gateway: Gateway, api: ModelApi) -> None:
    gateway.configure(metrics_listen=f"127.0.0.1:{api.port}")
    await gateway.launch()

    async def is_named() -> bool:
        return f"gateway.metrics_listen: cannot listen on 127.0.0.1:{api.port}: " in gateway.log.read_text()

    await eventually(is_named, 60)
