"""Runs foreign code where it reaches nothing of ours: programs that models write, prompt builders of a clone.

Two existing sandboxes serve, in this order: bubblewrap (namespaces of its own, no network, a private temporary file
system), and Landlock where no user namespace may be made (reads the interpreter's files alone, writes nothing). Under
both, `syscalls` lists the system calls there are, and `launch` sets resource limits. Where neither works, nothing runs
unless its caller asks for "none".
"""

from recmas.sandbox.choice import SANDBOXES, choose, reasons
from recmas.sandbox.process import Finished, Limits, run

__all__ = ["SANDBOXES", "Finished", "Limits", "choose", "reasons", "run"]
