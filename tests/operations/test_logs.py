"""How lines of the log look, whoever writes them."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from typing import Any

from service import logs
from service.jobs import Job, Op

SECRET = "a-value-that-no-traceback-shows"  # noqa: S105


def record(message: str, *arguments: object, level: int = logging.INFO, **more: Any) -> logging.LogRecord:
    """As a module's logger makes them."""
    return logging.getLogger("some.module").makeRecord(
        "some.module", level, "file.py", 1, message, arguments, more.pop("exc_info", None), extra=more
    )


def failure() -> Any:
    """What went wrong somewhere, with a secret in a variable."""
    hidden = SECRET  # noqa: F841
    try:
        raise ValueError("what went wrong")
    except ValueError:
        return sys.exc_info()


def test_a_line_is_an_object_however_its_message_looks() -> None:
    formatter = logs.lines(worker="w-0")
    line = formatter.format(record('%s\n{"event": 1} ünd', "a", model="m", odd=object))
    assert "\n" not in line
    written = json.loads(line)
    assert written["event"] == 'a\n{"event": 1} ünd'
    expected = {"level": "info", "logger": "some.module", "worker": "w-0", "model": "m"}
    assert expected.items() <= written.items()
    assert list(written)[:3] == ["timestamp", "level", "event"]


def test_tracebacks_are_whole_and_tell_no_values() -> None:
    failed = record("it failed", level=logging.ERROR, exc_info=failure())
    in_json = json.loads(logs.lines().format(failed))
    assert in_json["exception"].endswith("ValueError: what went wrong")
    for text in (in_json["exception"], logs.text().format(failed), logs.text(colors=True).format(failed)):
        assert "Traceback (most recent call last)" in text
        assert "what went wrong" in text
        assert SECRET not in text


def test_text_has_the_same_fields() -> None:
    line = logs.text(worker="w-0").format(record("a %s", "job", model="m"))
    for part in ("a job", "info", "some.module", "worker=w-0", "model=m"):
        assert part in line
    assert "\x1b" not in line


def test_what_is_known_of_a_request_is_in_its_lines_and_in_no_other() -> None:
    formatter = logs.lines()

    def written() -> dict[str, Any]:
        line: dict[str, Any] = json.loads(formatter.format(record("something")))
        return line

    async def deep() -> None:
        """In a task of its own, as work that must outlive its connection is."""
        logs.bind(job_id=f"job of {logs.known()['request_id']}")
        await asyncio.sleep(0)

    async def answer(request_id: str) -> dict[str, Any]:
        logs.begin(request_id)
        await asyncio.create_task(deep())
        return written()

    async def all_at_once() -> list[dict[str, Any]]:
        return await asyncio.gather(*(asyncio.create_task(answer(f"r{i}")) for i in range(20)))

    for i, line in enumerate(asyncio.run(all_at_once())):
        assert (line["request_id"], line["job_id"]) == (f"r{i}", f"job of r{i}")
    logs.bind(job_id="of nobody")
    assert not {"request_id", "job_id"} & written().keys()


def test_what_a_line_says_of_jobs() -> None:
    def job(number: int) -> Job:
        request = f"r{number}" if number else ""
        return Job(id=f"j{number}", op=Op.SCORE, model="m", payload={}, rows=1, cost=1, request_id=request)

    assert logs.about(job(1)) == {"model": "m", "op": "score", "job_id": "j1", "request_id": "r1"}
    assert logs.about(job(0)) == {"model": "m", "op": "score", "job_id": "j0"}
    several = logs.about(job(1), job(0), job(2))
    assert (several["job_id"], several["request_id"]) == (["j1", "j0", "j2"], ["r1", "r2"])


def test_whatever_ends_a_process_is_a_line_too() -> None:
    program = "import warnings; from service import logs; logs.configure('info', 'auto', worker='w'); "
    program += "warnings.warn('beware'); raise RuntimeError('the end')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    warned, ended = [json.loads(line) for line in done.stderr.splitlines()]
    assert (warned["logger"], warned["level"]) == ("py.warnings", "warning")
    assert "beware" in warned["event"]
    assert (ended["level"], ended["worker"]) == ("critical", "w")
    assert ended["exception"].endswith("RuntimeError: the end")


def test_a_thread_that_fails_is_a_line_and_no_standard_error_is_no_fault() -> None:
    program = "import threading; from service import logs; logs.configure('info', 'auto'); "
    program += "thread = threading.Thread(target=lambda: 1 // 0); thread.start(); thread.join(); print('alive')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    [line] = [json.loads(line) for line in done.stderr.splitlines()]
    assert line["level"] == "error"
    assert line["exception"].endswith("ZeroDivisionError: integer division or modulo by zero")
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", program]
    assert subprocess.run(closed, stdout=subprocess.PIPE, text=True, check=True).stdout == "alive\n"


def test_the_logs_import_no_torch() -> None:
    code = "import sys, service.logs; print([m for m in sys.modules if m.partition('.')[0] in ('torch', 'fastapi')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
