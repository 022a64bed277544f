"""Which keys are accepted."""

import pytest

from aft_ray.config.run import ConfigError
from aft_ray.config.serve import AccessConfig
from aft_ray.serving.api import api_keys
from aft_ray.serving.api.api_keys import ApiKeys
from aft_ray.serving.api.errors import ApiError


def test_only_the_keys_of_the_file_are_accepted(tmp_path):
    (tmp_path / "keys").write_text("# of the team\nfirst\n\n second \n")
    keys = ApiKeys(AccessConfig(keys_file=str(tmp_path / "keys")))
    keys.check("Bearer first")
    keys.check("bearer second")
    for wrong in (None, "", "Bearer", "Bearer ", "Basic first", "Bearer # of the team", "Bearer firs", "Bearer Ω"):
        with pytest.raises(ApiError) as refused:
            keys.check(wrong)
        assert refused.value.status == 401
        assert refused.value.headers["WWW-Authenticate"] == "Bearer"


def test_a_changed_file_counts_and_a_missing_one_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(api_keys, "_RELOAD_INTERVAL_S", 0.0)
    file = tmp_path / "keys"
    file.write_text("old")
    keys = ApiKeys(AccessConfig(keys_file=str(file)))
    keys.check("Bearer old")
    file.write_text("newer")
    keys.check("Bearer newer")
    with pytest.raises(ApiError):
        keys.check("Bearer old")
    file.unlink()
    keys.check("Bearer newer")


def test_without_keys_it_serves_only_when_told_to_be_open(tmp_path, monkeypatch):
    monkeypatch.delenv("AFT_RAY_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"access\.keys_file.*AFT_RAY_API_KEYS.*access\.open=true"):
        ApiKeys(AccessConfig())
    ApiKeys(AccessConfig(open=True)).check(None)
    monkeypatch.setenv("AFT_RAY_API_KEYS", "one,two")
    with pytest.raises(ApiError):
        ApiKeys(AccessConfig(open=True)).check(None)  # keys are checked if there are any
    ApiKeys(AccessConfig()).check("Bearer two")
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys(AccessConfig(keys_file=str(tmp_path / "none")))
