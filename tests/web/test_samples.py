"""The Samples page: samples are seen, brushed, filtered, tagged, discarded and forked on, by mouse and by keyboard.

A training and a hub of its own: what it tags and forks is nobody else's.
"""

import csv
import importlib.util
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

import onthefly

_spec = importlib.util.spec_from_file_location("web_stage", Path(__file__).with_name("conftest.py"))
_web = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_web)

AXE = _web.WEB / "node_modules/axe-core/axe.min.js"


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    made = _web.Stage(tmp_path_factory.mktemp("samples"))
    try:
        made.wait((made.store / "onthefly.db").exists)
        made.start_hub()
        made.until_it_trains()
        with onthefly.connect(made.store) as client:
            client.scan(embeddings=True)
        yield made
    finally:
        made.end()


@pytest.fixture
def page(open_page):
    made = open_page("samples")
    expect(made.get_by_role("heading", name="1 257 samples")).to_be_visible()
    return made


def choose(page, expression, count):
    page.get_by_label("Choose by expression").fill(expression)
    page.get_by_label("Choose by expression").press("Enter")
    expect(page.get_by_role("heading", name=f"{count} selected")).to_be_visible()


def table(page):
    return page.get_by_role("region", name="Table of samples")


def drag(page, element, *places):
    element.hover()  # it waits until nothing moves
    box = element.bounding_box()
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*at[0])
    page.mouse.down()
    for place in at[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


def test_what_is_brushed_is_seen_as_the_data_set_gives_it(page):
    drag(page, page.locator("canvas[aria-label^='Histogram of loss']"), (0.4, 0.5), (0.99, 0.5))
    expect(page.get_by_role("heading", name=re.compile("^[0-9 ]+ selected$"))).to_be_visible()
    pictures = table(page).get_by_label(re.compile("^picture of sample"))
    expect(pictures).to_have_count(0)  # nothing is read before it is asked for
    page.get_by_role("button", name="Show pictures").click()
    first = pictures.first
    expect(first).to_be_visible()
    shades = first.evaluate("c => [c.width, c.height, new Set(c.getContext('2d').getImageData(0, 0, 8, 8).data).size]")
    assert shades[:2] == [8, 8]
    assert shades[2] > 8  # a digit, and no blank
    page.get_by_role("button", name="Tiles").click()
    tile = page.get_by_role("list", name="Samples").get_by_role("button").first
    expect(tile.get_by_label(re.compile("^picture"))).to_be_visible()
    tile.click()
    panel = page.get_by_role("complementary", name=re.compile("^Sample "))
    expect(panel).to_contain_text("image · float32 · 1x8x8")
    expect(panel).to_contain_text("mean_loss")


def test_samples_are_filtered_tagged_discarded_and_left_out_of_a_fork(page, stage):
    choose(page, "top(loss, 30)", 30)
    page.get_by_role("button", name="Tag…").click()
    dialog = page.get_by_role("dialog", name="Tag 30 samples")
    dialog.get_by_label("New tag").fill("<b>odd</b>")
    dialog.get_by_role("button", name="Add", exact=True).click()
    expect(dialog).to_contain_text("all of them")
    dialog.get_by_role("button", name="Done").click()

    choose(page, "top(loss, 12)", 12)
    page.get_by_role("button", name="Discard").click()
    expect(page.get_by_role("button", name="Take back")).to_be_visible()
    page.get_by_label("Tag", exact=True).select_option("discarded (12)")
    page.get_by_label("Choose by expression").fill("")
    page.get_by_label("Choose by expression").press("Enter")
    expect(page.get_by_role("heading", name="12 selected")).to_be_visible()
    page.get_by_label("Correctness").select_option("only right")
    expect(page.get_by_role("heading", name="0 selected")).to_be_visible()
    page.get_by_label("Correctness").select_option("only wrong")
    expect(page.get_by_role("heading", name="12 selected")).to_be_visible()
    expect(table(page).locator("tr.gone")).to_have_count(12)

    table(page).get_by_role("button", name=re.compile("^Sample")).first.click()
    panel = page.get_by_role("complementary", name=re.compile("^Sample "))
    panel.get_by_role("button", name="Remove the tag <b>odd</b>").click()
    expect(panel.get_by_text("<b>odd</b>")).to_have_count(0)
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Tag", exact=True).select_option("<b>odd</b> (29)")
    expect(page.get_by_role("heading", name="29 selected")).to_be_visible()
    with page.expect_download() as saved:
        page.get_by_role("button", name="CSV").click()
    rows = list(csv.DictReader(saved.value.path().read_text().splitlines()))
    assert sorted(row["tags"] for row in rows) == ["<b>odd</b>"] * 18 + ["<b>odd</b>; discarded"] * 11

    page.get_by_role("button", name="Fork on the selection").click()
    fork = page.get_by_role("dialog", name="Fork this run")
    expect(fork.get_by_label("without 11 discarded samples")).to_be_checked()
    expect(fork).to_contain_text("18 of 1 257 samples")
    fork.get_by_label("Name", exact=True).fill("odd")
    fork.get_by_role("button", name="Fork", exact=True).click()
    expect(page.locator("header.top .now")).to_contain_text("odd")
    with onthefly.connect(stage.store) as client:
        chosen = set(client.selection("odd").indices.tolist())
        tags = client.sample_tags()
    assert len(tags["discarded"]) == 12
    assert chosen == set(tags["<b>odd</b>"]) - set(tags["discarded"])


def test_a_fork_on_nothing_chosen_leaves_the_discarded_out_as_well(page, stage):
    with onthefly.connect(stage.store) as client:
        client.subset()
        client.tag_samples([3, 17], "discarded")
        discarded = set(client.sample_tags()["discarded"])
    for name in ("rest", "fewer"):  # the second goes on with the samples of the first, and not with all
        page.keyboard.press("f")
        fork = page.get_by_role("dialog", name="Fork this run")
        expect(fork.get_by_label(f"without {len(discarded)} discarded samples")).to_be_checked()
        fork.get_by_label("Name", exact=True).fill(name)
        fork.get_by_role("button", name="Fork", exact=True).click()
        expect(page.locator("header.top .now")).to_contain_text(name)
        with onthefly.connect(stage.store) as client:
            assert set(client.selection(name).indices.tolist()) == set(range(1257)) - discarded
            client.tag_samples([40], "discarded")
            discarded = set(client.sample_tags()["discarded"])

    with onthefly.connect(stage.store) as client:
        client.save()
        client.tag_samples([41], "discarded")
        discarded = set(client.sample_tags()["discarded"])
    page.keyboard.press("6")
    page.get_by_role("region", name="Table of checkpoints").get_by_role("button", name="Fork…").first.click()
    fork = page.get_by_role("dialog", name="Fork from fewer")
    fork.get_by_label("Name", exact=True).fill("earlier")
    fork.get_by_role("button", name="Fork", exact=True).click()
    expect(fork).to_have_count(0)
    with onthefly.connect(stage.store) as client:
        assert set(client.selection("earlier").indices.tolist()) == set(range(1257)) - discarded


def test_a_fork_waits_until_it_is_known_what_is_discarded(page):
    broken = lambda route: route.fulfill(status=200, content_type="application/json", body="{")  # noqa: E731
    page.route("**/samples/tags*", broken)
    page.get_by_label("Choose by expression").blur()
    page.keyboard.press("f")
    fork = page.get_by_role("dialog", name="Fork this run")
    expect(fork.get_by_role("alert")).to_contain_text("could not be read")
    expect(fork.get_by_role("button", name="Fork", exact=True)).to_be_disabled()
    page.unroute("**/samples/tags*", broken)
    fork.get_by_role("button", name="Try again").click()
    expect(fork.get_by_role("button", name="Fork", exact=True)).to_be_enabled()


def test_the_map_is_drawn_around_by_keyboard_and_axe_is_content(page):
    around = page.locator("canvas.above")
    around.focus()
    for key in ("Shift+ArrowLeft", "Shift+ArrowUp", "Space"):
        page.keyboard.press(key)
    for key in [*["Shift+ArrowRight"] * 3, *["Shift+ArrowDown"] * 4, "Space", "Enter"]:
        page.keyboard.press(key)
    heading = page.get_by_role("heading", name=re.compile("^[0-9 ]+ selected$"))
    expect(heading).to_be_visible()
    expect(page.locator("header.top .now")).not_to_contain_text("paused")
    page.keyboard.press("Escape")
    expect(page.get_by_role("heading", name="1 257 samples")).to_be_visible()

    table(page).get_by_role("button", name=re.compile("^Sample")).first.click()
    page.evaluate(AXE.read_text() + "; true")
    for tiled in (False, True):
        if tiled:
            page.get_by_role("button", name="Tiles").click()
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        serious = [(one["id"], [node["html"][:160] for node in one["nodes"][:3]]) for one in found]
        assert [
            one for one, seen in zip(serious, found, strict=True) if seen["impact"] in ("serious", "critical")
        ] == []
