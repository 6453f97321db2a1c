"""End a Job at Ctrl-C (SIGINT), at SIGTERM, and with its parent process."""

import _thread
import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

INSIST_SECONDS = 10.0  # until a swallowed interruption is repeated


class Interruption:
    """Interrupt a Job by SystemExit(130) at the first signal, and end the process at the second.

    Libraries can swallow the exception, so it is raised again every `INSIST_SECONDS` until the Job
    ends.

    Attributes:
        is_requested: Whether the Job is to end with code 130.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._is_repeated = False
        self._settled = threading.Event()
        self._handlers: dict[int, Any] = {}  # the earlier ones

    @contextlib.contextmanager
    def handled(self, record: Callable[[], None]) -> Iterator[None]:
        """Handle signals within a context, if this is the main thread.

        Args:
            record: Called at the first signal, because the process may be killed soon.
        """
        self._record = record
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._handlers[signum] = signal.signal(signum, self._handle)
        try:
            yield
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def settle(self) -> None:
        """Raise no more exceptions, since the Job ends. A second signal still ends the process."""
        self._settled.set()
        for number in self._handlers:  # Lightning may have installed others
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self._is_repeated:
            self._is_repeated = False
        elif self.is_requested:
            os._exit(130)
        else:
            self.is_requested = True
            # An exception here would look like a failure of the interrupted code.
            with contextlib.suppress(Exception):
                self._record()
            threading.Thread(target=self._repeat, daemon=True).start()
        # Do not raise KeyboardInterrupt: Lightning would then ignore a second Ctrl-C.
        if not self._settled.is_set():
            raise SystemExit(130)

    def _repeat(self) -> None:
        while not self._settled.wait(INSIST_SECONDS):
            self._is_repeated = True
            _thread.interrupt_main(signal.SIGTERM)


def is_interruption(error: BaseException) -> bool:
    """Return whether an exception is a KeyboardInterrupt or a SystemExit with code 130.

    Args:
        error: The exception.
    """
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and error.code == 130
    )


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C between Jobs; during a Job, `Interruption` handles both."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies. Other systems ignore the call.

    Args:
        parent: The process ID of the parent.

    Raises:
        SystemExit: The parent has already died (code 130).
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    if prctl is not None:
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl.h
        prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # the parent has already died
            raise SystemExit(130)
