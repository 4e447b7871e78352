"""A compile that was interrupted must not hang the next start."""

from blipds.engine.ops import clear_stale_lock


def test_a_lock_that_no_process_holds_is_removed(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    assert clear_stale_lock(lock)
    assert not lock.exists()


def test_a_lock_that_a_compile_holds_open_stays(tmp_path):
    lock = tmp_path / "lock"
    with lock.open("w"):
        assert not clear_stale_lock(lock)
        assert lock.exists()


def test_no_lock_is_nothing_to_do(tmp_path):
    assert not clear_stale_lock(tmp_path / "lock")
