"""What a serving process does to its interpreter."""

from __future__ import annotations

import gc
import sys
import threading

from cluster.base.interpreter import settle_for_serving


def test_what_is_loaded_is_frozen_and_threads_switch_sooner() -> None:
    before_s = sys.getswitchinterval()
    try:
        # In a thread of its own: what it asks of the kernel is asked for the calling thread.
        settling = threading.Thread(target=settle_for_serving)
        settling.start()
        settling.join()
        assert gc.get_freeze_count() > 0
        assert sys.getswitchinterval() < before_s
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        sys.setswitchinterval(before_s)
