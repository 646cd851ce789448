"""Decoders of known models at one position per row: all their layers in one call of kernels.

``parts`` is what the kernels know of a layer, ``proof`` that they compute the same, ``kernels`` their calls. ``layer``
is the ``forward`` in a layer's place, ``run`` the layers put off until the last of them, ``model`` the ``forward`` in a
decoder's place, ``steps`` a batch that goes on without the decoder's class.
"""
