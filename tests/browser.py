"""A front end of Jupyter on this machine, and a browser that asks nobody else: for tests of what readers see and type.

    with serving("jupyter", "lab", ..., cwd=folder) as (url, token), browsing() as open:
        with open() as page: page.goto(f"{url}/lab/tree/page.ipynb?token={token}")
"""
import os, secrets, shutil, signal, socket, subprocess, time, urllib.error, urllib.request
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOCAL = ("127.0.0.1", "localhost")
ALONE = "--host-resolver-rules=MAP * ~NOTFOUND, " + ", ".join(f"EXCLUDE {o}" for o in LOCAL)   # no other name has an address


def need_browser():
    "Skip a test where there is no Playwright or no Chromium; nothing is downloaded."
    pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    if CHROMIUM is None: pytest.skip("there is no Chromium: apt-get install chromium")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url):
    try: return urllib.request.urlopen(url, timeout=5).status == 200
    except (urllib.error.URLError, OSError): return False


@contextmanager
def serving(*command, cwd, ready="/api", seconds=240, env={}, log="server.log"):
    """Start `command`, a server that takes `{port}` and `{token}` in its arguments, and wait until `ready` answers; stop it and
    its children afterwards. Yields (address, token)."""
    port, token = free_port(), secrets.token_hex(16)
    url, log = f"http://127.0.0.1:{port}", cwd/log
    with open(log, "w", encoding="utf-8") as out:
        p = subprocess.Popen([o.format(port=port, token=token) for o in command], cwd=cwd, stdout=out, stderr=out,
                             env=os.environ | env, start_new_session=True)
    try:
        end = time.monotonic() + seconds
        while not answers(url + ready):
            if p.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{command[0]} does not answer:\n{log.read_text(encoding='utf-8')[-3000:]}")
            time.sleep(.2)
        yield url, token
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            try: os.killpg(p.pid, how)
            except ProcessLookupError: break
            try: p.wait(10)
            except subprocess.TimeoutExpired: continue


class Watch:
    "What a page did that a reader must never meet."
    def __init__(self, page):
        self.abroad, self.errors = [], []
        page.on("request", self.request)   # a route would switch the browser's cache off, and ask this process about each file
        page.on("pageerror", lambda e: self.errors.append(str(e)))
    def request(self, request):
        url = urlsplit(request.url)
        if url.scheme not in ("data", "blob") and url.hostname not in LOCAL: self.abroad.append(request.url)


@contextmanager
def browsing():
    "Chromium without a window. Yields a context manager that opens a page, with a `watch`; options go to Playwright."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as pw:
        chromium = pw.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", ALONE])
        @contextmanager
        def open(**how):
            context = chromium.new_context(**dict(viewport=dict(width=1200, height=900)) | how)
            page = context.new_page()
            page.set_default_timeout(120_000)    # a busy machine is slow, and nothing is wrong with the page
            page.watch = Watch(page)
            try: yield page
            finally: context.close()
        try: yield open
        finally: chromium.close()
