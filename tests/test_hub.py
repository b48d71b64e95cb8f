"""Pushes with the real client of the Hub to a server on the loopback: faults, repetition, privacy."""

from __future__ import annotations

import shutil

import pytest

from hub_server import Fault, Repo
from llmselect import hub
from llmselect.errors import LlmselectError, UsageError

pytest_plugins = ["hub_server"]


def front(text):
    from huggingface_hub import DatasetCard

    return DatasetCard(text).data.to_dict()


def test_a_second_push_changes_nothing_and_new_content_one_commit(hub_run, server):
    first = hub.push_run(hub_run.folder, "me/subset")[0].pushed
    repo, uploads = server.repos["dataset", "me/subset"], server.count("^PUT ")
    again = hub.push_run(hub_run.folder, "me/subset")[0].pushed
    assert first.changed and not again.changed and first.commit == again.commit
    assert len(repo.titles) == 1 and uploads == server.count("^PUT ") > 0
    hub.push_run(hub_run.folder, "me/subset", methods=["random"])
    names = [one["config_name"] for one in front(repo.tree()["README.md"].decode())["configs"]]
    assert len(repo.titles) == 2 and names == ["random-seed-0-25pct", "random-seed-1-25pct", "scores"]


@pytest.mark.parametrize("pattern", ["whoami", "repos/create", "/preupload/", "objects/batch", "^PUT /store/", "/commit/", "yaml",
                                     "^GET /api/datasets/me/subset"])  # fmt: skip
@pytest.mark.parametrize("status", [503, 429])
def test_a_hub_that_fails_twice_is_tried_again(hub_run, server, pattern, status):
    server.faults = [Fault(pattern, 2, status, body="<html>busy</html>")]
    assert hub.push_run(hub_run.folder, "me/subset", methods=["random"])[0].pushed.changed
    assert server.faults[0].times == 0 and len(server.waits) == 2 and len(server.repos["dataset", "me/subset"].titles) == 1


def test_a_lost_answer_makes_no_second_commit_or_pull_request(hub_run, server):
    for pull in (False, True):
        name = f"me/lost-{pull}"
        server.faults = [Fault("/commit/", 1, 502, after=True)]
        hub.push_run(hub_run.folder, name, methods=["random"], create_pr=pull)
        assert len(server.repos["dataset", name].titles) == 1 and len(server.repos["dataset", name].pulls) == pull


def test_a_push_that_fails_halfway_is_completed_by_the_next(hub_run, server):
    server.faults = [Fault("^PUT /store/", 10_000, 403, skip=2)]
    # files go up side by side, so which of them is refused first is left to chance
    with pytest.raises(LlmselectError, match=r"'(data/\S+|scores|source-mix)\.\w+'.*403.*same command to continue"):
        hub.push_run(hub_run.folder, "me/subset")
    kept, before = set(server.stored), len(server.seen)
    server.faults = [Fault("/commit/", 10_000, 500)]
    with pytest.raises(LlmselectError, match=r"the Hub answered 500"):
        hub.push_run(hub_run.folder, "me/subset")
    repo = server.repos["dataset", "me/subset"]
    uploads, server.faults = server.count("^PUT "), []
    assert len(kept) == 2 and not repo.tree()  # what was sent is kept, and nothing half-done is seen
    assert not [name for name in kept if any(name in one for one in server.seen[before:])]
    assert hub.push_run(hub_run.folder, "me/subset")[0].pushed.changed
    assert len(repo.titles) == 1 and "README.md" in repo.tree() and server.count("^PUT ") == uploads


@pytest.mark.parametrize("pull", [False, True])
def test_many_files_go_in_several_commits_and_the_card_comes_last(hub_run, server, monkeypatch, pull):
    monkeypatch.setattr("llmselect.hub.remote.COMMIT_FILES", 5)
    server.repos["dataset", "me/parts"] = repo = Repo(False)
    revision = "refs/pr/1" if pull else "main"
    server.faults = [Fault("/commit/", 1, 403, skip=2)]
    with pytest.raises(LlmselectError, match="403"):
        hub.push_run(hub_run.folder, "me/parts", features=True, create_pr=pull)
    assert len(repo.titles) == 2 and len(repo.tree(revision)) == 10 and "README.md" not in repo.tree(revision)
    report = hub.push_run(hub_run.folder, "me/parts", features=True, create_pr=pull)[0]
    assert len(repo.titles) == -(-len(report.files) // 5) and set(repo.tree(revision)) == set(report.files)
    assert report.pushed.changed and not hub.push_run(hub_run.folder, "me/parts", features=True, create_pr=pull)[0].pushed.changed
    assert len(repo.titles) == -(-len(report.files) // 5) and len(repo.pulls) == pull


def test_a_pull_request_is_opened_once(hub_run, server):
    server.repos["dataset", "other/subset"] = Repo(False)
    first, again = (hub.push_run(hub_run.folder, "other/subset", create_pr=True)[0].pushed for _ in range(2))
    repo = server.repos["dataset", "other/subset"]
    assert first.url == again.url == f"{server.url}/datasets/other/subset/discussions/1" and not again.changed
    assert len(repo.pulls) == 1 and len(repo.titles) == 1 and not repo.tree() and "README.md" in repo.tree("refs/pr/1")


def test_private_means_private(hub_run, server):
    hub.push_run(hub_run.folder, "me/closed", private=True)
    hub.push_run(hub_run.folder, "me/closed", private=True)
    hub.push_run(hub_run.folder, "me/open")
    assert server.repos["dataset", "me/closed"].private and not server.repos["dataset", "me/open"].private
    before = len(server.seen)
    with pytest.raises(LlmselectError, match="public, so --private cannot hold"):
        hub.push_run(hub_run.folder, "me/open", methods=["random"], private=True)
    assert not [one for one in server.seen[before:] if "preupload" in one or "commit" in one]


def test_wrong_use_costs_one_line(hub_run, server, monkeypatch, tmp_path):
    for match, options in {
        "random.*Did you mean|Did you mean 'random'": {"methods": ["randm"]},
        "is no Hub id": {"base_model": "a/b/c"},
    }.items():
        with pytest.raises(UsageError, match=match):
            hub.push_run(hub_run.folder, "me/subset", **options)
    with pytest.raises(UsageError, match="no run there"):
        hub.push_run(tmp_path, "me/subset")
    with pytest.raises(UsageError, match="'me/sub set' is no Hub id"):
        hub.push_run(hub_run.folder, "me/sub set")
    copy = shutil.copytree(hub_run.folder, tmp_path / "copy")
    shutil.rmtree(copy / "selections" / "trim+" / "seed-1")
    with pytest.raises(UsageError, match=r"trim\+, seed 1 is not selected yet; type: llmselect select"):
        hub.push_run(copy, "me/subset")
    assert server.seen == []
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UsageError, match="hf auth login") as told:
        hub.push_run(hub_run.folder, "me/subset")
    assert "hf_wrong" not in str(told.value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        hub.push_run(hub_run.folder, "me/subset")
    assert server.repos == {}
