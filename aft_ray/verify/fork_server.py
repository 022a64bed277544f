"""A multiprocessing context whose processes import only what verification needs.

Invariant: a verification process has imported `aft_ray.verify.preload` and nothing else, whatever its parent has
imported. The start methods of multiprocessing do not give this. `fork` copies a process with the threads of Ray, torch
or vLLM, and with the locks that they hold. `spawn` and `forkserver` run the parent's `__main__` again, which in a Ray
worker imports Ray. So this module has a fork server of its own, which is started once per process with the preload and
does not run `__main__`. It starts a verification process in milliseconds.
"""

from __future__ import annotations

import io
import os
from multiprocessing import forkserver, popen_forkserver, process, reduction, spawn, util
from multiprocessing.context import ForkServerContext, ForkServerProcess, set_spawning_popen

# The server ends when the last process that holds the other end of its pipe ends: its parent or a process it started.
_server = forkserver.ForkServer()
_server.set_forkserver_preload(["aft_ray.verify.preload"])


class _Popen(popen_forkserver.Popen):
    """Starts a process through this module's fork server, without instructions to run `__main__`."""

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
        # The child waits for the end of this pipe too. So it learns when its parent dies while it starts.
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
    """The multiprocessing context of this module's fork server."""

    Process = _Process
