"""Training from a web server that dies in mid-epoch, or loses a shard: one line, then `--resume` goes on."""

import contextlib
import http.server
import re
import threading

import pytest

SHARD_READS = 5  # answered well: the three of the first epoch, and two of the second


class Server:
    """Serves a shard set, each file whole, until `fail` is set: then the sixth shard that is asked for is lost.

    A server that dies sends half of it and no more, and refuses all later connections. It may start again on its port.
    """

    def __init__(self, folder, fail=None):
        self.folder, self.fail, self.shard_reads = folder, fail, 0
        self.url = ""
        self.start()

    def start(self):
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                name = self.path.rpartition("/")[2]
                server.shard_reads += name.endswith(".tar")
                lost = server.fail and name.endswith(".tar") and server.shard_reads > SHARD_READS
                content = (server.folder / name).read_bytes()
                self.send_response(404 if lost and server.fail == "404" else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if lost and server.fail == "dies":
                    server.close()
                    self.wfile.write(content[: len(content) // 2])
                elif not lost:
                    with contextlib.suppress(OSError):  # the command has ended
                        self.wfile.write(content)

        port = int(self.url.rpartition(":")[2] or 0)
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        """Let nobody connect any more."""
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def command(shards, tmp_path):
    """A function that returns the command of a training of two epochs, four steps each, which streams its images.

    A window of one image keeps shards together, so that a shard that is lost in mid-epoch is needed in mid-epoch.
    """
    own = (
        "--epochs",
        "2",
        "--lr",
        "0.01",
        "--warmup-epochs",
        "0",
        "--renderer",
        "torch",
        "--shuffle-window",
        "1",
        "--monitor-every",  # it reads shards, too
        "0",
    )
    small = (
        "--batch-size",
        "12",
        "--image-size",
        "32",
        "--encoder",
        "timm/test_resnet",
        "--device",
        "cpu",
        "--store",
        "stream",
    )
    return lambda out, *more: ("pretrain", *own, *small, "--out", tmp_path / out, *more)


@pytest.fixture
def undisturbed(command, succeed, shards, tmp_path):
    """The encoder's bytes after the same training from the folder."""
    succeed(*command("undisturbed", "--shards", shards))
    return (tmp_path / "undisturbed/encoder.safetensors").read_bytes()


@pytest.mark.parametrize("fault", ["dies", "404"])
def test_a_server_lost_in_mid_epoch_costs_no_finished_step(
    command, start, succeed, fail, shards, undisturbed, tmp_path, fault
):
    server = Server(shards, fault)
    hurried = "import modan_fast.remote; modan_fast.remote.PAUSES = (0.05,); "
    hurried += (
        "import modan_fast.stream; modan_fast.stream.IN_FLIGHT = 1"  # so that the last shard is the one lost
    )
    try:
        line = start(*command("run", "--shards", server.url), first=hurried).fails()
        assert f"{server.url}/shard-00000" in line
        assert ("the server answered 404" if fault == "404" else "(5 tries)") in line
        assert re.search("; 1 epochs and [123] steps are saved in .*/run, --resume continues them$", line)

        assert "a recorded URL is not opened" in fail("pretrain", "--out", tmp_path / "run", "--resume")

        server.close()
        server.fail = None
        server.start()
        succeed("pretrain", "--out", tmp_path / "run", "--resume", "--shards", server.url)
        assert (tmp_path / "run/encoder.safetensors").read_bytes() == undisturbed
    finally:
        server.close()
