"""What people read: a notice as a Feishu card, or as plain text where a card is refused.

Cards are of version 1.0, which ignores what it does not know. Everything that came from outside is escaped.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from fleet.model import Inventory, Service
from remediator.notices.feishu import BODY_LIMIT
from remediator.notices.outbox import Notice

VALUE_LIMIT = 600
SIGNATURE_ROOM = 500  # bytes that signing and masking may add
_ENTITIES = {character: f"&#{ord(character)};" for character in "*<>[]()\\_~`&"}
_COLOURS = {
    "down": "red",
    "could_not_restart": "red",
    "gave_up": "red",
    "restarted": "orange",
    "recovered": "green",
    "unobserved": "grey",
    "alert_over": "green",
    "approval": "orange",
    "blind": "red",
    "watchdog_missing": "red",
    "watchdog_back": "green",
    "automation_off": "orange",
    "automation_on": "green",
}
_OF_ITSELF = {"watchdog_missing", "watchdog_back", "automation_off", "automation_on"}  # news of Defib, of no service
_SEVERITY_COLOURS = {"critical": "red", "warning": "orange", "info": "blue"}
_CALLING = {
    "down",
    "could_not_restart",
    "gave_up",
    "alert",
    "approval",
    "blind",
    "watchdog_missing",
}  # what may mention people

_WORDS: Mapping[str, Mapping[str, str]] = {
    "zh": {
        "down": "服务故障",
        "restarted": "已重启，正在观察",
        "could_not_restart": "重启失败",
        "gave_up": "不再自动重启，需要人工处理",
        "recovered": "已恢复",
        "unobserved": "告警已结束，但未观察到恢复",
        "alert": "告警",
        "alert_over": "告警已解除",
        "approval": "等待批准",
        "blind": "无法观察到服务状态",
        "watchdog_missing": "监控链路中断：收不到 Watchdog",
        "watchdog_back": "监控链路已恢复",
        "automation_off": "自动处理已关闭",
        "automation_on": "自动处理已开启",
        "step": "步骤",
        "approve": "批准命令",
        "who": "操作人",
        "service": "服务",
        "host": "主机",
        "alertname": "告警名",
        "severity": "级别",
        "since": "开始",
        "at": "时间",
        "lasted": "持续",
        "attempt": "尝试",
        "took": "恢复用时",
        "by": "恢复方式",
        "defib": "由 Defib 重启",
        "person": "由人工重启",
        "self": "自行恢复",
        "why": "原因",
        "output": "输出",
        "probe": "探测",
        "runbook": "处理手册",
        "last_attempt": "已无重试机会，需要人工处理",
        "of": "{0}/{1}",
    },
    "en": {
        "down": "Service down",
        "restarted": "Restarted, being watched",
        "could_not_restart": "Could not restart",
        "gave_up": "No more restarts: a person is needed",
        "recovered": "Recovered",
        "unobserved": "The alert is over, but no recovery was seen",
        "alert": "Alert",
        "alert_over": "Alert resolved",
        "approval": "Waits for approval",
        "blind": "Nobody can see how it is",
        "watchdog_missing": "Monitoring is broken: the Watchdog does not come",
        "watchdog_back": "Monitoring works again",
        "automation_off": "Automation is off",
        "automation_on": "Automation is on",
        "step": "Step",
        "approve": "To approve",
        "who": "By",
        "service": "Service",
        "host": "Host",
        "alertname": "Alert",
        "severity": "Severity",
        "since": "Since",
        "at": "At",
        "lasted": "Lasted",
        "attempt": "Attempt",
        "took": "Up after",
        "by": "Brought back by",
        "defib": "Defib's restart",
        "person": "a person's restart",
        "self": "itself",
        "why": "Why",
        "output": "Output",
        "probe": "Probe",
        "runbook": "Runbook",
        "last_attempt": "No attempts are left: a person is needed",
        "of": "{0} of {1}",
    },
}


def message(notice: Notice, inventory: Inventory, mention: list[str]) -> dict[str, Any]:
    """The message to send for a notice, no larger than Feishu takes."""
    words = _WORDS[inventory.notify.language]
    service = inventory.services.get(_service_id(notice))
    title = _title(notice, service, words)
    facts = _facts(notice, inventory, service, words)
    if notice.content.get("plain"):
        return _plain(title, facts)
    called = [f"<at id={name}></at>" for name in mention] if notice.kind in _CALLING else []
    card = {
        "config": {"wide_screen_mode": True},
        "header": {"template": _colour(notice), "title": {"tag": "plain_text", "content": title}},
        "elements": [
            *({"tag": "div", "text": _markdown(f"**{name}** {escape(value)}")} for name, value in facts),
            *([{"tag": "div", "text": _markdown(" ".join(called))}] if called else []),
            *_buttons(service, words),
        ],
    }
    made = {"msg_type": "interactive", "card": card}
    size = len(json.dumps(made, ensure_ascii=False).encode())
    return made if size < BODY_LIMIT - SIGNATURE_ROOM else _plain(title, facts)


def _plain(title: str, facts: list[tuple[str, str]]) -> dict[str, Any]:
    lines = [title, *(f"{name}: {_clip(value, 200)}" for name, value in facts[:20])]
    # In text, too, `<at …>` would call people.
    return {"msg_type": "text", "content": {"text": "\n".join(lines).replace("<", "‹")}}


def _markdown(content: str) -> dict[str, str]:
    return {"tag": "lark_md", "content": content}


def escape(value: str) -> str:
    """Text that shows as it is in a card: nothing in it is markup, a mention or a link."""
    return "".join(_ENTITIES.get(character, character) for character in value)


def _clip(value: str, limit: int = VALUE_LIMIT) -> str:
    shown = "".join(character if character.isprintable() else " " for character in value)
    return shown if len(shown) <= limit else f"{shown[:limit]}…"


def _service_id(notice: Notice) -> str:
    return str(notice.content.get("service") or notice.content.get("labels", {}).get("service", ""))


def _title(notice: Notice, service: Service | None, words: Mapping[str, str]) -> str:
    labels = notice.content.get("labels", {})
    about = service.title if service else labels.get("service") or labels.get("alertname", "")
    if notice.kind in ("alert", "alert_over"):
        name = labels.get("alertname", "")
        about = name if about in ("", name) else f"{name} · {about}"
    return _clip(f"{words[notice.kind]}: {about}" if notice.kind not in _OF_ITSELF else words[notice.kind], 150)


def _colour(notice: Notice) -> str:
    return _COLOURS.get(notice.kind) or _SEVERITY_COLOURS.get(notice.severity, "blue")


def _facts(
    notice: Notice, inventory: Inventory, service: Service | None, words: Mapping[str, str]
) -> list[tuple[str, str]]:
    """What the card says, line by line."""
    content = notice.content
    labels, annotations = content.get("labels", {}), content.get("annotations", {})
    zone = ZoneInfo(inventory.notify.timezone)
    facts = [
        (words["service"], f"{service.title} ({service.id})" if service else labels.get("service", "")),
        (words["host"], service.host if service else labels.get("host", "")),
        (words["severity"], labels.get("severity", "") if notice.kind in _CALLING else ""),
        (words["since" if notice.kind == "down" else "at"], _time(notice.created_at, zone)),
    ]
    if notice.kind in ("alert", "alert_over"):
        hidden = ("service", "host", "severity", "alertname")
        facts += [(name, value) for name, value in sorted(labels.items()) if name not in hidden][:15]
    facts += [(name, text) for name, text in sorted(annotations.items()) if name != "runbook_url"][:6]
    if "attempt" in content:
        used, allowed = content["attempt"], content["attempts"]
        facts.append((words["attempt"], words["of"].format(used, allowed)))
    if "seconds" in content:
        facts.append((words["took"], f"{content['seconds']:.1f} s"))
    if content.get("since"):
        facts.append((words["since"], _time(content["since"], zone)))
    if notice.kind == "approval":
        facts += [(words["step"], str(content["kind"])), (words["approve"], f"defib approve {content['action']}")]
    if content.get("by"):
        facts.append((words["by"], words.get(content["by"], content["by"])))
    if "closed_at" in content:
        facts.append((words["lasted"], f"{content['closed_at'] - content['opened_at']:.0f} s"))
    facts += [(words[key], str(content.get(key) or "")) for key in ("probe", "who", "why", "output")]
    if notice.kind == "could_not_restart" and content.get("last"):
        facts.append(("⚠", words["last_attempt"]))
    return [(_clip(name, 60), _clip(value)) for name, value in facts if value]


def _time(at: float, zone: ZoneInfo) -> str:
    return datetime.fromtimestamp(at, zone).strftime("%Y-%m-%d %H:%M:%S %Z")


def _buttons(service: Service | None, words: Mapping[str, str]) -> list[dict[str, Any]]:
    if service is None or not service.runbook.startswith(("http://", "https://")):
        return []
    text = {"tag": "plain_text", "content": words["runbook"]}
    return [{"tag": "action", "actions": [{"tag": "button", "text": text, "url": service.runbook, "type": "default"}]}]
