"""Reports and the audit trail, in the browser, on the training of `test_dashboard.py`."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

import onthefly
from onthefly.errors import OnTheFlyError

AXE = Path(__file__).parents[2] / "src/onthefly/hub/web/node_modules/axe-core/axe.min.js"


def serious(page):
    page.evaluate(AXE.read_text() + "; true")
    found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
    return [
        (one["id"], [node["html"][:160] for node in one["nodes"][:3]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def ask(page, kind):
    page.get_by_role("region", name="Ask for a report").get_by_role("button", name=re.compile(f"^{kind}")).click()


def test_a_report_is_watched_cancelled_kept_and_fetched(open_page):
    page = open_page("reports")
    page.get_by_label("Steps").fill("10000")
    ask(page, "Health")
    under_way = page.get_by_role("region", name="Report under way")
    expect(under_way).to_contain_text(re.compile(r"[1-9]\d* of 10 000 steps"))
    assert serious(page) == []
    under_way.get_by_role("button", name="Cancel").click()

    report = page.get_by_role("article", name="Report on health")
    expect(report.get_by_role("region", name="Not looked at")).to_contain_text("it was cancelled")
    expect(report.get_by_role("list", name="Parts").get_by_role("listitem")).to_have_count(7)
    expect(under_way).to_have_count(0)
    page.get_by_label("Steps").fill("4")
    ask(page, "Gradients")
    expect(page.get_by_role("article", name="Report on gradients")).to_contain_text("4 looked into")

    page.reload()
    made = page.get_by_role("region", name="Reports that were made")
    expect(made.get_by_role("button", name=re.compile("Gradients"))).to_have_attribute("aria-current", "true")
    norms = page.get_by_role("region", name="Gradient norms", exact=True)
    expect(norms.get_by_role("row")).to_have_count(12)
    norms.get_by_role("button", name="median norm").click()
    expect(norms.get_by_role("columnheader", name="median norm")).to_have_attribute("aria-sort", "descending")
    made.get_by_role("button", name=re.compile("Health")).first.click()
    expect(report.get_by_role("img", name=re.compile("Where a step's time goes"))).to_be_visible()
    assert serious(page) == []
    with page.expect_download() as saved:
        report.get_by_role("button", name="JSON").click()
    assert json.loads(saved.value.path().read_text())["kind"] == "health"


def test_a_run_without_a_session_is_judged_by_what_is_recorded(open_page, stage):
    stage.start_player("run=short")
    stage.stop_others()
    page = open_page("reports")
    page.get_by_label("Run", exact=True).select_option("short")
    expect(page.get_by_role("region", name="Ask for a report")).to_contain_text("No session is on this run")
    ask(page, "Activations")
    expect(page.get_by_role("article", name="Report on activations")).to_contain_text(
        "seen only while a session trains"
    )


def test_who_asked_and_what_came_of_it_is_listed(open_page, stage):
    with onthefly.connect(stage.store) as client, pytest.raises(OnTheFlyError, match="sense"):
        client.command("set", 1, values={"sense": 3})
    page = open_page("log")
    page.get_by_role("button", name="Who asked").click()
    trail = page.get_by_role("region", name="Who asked for what")
    refused = trail.get_by_role("row", name=re.compile("Python .*Set sense = 3"))
    expect(refused.first).to_contain_text("there is nothing named 'sense' to set")
    page.get_by_label("Through which door").select_option("dashboard")
    expect(trail.locator("tbody")).not_to_contain_text("Python")
    page.get_by_label("Through which door").select_option("")
    page.get_by_label("What came of it").select_option("failed")
    page.get_by_label("Which commands").select_option("set")
    page.get_by_label("Search what was asked").fill("sense*")
    expect(refused).to_have_count(1)
    refused.get_by_role("button", name="Set").click()
    expect(trail).to_contain_text('"asker"')
    assert serious(page) == []
