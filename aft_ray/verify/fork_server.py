"""The start method of the verifier's worker processes.

Invariant: a worker has imported what verification needs and nothing else, whatever its parent has loaded. `fork` would
copy a process with the threads of Ray, torch or vLLM, and their locks, and `spawn` and `forkserver` run the parent's
`__main__` again, which in a Ray worker imports Ray. Here a fork server of this module's own is started with the
verifier preloaded, once per process, and `__main__` is left alone; a worker then starts in milliseconds.
"""

from __future__ import annotations

import io
import os
from multiprocessing import forkserver, popen_forkserver, process, reduction, spawn, util
from multiprocessing.context import ForkServerContext, ForkServerProcess, set_spawning_popen

# It ends when the last process that holds its other end does: with its parent and the parent's workers.
_server = forkserver.ForkServer()
_server.set_forkserver_preload(["aft_ray.verify.preload"])


class _Popen(popen_forkserver.Popen):
    """Asks the module's own fork server, and sends no word about `__main__`."""

    def _launch(self, process_obj: process.BaseProcess) -> None:
        preparation = spawn.get_preparation_data(process_obj.name)
        for main in ("init_main_from_name", "init_main_from_path"):
            preparation.pop(main, None)
        message = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(preparation, message)
            reduction.dump(process_obj, message)
        finally:
            set_spawning_popen(None)
        self.sentinel, writer = _server.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        # The child waits for the end of this pipe too: it learns so that its parent died while it was starting.
        self.finalizer = util.Finalize(self, _close, (os.dup(writer), self.sentinel))
        with open(writer, "wb") as pipe:
            pipe.write(message.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> _Popen:
        return _Popen(process_obj)


class LightContext(ForkServerContext):
    """A multiprocessing context whose processes are light; see the module."""

    Process = _Process
