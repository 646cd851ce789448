"""The backends, and the choice among them.

``choice`` is the table of who serves what, ``explain`` prints it for a call, ``settings`` reads the environment. A
backend (``cpu``, ``cuda``, ``triton``) allocates, calls its kernels and says which calls it does not take. ``packing``
belongs to ``cpu``; ``native`` loads compiled modules; ``tensors`` checks a link's tensors for all of them.
"""
