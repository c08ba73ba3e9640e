"""Settings from the environment."""

from pathlib import Path

import pytest

from ostinato.config import Settings, child_environment


def test_where_the_cache_is():
    own = Settings.from_environment({"OSTINATO_CACHE": "/own", "XDG_CACHE_HOME": "/shared"})
    assert own.cache_dir == Path("/own")
    assert own.models_dir == Path("/own/models")
    assert Settings.from_environment({"XDG_CACHE_HOME": "/shared"}).cache_dir == Path("/shared/ostinato")
    assert Settings.from_environment({}).cache_dir == Path.home() / ".cache" / "ostinato"


@pytest.mark.parametrize(
    ("word", "offline"), [("1", True), ("TRUE", True), ("yes", True), ("", False), ("0", False), (" off ", False)]
)
def test_offline(word, offline):
    assert Settings.from_environment({"OSTINATO_OFFLINE": word}).offline is offline
    assert Settings.from_environment({}).offline is False


def test_a_child_gets_the_environment_and_the_changes(monkeypatch):
    monkeypatch.setenv("OSTINATO_TEST_A", "a")
    monkeypatch.setenv("OSTINATO_TEST_B", "b")
    child = child_environment(OSTINATO_TEST_B="c")
    assert (child["OSTINATO_TEST_A"], child["OSTINATO_TEST_B"]) == ("a", "c")
