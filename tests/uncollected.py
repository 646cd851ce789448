"""Processes that imported this first look for no garbage while they import the rest."""

from __future__ import annotations

import gc

gc.disable()
