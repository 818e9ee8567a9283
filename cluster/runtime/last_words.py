"""Says why a command has ended when it could not say so itself; a program of its own.

Ray's C++ ends the process that it runs in, at once and without a word, where it waits for an answer
of a raylet that has died. So a run that starts a Ray keeps this program beside it. On stdin comes
what the run knows of its Ray, a JSON object a line: process number -> what to say when it dies.
An empty line means that the run speaks for itself from here on.

It says something only if the death was seen while the run still lived: a run that is killed takes
its Ray with it, and then Ray's death is no reason.
"""

from __future__ import annotations

import json
import os
import select
import sys

_STDIN = 0


def main() -> None:
    """Wait for the run to end."""
    watched: dict[int, str] = {}  # handle of a process -> what to say
    known: set[str] = set()
    said, text = "", b""
    poll = select.poll()
    poll.register(_STDIN, select.POLLIN)
    while True:
        ready = [handle for handle, _ in poll.poll()]
        if _STDIN in ready:
            piece = os.read(_STDIN, 65536)
            if not piece:
                break
            *lines, text = (text + piece).split(b"\n")
            for line in lines:
                if not line:
                    return
                for pid, words in json.loads(line).items():
                    if pid in known:
                        continue
                    known.add(pid)
                    try:
                        handle = os.pidfd_open(int(pid))
                    except ProcessLookupError:
                        said = said or words
                        continue
                    watched[handle] = words
                    poll.register(handle, select.POLLIN)
        elif ready:
            for handle in ready:
                said = said or watched[handle]
                poll.unregister(handle)
    if said:
        os.write(sys.stderr.fileno(), f"error: {said}\n".encode())


if __name__ == "__main__":
    main()
