"""What a person does in the dashboard, with the mouse and the keyboard, while a real model trains. The tests build on each other's runs."""

import re
import time
from pathlib import Path

from playwright.sync_api import expect

import onthefly

AXE = Path(__file__).parents[2] / "src/onthefly/hub/web/node_modules/axe-core/axe.min.js"
XSS = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'


def go(page, name):
    page.locator("nav").get_by_role("link", name=name).click()


def drag(page, element, start, end, *between):
    """Press at one place of an element, move over others, and let go. Places are parts of its width and height."""
    element.hover()  # it waits until nothing moves
    box = element.bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, *between, end)]
    page.mouse.move(*at[0])
    page.mouse.down()
    for place in at[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def history(page):
    return page.get_by_role("region", name="What was asked, and what came of it")


def status(page):
    return page.locator("header.top .now")


def trains(page):
    """The step that is shown goes up."""
    before = step(page)
    deadline = time.monotonic() + 20
    while step(page) <= before:
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


def step(page):
    return int(re.sub(r"\D", "", page.locator("header.top .step").inner_text()))


def test_the_token_leaves_the_address_and_the_policy_holds(open_page, stage):
    page = open_page()

    assert "token" not in page.url
    answer = page.request.get(stage.url.partition("?")[0])
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|\bon\w+=|style=", answer.text())


def test_a_training_is_paused_saved_tested_and_changed(open_page):
    page = open_page()
    expect(page.get_by_role("heading", name="digits")).to_be_visible()
    trains(page)

    page.get_by_role("region", name="Session").get_by_role("button", name="Pause").click()
    expect(status(page)).to_contain_text("paused")
    page.keyboard.press("s")
    expect(history(page)).to_contain_text("Saved at step")
    page.keyboard.press("t")
    expect(history(page)).to_contain_text("Tested at step")
    page.get_by_label("New value of weight_decay").fill("0.02")
    page.get_by_role("button", name="Set", exact=True).click()
    expect(history(page)).to_contain_text("weight_decay 0.01000 → 0.02000")
    expect(page.get_by_label("Values that can be changed")).to_contain_text("0.02000")
    page.locator("h1").click()
    page.keyboard.press(" ")
    expect(status(page)).to_contain_text("running")


def test_commands_are_found_by_name_and_by_key(open_page):
    page = open_page()
    expect(status(page)).to_contain_text("running")

    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard")).to_be_visible()
    # Of a dialog that closes the page is told a moment later, and whoever types fast has opened the next one by then.
    page.evaluate(
        "document.querySelector('dialog').close(); dispatchEvent(new KeyboardEvent('keydown', {key: 'k', ctrlKey: true}))"
    )
    page.get_by_role("combobox").fill("pause")
    page.keyboard.press("Enter")
    expect(status(page)).to_contain_text("paused")
    page.keyboard.press("/")
    page.get_by_role("combobox").fill("resume")
    page.keyboard.press("Enter")
    expect(status(page)).to_contain_text("running")
    page.keyboard.press("m")
    expect(page).to_have_url(re.compile("#/merge"))


def test_a_run_is_forked_with_another_learning_rate(open_page):
    page = open_page()
    expect(status(page)).to_contain_text("running")

    page.keyboard.press("f")
    dialog = page.get_by_role("dialog", name="Fork this run")
    dialog.get_by_label("Name", exact=True).fill("warm")
    dialog.get_by_label("Name of a value").fill("lr")
    dialog.get_by_label("Its new value").fill("0.004")
    dialog.get_by_role("button", name="Fork", exact=True).click()

    expect(status(page)).to_contain_text("warm")
    expect(history(page)).to_contain_text("warm forked from digits")


def test_curves_are_zoomed_searched_and_gone_back_to(open_page):
    page = open_page("charts")
    chart = page.get_by_role("figure", name="Chart of loss", exact=True)
    over = chart.locator(".u-over")
    expect(chart.locator(".legend")).to_contain_text("warm")

    drag(page, over, (0.2, 0.5), (0.7, 0.5))
    zoomed = page.get_by_title("Zoom out")
    expect(zoomed).to_be_visible()
    over.dblclick(position={"x": 60, "y": 60})
    expect(zoomed).to_be_hidden()
    page.get_by_label("Search metrics").fill("val_*")
    expect(page.get_by_role("figure")).to_have_count(2)
    page.get_by_label("Search metrics").fill("")
    for name in ("log y", "joined", "log x"):
        page.get_by_role("button", name=name).click()
        expect(over).to_be_visible()
    page.get_by_role("button", name="log x").click()
    # A scale of logarithms never begins at zero: there would be no end of marks.
    page.get_by_label("x axis").select_option("relative")
    drag(page, over, (0.001, 0.5), (0.6, 0.5))
    page.get_by_role("button", name="log x").click()
    expect(zoomed).to_be_visible()
    page.get_by_role("button", name="log x").click()
    zoomed.click()
    page.get_by_label("Smoothing").fill("0.6")
    for axis in ("epoch", "relative", "time", "step"):
        page.get_by_label("x axis").select_option(axis)
        expect(chart.locator(".legend b").first).to_have_text(re.compile(r"\d"))
    with page.expect_download() as saved:
        chart.get_by_role("button", name="PNG").click()
    assert saved.value.path().read_bytes().startswith(b"\x89PNG")

    over.hover()
    box = over.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.6, steps=3)
    expect(chart.locator(".hint")).to_contain_text("step")
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.6)
    point = page.get_by_role("dialog", name="Point on a curve")
    point.get_by_role("button", name="Load").click()
    expect(status(page)).to_contain_text("rewind1")


def test_the_lineage_is_drawn_listed_and_compared(open_page):
    page = open_page("runs")
    graph = page.locator("svg[aria-label='Lineage of the runs']")
    expect(graph.locator("[data-run]")).to_have_count(3)

    graph.locator("[data-run=warm]").click()
    panel = page.get_by_role("complementary", name="Run warm")
    expect(panel).to_contain_text("digits")
    panel.get_by_label("Tags, with commas between").fill(f"good, {XSS[:50]}")
    panel.get_by_label("Notes", exact=True).fill(XSS)
    panel.get_by_label("Notes", exact=True).press("Tab")
    page.get_by_role("button", name="Close").first.click()
    before = graph.locator("> g").get_attribute("transform")
    graph.hover(position={"x": 300, "y": 100})
    page.mouse.wheel(0, -400)
    expect(graph.locator("> g")).not_to_have_attribute("transform", before)

    page.get_by_role("button", name="Table").click()
    table = page.get_by_role("region", name="Table of runs")
    expect(table).to_contain_text(XSS[:50])
    page.get_by_label("Filter runs").fill("good")
    expect(table.locator("tbody tr")).to_have_count(1)
    page.get_by_label("Filter runs").fill("")
    table.get_by_role("button", name="val_loss").click()
    expect(table.get_by_role("columnheader", name="val_loss")).to_have_attribute("aria-sort", "ascending")
    table.get_by_label("Mark digits").check()
    table.get_by_label("Mark warm").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    dialog = page.get_by_role("dialog", name="Compare 2 runs")
    expect(dialog.get_by_role("row", name=re.compile("kind"))).to_contain_text("fork")
    assert page.evaluate("window.hit") is None


def test_samples_are_scanned_brushed_and_forked_on(open_page):
    page = open_page("samples")
    page.get_by_role("button", name=re.compile("Scan (now|the train data)")).first.click()
    histogram = page.locator("canvas[aria-label^='Histogram of loss']")
    expect(histogram).to_be_visible()
    expect(page.get_by_role("heading", name="1 257 samples")).to_be_visible()

    drag(page, histogram, (0.3, 0.5), (0.99, 0.5))
    expect(page.get_by_role("heading", name="selected")).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="embeddings").click()
    around = page.locator("canvas.above")
    drag(page, around, (0.1, 0.05), (0.1, 0.9), (0.95, 0.05), (0.95, 0.9))
    expect(page.get_by_role("heading", name="selected")).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Choose by expression").fill("top(loss, 200)")
    page.get_by_label("Choose by expression").press("Enter")
    expect(page.get_by_role("heading", name="200 selected")).to_be_visible()
    with page.expect_download() as saved:
        page.get_by_role("button", name="CSV").click()
    assert len(saved.value.path().read_text().splitlines()) == 201
    page.get_by_role("button", name="Fork on the selection").click()
    dialog = page.get_by_role("dialog", name="Fork this run")
    expect(dialog).to_contain_text("200 samples that you have selected")
    dialog.get_by_label("Name", exact=True).fill("worst")
    dialog.get_by_role("button", name="Fork", exact=True).click()
    expect(status(page)).to_contain_text("worst")


def test_single_samples_of_two_runs_are_compared(open_page):
    page = open_page("runs")
    page.get_by_role("button", name="Table").click()
    table = page.get_by_role("region", name="Table of runs")
    page.get_by_label("Filter runs").fill("samples=200")
    expect(table.locator("tbody tr")).to_have_count(1)
    table.get_by_label("Mark worst").check()
    page.get_by_label("Filter runs").fill("")
    table.get_by_label("Mark rewind1").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    dialog = page.get_by_role("dialog", name="Compare 2 runs")

    dialog.get_by_role("button", name="Scan worst").click()

    expect(dialog.get_by_label("Single samples")).to_contain_text("unchanged")
    dialog.get_by_role("button", name="higher loss").click()
    dialog.get_by_role("button", name="Fork on these").click()
    expect(page.get_by_role("dialog", name="Fork this run")).to_contain_text("samples that you have selected")


def test_runs_are_merged_after_a_preview_and_the_merge_is_taken_back(open_page):
    page = open_page("merge")
    parents = page.get_by_role("complementary", name="What is merged")
    page.locator("[data-run=digits]").click()  # in the graph, or in the list
    parents.get_by_role("listitem").filter(has_text="warm").get_by_role("checkbox").check()
    preview = parents.get_by_role("button", name="Preview")
    parents.get_by_role("checkbox", name=re.compile("^weighted")).check()
    parents.get_by_role("checkbox", name=re.compile("^ties")).check()
    parents.get_by_label("Weight of warm", exact=True).fill("0.25")
    density = parents.get_by_label(re.compile("^density"))
    density.fill("1.5")
    expect(parents).to_contain_text("density is at most 1")
    expect(preview).to_be_disabled()
    density.fill("0.6")
    parents.get_by_text("More", exact=True).click()
    rows = parents.get_by_label("Rows of your own")
    rows.fill("top(loss, 20)")
    expect(preview).to_be_disabled()
    rows.fill("hardest = top(loss, 20)")
    preview.click()
    expect(page.get_by_role("button", name="Commit weighted")).to_be_visible(timeout=40_000)
    expect(page.get_by_role("button", name="Commit ties")).to_be_visible()
    expect(page.get_by_role("row", name=re.compile("^val "))).to_contain_text("%")

    page.get_by_label("commit nothing that is worse than the best parent").uncheck()
    expect(page.get_by_role("radio", name="val", exact=True)).to_be_checked()
    page.get_by_role("radio", name="hardest", exact=True).check()
    page.get_by_role("button", name="Commit weighted").click()

    expect(status(page)).to_contain_text("merge1", timeout=40_000)
    expect(page.locator("[data-run=merge1]")).to_be_visible()
    page.get_by_role("button", name="Undo the merge").click()
    expect(status(page)).not_to_contain_text("merge1")


def test_checkpoints_are_pinned_verified_and_fetched(open_page):
    page = open_page("checkpoints")
    page.get_by_role("button", name="Save and pin").click()
    table = page.get_by_role("region", name="Table of checkpoints")
    pinned = table.get_by_role("row").filter(has_text="pinned").first
    expect(pinned).to_be_visible()

    pinned.get_by_role("button", name="Verify").click()
    expect(page.get_by_text("Sound: all")).to_be_visible()
    with page.expect_download() as saved:
        pinned.get_by_role("link", name=re.compile("^Download")).click()
    with open(saved.value.path(), "rb") as file:
        assert b"__metadata__" in file.read(200)
    pinned.get_by_role("button", name=re.compile("^Unpin")).click()
    expect(table.get_by_role("row").filter(has_text="pinned")).to_have_count(0)


def test_everything_that_happened_is_listed(open_page):
    page = open_page("log")
    events = page.get_by_role("region", name="Events")

    expect(events).to_contain_text("merge of")
    page.get_by_label("Search events").fill("weight_decay")
    expect(events.locator("tbody tr")).not_to_have_count(0)
    expect(events).to_contain_text("weight_decay 0.01000 → 0.02000")


def test_nothing_hostile_runs(open_page, stage):
    stage.start_player("run=hostile", f"metric={XSS}")
    page = open_page("overview")
    expect(page.get_by_role("heading", name="hostile")).to_be_visible()
    for name in ("Runs", "Samples", "Merge", "Checkpoints", "Log", "Charts", "Overview"):
        go(page, name)
        page.wait_for_timeout(150)
    expect(page.get_by_role("heading", name=XSS)).to_be_visible()
    assert page.evaluate("window.hit") is None
    page.get_by_role("region", name="Other sessions").get_by_role("button", name="Steer this one").click()
    expect(page.get_by_role("heading", name="hostile")).to_be_hidden()
    stage.stop_others()


def test_axe_finds_nothing_serious(open_page):
    page = open_page()
    page.evaluate(AXE.read_text() + "; true")
    for name in ("Overview", "Charts", "Runs", "Samples", "Merge", "Checkpoints", "Log"):
        go(page, name)
        page.wait_for_timeout(250)
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        serious = [
            (name, one["id"], [node["html"][:160] for node in one["nodes"][:3]])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == []


def test_a_phone_watches_and_pauses(open_page):
    page = open_page(width=390, height=844, has_touch=True, is_mobile=True)
    page.get_by_role("region", name="Session").get_by_role("button", name="Pause").tap()
    expect(status(page)).to_contain_text("paused")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("region", name="Session").get_by_role("button", name="Resume").tap()
    expect(status(page)).to_contain_text("running")


def test_a_hub_that_was_killed_is_found_again_and_nothing_is_missed(open_page, stage):
    page = open_page("log", offline=True)
    events = page.get_by_role("region", name="Events")
    expect(events.locator("tbody tr").first).to_be_visible()

    stage.kill_hub()
    expect(page.get_by_role("alert")).to_contain_text("The hub does not answer")
    with onthefly.connect(stage.store) as client:
        client.command("set", 1, values={"weight_decay": 0.033})
    stage.start_hub()

    expect(events).to_contain_text("→ 0.03300")
    expect(page.get_by_role("alert")).to_have_count(0)
    trains(page)


def test_a_training_that_was_killed_is_said_to_be(open_page, stage):
    page = open_page()
    expect(status(page)).to_contain_text("running")

    stage.trainer.kill()
    stage.trainer.wait()

    expect(page.get_by_role("alert")).to_contain_text("was killed")
    expect(page.get_by_role("alert")).to_contain_text("onthefly resume")
    expect(page.get_by_role("region", name="Session").get_by_role("button", name="Pause")).to_be_disabled()
