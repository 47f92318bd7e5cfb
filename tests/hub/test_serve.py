"""The process: one for each store, found again, with the same token and port after it was killed."""

import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

import onthefly
from onthefly.errors import HubError
from onthefly.hub.serve import Where, serve
from onthefly.store import hubs

from .conftest import MAIN

# Each starts a hub of its own: minutes in all.
pytestmark = pytest.mark.long


def ui(*words):
    return subprocess.run(
        [sys.executable, "-c", MAIN, "ui", "--no-open", *map(str, words)], capture_output=True, text=True
    )


@pytest.fixture
def other_store(tmp_path):
    from onthefly.store.store import Store

    Store.open(tmp_path / "other", create=True).close()
    return tmp_path / "other"


def test_a_second_start_finds_the_first_and_a_third_after_its_death_takes_its_place(own_store, play, start_hub, kill):
    play()
    hub = start_hub(own_store)
    assert ui().stdout.strip() == hub.url
    assert ui(own_store).returncode == 0
    assert hubs.running(own_store).pid == hub.process.pid
    kill(hub.process)
    assert hubs.running(own_store) is None
    again = start_hub(own_store)
    assert again.url == hub.url
    assert again.process.pid != hub.process.pid


def test_one_hub_serves_several_stores_and_two_hubs_are_apart(own_store, play, other_store, start_hub, tmp_path):
    play()
    hub = start_hub(own_store, other_store)
    assert {s["path"] for s in hub.http.get("/api/v1/stores").json()} == {str(own_store), str(other_store)}
    assert ui(other_store).stdout.strip() == hub.url
    assert ui(other_store, own_store).stdout.strip() == hub.url
    from onthefly.store.store import Store

    Store.open(tmp_path / "third", create=True).close()
    refused = ui(own_store, tmp_path / "third")
    assert refused.returncode == HubError.exit_code
    assert "without" in refused.stderr
    third = start_hub(tmp_path / "third")
    assert third.token != hub.token
    assert third.port != hub.port
    assert hub.bare.get("/api/v1/hub", headers=third.bearer).status_code == 401


def test_a_port_that_is_taken_is_said_or_another_is_taken(own_store, play, start_hub, kill):
    play()
    hub = start_hub(own_store)
    kill(hub.process)
    with socket.create_server(("127.0.0.1", hub.port)):
        refused = ui("--port", hub.port)
        assert refused.returncode == HubError.exit_code
        assert "cannot listen" in refused.stderr
        assert start_hub(own_store).port != hub.port


def test_it_ends_in_order_when_it_is_told(own_store, play, start_hub):
    play()
    hub = start_hub(own_store)
    with hub.tab() as tab:
        tab.say(type="follow", store=hub.stores[0])
        hub.process.send_signal(signal.SIGTERM)
        hub.process.wait(20)
    assert hub.process.stderr.read() == ""
    assert not hubs.is_served(own_store)


def test_training_does_not_feel_its_death(training, start_hub, hub):
    before = hub.get(f"/sessions/{training.session}")["step"]
    os.kill(hub.process.pid, signal.SIGSTOP)
    with onthefly.connect(training.store) as client:
        assert client.save(session=training.session)["step"] > before
    os.kill(hub.process.pid, signal.SIGCONT)


def test_no_store_is_said(tmp_path):
    done = ui(tmp_path)
    assert done.returncode == HubError.exit_code
    assert "no store" in done.stderr


def test_the_token_is_printed_for_programs(own_store, play):
    play()
    token = ui("--print-token").stdout.strip()
    assert token == hubs.token(own_store)


def test_missing_packages_are_said(own_store, play):
    play()
    code = f"import sys; sys.modules['fastapi'] = None; sys.argv = ['onthefly', 'ui', '--no-open']; {MAIN}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 6
    assert "onthefly[ui]" in done.stderr


def test_it_serves_https(own_store, play, start_hub, tmp_path):
    play()
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    try:
        subprocess.run(["openssl", *words, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl here")
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "ui", "--no-open", "--tls-cert", str(certificate), "--tls-key", str(key)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("https://127.0.0.1:")
        answer = httpx.get(url, verify=False)
        assert answer.status_code == 303
        assert "; Secure" in answer.headers["set-cookie"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_certificate_that_cannot_be_read_is_said(own_store, play, tmp_path):
    play()
    (tmp_path / "bad").write_text("no certificate")
    bad = tmp_path / "bad"
    with pytest.raises(HubError, match="cannot serve"):
        serve([own_store], Where(tls_cert=bad, tls_key=bad), on_ready=print)
    assert not hubs.is_served(own_store)


@pytest.fixture
def end_hub_of():
    """Ends the hubs that sessions have started, which belong to nobody."""
    stores = []
    yield stores.append
    for store in stores:
        if (note := hubs.running(store)) is not None:
            os.kill(note.pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["config", "environment"])
def test_a_session_starts_a_hub_that_outlives_it_and_the_next_one_finds(tmp_path, end_hub_of, wait_until, how):
    store = tmp_path / "store"
    end_hub_of(store)
    asked = "True" if how == "config" else "False"
    code = (
        "import sys, torch, onthefly\n"
        "model = torch.nn.Linear(2, 2)\n"
        f"config = onthefly.SessionConfig(store=sys.argv[1], ui={asked})\n"
        "with onthefly.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config) as session:\n"
        "    for _ in session.steps(3): session.log(loss=1.0)\n"
    )
    environment = {**os.environ, "ONTHEFLY_UI": "1" if how == "environment" else "0"}
    told = []
    for _ in range(2):
        words = [sys.executable, "-W", "error", "-c", code, str(store)]
        done = subprocess.run(words, env=environment, check=True, stderr=subprocess.PIPE, text=True)
        told.append(next(line.partition(": http")[2] for line in done.stderr.splitlines() if "dashboard" in line))
        wait_until(lambda: hubs.running(store))  # in its own time, after the first session has ended
    assert told[0] == told[1]
    assert httpx.get(f"http{told[0]}").status_code == 303


def test_what_keeps_a_hub_from_starting_never_keeps_a_training(tmp_path, caplog):
    from onthefly.control import dashboard

    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text("read by all")
    (tmp_path / "hub" / "token").chmod(0o644)
    said = []
    dashboard.show(tmp_path, said.append)
    assert said == []
    assert "no dashboard" in caplog.text
