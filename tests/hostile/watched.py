"""Run in a process of its own: loads what the parent names, while everything that runs or fetches something fails.

stdin: JSON list of [name, what]; `what` is for `qclip.load_model`. The last argument is the folder whose files are
foreign. stdout: JSON list of [name, class of the error or "loaded", message], and what was attempted.
"""

from __future__ import annotations

import json
import sys
import warnings


def main() -> None:
    import torch
    import transformers.models.auto.tokenization_auto  # noqa: F401  (lazy modules of libraries, before the watch begins)

    import qclip.models

    warnings.simplefilter("ignore")
    foreign, attempts = sys.argv[-1], []

    def watch(event: str, arguments: tuple) -> None:
        caught = event.startswith(("socket.", "subprocess.", "urllib.")) or event in (
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.spawn",
            "os.fork",
            "os.forkpty",
            "pty.spawn",
        )
        if event == "exec":
            caught = getattr(arguments[0], "co_filename", "").startswith(foreign)
        if event == "import":
            caught = any(isinstance(a, str) and a.startswith(foreign) for a in arguments)
        if event == "compile":
            caught = isinstance(arguments[1], str) and arguments[1].startswith(foreign)
        if caught:
            attempts.append(f"{event} {arguments!r}"[:300])
            raise PermissionError(f"{event} is not allowed while a file is loaded")

    cases = json.load(sys.stdin)
    sys.addaudithook(watch)
    out = []
    for name, what in cases:
        try:
            model = qclip.load_model(what)
            if getattr(model, "tokenizer", None) is not None:
                model.tokenizer(["a dog"])
            with torch.inference_mode():
                qclip.models.encoders(model).encode_image(torch.zeros(1, 3, 32, 32))
            out.append([name, "loaded", ""])
        except Exception as error:
            ours = isinstance(error, qclip.errors.InputError)
            out.append([name, "InputError" if ours else type(error).__name__, str(error)])
    before = list(attempts)
    try:  # the watch itself must have been awake
        import socket

        socket.getaddrinfo("localhost", 1)
    except PermissionError:
        pass
    json.dump({"cases": out, "attempts": before, "awake": len(attempts) > len(before)}, sys.stdout)


if __name__ == "__main__":
    main()
