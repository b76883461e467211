"""Runs a command and ends it, with all that it has begun, when the process that wants it is gone, however that went.

Started by its path, as the leader of a process group. The other end of its stdin is held by who wants the command.
"""

import os
import signal
import subprocess
import sys
import threading


def end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Exit code of the command, or 128 and the number of the signal that ended it."""
    signal.signal(signal.SIGINT, lambda *_: None)  # the command answers it; a handler, unlike SIG_IGN, is not passed on
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    code = command.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the thread waits for a parent that waits for us
