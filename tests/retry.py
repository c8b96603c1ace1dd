"""One second chance for tests marked `timed`: those of processes with limits of time, which a busy machine may miss.

Nothing else is ever run again. The first failure is kept and printed at the end, whatever the second run gives.
`tests/conftest.py` takes these hooks in.
"""

from __future__ import annotations

import pytest
from _pytest.runner import runtestprotocol

FIRST = "first failure, before the test was run once more"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A `timed` test's own limit of time counts for each of its two runs."""
    for item in items:
        if item.get_closest_marker("timed") is not None:
            limit = item.get_closest_marker("timeout")
            item.add_marker(pytest.mark.timeout(*(limit.args if limit else ()), func_only=True), append=False)


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if item.get_closest_marker("timed") is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    failures = [report for report in reports if report.failed]
    if failures:
        item._initrequest()  # type: ignore[attr-defined]  # new fixtures of its own
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        text = "\n".join(f"{failure.longreprtext}\n{_output(failure)}" for failure in failures)
        next(report for report in reversed(reports) if report.when in ("setup", "call")).sections.append((FIRST, text))
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _output(report: pytest.TestReport) -> str:
    return "\n".join(f"--- {name} ---\n{text}" for name, text in report.sections)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for kind in ("passed", "failed", "error") for r in terminalreporter.getreports(kind)]
    for report in reports:
        for name, text in report.sections:
            if name == FIRST:
                terminalreporter.section(f"{report.nodeid}: {FIRST}; then it {report.outcome}", "!")
                terminalreporter.write_line(text)
