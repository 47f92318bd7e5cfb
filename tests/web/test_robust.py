"""What the dashboard bears: several browsers and tabs, a hub and sessions that are killed, and text that would like to run. Sessions are
played (`tests/player.py`): what is tried here is between store, hub and page."""

import time

import numpy as np
import pytest
from playwright.sync_api import expect

import onthefly
from onthefly.samples.table import SampleTable
from onthefly.store import catalog

XSS = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'
HIDE = """hidden => {
    Object.defineProperty(document, 'hidden', { configurable: true, get: () => hidden })
    document.dispatchEvent(new Event('visibilitychange'))
}"""


@pytest.fixture
def give(played):
    """Gives the played session a value, as another door would."""

    def now(**values):
        with onthefly.connect(played.store) as client:
            client.command("set", 1, values=values)

    return now


def history(page):
    return page.get_by_role("region", name="What was asked, and what came of it")


def status(page):
    return page.locator("header.top .now")


def until(page, condition):
    """The condition comes true while the page goes on."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


def changes(page, name):
    """The rows of the log that say that a value was changed."""
    return page.get_by_role("region", name="Events").locator("tbody tr").filter(has_text=name)


def test_what_one_browser_asks_for_another_one_sees(open_page, played):
    one, other = open_page(on=played), open_page(on=played)
    expect(status(other)).to_contain_text("running")

    one.keyboard.press("Space")

    for page in (one, other):
        expect(status(page)).to_contain_text("paused")
        expect(history(page)).to_contain_text("Pause")
    other.keyboard.press("Space")
    expect(status(one)).to_contain_text("running")


def test_hidden_tabs_have_no_socket_and_catch_up_when_they_are_shown(open_page, played, give):
    first = open_page("log", on=played)
    tabs = [first, *(first.context.new_page() for _ in range(7))]
    sockets = {tab: [] for tab in tabs}
    for tab in tabs:
        tab.on("websocket", lambda socket, tab=tab: sockets[tab].append(socket))
        tab.goto(played.url.partition("?")[0] + "?again#/log")
        until(tab, lambda tab=tab: sockets[tab])
    hidden = tabs[1:]

    def open_sockets(tab):
        return [socket for socket in sockets[tab] if not socket.is_closed()]

    for tab in hidden:
        tab.evaluate(HIDE, True)
    until(first, lambda: not any(open_sockets(tab) for tab in hidden))
    before = {tab: len(sockets[tab]) for tab in hidden}
    give(unseen=0.125)
    expect(changes(first, "unseen")).to_have_count(1)
    assert {tab: len(sockets[tab]) for tab in hidden} == before
    assert all(changes(tab, "unseen").count() == 0 for tab in hidden)

    for tab in hidden:
        tab.evaluate(HIDE, False)
    for tab in tabs:
        expect(changes(tab, "unseen")).to_have_count(1)
        assert len(open_sockets(tab)) == 1


def test_a_cookie_outlives_a_hub_and_no_event_is_missed_or_seen_twice(open_page, played, give):
    page = open_page("log", on=played, offline=True)
    give(before=1.5)
    expect(changes(page, "before")).to_have_count(1)
    cookie = page.context.cookies()

    played.kill_hub()
    expect(page.get_by_role("alert")).to_contain_text("The hub does not answer")
    for number in range(5):
        give(**{f"meanwhile{number}": 0.5})
    played.start_hub()

    expect(page.get_by_role("alert")).to_have_count(0)
    for number in range(5):
        expect(changes(page, f"meanwhile{number}")).to_have_count(1)
    give(after=2.5)
    expect(changes(page, "after 1")).to_have_count(1)
    shown = page.get_by_role("region", name="Events").locator("td.about").all_inner_texts()
    order = ["before 1", *(f"meanwhile{number} " for number in range(5)), "after 1"]
    places = [next(i for i, text in enumerate(shown) if text.startswith(name)) for name in order]
    assert places == sorted(places)
    assert page.context.cookies() == cookie


def test_a_command_to_a_session_that_dies_of_it_is_answered(open_page, played):
    mortal = played.start_player("run=mortal", "dies=testRun")
    page = open_page(on=played)
    expect(page.get_by_role("heading", name="mortal")).to_be_visible()

    page.keyboard.press("t")

    mortal.wait()
    expect(page.get_by_role("alert").filter(has_text="was killed")).to_be_visible()
    expect(history(page)).to_contain_text("ended before it came to this command")
    expect(page.get_by_role("region", name="Session").get_by_role("button", name="Pause")).to_be_disabled()


def test_no_text_that_comes_from_elsewhere_runs(open_page, played, give):
    """Names of values, log lines, names of samples, messages of errors; names of metrics, notes and tags have tests of their own."""
    store = played.store
    played.start_player("run=told", "steps=3").wait()
    (store / "logs").mkdir(exist_ok=True)
    (store / "logs/told.log").write_text(f"{XSS}\n")
    columns = {"loss": [0.5, 0.25], "label": [0, 1], "name": [XSS, f"'\"{XSS}"]}
    table = SampleTable({name: np.array(values) for name, values in columns.items()}, {"run": "told"})
    digest = table.write(store / "scans/told-train.arrow")
    with onthefly.connect(store) as client:
        about = {"generation": 0, "step": 3, "epoch": 0, "checkpoint": "ab" * 32, "data": "train", "seconds": 0.1}
        path = str(store / "scans/told-train.arrow")
        about |= {"columns": list(columns), "length": 2, "path": path, "hash": digest}
        catalog.scanned(client.store, run="told", **about)
    give(**{XSS: 1.5})

    page = open_page("log", on=played)
    expect(changes(page, XSS)).to_have_count(1)
    changes(page, XSS).click()
    page.get_by_label("Output of a run").select_option("told")
    expect(page.get_by_label("Output of told")).to_contain_text(XSS)
    for name in ("Charts", "Runs", "Samples", "Merge", "Checkpoints", "Overview"):
        page.locator("nav").get_by_role("link", name=name).click()
        expect(page.locator("nav a[aria-current=page]")).to_contain_text(name)
        if name == "Samples":
            expect(page.get_by_role("heading", name="2 samples")).to_be_visible()
    expect(history(page)).to_contain_text(XSS)
    played.start_player("run=failing", f"says={XSS}")
    page.get_by_role("region", name="Other sessions").get_by_role("button", name="Steer this one").click()
    expect(page.get_by_role("heading", name="failing")).to_be_visible()
    page.keyboard.press("t")
    expect(history(page)).to_contain_text(f"no such part: {XSS}")
    assert page.evaluate("window.hit") is None
