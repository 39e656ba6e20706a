"""Runs a command that must not outlive whoever started it: `python keeper.py WORD...`, with a pipe as standard input.

The command has a process group of its own. When the pipe closes, because the starter closed it or died in whatever way, the
whole group is killed; so is what the command leaves running when it ends. Imports nothing of the package: it starts in
milliseconds.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """Run the command of `sys.argv`. Returns its exit code, 128 + N after signal N, 127 if it cannot be started."""
    try:
        child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as fault:
        print(f"{sys.argv[1]}: {fault.strerror}", flush=True)
        return 127

    def end() -> None:
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)

    def watch() -> None:
        sys.stdin.buffer.read()
        end()

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    end()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    ended = main()
    sys.stdout.flush()
    os._exit(ended)  # the thread that waits for the pipe is no reason to stay
