"""Each rule of who may come in and what may be done, with the attack that it is against."""

import http.client
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from urllib.parse import quote

import httpx
import pytest
import uvicorn
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import onthefly
from onthefly.errors import HubError
from onthefly.hub.app import create_app
from onthefly.hub.auth import Keys
from onthefly.hub.guard import Bucket, Limits
from onthefly.hub.serve import Where
from onthefly.store import hubs
from onthefly.store.store import Store

TOKEN = "t" * 43


@pytest.fixture(scope="module")
def quiet_store(tmp_path_factory):
    """A store in which nothing happens."""
    folder = tmp_path_factory.mktemp("quiet") / "store"
    with closing(Store.open(folder, create=True)) as store:
        store.create_run("baseline", project="default")
    return folder


@pytest.fixture(scope="module")
def app(quiet_store):
    """Serves an application of this process, to be attacked by a client that has the token."""

    @contextmanager
    def serve(host="localhost", **options):
        made = create_app([onthefly.connect(quiet_store)], TOKEN, **options)
        server = uvicorn.Server(uvicorn.Config(made, log_level="error", ws="websockets-sansio"))
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            port = listener.getsockname()[1]
            headers = {"Authorization": f"Bearer {TOKEN}", "Host": f"{host}:{port}"}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
                client.port = port
                yield client
            server.should_exit = True
            thread.join()

    return serve


@pytest.fixture(scope="module")
def inside(app):
    """One application for many attacks."""
    with app(limits=Limits(requests=10_000, failures=10_000)) as client:
        yield client


def raw(hub, method, path, headers=None, body=b""):
    """A request as no well-behaved client sends it."""
    headers = headers or [
        ("Host", "localhost"),
        ("Authorization", f"Bearer {TOKEN}"),
        ("Content-Length", str(len(body))),
    ]
    connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=20)
    connection._validate_path = lambda path: None
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers:
        connection.putheader(name, value)
    connection.endheaders(body)
    answer = connection.getresponse()
    answer.text = answer.read().decode()
    connection.close()
    return answer


PATHS = [
    "/",
    "/api/v1/hub",
    "/api/v1/openapi.json",
    "/api/v1/stores",
    "/index.html",
    "/assets/x.js",
    "/docs",
    "/nothing",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("word", ["", "Bearer wrong", "Bearer", "Basic eDp5", f"Basic {TOKEN}"])
def test_nothing_is_told_without_the_token(inside, path, word):
    answer = inside.get(path, headers={"Authorization": word})
    assert answer.status_code == 401
    assert "store" not in answer.text.lower() or path == "/"


def test_wrong_tokens_are_slowed_down_and_right_ones_are_not(app):
    with app(limits=Limits(failures=0.5)) as client:
        answers = [client.get("/api/v1/hub", headers={"Authorization": f"Bearer {n}"}) for n in range(40)]
        assert {answer.status_code for answer in answers} == {401, 429}
        assert answers[-1].headers["retry-after"] == "1"
        assert client.get("/api/v1/hub").status_code == 200


def test_the_token_in_the_url_becomes_a_cookie_and_leaves_the_url(hub):
    answer = httpx.get(hub.url)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("onthefly_")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    assert hub.token not in str(answer.headers)
    assert hub.token not in answer.text
    page = httpx.get(hub.base, headers={"Cookie": cookie.partition(";")[0]})
    assert page.status_code == 200
    assert httpx.get(hub.url).headers["set-cookie"] != cookie  # a random id each time


@pytest.mark.parametrize("path", ["/api/v1/hub", "/api/v1/stores", "/index.html", "/healthz/x"])
def test_a_token_in_any_other_url_is_worth_nothing(hub, path):
    """So that no log, no history and no Referer of another page can be used."""
    assert hub.bare.get(path, params={"token": hub.token}).status_code in (401, 429)
    url = f"ws://127.0.0.1:{hub.port}/api/v1/live?token={hub.token}"
    with pytest.raises(InvalidStatus), connect(url, proxy=None):
        pass


def test_two_tokens_in_a_url_are_none(hub):
    assert hub.bare.get(f"/?token=x&token={hub.token}").status_code in (401, 429)


@pytest.mark.parametrize("value", ["", "x", "a.b.c", "00.99999999999.00", "\x80.1.2", "é", "1" * 5000])
def test_a_made_up_cookie_is_none(inside, value):
    keys = Keys(TOKEN)
    assert not keys.is_session(value)
    header = f"{keys.cookie}={value}".encode("latin-1")
    assert inside.get("/api/v1/hub", headers={"Authorization": "", "Cookie": header}).status_code == 401


def test_an_old_or_altered_cookie_is_none(monkeypatch):
    keys = Keys(TOKEN)
    value = keys.new_session()
    assert keys.is_session(value)
    said, until, proof = value.split(".")
    assert not keys.is_session(f"{said}.{int(until) + 1}.{proof}")
    assert TOKEN not in value
    assert not Keys("u" * 43).is_session(value)
    monkeypatch.setattr("time.time", lambda: int(until) + 1.0)
    assert not keys.is_session(value)


def test_the_cookie_of_another_hub_is_none(hub, own_store, play, start_hub):
    play()
    other = start_hub(own_store)
    cookies = [hub.cookie(), other.cookie()]
    names = [cookie.partition("=")[0] for cookie in cookies]
    assert names[0] != names[1]
    both = "; ".join(cookies)  # one browser has both: cookies do not know ports
    for one in (hub, other):
        assert one.bare.get("/api/v1/hub", headers={"Cookie": both}).status_code == 200
    assert other.bare.get("/api/v1/hub", headers={"Cookie": cookies[0]}).status_code == 401
    value = cookies[0].partition("=")[2]
    assert other.bare.get("/api/v1/hub", headers={"Cookie": f"{names[1]}={value}"}).status_code == 401


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "127.0.0.2",
        "",
        "a b",
        "[::1",
        "0.0.0.0",
    ],
)
def test_a_name_that_was_rebound_to_this_machine_is_refused(hub, host):
    headers = [("Host", host), ("Authorization", f"Bearer {hub.token}")]
    assert raw(hub, "GET", "/api/v1/hub", headers).status in (400, 421)
    assert raw(hub, "GET", f"/?token={hub.token}", headers).status in (400, 421)


def test_two_hosts_are_none(hub):
    good = ("Host", f"127.0.0.1:{hub.port}")
    answer = raw(hub, "GET", "/api/v1/hub", [good, ("Host", "evil.example"), ("Authorization", f"Bearer {hub.token}")])
    assert answer.status in (400, 421)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8888", "LOCALHOST:80"])
def test_a_tunnel_may_have_any_port(hub, host):
    headers = [("Host", host), ("Authorization", f"Bearer {hub.token}")]
    assert raw(hub, "GET", "/api/v1/hub", headers).status == 200


def test_another_name_may_be_allowed(app):
    with app("box.example", allow_hosts=["Box.example"]) as client:
        assert client.get("/api/v1/hub").status_code == 200


ORIGINS = [
    "http://evil.example",
    "null",
    "http://127.0.0.1",
    "https://127.0.0.1:{port}",
    "http://localhost:{port}",
    "file://",
    "",
]


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_page_from_elsewhere_can_do_nothing_with_the_cookie(training, hub, origin):
    origin = origin.format(port=hub.port)
    path = f"{hub.at}/sessions/{training.session}/commands/stop"
    headers = {"Cookie": hub.cookie(), "Origin": origin}
    assert hub.bare.post(path, json={}, headers=headers).status_code == 403
    assert hub.bare.get("/api/v1/hub", headers=headers).status_code == 403
    with pytest.raises(InvalidStatus), hub.tab(Origin=origin):
        pass


def test_a_form_of_another_page_is_no_command(training, hub):
    """A browser sends it without asking; here even with an Origin that is right."""
    path = f"{hub.at}/sessions/{training.session}/commands/stop"
    headers = {"Cookie": hub.cookie(), "Origin": hub.base, "Content-Type": "text/plain"}
    assert hub.bare.post(path, content='{"save": false}', headers=headers).status_code == 422


def test_nobody_is_told_that_another_origin_may_read(hub):
    for method in ("OPTIONS", "GET"):
        answer = hub.http.request(method, "/api/v1/hub", headers={"Origin": hub.base})
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_websocket_needs_token_and_origin(hub):
    for headers in ({"Cookie": None}, {"Cookie": "x=y"}, {"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        with pytest.raises(InvalidStatus), hub.tab(**headers):
            pass
    with hub.tab(Cookie=None, Origin=None, Authorization=f"Bearer {hub.token}") as tab:
        assert tab.welcome["type"] == "welcome"


EVIL = ["..", "../..", "%2e%2e", "..%2f..%2fonthefly.db", "....//", "/etc/passwd", "%2fetc%2fpasswd", "x%00y", "..\\..", "-1", "9" * 30, "1e3", "a" * 2000, "'; DROP TABLE run; --", "<script>"]  # fmt: skip


@pytest.mark.parametrize("evil", EVIL)
def test_no_id_is_a_path(inside, quiet_store, evil):
    (quiet_store / "secret.json").write_text('{"notes": "stolen", "tags": []}')
    store = f"/api/v1/stores/{inside.get('/api/v1/stores').json()[0]['id']}"
    word = evil if "%" in evil else quote(evil, safe="")
    templates = [
        "/api/v1/stores/{}",
        store + "/sessions/{}",
        store + "/runs/{}",
        store + "/runs/{}/log",
        store + "/checkpoints/{}/file",
        store + "/checkpoints/{}",
        store + "/scans/{}/columns",
        store + "/selections/{}",
        store + "/events/{}",
        store + "/commands/{}",
        "/assets/{}",
        "/{}",
    ]
    for template in templates:
        answer = raw(inside, "GET", template.format(word))
        assert answer.status in (404, 405, 422), (template, answer.text)
        assert "root:" not in answer.text
        assert "stolen" not in answer.text
    notes = raw(inside, "PUT", f"{store}/runs/{word}/annotations", body=b'{"notes": "x"}')
    assert notes.status in (404, 405, 422)
    assert not list(quiet_store.glob("notes/*"))


def test_a_static_file_outside_of_the_dashboard_is_not_served(app, tmp_path):
    web = tmp_path / "web" / "dist"
    (web / "assets").mkdir(parents=True)
    (tmp_path / "secret").write_text("stolen")
    (web / "index.html").write_text("<!doctype html><title>the page</title>")
    (web / "assets" / "app-1234.js").write_text("/* " + "x" * 2000 + " */")
    (web / "link").symlink_to(tmp_path / "secret")
    with app(web=web) as client:
        assert "the page" in client.get("/").text
        script = client.get("/assets/app-1234.js")
        assert script.headers["content-type"].startswith("text/javascript")
        assert "immutable" in script.headers["cache-control"]
        assert script.headers["content-encoding"] == "gzip"
        for path in ("/../secret", "/%2e%2e/%2e%2e/secret", "/assets/..%2f..%2f..%2fsecret", "/link"):
            assert raw(client, "GET", path).status == 404
        assert client.get("/assets/app-1234.js", headers={"Authorization": ""}).status_code == 401


def test_every_answer_forbids_scripts_from_elsewhere_and_tells_nobody_where_it_came_from(hub):
    for answer in (
        hub.http.get("/"),
        hub.bare.get("/"),
        hub.http.get("/nope"),
        hub.http.get(hub.url),
        hub.http.get("/api/v1/hub"),
    ):
        policy = answer.headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
    assert hub.http.get("/api/v1/hub").headers["cache-control"] == "no-store"


def test_a_body_that_is_too_large_is_refused_however_it_comes(inside):
    store = f"/api/v1/stores/{inside.get('/api/v1/stores').json()[0]['id']}"
    large = json.dumps({"series": [["a", "b"]], "x": "y" * 2_000_000})
    headers = {"Content-Type": "application/json"}
    assert inside.post(f"{store}/series", content=large, headers=headers).status_code == 413
    pieces = (large[i : i + 65536].encode() for i in range(0, len(large), 65536))
    assert inside.post(f"{store}/series", content=pieces, headers=headers).status_code == 413  # no Content-Length
    assert inside.post(f"{store}/series", content=b"{", headers=headers).status_code == 422
    deep = "[" * 100_000
    assert inside.post(f"{store}/series", content=deep, headers=headers).status_code in (400, 422)


def test_a_length_that_lies_is_refused(hub):
    for length in ("-1", "1e9", "99999999999", "+5"):
        headers = [("Host", "localhost"), ("Authorization", f"Bearer {hub.token}"), ("Content-Length", length)]
        assert raw(hub, "POST", f"{hub.at}/series", headers).status in (400, 413)


def test_too_many_requests_wait(app):
    with app(limits=Limits(requests=5)) as client:
        found = [client.get("/api/v1/hub").status_code for _ in range(20)]
        assert found[:5] == [200] * 5
        assert 429 in found


def test_a_bucket_fills_again(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    bucket = Bucket(2.0, 3.0)
    assert [bucket.takes() for _ in range(4)] == [True, True, True, False]
    now[0] = 1.0
    assert [bucket.takes() for _ in range(3)] == [True, True, False]


def test_too_many_sockets_are_sent_away(app):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with app(limits=Limits(sockets=1)) as client:
        url = f"ws://127.0.0.1:{client.port}/api/v1/live"
        with connect(url, additional_headers=headers, proxy=None) as first:
            assert "welcome" in first.recv()
            with connect(url, additional_headers=headers, proxy=None) as second, pytest.raises(ConnectionClosed) as e:
                second.recv()
            assert e.value.rcvd.code == 1013


def test_a_message_that_is_none_ends_the_socket(hub):
    for bad in ("{", "x" * 100_000, b"\x00\x01"):
        with hub.tab() as tab:
            tab.socket.send(bad)
            with pytest.raises(ConnectionClosed) as e:
                tab.socket.recv(timeout=20)
            assert e.value.rcvd.code in (1008, 1009)


def test_hostile_names_and_lines_come_back_as_data(own_store, play, start_hub):
    evil = "<img src=x onerror=alert(1)>\u202e\x1b[31m"
    play(f"metric={evil}", "run=x")
    (own_store / "logs").mkdir()
    (own_store / "logs" / "x.log").write_text(evil)
    hub = start_hub(own_store)
    hub.http.put(f"{hub.at}/runs/x/annotations", json={"notes": evil, "tags": [evil]})
    for path in ("/runs", "/runs/x", "/runs/x/log", "/events", "/metrics", f"/runs/{quote(evil, safe='')}"):
        answer = hub.http.get(hub.at + path)
        assert answer.headers["content-type"] == "application/json"
        answer.json()
    assert hub.get("/runs/x/log")["text"] == evil
    assert hub.get("/runs/x")["notes"] == evil
    table = hub.http.get(f"{hub.at}/series.csv?run=x")
    assert table.headers["content-type"].startswith("text/csv")
    assert "attachment" in table.headers["content-disposition"]


def test_the_token_is_its_owner_s_alone(own_store, play, start_hub):
    play()
    hub = start_hub(own_store)
    folder = own_store / "hub"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("token", "hub.json", "lock"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert (folder / "token").read_text() == hub.token
    assert hub.token not in (folder / "hub.json").read_text()
    with open(f"/proc/{hub.process.pid}/cmdline") if os.path.exists("/proc") else open(os.devnull) as words:
        assert hub.token not in words.read()


def test_a_token_that_others_can_read_or_that_is_none_is_refused(tmp_path):
    first = hubs.token(tmp_path)
    assert hubs.token(tmp_path) == first
    (tmp_path / "hub" / "token").chmod(0o644)
    with pytest.raises(HubError, match="read by others"):
        hubs.token(tmp_path)
    (tmp_path / "hub" / "token").chmod(0o600)
    (tmp_path / "hub" / "token").write_text("short")
    with pytest.raises(HubError, match="no token"):
        hubs.token(tmp_path)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "box.example", "127.0.0.1.example"])
def test_it_listens_beyond_this_machine_only_with_tls_or_when_told(host, tmp_path):
    with pytest.raises(HubError, match="--tls-cert"):
        Where(host)
    assert Where(host, insecure=True).scheme == "http"
    assert Where(host, tls_cert=tmp_path, tls_key=tmp_path).scheme == "https"
    with pytest.raises(HubError, match="both"):
        Where(host, tls_cert=tmp_path)


def test_the_command_line_refuses_too(own_store, play):
    play()
    words = [
        "-c",
        "import sys; from onthefly.cli import main; sys.exit(main())",
        "ui",
        "--no-open",
        "--host",
        "0.0.0.0",
    ]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == HubError.exit_code
    assert "--insecure" in done.stderr
