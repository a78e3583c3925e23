"""Pauses of probing between the remediator and exporters of this and earlier versions."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from fleet.inventory.endpoints import Endpoint
from remediator.clients.exporter import Exporter
from remediator.engine import probe_pauser
from remediator.record import maintenance
from runtime.tasks import cancel_and_wait
from runtime.tokens import ConfiguredToken
from tests.integration import peers
from tests.support import eventually, new_record

UNTIL = 4e9  # of the record's clock


@pytest.mark.parametrize("status", [200, 404])
async def test_pauses_are_sent_only_while_there_are_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """An earlier exporter has no pauses; it is asked no more often than another one."""
    monkeypatch.setattr(probe_pauser, "SEND_EVERY", 0.02)
    sent: list[list[dict[str, Any]]] = []

    async def answer(request: web.Request) -> web.Response:
        sent.append((await request.json())["scopes"])
        return web.json_response({"services": 0}, status=status)

    record = await asyncio.to_thread(new_record, tmp_path)
    async with peers.web_server(answer) as port:
        url = f"http://127.0.0.1:{port}"
        exporter = await asyncio.to_thread(Exporter, Endpoint(url=url), ConfiguredToken("exporter.token"))
        task = asyncio.create_task(probe_pauser.ProbePauser(record, exporter).run())

        async def have(number: int) -> None:
            async def is_sent() -> bool:
                return len(sent) >= number

            await eventually(is_sent)

        await have(1)  # an earlier process may have paused something
        number = await record.write(
            maintenance.begin, "host", "h", until=UNTIL, reason="r", by="ann", pause_probing=True
        )
        await have(4)
        await record.write(maintenance.end, number)
        await asyncio.sleep(0.2)  # until the last one
        last = len(sent)
        await asyncio.sleep(0.2)
        assert (sent[0], sent[1], sent[-1], len(sent)) == ([], [{"scope": "host", "name": "h"}], [], last)
        await cancel_and_wait([task])
        await exporter.close()
    await asyncio.to_thread(record.close)
