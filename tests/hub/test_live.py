"""The WebSocket: frames when they are drawn, events each once, and nothing missed after a gap."""

import json
import os
import socket
import sqlite3
import time
from contextlib import ExitStack, closing

import onthefly
from onthefly.hub.columns import unpack
from onthefly.store.journal import Journal
from onthefly.store.liveness import SessionLock
from onthefly.store.store import Store


def every_event(store):
    with onthefly.connect(store) as client:
        return [f"{event.session}.{event.seq}" for event in client.events()]


def chart(run, **more):
    return {"id": "loss", "series": [[run, "loss"]], "points": 2000} | more


def test_a_tab_sees_the_session_go_on_and_its_curve_grow(training, hub):
    store = hub.stores[0]
    run = hub.get(f"/sessions/{training.session}")["run"]
    with hub.tab() as tab:
        assert (tab.welcome["type"], tab.welcome["stores"][0]["id"]) == ("welcome", store)
        tab.say(type="follow", store=store)
        tab.say(type="charts", store=store, charts=[chart(run)])
        first = tab.until(store, lambda found: "sessions" in found)
        assert [s["id"] for s in first["sessions"]] == [training.session]
        points = []
        while len(points) < 3:
            found, columns = tab.frame(store)
            if "charts" in found:
                about = found["charts"]["loss"]
                assert len(columns[about["columns"] + "0"]) == len(columns[about["columns"] + "x"])
                points.append(about["series"][0]["points"])
        assert points == sorted(set(points))


def test_a_watched_session_need_not_carry_its_news_over_itself(own_store, start_hub):
    """This test is the sessions: one writes into its journal, and nobody else ever does more; the journal of the other cannot be read."""
    with closing(Store.open(own_store, create=True)) as store, ExitStack() as alive:

        def begin(run):
            about = {"environment": {}, "inexact": [], "config": {}, "launch": None, "host": socket.gethostname()}
            session = store.create_session(project="default", run=run, pid=os.getpid(), time=time.time(), **about)
            lock = SessionLock(store.lock_path(session))
            lock.acquire()
            alive.callback(lock.release)
            return store.journal_path(session)

        begin(store.create_run(None, project="default")).mkdir()
        run = store.create_run(None, project="default")
        journal = Journal(begin(run))
        alive.callback(journal.close)
        loss = journal.series(run, 0, "loss")
        hub = start_hub(own_store)
        with hub.tab() as tab:
            tab.say(type="follow", store=hub.stores[0], cursor="")
            tab.say(type="charts", store=hub.stores[0], charts=[chart(run)])

            def shows(count):
                def has(found):
                    return "charts" in found and any(
                        one["points"] == count for one in found["charts"]["loss"]["series"]
                    )

                return has

            for step in (1, 2, 3):
                journal.metrics(step, 0, time.time(), [loss, 1 / step])
                tab.until(hub.stores[0], shows(step))


def test_there_is_never_more_than_one_frame_on_its_way(training, hub):
    store = hub.stores[0]
    with hub.tab() as tab:
        tab.say(type="follow", store=store)
        _, meta = tab.next()
        frame = meta["frame"]
        try:
            while True:  # it is not drawn, and the training goes on
                unpack(tab.socket.recv(timeout=1.0))
                raise AssertionError("a second frame came")
        except TimeoutError:
            pass
        tab.say(type="drawn", frame=frame + 5)  # of no frame that there was
        tab.say(type="drawn", frame=frame)
        _, meta = tab.next()
        assert meta["frame"] == frame + 1
        assert meta["stores"][store]["sessions"][0]["step"] > 0


def test_a_command_of_one_page_is_an_event_on_the_other(training, hub):
    store = hub.stores[0]
    with hub.tab() as one, hub.tab() as other:
        for tab in (one, other):
            tab.say(type="follow", store=store, sessions=False)
            assert tab.frame(store)[0]["events"] == []
        hub.give(training.session, "set", values={"lr": 0.011})
        ids = [
            [event["id"] for event in tab.until(store, lambda found: found.get("events"))["events"]]
            for tab in (one, other)
        ]
        assert ids[0] == ids[1]


def test_nothing_is_missed_and_nothing_comes_twice_over_a_gap_and_a_new_hub(own_store, play, start_hub, kill):
    """The socket breaks, the hub is killed, two sessions go on meanwhile, and a new hub has the same token and port."""
    players = [play("run=a"), play("run=b")]
    hub = start_hub(own_store)
    cookie, seen = hub.cookie(), []
    with hub.tab(Cookie=cookie) as tab:
        tab.say(type="follow", store=hub.stores[0], cursor="")
        cursor = ""
        while len(seen) < len(every_event(own_store)):
            found, _ = tab.frame(hub.stores[0])
            seen += [event["id"] for event in found.get("events", [])]
            cursor = found.get("cursor", cursor)
    kill(hub.process)
    with onthefly.connect(own_store) as client:
        for n in range(6):
            client.set(lr=n, session=players[n % 2].session)
    again = start_hub(own_store)
    assert (again.token, again.port, again.stores) == (hub.token, hub.port, hub.stores)
    with again.tab(Cookie=cookie) as tab:  # the page still has it
        tab.say(type="follow", store=again.stores[0], cursor=cursor)
        while len(seen) < len(every_event(own_store)):
            found, _ = tab.frame(again.stores[0])
            seen += [event["id"] for event in found.get("events", [])]
    assert sorted(seen) == sorted(every_event(own_store))


def test_many_events_come_in_frames_of_some(own_store, play, start_hub):
    player = play()
    with onthefly.connect(own_store) as client:
        for _ in range(30):
            client.pause()
    hub = start_hub(own_store)
    page = hub.get("/events?limit=10")
    assert (len(page["events"]), page["more"]) == (10, True)
    with hub.tab() as tab:
        tab.say(type="follow", store=hub.stores[0], cursor=page["cursor"], sessions=False)
        found, _ = tab.frame(hub.stores[0])
        ids = [event["id"] for event in page["events"] + found["events"]]
        assert (
            ids[:25] == [f"{player.session}.{seq}" for seq in range(int(ids[0].split(".")[1]), 99)][:25]
            or len(ids) > 25
        )
        assert len(set(ids)) == len(ids)


def test_a_session_that_is_killed_is_shown_as_such(own_store, play, start_hub, kill):
    player = play()
    hub = start_hub(own_store)
    with hub.tab() as tab:
        tab.say(type="follow", store=hub.stores[0])
        assert tab.frame(hub.stores[0])[0]["sessions"][0]["alive"]
        kill(player)
        found = tab.until(hub.stores[0], lambda found: [s["status"] for s in found.get("sessions", [])] == ["killed"])
        assert not found["sessions"][0]["alive"]


def test_a_new_or_changed_run_is_told(own_store, play, start_hub):
    play("run=a")
    hub = start_hub(own_store)
    store = hub.stores[0]
    with hub.tab() as tab:
        tab.say(type="follow", store=store)
        first = tab.until(store, lambda found: "runs" in found)["runs"]
        play("run=b")
        second = tab.until(store, lambda found: "runs" in found)["runs"]
        hub.http.post(f"{hub.at}/runs/a/archive", json={"archived": True})
        third = tab.until(store, lambda found: "runs" in found)["runs"]
        assert len({first, second, third}) == 3


def test_what_cannot_be_used_is_an_error_and_the_socket_goes_on(training, hub):
    store = hub.stores[0]
    bad = [
        {"type": "explode"},
        {"type": "follow"},
        {"type": "follow", "store": "nope"},
        {"type": "follow", "store": store, "cursor": "x"},
        {"type": "charts", "store": store, "charts": [{"id": "a", "series": []}]},
        {"type": "charts", "store": store, "charts": [{"id": "a", "series": [["a", "b"]], "from": 2, "to": 1}]},
        {"type": "unfollow", "store": "nope"},
        ["type"],
        7,
    ]
    with hub.tab() as tab:
        for message in bad:
            tab.socket.send(json.dumps(message))
            assert tab.next()["type"] == "error"
        tab.say(type="follow", store=store)
        assert "sessions" in tab.frame(store)[0]
        tab.say(type="unfollow", store=store)


def test_a_store_that_breaks_is_said(play, own_store, start_hub):
    play("steps=3").wait()
    hub = start_hub(own_store)
    store = hub.stores[0]
    with hub.tab() as tab:
        tab.say(type="follow", store=store)
        tab.frame(store)
        database = own_store / "onthefly.db"
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.write_bytes(b"this is no database " * (database.stat().st_size // 20))
        assert tab.until(store, lambda found: found.get("error"))["error"]["type"] == "StoreError"
    assert hub.http.get(f"{hub.at}/runs").status_code == 500
    assert hub.http.get("/healthz").status_code == 200
