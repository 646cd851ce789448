"""Triton products with their pointwise work in the epilogue, for links over many tokens: built, tested, never timed.

``product`` forms one by pointers, ``persistent`` by tensor descriptors (Hopper and newer), ``epilogue`` is what they
share, ``gradients`` forms those of the weights in one launch, ``tiles`` says in which tiles, and ``link`` makes a
link's variant of them: ``with installed():`` serves every link by them. They are part of no package. One that makes a
whole link at least 5 % faster than the library variant, on a device and on record, comes back as a variant of `plan`.
"""
