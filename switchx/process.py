"""How a script begins, before it imports anything heavy."""

import os
import signal
import sys

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def prepare() -> None:
    """Set what cannot be set later in a process: huge pages, and a Ctrl-C without a traceback.

    XLA on CPU maps the temporary memory of every training step anew. With glibc's huge pages that
    takes a tenth of the page faults and up to an eighth less CPU time (docs/performance.md), but
    glibc reads the setting when a process starts: the script starts itself again, once, with
    `GLIBC_TUNABLES` set, under the same process id. Where that variable is set already, to
    anything, it is left alone. Other C libraries than glibc ignore it.

    An interrupt ends the process silently from here on, until `command_line.run` reports it.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
