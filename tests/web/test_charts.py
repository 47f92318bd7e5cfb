"""Charts in the browser: in an order of one's own, that is kept, and by epoch. Nothing here changes the training."""

from playwright.sync_api import expect

import onthefly


def chart(page, name):
    return page.get_by_role("figure", name=f"Chart of {name}", exact=True)


def order(page):
    return page.locator(".charts figure").evaluate_all("all => all.map(one => one.dataset.metric)")


def handle(page, name):
    return chart(page, name).get_by_role("button", name=f"Move {name}")


def test_charts_stand_where_they_were_put_by_hand_and_by_keyboard(open_page):
    page = open_page("charts")
    expect(chart(page, "val_loss")).to_be_visible()
    assert order(page) == ["loss", "val_accuracy", "val_loss"]

    handle(page, "val_loss").press("Home")
    expect(handle(page, "val_loss")).to_be_focused()
    expect(page.get_by_text("val_loss: place 1 of 3")).to_be_attached()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_text("val_loss: place 2 of 3")).to_be_attached()
    assert order(page) == ["loss", "val_loss", "val_accuracy"]

    grip, target = handle(page, "loss"), chart(page, "val_accuracy")
    grip.hover()
    page.mouse.down()
    target.hover()
    expect(page.locator(".slot.after")).to_have_attribute("data-name", "val_accuracy")
    page.keyboard.press("Escape")
    page.mouse.up()
    assert order(page) == ["loss", "val_loss", "val_accuracy"]
    grip.drag_to(target)
    expect(page.get_by_text("loss: place 3 of 3")).to_be_attached()
    assert order(page) == ["val_loss", "val_accuracy", "loss"]

    chart(page, "val_accuracy").get_by_role("button", name="Pin val_accuracy").click()
    page.get_by_label("Columns").select_option("3")
    handle(page, "val_accuracy").press("ArrowRight")  # it is the only one that is pinned
    assert order(page) == ["val_accuracy", "val_loss", "loss"]

    page.reload()
    expect(chart(page, "loss")).to_be_visible()
    assert order(page) == ["val_accuracy", "val_loss", "loss"]
    expect(page.get_by_label("Columns")).to_have_value("3")
    expect(page.get_by_role("button", name="Pin val_accuracy")).to_have_attribute("aria-pressed", "true")

    page.get_by_label("Search metrics").fill("*[au]*r*y, lo?s")
    expect(page.locator(".charts figure")).to_have_count(2)
    assert order(page) == ["val_accuracy", "loss"]


def test_curves_are_drawn_by_epoch(open_page, stage):
    page = open_page("charts")
    expect(chart(page, "val_loss").locator(".u-over")).to_be_visible()
    page.get_by_label("x axis").select_option("epoch")
    over = chart(page, "loss").locator(".u-over")
    over.hover()
    expect(chart(page, "loss").locator(".hint")).to_contain_text("epoch ")  # it is drawn anew
    over.hover(position={"x": over.bounding_box()["width"] - 1, "y": 40})
    said = float(chart(page, "loss").locator(".hint").inner_text().removeprefix("epoch "))
    expect(chart(page, "val_loss").locator(".hint")).to_contain_text("epoch ")  # the cursor is in all of them
    # The last point is of a step that was recorded.
    hub = page.url.partition("#")[0] + "api/v1/stores"
    store = page.request.get(hub).json()[0]["id"]
    line = page.request.get(f"{hub}/{store}/epochs").json()[0]
    with onthefly.connect(stage.store) as client:
        done = client.series(line["run"], "loss").steps[-1] * line["epochs"][1] / line["steps"][1]
    assert 0 < said <= done + 0.01
