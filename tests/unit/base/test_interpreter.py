"""What a serving process does to its interpreter."""

from __future__ import annotations

import gc
import sys

from cluster.base.interpreter import settle_for_serving


def test_what_is_loaded_is_frozen_and_threads_switch_sooner() -> None:
    before_s = sys.getswitchinterval()
    try:
        settle_for_serving()
        assert gc.get_freeze_count() > 0
        assert sys.getswitchinterval() < before_s
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        sys.setswitchinterval(before_s)
