"""What vLLM's processes import, for the one that they are forked from; see forking.py.

Unlike other modules it does its work when it is imported, since that is all that Python's fork
server can be told.
"""

import gc
import signal
import sys
from importlib import import_module

# Not numba: it must come after vLLM has registered its own kernels, which it does in the worker.
MODULES = (
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "rora_serve.engine.platform",
    "rora_serve.engine.worker",
    "rora_serve.engine.manager",
)

# Python's fork server learns by it that a process has ended; a supervisor may have blocked it.
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
gc.disable()
try:
    for module in MODULES:
        import_module(module)
finally:  # Python's fork server goes on without what can not be imported
    gc.freeze()  # so that collections neither look through it nor write to pages that are shared
    gc.enable()
sys.stdout.flush()
