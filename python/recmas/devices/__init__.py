"""Where weights are: the device of every role, and offload to host memory. It knows modules, not agents."""
