"""Every path, against a real training and its store."""

import csv
import io
import subprocess
import sys

import numpy as np
import pytest

import onthefly


def test_the_hub_says_what_it_serves(training, hub):
    found = hub.http.get("/api/v1/hub").json()
    assert found["stores"][0]["path"] == str(training.store)
    assert found["stores"][0]["sessions"] == 1
    assert hub.get("")["projects"] == ["default"]


def test_a_live_session_is_shown_with_its_speed(training, hub, wait_until):
    found = wait_until(lambda: (s := hub.get(f"/sessions/{training.session}"))["speed"] and s)
    assert (found["alive"], found["status"], found["resumable"]) == (True, "running", True)
    assert 0 < found["speed"] < 1000
    assert found["memory"] is None or found["memory"] > 10e6
    assert [s["id"] for s in hub.get("/sessions?alive=true")] == [training.session]


def test_a_command_goes_round(training, hub):
    paused = hub.give(training.session, "pause", save=False)
    assert (paused["status"], paused["error"]) == ("done", None)
    assert hub.get(f"/sessions/{training.session}")["status"] == "paused"
    changed = hub.give(training.session, "set", values={"lr": 0.02, "mixup": 0.3})
    assert {c["name"]: c["after"] for c in changed["result"]["changed"]} == {"optimizer.0.lr": 0.02, "mixup": 0.3}
    assert hub.give(training.session, "resume")["result"]["paused"] is False
    assert hub.get(f"/commands/{changed['id']}") == changed
    assert changed in hub.get(f"/commands?session={training.session}&status=done")


def test_who_asked_and_through_which_door_is_kept(training, hub):
    hub.give(training.session, "saveCheckpoint", pin=False)
    with onthefly.connect(training.store) as client:
        client.save()
    page = {"Cookie": hub.cookie(), "Origin": hub.base}
    path = f"{hub.at}/sessions/{training.session}/commands/set?wait=30"
    assert hub.bare.post(path, json={"values": {"nonsense": 1}}, headers=page).json()["status"] == "failed"
    words = [sys.executable, "-c", "from onthefly.cli import main; main()", "save", "--store", training.store]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

    trail = hub.get("/commands?limit=4")
    assert [one["door"] for one in trail] == ["cli", "dashboard", "python", "api"]
    assert [one["asker"] for one in trail][1::2] == ["127.0.0.1", "127.0.0.1"]
    assert "@" in trail[0]["asker"]
    assert {one["run"] for one in trail} == {hub.get(f"/sessions/{training.session}")["run"]}
    assert [one["kind"] for one in hub.get("/commands?limit=1&door=dashboard&kind=set")] == ["set"]
    older = hub.get(f"/commands?limit=1&before={trail[1]['number']}")
    assert older == [trail[2]]


def test_a_list_of_commands_has_the_beginning_alone_of_what_is_long(training, hub):
    named = list(range(10**9, 10**9 + 250))
    recipe = {"minus": [{"select": "all"}, {"select": "indices", "indices": named}]}
    path = f"{hub.at}/sessions/{training.session}/commands/forkRun?wait=30"
    given = hub.http.post(path, json={"recipe": recipe}).json()
    assert given["status"] == "failed"  # no sample has such an index
    listed = hub.get("/commands?limit=1")[0]
    assert listed["id"] == given["id"]
    assert listed["arguments"]["recipe"]["minus"][1]["indices"] == named[:100]
    assert listed["cut"] == {"arguments.recipe.minus.1.indices": 250}
    whole = hub.get(f"/commands/{given['id']}")
    assert (whole["arguments"]["recipe"], whole["cut"]) == (recipe, {})


def test_a_command_without_wait_is_queued_and_answered_later(training, hub, wait_until):
    path = f"{hub.at}/sessions/{training.session}/commands/testRun"
    answer = hub.http.post(path, params={"key": "once"}, json={"save": False})
    assert answer.status_code in (200, 202)
    found = wait_until(lambda: (c := hub.get("/commands/once"))["status"] != "queued" and c)
    assert found["result"]["samples"] == 64
    again = hub.http.post(path, params={"key": "once"}, json={"save": False}).json()
    assert again["number"] == found["number"]
    other = hub.http.post(path, params={"key": "once"}, json={"save": True})
    assert other.status_code == 422


def test_reports_are_listed_read_and_made_of_what_is_recorded(training, hub):
    assert hub.get("/schemas/report")["properties"]["steps"]["maximum"] == 10_000
    given = hub.give(training.session, "report", report="gradients", steps=3)
    assert given["status"] == "done"

    (head,) = hub.get("/reports?kind=gradients&limit=1")
    assert (head["id"], head["door"], head["run"]) == (given["id"], "api", given["result"]["run"])
    assert head["last_step"] - head["first_step"] == 2
    whole = hub.get(f"/reports/{given['id']}")
    assert {name: whole[name] for name in head} == head
    assert whole["report"]["tables"] == given["result"]["tables"]
    assert whole["report"]["latest"]["loss"][-1][0] == head["step"]
    assert hub.get("/reports?run=nobody") == []
    recorded = hub.get(f"/runs/{head['run']}/report?kind=gradients")
    assert (recorded["live"], recorded["tables"]) == (False, whole["report"]["tables"])
    assert hub.http.get(hub.at + "/reports/nothing").status_code == 404
    assert "no report is under way" in hub.give(training.session, "cancelReport")["error"]["message"]


def test_what_the_session_refuses_is_its_answer(training, hub):
    found = hub.give(training.session, "set", values={"nonsense": 1})
    assert found["status"] == "failed"
    assert "nonsense" in found["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("set", {}),
        ("set", {"values": {"lr": {"deep": 1}}}),
        ("pause", {"unknown": 1}),
        ("saveCheckpoint", {"path": "/tmp/elsewhere.safetensors"}),
        ("loadCheckpoint", {"path": "/etc/passwd"}),
        ("pinCheckpoint", {"path": "../../x"}),
    ],
)
def test_wrong_arguments_never_reach_the_session(training, hub, kind, body):
    answer = hub.http.post(f"{hub.at}/sessions/{training.session}/commands/{kind}", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "InvalidCommandError")


@pytest.mark.parametrize("kind", ["exportSubset", "adoptScan"])
def test_there_is_no_path_that_names_any_file(training, hub, kind):
    answer = hub.http.post(f"{hub.at}/sessions/{training.session}/commands/{kind}", json={"path": "/tmp/x.csv"})
    assert answer.status_code in (404, 405)


def test_a_dead_session_is_a_conflict_and_an_unknown_one_is_not_found(own_store, play, start_hub, kill):
    player = play()
    hub = start_hub(own_store)
    kill(player)
    dead = hub.http.post(f"{hub.at}/sessions/{player.session}/commands/pause", json={})
    assert (dead.status_code, dead.json()["error"]["type"]) == (409, "NoLiveSessionError")
    assert hub.get(f"/sessions/{player.session}")["status"] == "killed"
    assert hub.http.post(f"{hub.at}/sessions/99/commands/pause", json={}).status_code == 404


def test_a_command_to_one_that_dies_fails(own_store, play, start_hub):
    player = play("dies=pause")
    hub = start_hub(own_store)
    found = hub.give(player.session, "pause")
    assert (found["status"], found["error"]["type"]) == ("failed", "NoLiveSessionError")


def test_charts_have_the_points_that_were_logged(training, hub):
    run = hub.get(f"/sessions/{training.session}")["run"]
    body = {"series": [[run, "loss"], [run, "nothing"], ["nobody", "loss"]], "points": 20000}
    columns, meta = hub.columns("POST", "/series", json=body)
    with onthefly.connect(training.store) as client:
        series = client.series(run, "loss")
    count = len(columns["x"])
    assert columns["x"].tolist() == series.steps[:count].tolist()
    assert columns["0"].tolist() == series.values[:count].tolist()
    assert np.isnan(columns["1"]).all()
    assert np.isnan(columns["2"]).all()
    assert [s["points"] > 0 for s in meta["series"]] == [True, False, False]
    columns, _ = hub.columns("POST", "/series", json=body | {"grid": False, "points": 16, "x": "relative"})
    assert len(columns["0.x"]) <= 16
    assert columns["0.x"][0] >= 0


def test_metrics_are_found_by_a_pattern_and_come_as_csv(training, hub):
    run = hub.get(f"/sessions/{training.session}")["run"]
    names = {m["name"] for m in hub.get(f"/metrics?run={run}")}
    assert {name for name in names if not name.startswith("health/")} == {"loss", "<script>alert(1)</script>"}
    assert {m["name"] for m in hub.get("/metrics?name=lo*")} == {"loss"}
    text = hub.http.get(f"{hub.at}/series.csv", params={"run": run, "name": "loss"}).text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert (rows[0]["run"], rows[0]["name"]) == (run, "loss")
    assert float(rows[0]["value"]) > 0
    assert hub.http.get(f"{hub.at}/series.csv?run={run}&name=nope").status_code == 404


def test_a_checkpoint_is_listed_looked_into_checked_and_downloaded(training, hub):
    hub.give(training.session, "saveCheckpoint")
    row = hub.get("/checkpoints")[-1]
    assert row["on_disk"]
    assert row["kept"]
    at = f"/checkpoints/{row['id']}"
    parts = hub.get(f"{at}/contents")["parts"]
    assert {"model", "optimizer", "knobs"} <= {part["name"] for part in parts}
    assert hub.http.post(f"{hub.at}{at}/check").json()["hash"] == row["hash"]
    whole = hub.http.get(f"{hub.at}{at}/file")
    assert len(whole.content) == row["size"]
    assert whole.headers["etag"] == f'"{row["hash"]}"'
    part = hub.http.get(f"{hub.at}{at}/file", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, whole.content[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{row['size']}"
    rest = hub.http.get(f"{hub.at}{at}/file", headers={"Range": "bytes=-10", "If-Range": whole.headers["etag"]})
    assert rest.content == whole.content[-10:]
    assert hub.http.get(f"{hub.at}{at}/file", headers={"Range": f"bytes={row['size']}-"}).status_code == 416
    changed = hub.http.get(f"{hub.at}{at}/file", headers={"Range": "bytes=0-9", "If-Range": '"other"'})
    assert (changed.status_code, len(changed.content)) == (200, row["size"])


def test_a_checkpoint_is_pinned_removed_and_then_gone(training, hub):
    hub.give(training.session, "saveCheckpoint")
    row = hub.get("/checkpoints")[-1]
    at = f"{hub.at}/checkpoints/{row['id']}"
    assert hub.http.post(f"{at}/pin", json={"pinned": True}).json()["pinned"] is True
    assert hub.http.post(f"{at}/pin", json={"pinned": False}).json()["pinned"] is False
    assert hub.http.delete(at).status_code == 409
    removed = hub.http.delete(f"{at}?force=true").json()
    assert (removed["evicted_reason"], removed["on_disk"]) == ("removed", False)
    assert hub.http.get(f"{at}/file").status_code == 404
    assert row["id"] not in [c["id"] for c in hub.get("/checkpoints")]
    assert row["id"] in [c["id"] for c in hub.get("/checkpoints?evicted=true")]


def test_a_load_begins_a_run_that_the_graph_shows(training, hub):
    before = hub.give(training.session, "saveCheckpoint")["result"]
    row = next(c for c in hub.get("/checkpoints") if c["hash"] == before["hash"])
    parent = row["run"]
    answer = hub.http.post(f"{hub.at}/checkpoints/{row['id']}/load?wait=30", json={"session": training.session})
    assert answer.json()["status"] == "done", answer.text
    run = hub.get(f"/sessions/{training.session}")["run"]
    assert run.startswith("rewind")
    graph = hub.get("/graph")
    edge = next(e for e in graph["edges"] if e["to"] == run)
    assert (edge["from"], edge["step"], edge["kind"]) == (parent, row["step"], "rewind")
    detail = hub.get(f"/runs/{run}")
    assert detail["ancestors"][0] == parent
    assert detail["path"][-1] == {"run": run, "first_step": row["step"], "last_step": None}
    assert detail["manifest"]["kind"] == "rewind"
    assert detail["problems"] == []
    assert run in hub.get(f"/runs/{parent}")["children"]
    columns, _ = hub.columns("POST", "/series", json={"series": [[run, "loss"]], "joined": True, "points": 20000})
    steps = columns["x"]
    assert steps[0] == 1.0
    assert np.all(np.diff(steps) == 1)


def test_samples_are_scanned_and_come_as_columns(training, hub):
    assert hub.give(training.session, "scanSamples", embeddings=True)["status"] == "done"
    scan = hub.get("/scans?data=train")[-1]
    assert scan["length"] == 64
    columns, about = hub.columns("GET", f"/scans/{scan['id']}/columns")
    assert len(columns["loss"]) == 64
    assert about["run"] == scan["run"]
    only, _ = hub.columns("GET", f"/scans/{scan['id']}/columns?name=loss")
    assert list(only) == ["loss"]
    histogram = hub.get(f"/scans/{scan['id']}/histogram?bins=10")
    assert sum(histogram["counts"]) == 64
    places, about_map = hub.columns("GET", f"/scans/{scan['id']}/map")
    assert np.isfinite(places["x"]).all()
    if "umap" in about_map["methods"]:  # an optional extra
        laid, _ = hub.columns("GET", f"/scans/{scan['id']}/map?method=umap")
        assert len(laid["x"]) == 64
    else:
        refused = hub.http.get(f"{hub.at}/scans/{scan['id']}/map?method=umap")
        assert (refused.status_code, "onthefly[umap]" in refused.text) == (409, True)
    assert hub.http.get(f"{hub.at}/scans/{scan['id']}/columns?name=no").status_code == 404
    chosen = hub.http.post(f"{hub.at}/samples/choose", json={"recipe": "top(loss, 5)", "source": "scan"}).json()
    assert (chosen["count"], chosen["length"]) == (5, 64)
    hardest = np.argsort(-columns["loss"])[:5]
    assert chosen["indices"] == sorted(hardest.tolist())
    assert hub.http.post(f"{hub.at}/samples/choose", json={"recipe": "explode()"}).status_code == 422
    hub.give(training.session, "saveCheckpoint")
    dynamics, _ = hub.columns("GET", "/dynamics")
    assert dynamics["seen"].sum() > 0
    assert hub.http.get(f"{hub.at}/dynamics?run=nobody").status_code == 404
    assert hub.http.get(f"{hub.at}/samples.csv").text.startswith('"index"')


def test_samples_are_shown_as_the_data_set_gives_them(training, hub):
    answer = hub.give(training.session, "showSamples", indices=[7, 3])
    columns, about = hub.columns("GET", f"/samples/shown/{answer['result']['shown']}")
    assert columns["index"].tolist() == [7, 3]
    assert (columns["kind"], columns["shape"], about["data"]) == (["array"] * 2, ["4", "4"], "train")
    assert set(columns["label"]) <= {"0", "1", "2"}
    assert hub.http.get(f"{hub.at}/samples/shown/{'0' * 32}").status_code == 404
    assert hub.http.get(f"{hub.at}/samples/shown/..%2f..%2fonthefly.db").status_code in (404, 422)
    path = f"{hub.at}/sessions/{training.session}/commands/showSamples"
    assert hub.http.post(path, json={"indices": list(range(65))}).status_code == 422
    assert hub.http.post(path, json={"indices": [-1]}).status_code == 422


def test_samples_are_tagged_and_the_tags_are_exported(hub, training):
    project = hub.get("/runs")[0]["project"]
    hub.give(training.session, "scanSamples")

    def tag(tag, indices, tagged=True):
        body = {"project": project, "tag": tag, "indices": indices, "tagged": tagged}
        return hub.http.post(f"{hub.at}/samples/tags", json=body)

    try:
        assert tag(" <b>odd</b> ", [5, 3, 5]).json()["tags"] == {"<b>odd</b>": [3, 5]}
        assert tag("discarded", [3]).json()["tags"] == {"<b>odd</b>": [3, 5], "discarded": [3]}
        assert hub.get(f"/samples/tags?project={project}")["tags"] == {"<b>odd</b>": [3, 5], "discarded": [3]}
        assert hub.get(f"/samples/tags?project={project}&data=val")["tags"] == {}
        rows = list(csv.DictReader(hub.http.get(f"{hub.at}/samples.csv").text.splitlines()))
        assert {int(row["index"]): row["tags"] for row in rows if row["tags"]} == {
            3: "<b>odd</b>; discarded",
            5: "<b>odd</b>",
        }
        for wrong in (tag("a;b", [1]), tag("\x1b", [1]), tag("x" * 65, [1]), tag("x", [-1]), tag("x", [])):
            assert wrong.status_code == 422
    finally:
        tag("<b>odd</b>", [3, 5], False)
        assert tag("discarded", [3, 9], False).json()["tags"] == {}


def test_a_fork_on_chosen_samples_has_a_selection(training, hub):
    indices = [1, 2, 3, 5, 8, 13, 21, 34]
    recipe = {"select": "indices", "indices": indices}
    assert hub.give(training.session, "forkRun", recipe=recipe, values={"lr": 0.03})["status"] == "done"
    run = hub.get(f"/sessions/{training.session}")["run"]
    selection = hub.get(f"/runs/{run}")["selection"]
    assert (selection["count"], selection["length"]) == (8, 64)
    columns, meta = hub.columns("GET", f"/selections/{run}")
    assert columns["index"].tolist() == indices
    assert meta["digest"] == selection["digest"]
    assert selection["digest"] in [s["digest"] for s in hub.get("/selections")]


def test_a_run_is_annotated_archived_and_its_values_are_known(training, hub):
    run = hub.get(f"/sessions/{training.session}")["run"]
    body = {"notes": "<b>bold</b>", "tags": ["good", "good", "<i>"]}
    assert hub.http.put(f"{hub.at}/runs/{run}/annotations", json=body).json()["tags"] == ["good", "<i>"]
    assert hub.get(f"/runs/{run}")["notes"] == "<b>bold</b>"
    assert hub.http.post(f"{hub.at}/runs/{run}/archive", json={"archived": True}).json()["archived"] > 0
    assert run not in [r["name"] for r in hub.get("/runs?archived=false")]
    hub.http.post(f"{hub.at}/runs/{run}/archive", json={"archived": False})
    row = next(r for r in hub.get("/runs?archived=false&metrics=loss") if r["name"] == run)
    assert row["session"] == training.session
    assert row["latest"]["loss"] > 0
    hub.give(training.session, "set", values={"weight_decay": 0.03}, hold=True)
    hub.give(training.session, "saveCheckpoint")
    values = hub.get(f"/runs/{run}/values")["values"]
    assert any("mixup" in name for name in values)
    assert values["optimizer/param_groups/0/weight_decay"] == 0.03  # what is held, not what the group has
    hub.give(training.session, "pause")
    fork = hub.give(training.session, "forkRun")["result"]["run"]  # it has no checkpoint of its own yet
    assert hub.get(f"/runs/{fork}/values")["values"]["optimizer/param_groups/0/weight_decay"] == 0.03
    hub.give(training.session, "switchRun", run=run)
    hub.give(training.session, "resume")
    assert hub.http.delete(f"{hub.at}/runs/{run}").status_code == 409
    assert hub.http.get(f"{hub.at}/runs/{run}/log").status_code == 404


def test_events_are_read_page_by_page_and_by_id(training, hub):
    every, cursor, more = [], "", True
    while more:
        page = hub.get("/events", params={"after": cursor, "limit": 3})
        every += page["events"]
        cursor, more = page["cursor"], page["more"]
    ids = [event["id"] for event in every]
    assert len(set(ids)) == len(ids)
    assert {"newRun", "command"} <= {event["kind"] for event in every}
    assert hub.get(f"/events/{ids[0]}") == every[0]
    assert hub.get("/events?newest=2")["events"] == every[-2:]
    assert hub.get("/events?after=now")["events"] == []
    assert hub.http.get(f"{hub.at}/events/1.99999").status_code == 404
    assert hub.http.get(f"{hub.at}/events?after=x").status_code == 422


def test_what_needs_torch_is_done_by_a_child(training, hub):
    assert hub.http.post(f"{hub.at}/fsck").json()["sound"] is True
    names = [run["name"] for run in hub.get("/runs")]
    assert hub.get("/compare", params={"a": names[0], "b": names[0]})["a"] == names[0]
    assert hub.http.get(f"{hub.at}/compare", params={"a": names[0], "b": "--help"}).status_code == 404
    answer = hub.http.post(f"{hub.at}/verify", json={"ref": "--help"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "UnknownReferenceError")


def test_single_samples_of_two_runs_are_compared(training, hub):
    hub.give(training.session, "scanSamples")
    first = hub.get(f"/sessions/{training.session}")["run"]
    second = hub.give(training.session, "forkRun", values={"lr": 0.5})["result"]["run"]
    before, _ = hub.columns("GET", f"/scans/{hub.get('/scans')[-1]['id']}/columns?name=loss")
    unknown = hub.http.get(f"{hub.at}/compare/samples", params={"a": first, "b": second})
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "UnknownReferenceError")
    hub.give(training.session, "testRun", save=False)  # some steps further on
    hub.give(training.session, "scanSamples")

    columns, meta = hub.columns("GET", "/compare/samples", params={"a": first, "b": second})

    assert columns["before"].tolist() == before["loss"].tolist()
    assert meta["samples"] == 64 == meta["learned"] + meta["forgotten"] + meta["unchanged"]
    assert (columns["change"] == 1).sum() == meta["learned"]
    assert (columns["change"] == -1).sum() == meta["forgotten"]
    beside = hub.http.post(f"{hub.at}/scan", json={"ref": "--help"})
    assert beside.status_code == 404


def test_strategies_of_merging_are_told_with_their_options(hub):
    found = {one["name"]: one for one in hub.http.get("/api/v1/merging/strategies").json()}
    assert {"swa", "weighted", "ties", "slerp", "lora", "greedy"} <= found.keys()
    assert found["ties"]["needs"] == ["base"]
    assert found["slerp"]["options"] == [
        {
            "name": "t",
            "kind": "number",
            "default": 0.5,
            "help": "0 is the first parent, 1 the second",
            "low": 0,
            "high": 1,
            "open_low": False,
        }
    ]


def test_what_parents_come_from_is_found(training, hub):
    first = hub.give(training.session, "saveCheckpoint")["result"]
    fork = hub.give(training.session, "forkRun", values={"lr": 0.01})["result"]
    hub.give(training.session, "saveCheckpoint")
    rows = hub.get("/checkpoints")
    parents = [next(row["id"] for row in rows if row["hash"] == first["hash"]), rows[-1]["id"]]
    assert rows[-1]["run"] == fork["run"]
    assert hub.get("/merging/base", params={"parent": parents})["hash"] == first["hash"]
    assert hub.http.get(f"{hub.at}/merging/base", params={"parent": [10**9]}).status_code == 404


def test_a_log_is_read_from_a_byte_on(own_store, play, start_hub):
    play()
    (own_store / "logs").mkdir()
    (own_store / "logs" / "baseline.log").write_bytes(b"one\n<script>\xff\nthree\n")
    hub = start_hub(own_store)
    assert hub.get("/runs/baseline/log")["text"] == "one\n<script>�\nthree\n"
    assert hub.get("/runs/baseline/log?after=-6") == {"text": "three\n", "next": 20, "size": 20}
    assert hub.get("/runs/baseline/log?after=99")["text"] == ""


def test_it_loads_no_torch(own_store, play):
    play()
    code = (
        "import sys, onthefly, onthefly.hub.serve\n"
        "from onthefly.hub.app import create_app\n"
        "app = create_app([onthefly.connect()], 'x' * 43)\n"
        "app.openapi()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
