"""Cards and what goes to the Hub: into a folder, and to a server on this machine that answers as the Hub does."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import DatasetCard

import potstill
from potstill import cli, config, pipeline
from potstill.errors import BadInput, Failed, Refused
from potstill.jobs import Job
from potstill.noise import Noise
from potstill.publish import model_card, publish
from potstill.state import read_json
from test_pipeline import RECIPE


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish") / "run"
    pipeline.execute(config.check(RECIPE | {"seeds": [0, 1]}), folder, quiet=True)
    return folder


def test_a_student_in_a_folder_is_loaded_and_says_what_it_is(finished, tmp_path):
    assert publish(finished, folder=tmp_path / "out", license="apache-2.0") == str(tmp_path / "out")
    student, own = potstill.load(tmp_path / "out"), potstill.load(finished / "student")
    assert torch.equal(student.sample(3, Noise((1,))), own.sample(3, Noise((1,))))
    card, metrics = ModelCard.load(tmp_path / "out" / "README.md"), read_json(finished / "metrics.json")
    card.validate = None
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "potstill"
    assert {"potstill", "data-free"} <= set(card.data.tags)
    results = {result.metric_type: result for result in card.data.eval_results}
    row = metrics["arms"]["student_data_free"]
    assert results["frechet"].metric_value == pytest.approx(row["frechet"]["mean"])
    assert results["reconstruction_mse"].metric_value == pytest.approx(row["reconstruction_mse"]["mean"])
    assert "features: pixels" in results["frechet"].metric_name
    assert results["reconstruction_mse"].metric_name == "Reconstruction MSE"
    assert "are no FID" in card.text
    assert "Seeds: 0, 1." in card.text
    assert "biases" in card.text
    assert "3 updates of generate, 3 updates of infer" in card.text


def test_what_its_figures_are_of(finished):
    recipe, metrics = config.read(finished / "recipe.yaml"), read_json(finished / "metrics.json")
    job = Job(recipe.arms[0], recipe.seeds[0])
    two, one = (model_card(finished, recipe, {"student": job}, metrics | {"seeds": seeds}, None) for seeds in ([0, 1], [0]))
    assert "mean and standard deviation over seeds 0, 1." in two.text
    assert two.data.eval_results[0].metric_config.endswith(" over 2 seeds")
    assert "of seed 0 alone." in one.text
    for result in one.data.eval_results:
        assert result.metric_config.endswith(" of 1 seed")
        assert "±" not in result.metric_config


def test_the_surrogate_is_a_data_set(finished, tmp_path):
    publish(finished, folder=tmp_path / "out", what="surrogate")
    front = DatasetCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert front["configs"] == [{"config_name": "surrogate", "data_files": "surrogate/*.parquet"}]
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out" / "surrogate" / "*.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert len(found["train"]) == RECIPE["surrogate"]["n"]


def test_no_path_of_this_machine_is_told(finished, tmp_path):
    recipe = RECIPE | {
        "teacher": {"kind": "pretrained", "path": str(finished / "student")},
        "evaluate": {"features": f"classifier:{finished}"},
        "data": {"kind": "npz", "path": "~/secret/place/data.npz", "test_path": "/mnt/own/test.npz"},
    }
    del recipe["train"]
    text = str(model_card(tmp_path, config.check(recipe), {}, None, None))
    for part in (str(finished.parent), "secret", "/mnt"):
        assert part not in text
    assert "`student`" in text
    assert '"classifier:run"' in text
    assert "data.npz" in text
    assert "License: not stated" in text


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as an upload of small files takes."""

    def _answer(self, found, code=200):
        body = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self._answer({"id": "me/mine", "sha": "0" * 40, "siblings": [], "private": True})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers.get("Authorization") != "Bearer hf_" + "x" * 30:
            self._answer({"error": "who are you"}, 401)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": "https://huggingface.co/me/mine", "name": "me/mine"})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": "https://huggingface.co/me/mine/commit/0", "hookOutput": ""})
        else:
            self._answer({})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.files = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield server
    server.shutdown()
    server.server_close()


def test_a_student_is_uploaded_as_it_is(finished, hub, tmp_path, capsys):
    assert cli.main(["push", str(finished), "me/mine", "--folder", str(tmp_path / "out"), "--license", "mit"]) == 0
    assert "me/mine" in capsys.readouterr().out
    (created,) = hub.created
    assert created["name"] == "mine"
    assert created.get("private") is True or created.get("visibility") == "private", created
    here = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert hub.files == here
    assert {"README.md", "config.json", "model.safetensors"} <= set(here)
    assert yaml.safe_load(here["README.md"].decode().split("---")[1])["license"] == "mit"


def test_what_the_hub_refuses_is_one_line_without_the_token(finished, hub, monkeypatch, capsys):
    token = "hf_" + "y" * 30
    monkeypatch.setenv("HF_TOKEN", token)
    assert cli.main(["push", str(finished), "me/mine"]) == 1
    said = capsys.readouterr().err
    assert "push: me/mine: the Hub did not take it" in said
    assert token not in said
    assert hub.files == {}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "push: say where"),
        ({"repo": "no such name!"}, "push: "),
        ({"repo": "a/b/c"}, "push: "),
    ],
)
def test_where_to_is_checked_first(finished, given, problem):
    with pytest.raises(BadInput, match=problem):
        publish(finished, **given)


def test_what_is_not_finished_or_there_already(finished, tmp_path):
    with pytest.raises(BadInput, match="no folder of a run"):
        publish(tmp_path, folder=tmp_path / "out")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_bytes((finished / "recipe.yaml").read_bytes())
    for what, problem in (("student", "no student in it"), ("surrogate", "no surrogate in it")):
        with pytest.raises(BadInput, match=problem):
            publish(tmp_path / "run", folder=tmp_path / "out", what=what)
    shutil.copytree(finished, tmp_path / "damaged")
    (tmp_path / "damaged" / "metrics.json").write_text('{"arms": {}}')
    with pytest.raises(BadInput, match=r"metrics.json: not what potstill wrote there"):
        publish(tmp_path / "damaged", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(Refused, match="is there already"):
        publish(finished, folder=tmp_path / "full")


def test_a_damaged_surrogate_is_not_published(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shard = next((tmp_path / "run" / "surrogate").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises((BadInput, Failed)):
        publish(tmp_path / "run", folder=tmp_path / "out", what="surrogate")
    assert not (tmp_path / "out").exists()
