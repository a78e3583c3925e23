"""The parts of the console that need no server: texts, filters, strips, forms."""

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args, get_type_hints
from urllib.parse import unquote_plus
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment, PackageLoader

from console.charts import draw_sparkline, draw_strip, find_late_start, nice_top
from console.languages import LANGUAGES, load_texts
from console.requests import SubmittedForms
from console.sign_in import SignInPages
from console.things import find_services_of_things
from console.translation import translate_detail, translate_entry, translate_event, translate_person
from exporter.api.host_problems import ProblemKind
from exporter.results import FailureReason
from remediator.filters import ORDERS, ServiceFilter
from remediator.notifications.rendering import shipped_templates
from remediator.policy.situation import STUCK, Decision
from remediator.record.event_sources import KINDS
from remediator.reports.availability import format_availability
from remediator.snapshot import ServiceRow
from tests.support import inventory_of


def keys_of(texts: Any, prefix: str = "") -> dict[str, set[str]]:
    """Return the places for values of each text, by its key."""
    if isinstance(texts, str):
        return {prefix: set(re.findall(r"{\d*}", texts))}
    return {key: places for name, each in texts.items() for key, places in keys_of(each, f"{prefix}.{name}").items()}


def test_all_languages_have_the_same_texts() -> None:
    first, *others = (keys_of(load_texts(language)) for language in LANGUAGES)
    for other in others:
        assert other == first


def test_no_text_is_called_as_an_attribute_of_dict() -> None:
    """In a template, `texts.x.copy` is the method."""
    used = {part for key in keys_of(load_texts("en")) for part in key.split(".")}
    assert not used & set(dir({}))


def test_every_problem_of_a_host_and_every_kind_of_event_has_a_text() -> None:
    texts = load_texts("en")
    assert {*get_args(FailureReason), STUCK} == shipped_templates("en").words["probe_reasons"].keys()
    assert set(get_args(get_type_hints(Decision)["verb"])) == texts["service"]["verbs"].keys()
    assert set(get_args(ProblemKind)) == texts["hosts"]["problems"].keys()
    assert set(KINDS) == texts["events"]["kinds"].keys()


CHINESE = load_texts("zh")
WORDS_IN_CHINESE = shipped_templates("zh").words


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("local (ann, unverified)", "本机（ann，未核实）"),
        ("ci (token)", "ci（令牌）"),
        ("ann", "ann"),
        ("local (a) (oidc)", "local (a) (oidc)"),
        ("defib", "defib"),
    ],
)
def test_who_did_something_is_named_in_chinese(label: str, name: str) -> None:
    assert translate_person(CHINESE, label) == name
    assert translate_person(load_texts("en"), label) == label


@pytest.mark.parametrize(
    ("detail", "shown"),
    [
        ("restart", "重启"),
        ("by local (ann, unverified): new settings: 2", "操作人：本机（ann，未核实）: new settings: 2"),
        ("by ann: new settings", "操作人：ann: new settings"),
        ("timeout: no answer within 10 s", "超时：“no answer within 10 s”"),
        ("after 2 tries", "已尝试 2 次"),
        ("on it: a note", "“on it: a note”"),
    ],
)
def test_details_of_decisions_in_chinese(detail: str, shown: str) -> None:
    assert translate_detail(CHINESE, WORDS_IN_CHINESE, detail) == shown


def test_failures_and_entries_of_a_timeline_in_chinese() -> None:
    entry = translate_entry(CHINESE, WORDS_IN_CHINESE, {"verb": "wait", "reason": "approval", "detail": "restart"})
    assert entry == {"verb": "等待", "reason": "approval", "detail": "重启"}
    assert translate_entry(CHINESE, WORDS_IN_CHINESE, {"by": "ci (token)", "text": "wait"}) == {
        "by": "ci（令牌）",
        "text": "wait",
    }


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        ({"kind": "service", "name": "web", "detail": "exit: 1"}, {"detail": "退出码不符：“1”"}),
        ({"kind": "operation", "operation": "begin maintenance", "name": "service web", "detail": "timeout: slow"},
         {"operation": "开始维护", "name": "服务 web"}),
        ({"kind": "operation", "operation": "acknowledge", "name": "incident 3"},
         {"operation": "确认", "name": "故障单 3"}),
        ({"kind": "maintenance", "name": "h", "detail": "host: disks"}, {"detail": "主机: disks"}),
        ({"kind": "action", "operation": "restart", "by": "ci (token)", "detail": "component ch1"},
         {"operation": "重启", "by": "ci（令牌）", "detail": "组件 ch1"}),
        ({"kind": "incident", "name": "web", "by": "self"}, {"by": "自行恢复"}),
        ({"kind": "container", "name": "state", "detail": "state: x"}, {}),
    ],
)  # fmt: skip
def test_events_in_chinese(event: dict[str, str], shown: dict[str, str]) -> None:
    whole = {"operation": "", "name": "", "detail": "", "by": ""} | event
    assert translate_event(CHINESE, WORDS_IN_CHINESE, whole) == whole | shown


def row(id_: str, **changed: Any) -> ServiceRow:
    given_ = {
        "title": id_, "host": "h", "group": "g", "category": "web", "provider": "vllm", "severity": "critical",
        "state": "up", **changed,
    }  # fmt: skip
    return ServiceRow(id_, **given_)


ROWS = [
    row("b"), row("a", latency=2.0, since=10.0), row("c", state="down", host="x"), row("d", state="unknown", since=20.0),
    row("e", state="degraded", provider="other", title="OCR 文档"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ({}, "cedab"),
        ({"state": "down,unknown"}, "cd"),
        ({"state": "nonsense"}, "cedab"),
        ({"q": "ocr 文"}, "e"),
        ({"q": "ocr nothing"}, ""),
        ({"host": "x"}, "c"),
        ({"provider": "vllm", "sort": "name"}, "abcd"),
        ({"sort": "latency"}, "abcde"),
        ({"sort": "since"}, "dabce"),
    ],
)
def test_filters(query: dict[str, str], ids: str) -> None:
    assert "".join(each.id for each in ServiceFilter.parse(query).select(ROWS)) == ids


@given(st.dictionaries(st.sampled_from(["state", "q", "host", "sort", "by", "page", "group"]), st.text()))
def test_any_query_is_a_filter_that_its_own_query_gives_again(query: dict[str, str]) -> None:
    chosen = ServiceFilter.parse(query)
    assert chosen.order in ORDERS
    again = dict(re.findall(r"[?&]([^=&]+)=([^&]*)", chosen.query(page=chosen.page)))
    assert ServiceFilter.parse({name: unquote_plus(text) for name, text in again.items()}) == chosen


def test_the_services_of_containers_units_and_programs(tmp_path: Path) -> None:
    hosts = {name: {"address": name, "ssh": {"user": "u", "known_hosts": "/dev/null"}} for name in ("h", "other")}
    things: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
        "api": ({"http": {"url": "http://h/"}}, {"docker": {"container": "api"}}),
        "gateway": ({"container": {"name": "api"}}, None),
        "nginx": ({"unit": {"name": "nginx"}}, {"systemd": {"unit": "nginx.service"}}),
        "agent": ({"program": {"name": "agents:one"}}, {"supervisor": {"program": "agent:agent"}}),
        "page": ({"http": {"url": "http://h/"}}, None),
    }
    services: dict[str, Any] = {
        name: {"host": "h", "probe": probe, **({"control": control} if control else {})}
        for name, (probe, control) in things.items()
    }
    services["elsewhere"] = {**services["api"], "host": "other"}
    inventory = inventory_of(tmp_path, {"hosts": hosts, "services": services}).inventory
    assert find_services_of_things(inventory, "h") == {
        "container": {"api": ["api", "gateway"]},
        "unit": {"nginx.service": ["nginx"]},
        "program": {"agent": ["agent"], "agents:one": ["agent"]},
    }


@pytest.mark.parametrize(
    ("latency", "shown"), [(0.0004, "0 ms"), (9.9994, "9999 ms"), (9.9996, "10.0 s"), (61.0, "61.0 s")]
)
def test_latencies(latency: float, shown: str) -> None:
    macros = Environment(loader=PackageLoader("console"), autoescape=True).get_template("macros.html").module
    assert str(macros.milliseconds(latency)).strip() == shown  # type: ignore[attr-defined] # the template's macro


def test_groups_with_broken_services_come_first() -> None:
    groups = ServiceFilter.parse({"by": "host"}).grouped(ServiceFilter().select(ROWS))
    assert [(name, "".join(each.id for each in rows)) for name, rows in groups] == [("x", "c"), ("h", "edab")]


@given(st.text(alphabet="+-?", max_size=80), st.text())
def test_a_strip_is_well_formed_and_has_a_bar_for_each_slot(recent: str, label: str) -> None:
    drawn = str(draw_strip(recent, "".join(each for each in label if each.isprintable())))
    svg = ET.fromstring(drawn)  # noqa: S314 - our own
    assert sum(path.attrib["d"].count("M") for path in svg) == 50
    failed = [path.attrib["d"].count("M") for path in svg if path.attrib["class"] == "bad"]
    assert sum(failed) == recent[-50:].count("-")


def test_a_line_is_broken_where_values_are_missing() -> None:
    points = [(0.0, 1.0), (100.0, 2.0), (3000.0, float("nan")), (9000.0, 1.0)]
    assert str(draw_sparkline(points, 0, 10_000, "x")).count("M") == 2
    assert draw_sparkline([], 0, 1, "x") == ""


@pytest.mark.parametrize(
    ("times", "late"), [([], None), ([100.0], None), ([104.0, 150.0], None), ([180.0, 120.0], 120.0), ([200.0], 200.0)]
)
def test_a_chart_whose_values_start_late(times: list[float], late: float | None) -> None:
    assert find_late_start(times, 100, 200) == late


@pytest.mark.parametrize(
    ("highest", "top"), [(0.0, 1.0), (0.9, 1.0), (1.0, 1.0), (1.1, 2.0), (240.0, 250.0), (7.0, 10.0)]
)
def test_the_top_of_a_scale_is_round(highest: float, top: float) -> None:
    assert nice_top(highest) == top


@pytest.mark.parametrize(("ratio", "text"), [(1.0, "100 %"), (0.99999, "99.99 %"), (0.5, "50 %"), (0.0, "0 %")])
def test_availability_is_never_rounded_up(ratio: float, text: str) -> None:
    assert format_availability(ratio) == text


async def test_a_form_is_done_once() -> None:
    forms, done = SubmittedForms(), []

    async def work() -> int:
        done.append(1)
        await asyncio.sleep(0)
        if len(done) == 4:
            raise ValueError("the record")
        return len(done)

    first = ("ann", "/services/web/restart", forms.new_id())
    assert list(await asyncio.gather(forms.run_once_as(first, work), forms.run_once_as(first, work))) == [1, 1]
    assert await forms.run_once_as(first, work) == 1
    assert await forms.run_once_as(("bob", *first[1:]), work) == 2
    assert await forms.run_once_as((*first[:2], forms.new_id()), work) == 3
    failing = (*first[:2], forms.new_id())
    with pytest.raises(ValueError, match="the record"):
        await forms.run_once_as(failing, work)
    assert await forms.run_once_as(failing, work) == 5


async def test_one_address_cannot_use_up_what_all_need_for_signing_in() -> None:
    going_on = asyncio.Event()

    class Slow:
        async def fetch_user(self, _code: str, _redirect: object) -> str:
            await going_on.wait()
            return "ann"

    access: Any = SimpleNamespace(find_address=lambda request: request)
    pages, service = SignInPages(access, {}, str, cast("Any", None)), cast("Any", Slow())

    async def sign_in(address: str) -> object:
        return await pages._exchange(cast("Any", address), service, "", cast("Any", None))

    flood = [asyncio.create_task(sign_in("10.0.0.1")) for _ in range(60)]
    other = asyncio.create_task(sign_in("10.0.0.2"))
    await asyncio.sleep(0)
    going_on.set()
    assert await other == "ann"
    outcomes = await asyncio.gather(*flood, return_exceptions=True)
    assert [str(each) for each in outcomes] == ["ann"] * 5 + ["too many people are signing in"] * 55
    assert await sign_in("10.0.0.1") == "ann"
