"""What Ray Serve is told: `hosts.ray.settings`, and the options of the command. No cluster is started."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from repmlp_deploy import Bundle
from repmlp_deploy.cli.serve import serve_command
from repmlp_deploy.serving.hosts.ray import app
from repmlp_deploy.serving.hosts.ray.settings import DEPLOYMENT, Scale, Settings
from repmlp_deploy.serving.served_model import version_name
from support.commands import ends_with


def test_the_file_for_serve_deploy_is_one_that_ray_reads_and_builds(bundle: Bundle, tmp_path: Path) -> None:
    yaml, schema = pytest.importorskip("yaml"), pytest.importorskip("ray.serve.schema")
    out = tmp_path / "deploy.yaml"
    given = (
        "--host-engine",
        "ray",
        "--replicas",
        2,
        "--max-replicas",
        4,
        "--format",
        "onnx",
        "--write-ray-config",
        out,
    )
    assert ends_with(serve_command, f"digits={bundle.folder}", *given) == 0
    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(out.read_text()))
    (application,) = config.applications
    (deployment,) = application.deployments
    assert deployment.name == DEPLOYMENT
    assert deployment.autoscaling_config == {"min_replicas": 2, "max_replicas": 4, "target_ongoing_requests": 16}
    version = version_name(bundle.folder)
    assert application.args["bundles"] == {"digits": {"path": str(bundle.folder.resolve()), "version": version}}
    module, _, function = application.import_path.rpartition(":")
    assert (module, function) == (app.__module__, app.__name__)
    built = app(application.args)
    assert built._bound_deployment.name == DEPLOYMENT
    for name in config.grpc_options.grpc_servicer_functions:
        where, _, function = name.rpartition(".")
        assert callable(getattr(__import__(where, fromlist=[function]), function))


def test_settings_that_ray_cannot_mean_are_refused() -> None:
    bundles = {"digits": {"path": "x"}}
    for wrong in ({}, {"bundles": {}}, {"bundles": bundles, "colour": "red"}, {"bundles": bundles, "queue": 0}):
        with pytest.raises(ValidationError):
            Settings.model_validate(wrong)
    assert Scale(replicas=3, gpus=0.5).options == {
        "num_replicas": 3,
        "ray_actor_options": {"num_cpus": 1.0, "num_gpus": 0.5},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host-engine", "spark"), "expected local or ray"),
        (("--replicas", 2), "--replicas is for --host-engine ray"),
        (("--write-ray-config", "x.yaml"), "--write-ray-config is for --host-engine ray"),
        (("--host-engine", "ray", "--control"), "ray has no --control"),
        (("--host-engine", "ray", "--connections", 5), "ray has no --connections"),
        (("--host-engine", "ray", "--tls-key", "k", "--tls-certificate", "c"), "ray has no --tls-certificate"),
        (("--host-engine", "ray", "--replicas", 0), "--replicas is 0; expected 1 to 100"),
        (("--host-engine", "ray", "--replicas", 3, "--max-replicas", 2), "--max-replicas is 2; expected 3 to 100"),
        (("--host-engine", "ray", "--replica-requests", 4), "with --max-replicas"),
        (("--host-engine", "ray", "--replica-cpus", -1), "--replica-cpus is -1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    bundle: Bundle, arguments: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends_with(serve_command, bundle.folder, *arguments) == 2
    assert message in capsys.readouterr().err


def test_without_ray_the_remedy_is_named(bundle: Bundle) -> None:
    script = "import sys; sys.modules['ray'] = None; from repmlp_deploy.cli.shared.entry import run; run('serve')"
    given = [sys.executable, "-c", script, str(bundle.folder), "--host-engine", "ray"]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert 'pip install "repmlp-deploy[ray]"' in done.stderr.splitlines()[-1]


def test_a_look_sees_copies_and_survives_a_folder_that_is_gone(bundle: Bundle, tmp_path: Path) -> None:
    """What was refused is tried again when one of its files changed."""
    process = pytest.importorskip("repmlp_deploy.serving.hosts.ray.process")
    host = process._Host(lambda bundles: Settings(bundles=bundles), Scale(), process.Address())
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "watched" / "a"))
    sources = process.Sources({}, [tmp_path / "watched"])
    first = host._looked(sources)
    assert first is not None
    assert host._is_news(first)
    host._refused = first
    assert not host._is_news(first)
    (folder / "model.onnx").touch()
    second = host._looked(sources)
    assert second is not None
    assert second.bundles == first.bundles
    assert host._is_news(second)
    shutil.rmtree(tmp_path / "watched")
    assert host._looked(sources) is None
