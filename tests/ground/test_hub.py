"""A model that cannot be had is named at once, before anything tries to load it."""

import pytest

from lavender_min import hub
from lavender_min.hosts import load as hosts


@pytest.fixture
def asked(monkeypatch):
    """Whom the hub was asked about; it refuses, and nothing may be loaded."""
    names = []

    def refuse(self, name):
        names.append(name)
        raise RuntimeError("403 Client Error.\n\nCannot access gated repo for url.")

    monkeypatch.setattr(hub.HfApi, "auth_check", refuse)
    monkeypatch.setattr(hosts.AutoConfig, "from_pretrained", lambda name: pytest.fail(f"tried to load {name}"))
    return names


def test_a_gated_model_ends_in_one_line(asked):
    said = r"--vlm some/model could not be loaded \(huggingface.co says: 403 Client Error. Cannot access gated repo for url\). Give"
    with pytest.raises(OSError, match=said):
        hosts.load("some/model")
    assert asked == ["some/model"]


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a model"])
def test_what_can_only_be_a_folder_is_not_asked_for(monkeypatch, name):
    with pytest.raises(OSError, match=r"could not be loaded \(there is no such folder\)"):
        hosts.load(name)


def test_folders_and_cached_models_are_not_asked_for(asked, tmp_path, monkeypatch):
    hub.ask(str(tmp_path), "config.json")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    hub.ask("some/model", "config.json")
    assert not asked
