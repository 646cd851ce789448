"""Files: replaced whole or not at all, written by one process at a time, and read as data that nobody vouches for."""

from recmas.files.writing import replacing, replacing_folder, sync, write_atomically

__all__ = ["replacing", "replacing_folder", "sync", "write_atomically"]
