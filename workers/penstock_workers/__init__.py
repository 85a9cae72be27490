"""What runs on model machines: Celery workers that load each model once and batch what is waiting."""

import os
import signal

if os.getpid() == 1:
    # The kernel keeps from process 1, a container's first, each signal that it has not asked for: what came
    # before Celery or the supervisor asks, seconds later, would be lost. This is imported first.
    def _end(number: int, frame: object) -> None:
        del frame
        os._exit(128 + number)  # what a shell says of a process that the signal ended

    for _number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(_number, _end)
