"""Imports that a program keeps."""

import gc

from fedweight.core.lazy import kept_imports


def test_what_is_imported_is_not_looked_at_by_the_garbage_collector():
    frozen = gc.get_freeze_count()
    try:
        with kept_imports():
            assert not gc.isenabled()
            kept = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen + len(kept)
        new = [[]]
        assert any(one is new for one in gc.get_objects())
        assert not any(one is kept[0] for one in gc.get_objects())
    finally:
        gc.unfreeze()
