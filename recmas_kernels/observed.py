"""Whether something has to see every op go through torch's dispatcher.

A trip through the dispatcher costs about 4 us for an op of sixteen arguments. When nobody looks, `functional` calls the
kernels without it. Looked for: compilation and export, dispatch modes (fake tensors, ``make_fx``, FLOP counters),
function modes, ``torch.func`` transforms, ``torch.jit.trace`` and profilers.
"""

from __future__ import annotations

import torch

try:
    from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import peek_interpreter_stack
except ImportError:  # a torch that has moved one of them

    def observed() -> bool:
        """True: this torch does not say whether anything observes ops, so every op goes through the dispatcher."""
        return True

else:

    def observed() -> bool:
        """Whether a trace, mode, transform or profiler is active on this thread; 0.3 us."""
        return (
            torch.compiler.is_compiling()
            or _len_torch_dispatch_stack() > 0
            or _len_torch_function_stack() > 0
            or peek_interpreter_stack() is not None
            or _profiler_enabled()
            or _get_tracing_state() is not None
        )
