"""One file of a shard set behind a URL, whole and checked. Time, bytes and tries are bounded.

A thread of its own reads the file, and the caller waits in short steps. So it can give up at any time, whatever the
server does.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import logging
import os
import re
import signal
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import CancelledError
from http import HTTPStatus
from http.client import HTTPResponse
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from modan_fast.config import is_url
from shard_builder.settings import InputError, printable

log = logging.getLogger(__name__)

TRIES = 5
WRONG_TRIES = (
    3  # of a file that arrives whole, but is another: a proxy's damage may pass, a wrong file stays wrong
)
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds between two tries
LONGEST_PAUSE = 60.0  # seconds that a server may ask for
STALL = 30.0  # seconds after which a try is given up if fewer bytes arrived than
SLOWEST = 1000.0  # bytes a second
POLL = 0.1  # seconds between two looks at the thread that reads
CHUNK = 2**18  # bytes read at a time
REDIRECTS = 5

CONNECTION = "check the connection and the server, and repeat the command; a run continues with `resume=True`"
LOCATION = "check `shards`"
CONTENT = "it is not the file that the manifest lists: upload the set again"


class FetchError(Exception):
    """A try that failed, and why. Another follows after `pause` seconds or more, until `tries` were made."""

    def __init__(
        self, what: str, *, tries: int | None = None, advice: str = CONNECTION, pause: float = 0
    ) -> None:
        super().__init__(printable(redacted(what)))
        self.tries, self.advice, self.pause = tries or TRIES, advice, pause


def fetch(
    location: str, name: str, *, most: int, sha256: str | None = None, stop: threading.Event | None = None
) -> bytes:
    """The bytes of the file `name` of the shard set at the URL `location`: `most` at most.

    With `sha256` they must have this SHA-256, and be `most` exactly. A try that fails is logged and repeated after a
    pause. Raises `InputError` after the last one, and `CancelledError` soon after `stop` is set.
    """
    url, shown, stop = url_of(location, name), shown_file(location, name), stop or threading.Event()
    number = 0
    while True:
        number += 1
        try:
            return _one_try(url, most, sha256, stop)
        except FetchError as failure:
            if number >= failure.tries:
                tries = f" ({number} tries)" if number > 1 else ""
                raise InputError(f"{shown} cannot be read: {failure}{tries}: {failure.advice}") from None
            pause = max(PAUSES[min(number, len(PAUSES)) - 1], failure.pause)
            log.warning("%s: %s; try %d of %d in %g s", shown, failure, number + 1, failure.tries, pause)
        if stop.wait(pause):
            raise CancelledError


def url_of(location: str, name: str) -> str:
    """The URL of the file `name` of the shard set at the URL `location`."""
    if location.startswith("pipe:"):
        if "{}" not in location:
            raise InputError(f"`shards={shown_location(location)}` must have {{}} where the file's name belongs")
        return location.replace("{}", name)
    return f"{location.rstrip('/')}/{name}"


def shown_file(location: str, name: str) -> str:
    """`name` and `location` for people, without what a URL may keep secret."""
    between = " " if location.startswith("pipe:") else "/"
    return f"{shown_location(location).rstrip('/')}{between}{name}"


def shown_location(location: str) -> str:
    """`location` for people. Of a command only the program: its arguments may hold passwords."""
    if location.startswith("pipe:"):
        program = next((word for word in location.removeprefix("pipe:").split() if "=" not in word), "")
        return f"pipe:{program} ..."
    return redacted(location) if is_url(location) else location


def redacted(text: str) -> str:
    """`text` without what URLs in it may keep secret: user and password, and all that follows a `?`."""
    return re.sub(r"\?[^\s'\"]*", "?***", re.sub(r"//[^/\s]*@", "//***@", text))


def _one_try(url: str, most: int, sha256: str | None, stop: threading.Event) -> bytes:
    transfer = _Transfer(url, most)
    transfer.start()
    try:
        since, before = time.monotonic(), 0
        while not transfer.ended.wait(POLL):
            if stop.is_set():
                raise CancelledError
            if (now := time.monotonic()) - since >= STALL:
                arrived = transfer.arrived - before
                if arrived < SLOWEST * STALL:
                    raise FetchError(f"only {arrived:,} bytes arrived in {STALL:g} s")
                since, before = now, transfer.arrived
    finally:
        transfer.give_up()
    if transfer.failure:
        raise transfer.failure
    content = transfer.content.getvalue()
    if sha256 and len(content) < most:
        raise FetchError(f"it ended after {len(content):,} of {most:,} bytes")
    if sha256 and hashlib.sha256(content).hexdigest() != sha256:
        raise FetchError("it has another SHA-256 than the manifest lists", tries=WRONG_TRIES, advice=CONTENT)
    return content


class _Transfer(threading.Thread):
    """Reads one file into `content`. A daemon: the interpreter's exit does not wait for a server."""

    def __init__(self, url: str, most: int) -> None:
        super().__init__(name="fetch", daemon=True)
        self.url, self.most = url, most
        self.content, self.arrived = io.BytesIO(), 0
        self.failure: FetchError | None = None
        self.ended = threading.Event()
        self._given_up = False
        self._library: Any = None
        self._process: subprocess.Popen[bytes] | None = None
        self._kill: Callable[[], None] = lambda: None

    def give_up(self) -> None:
        """End soon; a program that was started is killed at once."""
        self._given_up = True
        self._end_process()

    def run(self) -> None:
        """Read the file; afterwards `ended` is set and `failure` says what went wrong."""
        try:
            self._read()
        except FetchError as failure:
            self.failure = failure
        except Exception as error:  # http.client, webdataset and what webdataset calls raise anything
            self.failure = FetchError(_reason(error))
        finally:
            self.ended.set()

    def _read(self) -> None:
        opened = self._open()
        length = opened.length if isinstance(opened, HTTPResponse) else None
        try:
            while not self._given_up and (chunk := opened.read1(CHUNK)):
                if self.arrived + len(chunk) > self.most:
                    raise FetchError(f"it has more than {self.most:,} bytes", tries=WRONG_TRIES, advice=CONTENT)
                self.content.write(chunk)
                self.arrived += len(chunk)
            if self._process and not self._given_up and (status := self._process.wait()):
                # 126 and 127: the shell found no such program.
                tries, advice = (1, LOCATION) if status in (126, 127) else (TRIES, CONNECTION)
                raise FetchError(f"the command failed with status {status}", tries=tries, advice=advice)
        finally:
            opened.close()
            self._end_process()
        if length is not None and self.arrived < length:
            raise FetchError(f"it ended after {self.arrived:,} of {length:,} bytes")

    def _open(self) -> Any:
        """The file, opened: it has `read1` and `close`."""
        scheme = self.url.partition(":")[0].lower()
        if scheme in ("http", "https"):
            return _open_http(self.url)
        if scheme == "pipe":
            # A session of its own, so that it can be killed together with the programs that it starts.
            # The user named the command; the file's name in it is `shard-000000.tar` or the like.
            process = subprocess.Popen(  # noqa: S602  # nosec B602
                self.url.removeprefix("pipe:"),
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            if hasattr(os, "killpg"):
                self._kill = lambda: os.killpg(process.pid, signal.SIGKILL)
            else:  # on Windows
                self._kill = process.kill
            self._process = process
            return process.stdout
        from webdataset.gopen import gopen

        try:
            opened = gopen(self.url)
        except (ValueError, ImportError, FileNotFoundError) as error:
            # An unknown scheme, or one whose package or program is not installed.
            raise FetchError(_reason(error), tries=1, advice=LOCATION) from None
        if started := getattr(opened, "proc", None):
            self._kill = started.kill
            self._process = started
        self._library = opened  # it closes its stream when nobody refers to it
        return getattr(opened, "stream", opened)

    def _end_process(self) -> None:
        # Only before it was waited for: then its number may be another's.
        if self._process and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended just now
                self._kill()
            if threading.current_thread() is self:
                self._process.wait()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects are followed by `_open_http`: urllib would read a redirect's body, however long it is."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none, which makes a redirect an `HTTPError`."""


def _open_http(url: str) -> HTTPResponse:
    """The answer to a GET of `url`, after redirects within http and https. Raises `FetchError`."""
    opener = urllib.request.build_opener(_NoRedirects)
    for _ in range(REDIRECTS + 1):
        try:
            response: HTTPResponse = opener.open(_request(url), timeout=STALL)
            return response
        except urllib.error.HTTPError as error:
            status, target = error.code, error.headers.get("Location")
            wait = error.headers.get("Retry-After", "")
            error.close()
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise FetchError(_reason(error), tries=1, advice=LOCATION) from None
            raise
        if status not in (301, 302, 303, 307, 308) or target is None:
            wait_s = min(float(wait), LONGEST_PAUSE) if re.fullmatch("[0-9]{1,9}", wait) else 0.0
            what = f"the server answered {status} {_phrase(status)}".rstrip()
            lasting = 400 <= status < 500 and status not in (408, 429)
            tries, advice = (1, LOCATION) if lasting else (TRIES, CONNECTION)
            raise FetchError(what, tries=tries, advice=advice, pause=wait_s)
        url = urljoin(url, target)
        if urlsplit(url).scheme not in ("http", "https"):
            raise FetchError(
                "the server redirects to something else than http or https", tries=1, advice=LOCATION
            )
    raise FetchError(f"the server redirects more than {REDIRECTS} times")


def _request(url: str) -> urllib.request.Request:
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    path, query = (quote(part, safe="/%:;,=+&?!$'()*@~") for part in (parts.path, parts.query))
    headers = {"User-Agent": "modan-fast"}
    if at:
        headers["Authorization"] = f"Basic {base64.b64encode(unquote(user).encode()).decode()}"
    # Of http or https: `_open_http` is called for no other URL.
    return urllib.request.Request(urlunsplit((parts.scheme, host, path, query, "")), headers=headers)  # noqa: S310


def _phrase(status: int) -> str:
    """What a status means. The server's own words are not shown."""
    return HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""


def _reason(error: BaseException) -> str:
    """The error in a few words of one line."""
    error = error.reason if isinstance(getattr(error, "reason", None), BaseException) else error  # type: ignore[attr-defined]
    text = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
    return (text or type(error).__name__)[:300]
