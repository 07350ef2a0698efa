"""A headless Chromium that opens a file and tells what it sees, over its debugging pipe.

The pipe carries NUL-separated JSON on descriptors 3 and 4.
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
# no sandbox: it wants rights that a container's root lacks; the page is our own
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe"
RED = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")


class Browser:
    """with Browser(folder) as browser: browser.open(path, width); browser.evaluate("1 + 1")"""

    def __init__(self, folder: Path):
        self.folder, self.number, self.complaints = folder, 0, []

    def __enter__(self):
        (read, self.out), (self.inn, write) = os.pipe(), os.pipe()
        read, write = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read, write))  # not 3 or 4
        command = f"exec '{CHROMIUM}' {FLAGS} --user-data-dir='{self.folder}' 3<&{read} 4>&{write}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(read, write), **quiet)
        os.close(read)
        os.close(write)
        self.incoming, self.session = os.fdopen(self.inn, "rb"), {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.incoming.close()
        os.close(self.out)

    def message(self) -> dict:
        """The next message; what a page's console shows in red goes to `complaints`."""
        text = b""
        while not text.endswith(b"\0"):
            byte = self.incoming.read(1)
            assert byte, "the browser ended"
            text += byte
        message = json.loads(text[:-1])
        if message.get("method") in RED:
            self.complaints.append(message["params"])
        return message

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int, height: int = 844):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self.message().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    def screenshot(self, path: Path, whole: bool = False):
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
