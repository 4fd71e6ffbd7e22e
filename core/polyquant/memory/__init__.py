"""Bytes: planned from shapes, stored by a walk over storages, peaks of the process and its devices."""
