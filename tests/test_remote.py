"""Sets behind URLs: servers and commands that fail in every way, and how soon a stream that waits for one can end."""

import contextlib
import hashlib
import http.server
import json
import os
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import torch

from modan_fast import remote
from modan_fast.remote import fetch, shown_file, shown_location
from modan_fast.shards import open_shards
from modan_fast.store import read_all
from modan_fast.stream import Stream
from shard_builder.settings import InputError

SHARD = "shard-000001.tar"
SLEEP = f"sleep 43210.{os.getpid()}"  # of this test run alone
ORDER = [np.arange(each, each + 16) for each in (0, 16, 32)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "STALL", 0.3)
    monkeypatch.setattr(remote, "SLOWEST", 10_000)
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01, 0.01, 0.01))


class Server:
    """Serves a folder. A path in `plan` is answered by its functions, one for each request; the last one repeats."""

    def __init__(self, folder):
        self.folder, self.plan, self.requests, self.headers, self.sent = folder, {}, Counter(), [], 0
        self.over = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                name = self.path.rpartition("/")[2]
                number = server.requests[name]
                server.requests[name] += 1
                server.headers.append(self.headers)
                answers = server.plan.get(name, [fine])
                path = server.folder / name
                with contextlib.suppress(OSError):
                    answers[min(number, len(answers) - 1)](
                        self, path.read_bytes() if path.exists() else b"", server
                    )

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}/set"


@pytest.fixture
def server(shards):
    made = Server(shards)
    threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield made
    made.over.set()
    made.http.shutdown()
    made.http.server_close()


def head(handler, length, status=200, **headers):
    handler.send_response(status)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def fine(handler, content, server):
    head(handler, len(content))
    handler.wfile.write(content)


def reset(handler, content, server):
    head(handler, len(content))
    handler.wfile.write(content[: len(content) // 2])
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def stall(handler, content, server):
    head(handler, len(content))
    handler.wfile.write(content[: len(content) // 2])
    handler.wfile.flush()
    server.over.wait(60)


def silence(handler, content, server):
    server.over.wait(60)


def dribble(handler, content, server):
    head(handler, len(content))
    for at in range(len(content)):
        handler.wfile.write(content[at : at + 1])
        handler.wfile.flush()
        if server.over.wait(0.01):
            break


def dribble_headers(handler, content, server):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while not server.over.wait(0.01):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def truncate(handler, content, server):
    head(handler, len(content))
    handler.wfile.write(content[: len(content) // 2])


def truncate_without_length(handler, content, server):
    head(handler, None)
    handler.wfile.write(content[: len(content) // 2])


def endless(handler, content, server):
    head(handler, None)
    handler.wfile.write(content)
    while not server.over.is_set():
        server.sent += handler.connection.send(bytes(2**16))


def wrong(handler, content, server):
    fine(handler, content[:5000] + bytes([content[5000] ^ 1]) + content[5001:], server)


def not_http(handler, content, server):
    handler.wfile.write(b"\x1b[2J no status line\r\n\r\n")


def endless_redirect_body(handler, content, server):
    head(handler, None, 302, Location="/set/elsewhere.tar")
    while not server.over.is_set():
        server.sent += handler.connection.send(bytes(2**16))


def answer(status, **headers):
    return lambda handler, content, server: head(handler, 0, status, **headers)


FAULTS = {
    "reset": reset,
    "stall": stall,
    "silence": silence,
    "dribble": dribble,
    "dribbled headers": dribble_headers,
    "truncated": truncate,
    "truncated, without a length": truncate_without_length,
    "not HTTP": not_http,
    "500": answer(500),
    "503": answer(503),
    "429": answer(429),
    "408": answer(408),
    "redirects in a circle": answer(302, Location=f"/set/{SHARD}"),
}


def stream_of(url):
    return Stream(open_shards(url), renderer="torch", batch_size=16, threads=1)


def pixels_of(location):
    return torch.cat([batch.pixels for batch in stream_of(location).fetch(ORDER)])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_logged_and_costs_no_sample(server, shards, caplog, fault):
    server.plan[SHARD] = [FAULTS[fault], FAULTS[fault], fine]
    if "circle" in fault:
        server.plan[SHARD] = [FAULTS[fault]] * (remote.REDIRECTS + 1) + [fine]
    assert torch.equal(pixels_of(server.url), pixels_of(shards))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == (1 if "circle" in fault else 2)
    assert lines[0].startswith(f"{server.url}/{SHARD}: ")
    assert lines[0].endswith("; try 2 of 5 in 0.01 s")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_ends_the_stream_after_five_tries(server, caplog, fault):
    server.plan[SHARD] = [FAULTS[fault]]
    begun = time.monotonic()
    with pytest.raises(InputError) as error:
        pixels_of(server.url)
    assert time.monotonic() - begun < 10
    assert str(error.value).startswith(f"{server.url}/{SHARD} cannot be read: ")
    assert "(5 tries): check the connection" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert "\x1b" not in str(error.value) + caplog.text
    assert server.requests[SHARD] == 5 * (1 + remote.REDIRECTS if "circle" in fault else 1)
    assert caplog.text.count(" of 5 in 0.01 s") == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_an_answer_that_will_not_change_is_not_asked_for_again(server, status, caplog):
    server.plan[SHARD] = [answer(status)]
    with pytest.raises(
        InputError, match=rf"{SHARD} cannot be read: the server answered {status} .*: check `shards`"
    ):
        pixels_of(server.url)
    assert server.requests[SHARD] == 1
    assert not caplog.text


def test_damage_on_the_way_is_noticed_and_read_again(server, shards):
    server.plan[SHARD] = [wrong, fine]
    assert torch.equal(pixels_of(server.url), pixels_of(shards))
    assert server.requests[SHARD] == 2


@pytest.mark.parametrize(("fault", "what"), [(wrong, "another SHA-256"), (endless, "it has more than")])
def test_a_file_that_is_not_the_manifests_is_refused_after_three_tries(server, shards, fault, what):
    server.plan[SHARD] = [fault]
    with pytest.raises(InputError, match=rf"{SHARD} cannot be read: .*{what}.* \(3 tries\): it is not the file"):
        pixels_of(server.url)
    assert server.requests[SHARD] == 3
    # What the sockets hold, not what the server would send.
    assert server.sent < 3 * (2**24 + (shards / SHARD).stat().st_size)


def test_no_byte_over_the_bound_is_kept(server):
    server.plan["manifest.json"] = [endless]
    with pytest.raises(InputError, match="it has more than 100,000 bytes"):
        fetch(server.url, "manifest.json", most=100_000)


def test_the_body_of_a_redirect_is_not_read(server, shards):
    server.plan[SHARD] = [endless_redirect_body]
    server.plan["elsewhere.tar"] = [lambda handler, _, its: fine(handler, (shards / SHARD).read_bytes(), its)]
    assert torch.equal(pixels_of(server.url), pixels_of(shards))
    assert server.sent < 2**24


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "pipe:touch x", "//[", ""]
)
def test_a_redirect_to_anything_but_the_web_is_refused(server, target):
    server.plan[SHARD] = [answer(302, Location=target)]
    with pytest.raises(InputError, match=f"{SHARD} cannot be read: "):
        pixels_of(server.url)
    assert server.requests[SHARD] == 1 or not target[:1].isalpha()


def test_the_pause_that_a_server_asks_for_is_kept_up_to_a_bound(server, monkeypatch, caplog):
    monkeypatch.setattr(remote, "LONGEST_PAUSE", 0.5)
    for asked in ("1000000", "-1", "tomorrow", "9" * 5000):
        caplog.clear()
        server.requests.clear()
        server.plan["manifest.json"] = [answer(503, Retry_After=asked), fine]
        begun = time.monotonic()
        open_shards(server.url)
        assert (time.monotonic() - begun >= 0.5) == (asked == "1000000")
        assert f"try 2 of 5 in {'0.5' if asked == '1000000' else '0.01'} s" in caplog.text


def test_a_manifest_that_is_cut_is_read_again(server, shards):
    server.plan["manifest.json"] = [truncate, reset, fine]
    assert (
        open_shards(server.url).fingerprint == hashlib.sha256((shards / "manifest.json").read_bytes()).hexdigest()
    )


def test_a_server_that_is_not_there_is_named():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(InputError, match=rf"http://127.0.0.1:{port}/manifest.json cannot be read: .*\(5 tries\)"):
        open_shards(f"http://127.0.0.1:{port}")


def test_user_and_password_reach_their_server_and_no_other(server):
    server.plan["manifest.json"] = [answer(302, Location=f"http://localhost:{server.port}/set/moved.json")]
    server.plan["moved.json"] = [lambda handler, _, its: fine(handler, b"{}", its)]
    assert fetch(f"http://me:se%2Fcret@127.0.0.1:{server.port}/set", "manifest.json", most=10) == b"{}"
    assert [each.get("Authorization") for each in server.headers] == ["Basic bWU6c2UvY3JldA==", None]


def test_no_message_tells_a_secret(server, caplog):
    caplog.set_level("DEBUG")
    server.plan["manifest.json"] = [answer(503)]
    server.plan["x"] = [answer(302, Location="http://127.0.0.1:1/y?sig=secret")]
    for location in (
        f"http://me:secret@127.0.0.1:{server.port}/set",
        f"http://127.0.0.1:{server.port}/set?token=secret",
        f"http://127.0.0.1:{server.port}/x?sig=secret",
        "nosuchscheme://me:secret@host/set?sig=secret",
        "pipe:TOKEN=secret false secret {}",
        "pipe:curl https://secret",
    ):
        with pytest.raises(InputError) as error:
            open_shards(location)
        assert "secret" not in str(error.value)
    assert "secret" not in caplog.text
    assert shown_location("https://a:b@c@host/set?x=y z") == "https://***@host/set?*** z"
    assert shown_file("pipe:aws s3 cp s3://b/{} -", "a.tar") == "pipe:aws ... a.tar"


@pytest.mark.parametrize(
    ("command", "what", "tries"),
    [
        ("exit 3; {}", "the command failed with status 3", 5),
        ("nosuchprogram {} 2> /dev/null", "the command failed with status 127", 1),
        ("head -c 1000 {0}/{{}}; exit 3", "the command failed with status 3", 5),
        ("head -c 1000 {0}/{{}}", "it ended after 1,000 of ", 5),
        ("yes {}", "it has more than", 3),
        ("SLEEP | cat; echo {}", r"only 0 bytes arrived in 0.3 s", 5),
        ("exec 1>&-; SLEEP; echo {}", r"only 0 bytes arrived in 0.3 s", 5),
    ],
)
def test_a_command_that_fails_is_ended_with_all_that_it_started(shards, command, what, tries):
    shard, command = open_shards(shards).manifest.shards[1], command.replace("SLEEP", SLEEP)
    command = command.format(shlex.quote(str(shards))) if "{0}" in command else command
    with pytest.raises(
        InputError, match=rf"{SHARD} cannot be read: {what}.*{'tries' if tries > 1 else ': check `'}"
    ):
        fetch(f"pipe:{command}", SHARD, most=shard.bytes, sha256=shard.sha256)
    assert not sleeping()


def test_other_schemes_go_through_the_webdataset_library(shards, tmp_path, monkeypatch, caplog):
    program = tmp_path / "gsutil"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program.write_text(f'#!/bin/sh\nexec cat {shlex.quote(str(shards))}/"${{2##*/}}"\n')
    program.chmod(stat.S_IRWXU)
    assert torch.equal(pixels_of("gs://bucket/set"), pixels_of(shards))
    program.write_text(f"#!/bin/sh\nexec {SLEEP}\n")
    with pytest.raises(
        InputError, match=r"gs://bucket/set/manifest.json cannot be read: only 0 bytes .* \(5 tries\)"
    ):
        open_shards("gs://bucket/set")
    assert caplog.text.count("of 5") == 4


def test_the_next_shard_is_fetched_while_one_is_in_use(server):
    with contextlib.closing(stream_of(server.url).fetch(np.split(np.arange(48), 12))) as batches:
        next(batches)
        until = time.monotonic() + 5
        while not server.requests[SHARD] and time.monotonic() < until:
            time.sleep(0.01)
        assert server.requests[SHARD] == 1


def sleeping():
    """The processes that a killed command left."""
    time.sleep(0.2)  # until the system has ended them
    return [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == SLEEP.split()]


def waiting_threads():
    return [each for each in threading.enumerate() if each.name.startswith(("stream", "shard"))]


@contextlib.contextmanager
def interrupted(after):
    """Raise KeyboardInterrupt in the main thread, from a signal's handler, `after` seconds."""

    def raise_it(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, raise_it)
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


def consume_stream(shards):
    stream = Stream(shards, renderer="torch", batch_size=16, threads=1)
    with contextlib.closing(stream.fetch(ORDER)) as batches:
        for _ in batches:
            pass


def fill_store(shards):
    read_all(shards, renderer="torch", device=torch.device("cpu"), threads=1)


@pytest.mark.parametrize("use", [consume_stream, fill_store])
@pytest.mark.parametrize("fault", [stall, silence, dribble_headers, answer(503)])
def test_an_interrupt_ends_a_stream_that_waits_for_its_server(server, monkeypatch, use, fault):
    monkeypatch.setattr(remote, "STALL", 60.0)
    monkeypatch.setattr(remote, "PAUSES", (60.0,))
    server.plan[SHARD] = [fault]
    shards = open_shards(server.url)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupted(0.7):
        use(shards)
    assert time.monotonic() - begun < 0.7 + 2
    assert not waiting_threads()


@pytest.mark.parametrize("fault", [stall, answer(503)])
def test_an_interrupt_ends_the_wait_for_a_manifest(server, monkeypatch, fault):
    monkeypatch.setattr(remote, "STALL", 60.0)
    monkeypatch.setattr(remote, "PAUSES", (60.0,))
    server.plan["manifest.json"] = [fault]
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupted(0.5):
        open_shards(server.url)
    assert time.monotonic() - begun < 0.5 + 2


def test_closing_a_stream_kills_the_command_that_it_waits_for(shards, monkeypatch):
    monkeypatch.setattr(remote, "STALL", 60.0)
    command = f"case {{}} in {SHARD}) {SLEEP} | cat;; *) cat {shlex.quote(str(shards))}/{{}};; esac"
    with contextlib.closing(stream_of(f"pipe:{command}").fetch(np.split(np.arange(48), 12))) as batches:
        next(batches)
        begun = time.monotonic()
    assert time.monotonic() - begun < 2
    assert not waiting_threads()
    assert not sleeping()


PROGRAM = """
import sys
import numpy as np
from modan_fast.shards import open_shards
from modan_fast.stream import Stream

stream = Stream(open_shards(sys.argv[1]), renderer="torch", batch_size=16, threads=1)
for batch in stream.fetch(np.split(np.arange(48), 12)):
    print(batch.ids[0], flush=True)
"""


def test_a_program_that_waits_for_a_server_ends_when_it_is_interrupted(server):
    server.plan[SHARD] = [stall]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, server.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout.readline() == "0\n"
        time.sleep(0.3)
        begun = time.monotonic()
        program.send_signal(signal.SIGINT)
        try:
            _, errors = program.communicate(timeout=10)
        finally:
            program.kill()
        assert time.monotonic() - begun < 2.5
    assert "KeyboardInterrupt" in errors


def test_a_folder_given_as_a_file_url_is_read(shards, tmp_path):
    odd = shutil.copytree(shards, tmp_path / "100% of: a? #1 ä")
    opened = open_shards(odd.as_uri())
    assert opened.location == str(odd)
    assert not opened.remote
    with pytest.raises(InputError, match="names a file of another machine"):
        open_shards(f"file://elsewhere{shards}")


def test_a_name_that_a_url_cannot_hold_is_escaped(server):
    server.plan["manifest.json"] = [answer(404)]
    with pytest.raises(InputError, match="the server answered 404"):
        open_shards(f"http://127.0.0.1:{server.port}/a b/ä%20\x01")


def test_a_manifest_with_a_shard_that_fits_into_no_memory_is_refused(server, shards, tmp_path):
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["shards"][1]["bytes"] = 2**60
    server.folder = tmp_path
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"has shards of 1073741824.0 GiB, two of which do not fit"):
        list(stream_of(server.url).fetch(ORDER))
